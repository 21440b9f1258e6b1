"""
Training: the authors' own steps come out, what is trained and saved is what each method says, and how a step is cut
into batches, or a run into two, changes nothing.
"""

import copy
import importlib.util
import inspect
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, RECORDS
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_creation import internvl_folder  # noqa: F401
from test_readme import save_siglip
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainingArguments,
)
from typer.main import get_command
from typer.testing import CliRunner

import transformers_llava_sp
from transformers_llava_sp import LlavaSPForConditionalGeneration
from transformers_llava_sp.cli import app
from transformers_llava_sp.conversion import convert_checkpoint, create_model, merge_adapter
from transformers_llava_sp.conversion.original import PROJECTOR_KEYS
from transformers_llava_sp.training import LlavaSPDataCollator, load_conversations
from transformers_llava_sp.training.parts import prepare_full, prepare_lora, prepare_projector
from transformers_llava_sp.training.train import (
    RECIPES,
    DataArguments,
    ModelArguments,
    RecipeParser,
    read_recipe,
    train,
)
from transformers_llava_sp.training.trainer import LlavaSPTrainer, LlavaSPTrainingArguments, count_labels


MINI = FIXTURES / "mini-cropping"

# In float32, without dropout, warm-up or reordering: what is compared must not depend on chance
PLAIN = {
    "bf16": False,
    "lora_dropout": 0.0,
    "lora_r": 4,
    "lora_alpha": 8,
    "warmup_steps": 0,
    "train_sampling_strategy": "sequential",
    "gradient_checkpointing": False,
    "dataloader_num_workers": 0,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
}


def options(workspace, output, **overrides) -> list[str]:
    values = {
        "model_name_or_path": workspace / "model",
        "train_data": workspace / "data.json",
        "image_folder": MINI / "golden",
        "output_dir": output,
        **PLAIN,
        **overrides,
    }
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def history(trainer, *keys) -> list[list[float]]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [[entry[key] for key in keys] for entry in logs]


# The authors' steps


@pytest.fixture(scope="module", params=["mini-cropping", "mini-pooling"])
def authors_steps(request, tmp_path_factory):
    """The authors' record of four steps, and the model that they start from: the base with the release's adapter."""
    folder = FIXTURES / request.param
    steps = json.loads((folder / "golden" / "training_steps.json").read_text())
    output = tmp_path_factory.mktemp("steps")
    convert_checkpoint(
        folder / "release",
        output / "merged",
        base_model=folder / "base",
        vision_tower=folder / "vision",
        dtype="float32",
    )
    merged = AutoModelForImageTextToText.from_pretrained(output / "merged")
    projector = merged.config.projector_config
    model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(
        folder / "vision",
        folder / "base",
        spatial_variant=projector.spatial_variant,
        spatial_hidden_size=projector.spatial_hidden_size,
        spatial_projection_bias=projector.spatial_projection_bias,
        dtype=torch.float32,
    )
    model.model.multi_modal_projector.load_state_dict(merged.model.multi_modal_projector.state_dict())
    adapter = json.loads((folder / "release" / "adapter_config.json").read_text())
    model = prepare_lora(model, r=adapter["r"], lora_alpha=adapter["lora_alpha"], lora_dropout=steps["lora_dropout"])
    state = {
        key.replace(".model.model.layers.", ".model.model.language_model.layers.").replace(
            ".weight", ".default.weight"
        ): tensor
        for key, tensor in load_file(folder / "release" / "adapter_model.safetensors").items()
    }
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    records = [{"id": str(index), **record} for index, record in enumerate(steps["records"])]
    (output / "records.json").write_text(json.dumps(records))
    processor = AutoProcessor.from_pretrained(output / "merged")
    dataset = load_conversations(output / "records.json", folder / "golden")
    return steps, model, processor, dataset


def our_name(key: str) -> str:
    """What our model calls a tensor that the authors' record names."""
    key = key.removeprefix("base_model.model.")
    if ".layers." in key:
        return key.replace("model.layers.", "model.language_model.layers.")
    name = key.removeprefix("model.")
    pattern = "conv_{number}.weight" if name.split(".")[0].removeprefix("conv_").isdigit() else name
    size = name.split(".")[0].removeprefix("conv_")
    ours = PROJECTOR_KEYS.get(pattern) or PROJECTOR_KEYS[f"mm_projector.{{position}}.{name.rsplit('.', 1)[-1]}"]
    position = name.split(".")[1]
    layer = int(position) // 2 if name.startswith("mm_projector") else 0
    scale = int(size) // 4 - 1 if size.isdigit() else 0
    return "model.multi_modal_projector.modules_to_save.default." + ours.format(scale=scale, layer=layer)


