"""Learning is real: tiny models, trained by the command, answer what they could not guess."""

import importlib.util
import json
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from transformers_llava_sp.cli import app


SCRIPT = Path(__file__).parents[1] / "examples" / "train_easy_vqa.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("easy_vqa") is None,
        reason="easy-vqa is not installed (pip install --no-deps easy-vqa: its data are needed, not its requirements)",
    ),
]


def test_colours_are_learned_from_the_image(tmp_path):
    """Of eight colours, which the question does not give away: the blind baseline is right once in eight times."""
    example = runpy.run_path(str(SCRIPT))
    example["prepare"](tmp_path)
    for name in ("train", "test"):
        file = tmp_path / f"{name}.json"
        records = json.loads(file.read_text())
        for record in records:
            turns = record["conversations"]
            asked = next((i for i in range(1, len(turns), 2) if turns[i]["value"] in example["COLOURS"]), None)
            record["conversations"] = asked and turns[asked - 1 : asked + 1]
            if asked:
                turns[asked - 1]["value"] = "<image>\n" + turns[asked - 1]["value"].removeprefix("<image>\n")
        file.write_text(json.dumps([record for record in records if record["conversations"]]))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "full.yaml"), "--num_train_epochs", "2"])
    assert result.exit_code == 0, result.output

    log = json.loads((tmp_path / "trained" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    scores, _ = example["score"](str(tmp_path / "trained"), kind="colour", limit=320)
    assert scores["colour"].exact_match > scores["colour"].blind_baseline + 0.1


def test_tiny_model_learns_shapes_of_other_pictures(tmp_path):
    """Of three shapes, with LoRA, from a model that calls one of them a square and has seen none of these pictures."""
    example = runpy.run_path(str(SCRIPT))
    example["prepare"](tmp_path, model="tiny-cropping")
    before, _ = example["score"]("tiny-cropping", kind="shape", limit=160)
    commands = (
        [
            "train",
            str(tmp_path / "lora.yaml"),
            "--max_steps",
            "120",
            "--eval_strategy",
            "no",
            "--eval_on_start",
            "false",
        ],
        ["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")],
    )
    for command in commands:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    after, _ = example["score"](str(tmp_path / "merged"), kind="shape", limit=160)
    assert before["shape"].exact_match < after["shape"].blind_baseline
    assert after["shape"].exact_match > after["shape"].blind_baseline + 0.2
