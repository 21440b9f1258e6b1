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


def keep_one_question(folder: Path, answers: tuple[str, ...]) -> None:
    """Of each conversation in the data, leave the first question that has one of these answers."""
    for name in ("train", "test"):
        file = folder / f"{name}.json"
        records = json.loads(file.read_text())
        for record in records:
            turns = record["conversations"]
            asked = next((i for i in range(1, len(turns), 2) if turns[i]["value"] in answers), None)
            record["conversations"] = asked and turns[asked - 1 : asked + 1]
            if asked:
                turns[asked - 1]["value"] = "<image>\n" + turns[asked - 1]["value"].removeprefix("<image>\n")
        file.write_text(json.dumps([record for record in records if record["conversations"]]))


def run(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def test_colours_are_learned_from_the_image(tmp_path):
    """Of eight colours, which the question does not give away: the blind baseline is right once in eight times."""
    example = runpy.run_path(str(SCRIPT))
    example["prepare"](tmp_path)
    keep_one_question(tmp_path, example["COLOURS"])
    run("train", tmp_path / "full.yaml", "--num_train_epochs", 2)

    log = json.loads((tmp_path / "trained" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    scores, _ = example["score"](str(tmp_path / "trained"), kind="colour", limit=320)
    assert scores["colour"].exact_match > scores["colour"].blind_baseline + 0.1


def test_tiny_model_learns_what_shapes_are_called_elsewhere(tmp_path):
    """With LoRA: it knows squares, but no rectangles, and has seen none of these pictures."""
    example = runpy.run_path(str(SCRIPT))
    example["prepare"](tmp_path, model="tiny-cropping")
    keep_one_question(tmp_path, example["SHAPES"])
    before, _ = example["score"]("tiny-cropping", kind="shape", limit=320)
    run("train", tmp_path / "lora.yaml", "--num_train_epochs", 1)
    run("merge", tmp_path / "adapter", tmp_path / "merged")

    after, _ = example["score"](str(tmp_path / "merged"), kind="shape", limit=320)
    assert before["shape"].exact_match < before["shape"].blind_baseline
    assert after["shape"].exact_match > after["shape"].blind_baseline + 0.3