class RecordingTrainer(LlavaSPTrainer):
    """Keeps what the authors record: losses as they are, and the first step's gradients before they are clipped."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), float(loss)]
        if len(self.losses) == 1:
            self.gradients = {
                name: float(parameter.grad.norm())
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }
        return loss


def train_as_the_authors(authors_steps, output_dir, dtype=torch.float32) -> RecordingTrainer:
    """The steps that the authors' code has recorded, made by ours."""
    steps, model, processor, dataset = authors_steps
    trainer = RecordingTrainer(
        model=copy.deepcopy(model).to(dtype),
        args=LlavaSPTrainingArguments(
            output_dir=output_dir,
            learning_rate=steps["lr"]["lora"],
            projector_learning_rate=steps["lr"]["projector"],
            lr_scheduler_type="constant",
            num_train_epochs=2,
            per_device_train_batch_size=2,
            train_sampling_strategy="sequential",
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
        ),
        data_collator=LlavaSPDataCollator(processor, return_ids=True),
        train_dataset=dataset,
    )
    trainer.train()
    assert [step["batch"] for step in steps["steps"]] == [0, 1, 0, 1]
    return trainer


def compare_gradients(trainer: RecordingTrainer, authors_steps, tolerance: float) -> None:
    """Compare the norm of each tensor's gradient in the first step with the authors'."""
    recorded = authors_steps[0]["steps"][0]["grad_norm_by_tensor"]
    by_tensor = {our_name(key): norm for key, norm in recorded.items()}
    found = {name.removeprefix("base_model.model."): norm for name, norm in trainer.gradients.items()}
    assert by_tensor.keys() == found.keys()
    for name, norm in by_tensor.items():
        # The softmax ignores what these add to all keys alike: the authors' are rounding errors
        if not name.endswith(("key_proj.bias", "key_norm.bias")):
            assert found[name] == pytest.approx(norm, rel=tolerance), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_steps_are_the_authors(authors_steps, tmp_path, dtype):
    trainer = train_as_the_authors(authors_steps, tmp_path, dtype)
    # In float32, which the authors ran in, Adam turns the rounding of a gradient near zero into a step of full length,
    # here as there, but not the same. The norms after two such steps are compared where there is no such rounding.
    compared = 4 if dtype == torch.float64 else 2
    norms = history(trainer, "grad_norm")
    for number, step in enumerate(authors_steps[0]["steps"]):
        assert trainer.losses[number] == pytest.approx(step["loss"], rel=1e-5)
        if number < compared:
            assert norms[number] == pytest.approx([step["grad_norm"]], rel=1e-4)
    compare_gradients(trainer, authors_steps, 1e-4)


