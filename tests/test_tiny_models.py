"""The stages by which the tiny models are made, each on a few scenes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel


TINY = Path(__file__).parents[1] / "examples" / "tiny"


@pytest.fixture
def scripts(monkeypatch):
    """Runs a script of the folder with arguments."""
    monkeypatch.syspath_prepend(str(TINY))
    import make_model
    import train_tower

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        {"make_model": make_model, "train_tower": train_tower}[name].main()

    return run


def test_tower_and_model_are_made(scripts, tmp_path, monkeypatch):
    import train_tower

    monkeypatch.setattr(train_tower, "VALIDATION_SCENES", 16)
    scripts("train_tower", tmp_path / "tower", "--scenes", 128, "--epochs", 2, "--workers", 0)
    log = json.loads((tmp_path / "tower" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    tower = CLIPVisionModel.from_pretrained(tmp_path / "tower")

    scripts("make_model", tmp_path / "tower", tmp_path / "model", "--spatial-variant", "pooling")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    projector = model.config.projector_config
    # The paper's geometry at half scale
    assert (projector.spatial_variant, projector.grid_size) == ("pooling", 12)
    assert list(projector.spatial_scales) == [2, 4, 6, 8, 10, 12]
    assert (projector.detail_kernel_size, projector.detail_stride) == (8, 2)
    for name, weight in tower.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], weight)
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    text = processor.apply_chat_template([{"role": "user", "content": "Is there a red circle?"}])
    assert len(processor.tokenizer(text)["input_ids"]) < 12
