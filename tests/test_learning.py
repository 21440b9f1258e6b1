"""Learning is real: a tiny model, trained from nothing by the command, answers what it could not guess."""

import importlib.util
import json
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from transformers_llava_sp.cli import app


SCRIPT = Path(__file__).parents[1] / "examples" / "train_easy_vqa.py"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("easy_vqa") is None,
    reason="easy-vqa is not installed (pip install --no-deps easy-vqa: its data are needed, not its requirements)",
)
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
