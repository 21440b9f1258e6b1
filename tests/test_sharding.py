"""What is trained, divided over processes: the same losses and weights as in one process, and saved whole."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import history, options

import transformers_llava_sp
from transformers_llava_sp.training.train import train
from transformers_llava_sp.training.trainer import SHARDINGS, LlavaSPTrainingArguments


# accelerate shards nothing between processes without a GPU: here it takes them for processes with one
PROGRAM = """
import sys

import transformers.training_args
from accelerate.state import DistributedType, PartialState

from transformers_llava_sp.cli import app

PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
transformers.training_args.is_torch_bf16_gpu_available = lambda: True
app(sys.argv[1:])
"""
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed (pip install deepspeed builds it, which takes minutes)",
)
EACH = [pytest.param(sharding, marks=needs_deepspeed if sharding.startswith("zero") else ()) for sharding in SHARDINGS]


def test_every_sharding_has_a_file():
    folder = Path(transformers_llava_sp.__file__).parent / "training" / "sharding"
    assert {path.stem for path in folder.iterdir()} == set(SHARDINGS)


def test_sharding_stands_for_fsdp(tmp_path):
    arguments = LlavaSPTrainingArguments(output_dir=tmp_path, sharding="fsdp2", use_cpu=True)
    assert arguments.fsdp
    assert arguments.fsdp_plugin_args["fsdp_version"] == 2
    assert arguments.fsdp_plugin_args["state_dict_type"] == "FULL_STATE_DICT"


def test_unknown_sharding_is_named(tmp_path):
    with pytest.raises(ValueError, match="Unknown sharding 'zero9': expected one of zero2, zero3, fsdp2"):
        LlavaSPTrainingArguments(output_dir=tmp_path, sharding="zero9")
    with pytest.raises(ValueError, match="pass one of the three"):
        LlavaSPTrainingArguments(output_dir=tmp_path, sharding="fsdp2", deepspeed="mine.json")


def test_quantized_weights_are_not_divided(workspace, tmp_path):
    arguments = options(workspace, tmp_path, sharding="fsdp2", use_cpu=True)
    with pytest.raises(ValueError, match="load_in_4bit needs the whole model on each GPU"):
        train("qlora", arguments)


def run_sharded(folder: Path, *arguments: str, processes: int = 2) -> list[list[float]]:
    """The command in several processes. Returns loss and gradient norm of each step that the run has made."""
    (folder / "program.py").write_text(PROGRAM)
    output = Path(arguments[arguments.index("--output_dir") + 1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    result = subprocess.run(
        [*launcher, "program.py", "train", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(transformers_llava_sp.__file__).parents[1]),
            "ACCELERATE_TORCH_DEVICE": "cpu",
            "DS_ACCELERATOR": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    state = json.loads((output / "trainer_state.json").read_text())
    return [[entry["loss"], entry["grad_norm"]] for entry in state["log_history"] if "loss" in entry]


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def records(workspace, tmp_path_factory) -> dict[str, Path]:
    """Data for each recipe. Of the conversations, one process gets texts alone in the first step."""
    folder = tmp_path_factory.mktemp("records")
    records = json.loads((workspace / "data.json").read_text())
    (folder / "conversations.json").write_text(json.dumps([records[index] for index in (0, 2, 1, 5, 3, 4, 6, 7)]))
    (folder / "captions.json").write_text(json.dumps([record for record in records if "image" in record][:4]))
    return {name: folder / f"{name}.json" for name in ("conversations", "captions")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "lora", "full", "full, vision tower too"])
@pytest.mark.parametrize("sharding", EACH)
def test_two_sharded_processes_equal_one(workspace, records, tmp_path, sharding, kind):
    recipe, _, tower = kind.partition(", ")
    data = records["captions" if recipe == "pretrain" else "conversations"]
    common = {"train_data": data, "max_steps": 2, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1}
    if tower:
        common["train_vision_tower"] = True
    undivided = {"per_device_train_batch_size": 4, **common}
    if (sharding, recipe) == ("zero3", "lora"):
        # LoRA begins at random numbers, which DeepSpeed makes weights draw in an order of its own
        one = [recipe, *options(workspace, tmp_path / "alone", sharding=sharding, **undivided)]
        expected_steps = run_sharded(tmp_path, *one, processes=1)
    else:
        alone = train(recipe, options(workspace, tmp_path / "alone", use_cpu=True, **undivided))
        expected_steps = history(alone, "loss", "grad_norm")
    output = tmp_path / "sharded"
    arguments = [recipe, *options(workspace, output, sharding=sharding, **common)]
    steps = run_sharded(tmp_path, *arguments)
    for step, expected in zip(steps, expected_steps, strict=True):
        assert step == pytest.approx(expected, rel=1e-4)

    expected, found = load_weights(tmp_path / "alone"), load_weights(output)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        # The gradient of these two is nothing but rounding, which Adam makes a step of
        if not name.endswith(("key_proj.bias", "key_norm.bias")):
            assert (found[name] - tensor).abs().mean() < 1e-5, name

    (output / "trainer_state.json").unlink()
    again = run_sharded(tmp_path, *arguments, "--resume_from_checkpoint", str(output / "checkpoint-1"))
    assert again == steps
    resumed = load_weights(output)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in found.items())
