"""
The benchmark of training steps does what it says, on tiny models; the memory that it computes is what tensors take and
what docs/training.md says; and the projector is in memory only once.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from transformers_llava_sp.training.parts import prepare_lora
from transformers_llava_sp.training.train import UNQUANTIZED_MODULES


REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "benchmarks" / "train_step.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def script():
    """The benchmark, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield importlib.import_module("train_step")


@pytest.fixture(scope="module")
def arms(script):
    return {name: script.Arm(name, script.SIZES["small"](), CPU) for name in script.MODELS}


@pytest.fixture(scope="module")
def figures(script, arms):
    """What a run measures, but for the projector's memory."""
    return {
        "matrix products": script.measure_matrix_products(128, CPU, repeats=3),
        "operations": {name: script.count_operations(arm) for name, arm in arms.items()},
        "steps, sdpa": script.measure_steps(arms, "sdpa", warmup=1, repeats=3, label="sdpa"),
    }


def projector_figures(excess: float) -> dict:
    arm = {"projector_bytes": 100, "gradient_bytes": 100, "state_bytes": 200, "peak_bytes": 500}
    return {"arms": {"frozen": arm, "trained": arm}, "excess_bytes": 0, "excess": excess}


# Steps


def test_models_differ_in_the_projector_alone(arms):
    ours, theirs = arms["llava-sp"], arms["llava"]
    assert type(ours.base).__name__ == "LlavaSPForConditionalGeneration"
    assert type(theirs.base).__name__ == "LlavaForConditionalGeneration"

    def shapes(arm):
        return {
            name: (parameter.shape, parameter.dtype, parameter.requires_grad)
            for name, parameter in arm.model.named_parameters()
            if "multi_modal_projector" not in name
        }

    assert shapes(ours) == shapes(theirs)
    for arm in arms.values():
        assert {parameter.dtype for parameter in arm.trained.values()} == {torch.float32}
        frozen = [parameter for parameter in arm.model.parameters() if not parameter.requires_grad]
        assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
        assert all(parameter.requires_grad for parameter in arm.projector.parameters())
        assert [group["lr"] for group in arm.optimizer.param_groups] == [2e-4, 2e-5]
        assert arm.base.model.language_model.layers[0].gradient_checkpointing
    for one, other in zip(ours.batches, theirs.batches, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        learned = [batch["labels"][batch["labels"] != -100] for batch in (one, other)]
        assert torch.equal(*learned)
        assert len(learned[0]) == 2 * 19
        assert one["input_ids"].shape[1] == other["input_ids"].shape[1] + 6


def test_the_7b_is_the_released_one(script):
    size = script.SIZES["7b"]()
    projector_config = size.config.projector_config
    assert projector_config.spatial_scales == [4, 8, 12, 16, 20, 24]
    assert (projector_config.spatial_hidden_size, projector_config.text_hidden_size) == (512, 4096)
    assert size.config.text_config.num_hidden_layers == 32
    assert projector_config.num_image_tokens + size.text_tokens == 700
    assert (size.micro_batch, size.lora_rank) == (16, 128)


def test_a_step_trains(script):
    arm = script.Arm("llava-sp", script.SIZES["small"](), CPU)
    before = {name: parameter.detach().clone() for name, parameter in arm.trained.items()}
    arm.step(0)
    arm.step(1)  # the first step leaves LoRA's A matrices, behind B matrices of zeros, as they are
    unchanged = [name for name, parameter in arm.trained.items() if torch.equal(parameter, before[name])]
    assert not unchanged
    assert all(parameter.grad is None for parameter in arm.model.parameters())


def test_times_are_parts_of_the_step(arms, figures):
    for name, part in figures["steps, sdpa"].items():
        assert part["tokens"] == arms[name].batches[0]["input_ids"].numel()
        assert len(part["steps"]) == 3
        for step in part["steps"]:
            assert min(step.values()) > 0
            assert step["projector_forward_ms"] + step["projector_backward_ms"] < step["forward_backward_ms"]


def test_operations_are_those_of_the_layers(script, arms, figures):
    """Frozen layers forward, again, and backward; LoRA's in both directions of the backward pass."""
    for name, arm in arms.items():
        layers = arm.base.model.language_model.layers
        frozen = sum(weight.numel() for key, weight in layers.named_parameters() if "base_layer" in key)
        language_model = 6 * arm.num_tokens * frozen
        found = figures["operations"][name]["operations"]
        # The rest is the tower, attention, LoRA and the head, and here nearly as much
        assert language_model < found < 3 * language_model
    projector = arms["llava-sp"].trained_projector
    per_token = {name: count["operations"] / count["tokens"] for name, count in figures["operations"].items()}
    # Though it has more: Transformers' LLaVA takes a gradient through the frozen tower, of which it makes no use
    assert per_token["llava-sp"] < per_token["llava"]
    assert script.count_parameters(projector) > script.count_parameters(arms["llava"].trained_projector)


# Results


@pytest.fixture
def machine():
    keys = ("device", "cpu", "cores", "torch", "transformers", "transformers_llava_sp", "peft")
    return {**dict.fromkeys(keys, "x"), "size": "small", "repeats": 3}


def test_finished_parts_are_not_measured_again(script, machine, tmp_path):
    path = tmp_path / "results.json"
    results = script.Results(path, machine)
    results.add("one", lambda: {"figure": 1})
    with pytest.raises(ZeroDivisionError):
        results.add("two", lambda: {"figure": 1 / 0})
    again = script.Results(path, machine)
    again.add("one", lambda: {"figure": 1 / 0})
    again.add("two", lambda: {"figure": 2})
    assert [json.loads(path.read_text())["parts"][name]["figure"] for name in ("one", "two")] == [1, 2]
    with pytest.raises(SystemExit, match="has results with device 'x', and this run has 'y'"):
        script.Results(path, {**machine, "device": "y"})
    with pytest.raises(SystemExit, match="has results with size 'small', and this run has '7b'"):
        script.Results(path, {**machine, "size": "7b"}, ["size"])


@pytest.mark.parametrize(
    ("size", "slower", "excess", "met"),
    [("7b", 1.0, 0.0, True), ("7b", 1.1, 0.0, False), ("7b", 1.0, 0.2, False), ("small", 1.1, 0.0, True)],
    ids=["within", "slow", "copied", "small"],
)
def test_report_says_whether_limits_are_met(script, machine, figures, size, slower, excess, met):
    results = script.Results(None, {**machine, "size": size})
    theirs = figures["steps, sdpa"]["llava"]
    tokens = figures["steps, sdpa"]["llava-sp"]["tokens"]
    scale = slower * tokens / theirs["tokens"]
    ours = [{**step, "forward_backward_ms": scale * step["forward_backward_ms"]} for step in theirs["steps"]]
    steps = {"llava": theirs, "llava-sp": {**theirs, "tokens": tokens, "steps": ours}}
    results.content["parts"] = {**figures, "steps, sdpa": steps, "projector": projector_figures(excess)}
    text, found = script.report(results, ["sdpa"], {"flash_attention_2": "there is no package"})
    assert found == met
    assert f"sdpa: forward and backward per token {slower:.3f} x LLaVA's" in text
    assert "flash_attention_2: not measured, there is no package" in text
    assert ("NOT MET" in text) != met


def test_the_7b_needs_a_gpu(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--device", "cpu"])
    with pytest.raises(SystemExit, match="or --size small"):
        script.main()


# Memory


def test_memory_table_is_that_of_the_documentation(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_step.py", "memory"])
    script.main()
    table = capsys.readouterr().out.strip()
    assert len(table.splitlines()) == 6
    assert table in (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", ["pretrain", "lora", "full"])
def test_computed_memory_is_what_tensors_take(script, recipe):
    size = script.SIZES["small"]()
    computed = script.count_memory(*script.prepare_recipe(recipe, size.config, torch.device("meta")))

    model, _ = script.prepare_recipe(recipe, size.config, CPU)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert computed == {
        "frozen weights": sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad),
        "trained weights": sum(parameter.nbytes for parameter in trained),
        "gradients": sum(parameter.grad.nbytes for parameter in trained),
        "optimizer states": sum(state.nbytes for state in states),
    }


def test_computed_memory_of_4_bits_is_what_tensors_take(script, tmp_path):
    config = script.SIZES["small"]().config
    computed = script.count_memory(*script.prepare_recipe("qlora", config, torch.device("meta")))

    script.make_model("llava-sp", config, CPU, torch.bfloat16).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=UNQUANTIZED_MODULES
    )
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=quantization
    )
    model = prepare_lora(model)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    scales = [parameter.quant_state.absmax for parameter in frozen if hasattr(parameter, "quant_state")]
    assert len(scales) == 2 * 7
    assert computed["frozen weights"] == sum(tensor.nbytes for tensor in [*frozen, *scales])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert computed["trained weights"] == sum(parameter.nbytes for parameter in trained)


@pytest.mark.slow
def test_the_whole_run_and_the_projector_in_memory_once(tmp_path, capsys):
    command = [sys.executable, str(SCRIPT), "--size", "small", "--device", "cpu", "--output", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    with capsys.disabled():
        print(f"\n{process.stdout}")
    assert "sdpa: forward and backward per token" in (tmp_path / "train_step.md").read_text()
    figures = json.loads((tmp_path / "train_step.json").read_text())["parts"]["projector"]
    assert figures["arms"]["frozen"]["projector_bytes"] > 200e6
    # Much less than gradients and states would be memory that was not counted
    assert -0.25 < figures["excess"] < 0.1

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("there already") == 2
    assert "made both models" not in again.stdout