# What is trained


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", ["projector", "lora", "full"])
def test_what_is_trained(workspace, method):
    model = AutoModelForImageTextToText.from_pretrained(workspace / "model", dtype=torch.bfloat16)
    names = {name for name, _ in model.named_parameters()}
    projector = {name for name in names if name.startswith("model.multi_modal_projector.")}
    assert projector
    prepared = {"projector": prepare_projector, "lora": prepare_lora, "full": prepare_full}[method](model)
    if method == "projector":
        expected = projector
    elif method == "full":
        expected = {name for name in names if not name.startswith("model.vision_tower.")}
    else:
        layers = [
            f"model.language_model.layers.{layer}.{part}_proj"
            for layer in range(2)
            for part in (*(f"self_attn.{name}" for name in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
        ]
        prefix = "base_model.model."
        expected = {f"{prefix}{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}
        own = "model.multi_modal_projector."
        expected |= {f"{prefix}{own}modules_to_save.default.{name.removeprefix(own)}" for name in projector}
    assert trained(prepared) == expected
    dtypes = {parameter.dtype for parameter in prepared.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32}
    frozen = {parameter.dtype for parameter in prepared.parameters() if not parameter.requires_grad}
    assert frozen == {torch.bfloat16}


def test_vision_tower_is_trained_as_far_as_it_is_used(workspace):
    """Several processes wait for a gradient of whatever is trained."""
    model = prepare_full(
        AutoModelForImageTextToText.from_pretrained(workspace / "model", dtype=torch.bfloat16), train_vision_tower=True
    )
    tower = model.config.vision_config.num_hidden_layers
    unused = ("model.vision_tower.post_layernorm.", f"model.vision_tower.encoder.layers.{tower - 1}.")
    assert model.config.vision_feature_layer == -2
    expected = {name for name, _ in model.named_parameters() if not name.startswith(unused)}
    assert trained(model) == expected
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    logits = logits_with_graph(model, AutoProcessor.from_pretrained(workspace / "model"))
    logits.sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected


def test_the_projector_is_not_copied(workspace):
    model = AutoModelForImageTextToText.from_pretrained(workspace / "model")
    num_parameters = model.num_parameters()
    prepared = prepare_lora(model, r=4)
    lora = sum(parameter.numel() for name, parameter in prepared.named_parameters() if ".lora_" in name)
    assert sum(parameter.numel() for parameter in prepared.parameters()) == num_parameters + lora


def test_loss_is_on_the_tokenizers_vocabulary(workspace):
    model = AutoModelForImageTextToText.from_pretrained(workspace / "model")
    assert model.config.text_config.vocab_size == 1024
    assert count_labels(model) == 1000


# Through the command


def run(*arguments):
    return CliRunner().invoke(app, ["train", *arguments])


def logits_of(model, processor) -> torch.Tensor:
    with torch.no_grad():
        return logits_with_graph(model.eval(), processor)


def logits_with_graph(model, processor) -> torch.Tensor:
    content = [{"type": "image", "path": str(MINI / "golden" / "square.png")}, {"type": "text", "text": "Who?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    return model(**inputs).logits


def test_adapter_holds_lora_and_projector(workspace, tmp_path):
    output = tmp_path / "adapter"
    result = run("lora", *options(workspace, output, learning_rate=1e-2, projector_learning_rate=1e-2))
    assert result.exit_code == 0, result.output
    saved = load_file(output / "adapter_model.safetensors")
    key = "base_model.model.model.multi_modal_projector.spatial_projection.weight"
    original = AutoModelForImageTextToText.from_pretrained(workspace / "model")
    names = [name for name, _ in original.model.multi_modal_projector.named_parameters()]
    assert {f"base_model.model.model.multi_modal_projector.{name}" for name in names} < saved.keys()
    assert not torch.equal(saved[key], original.model.multi_modal_projector.spatial_projection.weight)

    merge_adapter(output, tmp_path / "merged")
    models = {
        "peft": PeftModel.from_pretrained(original, output).base_model.model,
        "transformers": AutoModelForImageTextToText.from_pretrained(output),
        "merged": AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"),
    }
    processor = AutoProcessor.from_pretrained(output)
    logits = {name: logits_of(model, processor) for name, model in models.items()}
    for name, model in models.items():
        [weight] = [
            weight
            for parameter, weight in model.named_parameters()
            if parameter.endswith("spatial_projection.weight") and "original_module" not in parameter
        ]
        assert torch.equal(weight, saved[key]), name
        torch.testing.assert_close(logits[name], logits["peft"], rtol=0, atol=1e-4)
    untrained = logits_of(AutoModelForImageTextToText.from_pretrained(workspace / "model"), processor)
    assert (logits["peft"] - untrained).abs().max() > 1e-2


def test_separator_of_tiles_is_trained_and_saved_beside_lora(workspace, tmp_path):
    create_model(
        tmp_path / "model",
        vision_tower=workspace / "tower",
        base_model=MINI / "base",
        image_tiles=True,
        dtype="float32",
    )
    output = tmp_path / "adapter"
    overrides = {"model_name_or_path": tmp_path / "model", "learning_rate": 1e-2, "projector_learning_rate": 0.0}
    result = run("lora", *options(workspace, output, max_length=4096, **overrides))
    assert result.exit_code == 0, result.output
    original = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    saved = load_file(output / "adapter_model.safetensors")["base_model.model.model.image_newline.weight"]
    # At LoRA's rate, as the authors train it
    assert (saved - original.model.image_newline.weight).abs().max() > 1e-2
    merge_adapter(output, tmp_path / "merged")
    for model in (
        AutoModelForImageTextToText.from_pretrained(output),
        AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"),
        PeftModel.from_pretrained(original, output).base_model.model,
    ):
        [weight] = [
            weight
            for name, weight in model.named_parameters()
            if "image_newline" in name and "original_module" not in name
        ]
        assert torch.equal(weight, saved)


def test_stage_one_gives_the_projector_that_stage_two_takes(workspace, tmp_path):
    captions = [record for record in json.loads((workspace / "data.json").read_text()) if "image" in record]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    output = tmp_path / "stage-1"
    overrides = {"train_data": tmp_path / "captions.json", "save_strategy": "steps", "save_steps": 2}
    result = run("pretrain", *options(workspace, output, **overrides))
    assert result.exit_code == 0, result.output
    for folder in (output, output / "checkpoint-2"):
        state = load_file(folder / "model.safetensors")
        assert not any(name.startswith("model.") for name in state)
    projector = AutoModel.from_pretrained(output)
    before = AutoModelForImageTextToText.from_pretrained(workspace / "model").model.multi_modal_projector
    assert not torch.equal(projector.patch_mlp.layers[0].weight, before.patch_mlp.layers[0].weight)

    # A rate of zero shows what training starts from
    trainer = train(
        "lora", options(workspace, tmp_path / "stage-2", projector=output, learning_rate=0, projector_learning_rate=0)
    )
    found = trainer.unwrapped_model.model.multi_modal_projector.modules_to_save["default"]
    for name, tensor in projector.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize("method", ["lora", "pretrain"])
def test_stopped_and_resumed_equals_uninterrupted(workspace, tmp_path, method):
    overrides = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "save_total_limit": 9}
    overrides["lora_dropout"] = 0.1
    overrides["train_sampling_strategy"] = "group_by_length"
    if method == "pretrain":
        captions = [record for record in json.loads((workspace / "data.json").read_text()) if "image" in record]
        (tmp_path / "captions.json").write_text(json.dumps(captions))
        overrides["train_data"] = tmp_path / "captions.json"
    whole = train(method, options(workspace, tmp_path / "whole", **overrides))
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed = train(method, options(workspace, tmp_path / "resumed", resume_from_checkpoint=True, **overrides))
    assert history(whole, "loss", "grad_norm") == history(resumed, "loss", "grad_norm")
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    expected, found = load_file(tmp_path / "whole" / name), load_file(tmp_path / "resumed" / name)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_batches_have_every_record_once(workspace, tmp_path, strategy):
    records = json.loads((workspace / "data.json").read_text())
    records = [{**record, "id": f"{copy} {record['id']}"} for copy in range(8) for record in records]
    texts = {record["id"] for record in records if "image" not in record}
    (tmp_path / "data.json").write_text(json.dumps(records))
    seen: list[list[str]] = []

    class Trainer(LlavaSPTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append(inputs["ids"])
            return torch.tensor(0.0)

    overrides = {"train_data": tmp_path / "data.json", "train_sampling_strategy": strategy, "num_train_epochs": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers_llava_sp.training.train.LlavaSPTrainer", Trainer)
        train("lora", options(workspace, tmp_path / "out", **overrides))
    assert sorted(record for batch in seen for record in batch) == sorted(record["id"] for record in records)
    num_mixed = sum(len(texts.intersection(batch)) == 1 for batch in seen)
    # Transformers sorts 16 records at a time here: at most one of those eight batches has both kinds, or two, as the
    # longest record of all is moved to the front
    assert (num_mixed <= 5) == (strategy == "group_by_length")


@pytest.mark.parametrize("strategy", ["group_by_length", "sequential"])
def test_evaluation_loss_is_that_of_all_records(workspace, tmp_path, strategy):
    overrides = {"eval_data": workspace / "data.json", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    overrides |= {"learning_rate": 0, "projector_learning_rate": 0, "train_sampling_strategy": strategy}
    trainer = train("lora", options(workspace, tmp_path, per_device_eval_batch_size=8, **overrides))
    [found] = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    batch = trainer.data_collator([trainer.eval_dataset[index] for index in range(len(RECORDS))])
    labels = batch.pop("labels")[:, 1:]
    batch.pop("ids")
    with torch.no_grad():
        scores = trainer.model.eval()(**batch).logits[:, :-1, :1000].double()
    expected = torch.nn.functional.cross_entropy(scores[labels != -100], labels[labels != -100])
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_that_is_no_number_stops_with_the_records(workspace, tmp_path):
    model = shutil.copytree(workspace / "model", tmp_path / "model")
    state = load_file(model / "model.safetensors")
    state["lm_head.weight"][7, 0] = float("nan")
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    result = run("lora", *options(workspace, tmp_path / "out", model_name_or_path=model))
    assert result.exit_code == 1
    assert "llava-sp: error: The loss of step 1 is nan, on the records 'record 0', 'record 1'" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "There is no recipe 'nothing': pass a YAML file or one of full, lora, pretrain, qlora"),
        (["lora"], "the following arguments are required"),
        (["lora", "--modle_name_or_path", "x"], "arguments are required"),
        (["lora", "--method", "magic", "--model_name_or_path", "x", "--train_data", "y"], "Unknown method 'magic'"),
        (["full", "--load_in_4bit", "true", "--model_name_or_path", "x", "--train_data", "y"], "load_in_4bit needs"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


REQUIRED = ["--model_name_or_path", "x", "--train_data", "y", "--output_dir", "out", "--bf16", "False"]


def test_every_key_may_have_dashes():
    defaults = [argument.replace("_", "-") if argument.startswith("--") else argument for argument in REQUIRED]
    classes = (ModelArguments, DataArguments, LlavaSPTrainingArguments)
    names = {field.name for group in classes for field in fields(group) if field.init and "_" in field.name}
    parser = RecipeParser(classes, allow_abbrev=False)
    assert {f"--{name.replace('_', '-')}" for name in names} <= set(parser._option_string_actions)
    dashed = [*defaults, "--skip-bad-records", "--lora-r", "4", "--projector-learning-rate=0.5", "--max-length", "7"]
    model, data, training = read_recipe("lora", [*dashed, "--gradient-checkpointing", "false"])
    assert (data.skip_bad_records, data.max_length) == (True, 7)
    assert (model.lora_r, training.projector_learning_rate) == (4, 0.5)
    assert gradient_checkpointing(training) is False
    assert gradient_checkpointing(read_recipe("lora", defaults)[2]) is True


def gradient_checkpointing(training: LlavaSPTrainingArguments) -> bool:
    """Under the name that the installed Transformers has for it."""
    name = "activation_checkpointing"
    return getattr(training, name if hasattr(training, name) else "gradient_checkpointing")


@pytest.mark.parametrize("key", ["skip_bad_records", "skip-bad-records"])
@pytest.mark.parametrize("value", ["true", "yes", "1"])
def test_keys_of_a_recipe_may_have_dashes(tmp_path, key, value):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"{key}: {value}\ngradient-checkpointing: true\ngradient-checkpointing-kwargs: {{}}\n")
    _, data, training = read_recipe(recipe, REQUIRED)
    assert data.skip_bad_records
    assert gradient_checkpointing(training)
    # What is on the command line goes before it, spelled either way
    for other in ("--skip_bad_records=false", "--skip-bad-records=false"):
        assert not read_recipe(recipe, [*REQUIRED, other])[1].skip_bad_records


def test_bad_records_are_skipped_by_a_flag_alone(workspace, tmp_path):
    records = json.loads((workspace / "data.json").read_text())
    records[3]["image"] = "missing.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    arguments = ["lora", *options(workspace, tmp_path / "out", train_data=tmp_path / "data.json", max_steps=1)]
    result = run(*arguments)
    assert result.exit_code == 1
    assert "record 3 (id 'record 3'): the image" in result.output
    result = run(*arguments, "--skip-bad-records")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--max-length", "long"], "argument --max_length/--max-length: invalid int value: 'long'"),
        (["--skip-bad-records", "maybe"], "--skip-bad-records: Truthy value expected: got maybe"),
        (["--learning-rate", "x"], "argument --learning_rate/--learning-rate: invalid float value: 'x'"),
        (["--optim", "magic"], "argument --optim: invalid choice: 'magic'"),
        (["--train-data"], "argument --train_data/--train-data: expected one argument"),
        (["--stage", "third"], "Unknown stage 'third'"),
        (["--gradient-checkpointing-kwargs", "{a"], "Expecting property name"),
        (["--skip-bad-recrods"], "--skip_bad_recrods"),
        (["--max_length", "99999"], "`max_length` is 99999, but the model takes at most 4096 tokens"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_wrong_values_are_one_line(workspace, tmp_path, overrides, message):
    result = run("lora", *options(workspace, tmp_path), *overrides)
    assert result.exit_code == 1
    [line] = [line for line in result.stderr.splitlines() if line.startswith("llava-sp: error: ")]
    assert message in line
    assert result.stderr.endswith(f"{line}\n")


def test_trainer_is_found_beside_the_data(monkeypatch):
    from transformers_llava_sp import training

    assert all(hasattr(training, name) for name in training.__all__)
    assert training.LlavaSPTrainer is LlavaSPTrainer
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        training.nothing  # noqa: B018


def test_missing_extra_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "transformers_llava_sp.training.train.find_spec", lambda name: None if name == "peft" else found(name)
    )
    result = run("lora")
    assert result.exit_code == 1
    assert "Training needs peft: pip install 'transformers-llava-sp[train]'" in result.output


def test_unknown_keys_of_a_recipe_are_named(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model_name_or_path: x\ntrain_data: y\nlearning_rat: 1\n")
    # In front of bf16, which not every machine has
    with pytest.raises(ValueError, match=r"--learning_rat 1\. Did you mean --learning_rate\?"):
        read_recipe(recipe)
    recipe.write_text("- a\n")
    with pytest.raises(ValueError, match="holds a YAML list"):
        read_recipe(recipe)


def test_trainer_needs_its_own_arguments(workspace, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(workspace / "model")
    with pytest.raises(TypeError, match="args are TrainingArguments, expected LlavaSPTrainingArguments"):
        LlavaSPTrainer(prepare_lora(model, r=4), TrainingArguments(tmp_path))


def test_adapter_that_transformers_loaded_is_not_trained(workspace, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(workspace / "model")
    prepare_lora(model, r=4).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="is_trainable=True"):
        LlavaSPTrainer(AutoModelForImageTextToText.from_pretrained(tmp_path), LlavaSPTrainingArguments(tmp_path))
    with pytest.raises(ValueError, match="The model has an adapter already"):
        prepare_lora(AutoModelForImageTextToText.from_pretrained(tmp_path))
    model = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(workspace / "model"), tmp_path, is_trainable=True
    )
    assert LlavaSPTrainer(model, LlavaSPTrainingArguments(tmp_path)).method == "lora"


def test_adapter_cannot_be_switched_off_while_it_is_trained(workspace):
    model = prepare_lora(AutoModelForImageTextToText.from_pretrained(workspace / "model"), r=4)
    processor = AutoProcessor.from_pretrained(workspace / "model")
    with model.disable_adapter(), pytest.raises(RuntimeError, match=r"load it by PeftModel\.from_pretrained"):
        logits_of(model, processor)
    assert logits_of(model.merge_and_unload(), processor).isfinite().all()


@pytest.fixture(scope="module")
def wrong_sources(workspace, tmp_path_factory):
    """An adapter, a projector, and what lacks a weight of its own or is for another model."""
    folder = tmp_path_factory.mktemp("wrong")
    model = AutoModelForImageTextToText.from_pretrained(workspace / "model")
    model.model.multi_modal_projector.save_pretrained(folder / "projector")
    shutil.copytree(workspace / "model", folder / "incomplete-model")
    for name in ("pooling-projector", "incomplete-projector"):
        shutil.copytree(folder / "projector", folder / name)
    for name in ("incomplete-model", "incomplete-projector"):
        file = folder / name / "model.safetensors"
        tensors = load_file(file)
        del tensors[next(key for key in tensors if key.endswith("query_proj.weight"))]
        save_file(tensors, file, metadata={"format": "pt"})
    file = folder / "pooling-projector" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "spatial_variant": "pooling"}))
    prepare_lora(model, r=4).save_pretrained(folder / "adapter")
    return {path.name: path for path in folder.iterdir()} | {
        "language-model": MINI / "base",
        "model": workspace / "model",
    }


@pytest.mark.parametrize(
    ("key", "source", "message"),
    [
        ("model_name_or_path", "adapter", "is an adapter, not a LLaVA-SP model: merge it into its model"),
        ("model_name_or_path", "language-model", "is not a LLaVA-SP model: its config.json has model_type 'llama'"),
        ("model_name_or_path", "incomplete-model", "detail_feature_integrator.query_proj.weight'. Make or download"),
        ("projector", "model", "is not a projector by itself"),
        ("projector", "adapter", "is not a projector by itself"),
        ("projector", "pooling-projector", "they differ in 'spatial_variant'"),
        ("projector", "incomplete-projector", "implies: 'detail_feature_integrator.query_proj.weight'"),
    ],
    ids=lambda value: value if " " not in value else "",
)
def test_nothing_is_trained_from_random_weights(workspace, wrong_sources, tmp_path, key, source, message):
    result = run("lora", *options(workspace, tmp_path, max_steps=1, **{key: wrong_sources[source]}))
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("recipe", "source"), [("lora", "projector"), ("pretrain", "adapter"), ("full", "projector"), ("lora", "model")]
)
def test_results_of_two_kinds_are_not_mixed(workspace, wrong_sources, recipe, source):
    output = wrong_sources[source]
    before = sorted(output.iterdir())
    result = run(recipe, *options(workspace, output, max_steps=1))
    assert result.exit_code == 1
    assert "holds something else than method" in " ".join(result.output.split())
    assert sorted(output.iterdir()) == before


def test_output_that_is_a_file_is_refused(workspace, tmp_path):
    (tmp_path / "file").touch()
    result = run("lora", *options(workspace, tmp_path / "file"))
    assert f"output_dir '{tmp_path / 'file'}' cannot be made: File exists." in " ".join(result.output.split())


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes_are_the_authors(name):
    model, data, training = read_recipe(
        name, ["--model_name_or_path", "x", "--train_data", "y", "--output_dir", "out", "--bf16", "False"]
    )
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert data.max_length == 2048
    assert (training.weight_decay, training.num_train_epochs, training.warmup_steps) == (0.0, 1, 0.03)
    assert training.lr_scheduler_type == "cosine"
    if name == "pretrain":
        assert (model.method, data.stage, batch, training.learning_rate) == ("projector", "pretrain", 256, 1e-3)
        return
    assert (data.stage, batch) == ("finetune", 128)
    if name == "full":
        assert (model.method, training.learning_rate) == ("full", 2e-5)
        return
    assert (model.method, training.learning_rate, training.projector_learning_rate) == ("lora", 2e-4, 2e-5)
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (128, 256, 0.05)
    assert model.load_in_4bit == (name == "qlora")


TRAINING_PAGE = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")


def backbone_commands() -> dict[str, list[list[str]]]:
    """For each of the paper's backbones, the three commands that the page has for it."""
    section = TRAINING_PAGE.split("### For the paper's backbones")[1]
    groups = section.split("```")[1].removeprefix("text\n").strip().split("\n\n")
    commands = [[shlex.split(line)[1:] for line in group.splitlines()] for group in groups]
    return {create[1]: [create, *rest] for create, *rest in commands}


BACKBONES = ("clip", "siglip", "internvl", "tiles")


def test_page_has_all_backbones():
    assert tuple(backbone_commands()) == BACKBONES


@pytest.mark.parametrize("name", BACKBONES)
def test_commands_for_a_backbone_fit_together(name):
    create, pretrain, finetune = backbone_commands()[name]
    context = get_command(app).commands["create"].make_context("create", create[1:])
    assert str(context.params["output"]) == name
    assert context.params["image_tiles"] == (name == "tiles")
    (first, captions, stage_1), (second, _, stage_2) = (
        read_recipe(command[1], [*command[2:], "--bf16", "False"]) for command in (pretrain, finetune)
    )
    assert (first.method, captions.stage, second.method) == ("projector", "pretrain", "lora")
    assert first.model_name_or_path == second.model_name_or_path == name
    assert second.projector == stage_1.output_dir != stage_2.output_dir
    assert captions.max_length == (4096 if name == "tiles" else 2048)


@pytest.mark.parametrize("name", ["siglip", "internvl"])
def test_another_backbone_is_trained_in_two_stages(internvl_folder, workspace, tmp_path, monkeypatch, name):  # noqa: F811
    """Of tiny parts of its kind, with the page's own options."""
    create, pretrain, finetune = backbone_commands()[name]
    parts = {"--from-llava": internvl_folder, "--vision-tower": tmp_path / "tower", "--base-model": MINI / "base"}
    save_siglip(tmp_path / "tower")
    arguments = [*create, "--dtype", "float32"]
    arguments[1] = str(tmp_path / name)
    for option in parts.keys() & set(create):
        arguments[create.index(option) + 1] = str(parts[option])
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    captions = [record for record in json.loads((workspace / "data.json").read_text()) if "image" in record]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    shutil.copy(workspace / "data.json", tmp_path / "conversations.json")
    (tmp_path / "images").symlink_to(MINI / "golden")
    monkeypatch.chdir(tmp_path)
    plain = [part for key, value in {**PLAIN, "max_steps": 1}.items() for part in (f"--{key}", str(value))]
    for command in (pretrain, finetune):
        result = run(*command[1:], *plain)
        assert result.exit_code == 0, result.output
    trained_model = AutoModelForImageTextToText.from_pretrained(tmp_path / f"{name}-adapter")
    projector = AutoModel.from_pretrained(tmp_path / f"{name}-projector")
    found = trained_model.model.multi_modal_projector.modules_to_save["default"].state_dict()
    assert found.keys() == projector.state_dict().keys()


@pytest.mark.slow
def test_processes_with_and_without_images_finish(workspace, tmp_path):
    """Two processes, each with every second record of a batch: in one step, one of them has texts alone."""
    records = json.loads((workspace / "data.json").read_text())
    order = [0, 2, 1, 5, 3, 4, 6, 7]
    (tmp_path / "data.json").write_text(json.dumps([records[index] for index in order]))
    common = {"train_data": tmp_path / "data.json", "max_steps": 2, "learning_rate": 1e-3, "use_cpu": True}
    alone = train("lora", options(workspace, tmp_path / "alone", per_device_train_batch_size=4, **common))
    program = "import sys; from transformers_llava_sp.cli import app; app(sys.argv[1:])"
    (tmp_path / "run.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "run.py"]
    overrides = {"per_device_train_batch_size": 2, "ddp_find_unused_parameters": False, **common}
    result = subprocess.run(
        [*command, "train", "lora", *options(workspace, tmp_path / "together", **overrides)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(transformers_llava_sp.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    state = json.loads((tmp_path / "together" / "trainer_state.json").read_text())
    together = [[entry["loss"], entry["grad_norm"]] for entry in state["log_history"] if "loss" in entry]
    for one, other in zip(history(alone, "loss", "grad_norm"), together, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_quantized_language_model_is_trained_beside_an_exact_projector(workspace, tmp_path):
    overrides = {"bf16": True, "use_cpu": True, "max_steps": 2, "learning_rate": 1e-2, "lora_dropout": 0.0}
    trainer = train("qlora", options(workspace, tmp_path, **overrides))
    model = trainer.unwrapped_model
    exact = (model.model.vision_tower, model.model.multi_modal_projector, model.lm_head)
    assert not any(type(module).__name__ == "Linear4bit" for part in exact for module in part.modules())
    layer = model.model.language_model.layers[0].mlp.up_proj
    assert type(layer.base_layer).__name__ == "Linear4bit"
    assert {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad} == {torch.float32}
    assert len(history(trainer, "loss")) == 2
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.isfinite(logits_of(loaded, AutoProcessor.from_pretrained(tmp_path))).all()


def test_example_script_trains_an_adapter_that_merges(workspace, tmp_path, monkeypatch):
    arguments = [
        str(workspace / "model"),
        str(workspace / "data.json"),
        str(MINI / "golden"),
        str(tmp_path / "adapter"),
    ]
    script = Path(__file__).parents[1] / "examples" / "finetune_lora.py"
    monkeypatch.setattr(sys, "argv", [str(script), *arguments, "--rank", "4"])
    runpy.run_path(str(script), run_name="__main__")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    adapter, merged = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("adapter", "merged"))
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(adapter, processor), logits_of(merged, processor), rtol=0, atol=1e-4)


def test_trainer_has_what_is_overridden():
    """Of Transformers' Trainer, some is private: a method that it no longer calls would be passed over silently."""
    for name, method in vars(LlavaSPTrainer).items():
        if inspect.isfunction(method) and hasattr(Trainer, name):
            theirs = inspect.signature(getattr(Trainer, name)).parameters
            ours = inspect.signature(method).parameters
            generic = {parameter.kind for parameter in ours.values()} & {
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            }
            assert generic or list(ours) == list(theirs), name
    private = {name for name in vars(LlavaSPTrainer) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private if not hasattr(Trainer, name)} == {"_staged", "_push_output"}
