"""trl's SFTTrainer trains the model with the data and the collator of this package."""

import copy

import pytest
import torch
from conftest import FIXTURES
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_llava_sp.training import LlavaSPDataCollator, load_conversations
from transformers_llava_sp.training.parts import prepare_lora


datasets = pytest.importorskip("datasets", reason="the extra `train` is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed: pip install '.[dev]'")

PREFIX = "base_model.model.model."


# Transformers 5.23 calls the argument otherwise; trl sets it under the name that all have
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_sft_trainer_trains_lora_and_the_projector(workspace, tmp_path):
    processor = AutoProcessor.from_pretrained(workspace / "model")
    collator = LlavaSPDataCollator(processor)
    # trl takes data sets of `datasets` alone. The images stay paths.
    records = list(load_conversations(workspace / "data.json", FIXTURES / "mini-cropping" / "golden"))
    dataset = datasets.Dataset.from_list(records)
    original = AutoModelForImageTextToText.from_pretrained(workspace / "model")
    model = prepare_lora(copy.deepcopy(original), r=4, lora_alpha=8, lora_dropout=0.0)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=tmp_path,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            train_sampling_strategy="sequential",
            num_train_epochs=2,
            gradient_checkpointing=False,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to="none",
        ),
        data_collator=collator,
        train_dataset=dataset,
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()

    # Of all records, as the first step has them
    with torch.no_grad():
        expected = float(original(**collator(records)).loss)
    first, second = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(expected, rel=1e-4)
    assert second < first

    saved = load_file(tmp_path / "adapter_model.safetensors")
    before = {
        f"{PREFIX}multi_modal_projector.{name}": tensor
        for name, tensor in original.model.multi_modal_projector.state_dict().items()
    }
    assert before.keys() == {name for name in saved if ".lora_" not in name}
    for name, tensor in before.items():
        # Softmax ignores what these add to all keys alike: they have no gradient but rounding errors
        if not name.endswith(("key_proj.bias", "key_norm.bias")):
            assert not torch.equal(saved[name], tensor), name
    lora = [name for name in saved if ".lora_B." in name]
    assert lora and all(saved[name].any() for name in lora)
    loaded = PeftModel.from_pretrained(original, tmp_path).base_model.model.model.multi_modal_projector
    for name, tensor in loaded.modules_to_save["default"].state_dict().items():
        assert torch.equal(tensor, saved[f"{PREFIX}multi_modal_projector.{name}"]), name
