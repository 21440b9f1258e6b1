"""
The first stage of the tiny models: a vision tower that tells shapes and colours apart, patch by patch.

    python examples/tiny/train_tower.py TOWER   # needs the extra train

A linear layer on each patch's features names the shape and the colour that lie there, or that nothing does; whether it
is the middle of a thing; and the row and the column that the patch is in. It is dropped afterwards. Without this
stage, trained through a language model alone, a tower this small learns colours, but not shapes; and without the rows
and columns it forgets where a patch is, which shapes and colours do not depend on.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import scenes
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, Trainer, TrainingArguments, set_seed


CONFIG = CLIPVisionConfig(
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=scenes.SIZE,
    patch_size=8,
)
# What the model takes its features from, counted from the last layer: that of LLaVA-SP
FEATURE_LAYER = -2
VALIDATION_SCENES = 500
GRID = CONFIG.image_size // CONFIG.patch_size
# How many classes of each kind a patch can be of
CLASSES = {
    "shape": 1 + len(scenes.SHAPES),
    "colour": 1 + len(scenes.COLOURS),
    "middle": 2,
    "row": GRID,
    "column": GRID,
}


class PatchDataset(Dataset):
    """Scenes of a split, each with the classes of every patch."""

    def __init__(self, split: str, num_scenes: int, processor: CLIPImageProcessor):
        self.split, self.num_scenes, self.processor = split, num_scenes, processor

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = scenes.make_scene(self.split, index)
        pixel_values = self.processor(scenes.draw(scene), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "labels": label_patches(scene)}


def label_patches(scene: scenes.Scene) -> torch.Tensor:
    """The classes of the patches of a scene, of shape `(kinds of classes, patches)`, in the order of `CLASSES`."""
    shapes, colours = scenes.label_patches(scene, GRID)
    middles = torch.zeros(GRID, GRID, dtype=torch.long)
    for thing in scene.things:
        middles[thing.y * GRID // scenes.SIZE, thing.x * GRID // scenes.SIZE] = 1
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    return torch.stack([torch.tensor(shapes), torch.tensor(colours), middles, rows, columns]).flatten(1)


class PatchClassifier(nn.Module):
    """A vision tower with a linear layer on each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = CLIPVisionModel(CONFIG)
        self.head = nn.Linear(CONFIG.hidden_size, sum(CLASSES.values()))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        `pixel_values` of shape `(batch, channels, height, width)` and `labels` of shape
        `(batch, kinds of classes, patches)`; logits of shape `(batch, patches, all classes)`.
        """
        output = self.vision_tower(pixel_values, output_hidden_states=True)
        logits = self.head(output.hidden_states[FEATURE_LAYER][:, 1:])
        losses = [
            nn.functional.cross_entropy(part.flatten(0, 1), label.flatten())
            for part, label in zip(logits.split([*CLASSES.values()], dim=-1), labels.unbind(1), strict=True)
        ]
        return {"loss": sum(losses), "logits": logits}


def accuracy(prediction: Any) -> dict[str, float]:
    """Of each kind of class, the share of right ones among the patches with something on them, or the middles."""
    parts = np.split(prediction.predictions, np.cumsum([*CLASSES.values()])[:-1], axis=-1)
    shares = {}
    for number, (kind, logits) in enumerate(zip(CLASSES, parts, strict=True)):
        counted = prediction.label_ids[:, list(CLASSES).index("middle" if kind == "middle" else "shape")] > 0
        shares[kind] = (logits.argmax(-1) == prediction.label_ids[:, number])[counted].mean()
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder to write the tower to")
    parser.add_argument("--scenes", type=int, default=30_000, help="how many to train on")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    set_seed(arguments.seed)
    size = {"height": CONFIG.image_size, "width": CONFIG.image_size}
    processor = CLIPImageProcessor(size=size, crop_size=size)
    model = PatchClassifier()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.output),
            per_device_train_batch_size=64,
            per_device_eval_batch_size=256,
            num_train_epochs=arguments.epochs,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            weight_decay=0.0,
            eval_strategy="steps",
            eval_steps=0.1,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            dataloader_num_workers=arguments.workers,
            seed=arguments.seed,
        ),
        train_dataset=PatchDataset("train", arguments.scenes, processor),
        eval_dataset=PatchDataset("validation", VALIDATION_SCENES, processor),
        compute_metrics=accuracy,
    )
    trainer.train()
    model.vision_tower.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    trainer.save_state()


if __name__ == "__main__":
    main()
