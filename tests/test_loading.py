"""
What loading costs, what it takes from a folder, and what it says about a folder that is damaged or another model's.

That a loaded model is the saved one is in test_modeling.py; which class an Auto class builds, and what happens where
weights are missing, in test_modeling_common.py.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, LlamaForCausalLM

from transformers_llava_sp import LlavaSPForConditionalGeneration, LlavaSPProjector


BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "load.py"

# Loads a part of a whole model's folder: key patterns and what replaces them
PROJECTOR_ALONE = {r"^model\.multi_modal_projector\.": ""}
LANGUAGE_MODEL_ALONE = {r"^model\.language_model\.": "model."}


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """The model, saved as shards."""
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


@pytest.fixture
def propagate_logs(monkeypatch):
    """Transformers keeps its messages from the root logger, where pytest listens."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)


def assert_same_weights(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    state, expected_state = actual.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    for key, tensor in expected_state.items():
        assert torch.equal(state[key], tensor), key


# Costs


def test_weights_are_made_once_only(folder, model, monkeypatch):
    """The model is built without memory, and the weights are not drawn at random before they are read."""
    built_on = set()
    initialise = LlavaSPForConditionalGeneration.__init__

    def record(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        built_on.update(parameter.device.type for parameter in self.parameters())

    monkeypatch.setattr(LlavaSPForConditionalGeneration, "__init__", record)
    random_state = torch.get_rng_state()
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert built_on == {"meta"}
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_weights(loaded, model)
    # Buffers that no file holds, such as the rotary frequencies, have to be computed
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(loaded.named_buffers()).keys()
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.slow
def test_memory_of_a_large_checkpoint(tmp_path, capsys):
    """As the benchmark measures it; the times, which it measures too, depend on what else the machine does."""
    command = [sys.executable, str(BENCHMARK), "--repeats", "2", "--tries", "1", "--folder", str(tmp_path)]
    output = tmp_path / "load.json"
    process = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True)
    assert output.exists(), process.stderr
    with capsys.disabled():
        print(f"\n{process.stdout}")
    parts = json.loads(output.read_text())["parts"]
    assert parts.keys() == {"single file", "shards"}, process.stderr
    for layout, part in parts.items():
        summary = part["summary"]
        assert summary["llava-sp"]["bytes"] > 2e9
        # Less than the weights would be memory that was not counted
        assert 0.95 < summary["llava-sp"]["peak_anonymous_multiple"] < 1.05, layout


@pytest.mark.parametrize("dtype", [None, "auto", torch.float32], ids=["default", "auto", "float32"])
def test_dtype_is_the_stored_one_unless_given(variant, tmp_path, dtype):
    tiny_model(variant).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, **({} if dtype is None else {"dtype": dtype}))
    expected = torch.float32 if dtype is torch.float32 else torch.bfloat16
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    config = loaded.config
    for part in (config, config.vision_config, config.projector_config, config.text_config):
        assert part.dtype == expected, part.model_type
    # Rotary frequencies in 16 bits would be wrong positions
    assert loaded.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


# Shards


def test_index_of_the_shards(folder, model):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = {key: file.name for file in folder.glob("*.safetensors") for key in load_file(file)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_missing_shard_is_named(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_truncated_shard_is_refused(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(SafetensorError):
        AutoModelForImageTextToText.from_pretrained(folder)


# Parts of a folder


@pytest.mark.parametrize("by", ["class", "auto-class"])
def test_projector_out_of_a_whole_models_folder(folder, model, by):
    """The projector's configuration is found in the model's; an Auto class has to be told which of them to build."""
    if by == "class":
        load, arguments = LlavaSPProjector.from_pretrained, {}
    else:
        load, arguments = AutoModel.from_pretrained, {"config": model.config.projector_config}
    loaded, report = load(folder, key_mapping=PROJECTOR_ALONE, output_loading_info=True, **arguments)
    assert type(loaded) is LlavaSPProjector
    assert loaded.config.spatial_variant == model.config.projector_config.spatial_variant
    assert not report["missing_keys"] | report["mismatched_keys"]
    assert {key.split(".")[0] for key in report["unexpected_keys"]} == {"model", "lm_head"}
    assert_same_weights(loaded, model.model.multi_modal_projector)


def test_projector_without_its_keys_is_reported(folder, model):
    _, report = LlavaSPProjector.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"] == set(model.model.multi_modal_projector.state_dict())


def test_language_model_out_of_a_whole_models_folder(folder, model):
    loaded, report = LlamaForCausalLM.from_pretrained(
        folder, config=model.config.text_config, key_mapping=LANGUAGE_MODEL_ALONE, output_loading_info=True
    )
    assert not report["missing_keys"] | report["mismatched_keys"]
    assert_same_weights(loaded.model, model.model.language_model)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


# Another configuration than the folder's


@pytest.mark.parametrize("spatial_variant", ["cropping", "pooling"])
def test_another_width_of_the_spatial_features_is_refused(spatial_variant, tmp_path, caplog, propagate_logs):
    """With the detail integrator the projection is twice as wide. Both shapes are in the report."""
    tiny_model(f"{spatial_variant}-dfi").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageTextToText.from_pretrained(tmp_path, config=tiny_config(spatial_variant))
    report = next(line for line in caplog.text.splitlines() if "spatial_projection.weight" in line)
    assert "torch.Size([64, 32])" in report
    assert "torch.Size([64, 16])" in report
