"""Fixtures shared by all tests: tiny seeded models of the four variants, and the authors' golden data."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
)

from transformers_llava_sp import LlavaSPConfig, LlavaSPForConditionalGeneration, LlavaSPProcessor
from transformers_llava_sp.conversion import convert_checkpoint


FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN_ROOT = Path(os.environ.get("LLAVA_SP_GOLDEN", FIXTURES.parents[2] / "shared" / "golden"))

MINI_GOLDEN = ("mini-cropping", "mini-pooling")
LARGE_GOLDEN = ("clip-cropping", "clip-pooling-dfi", "clip-pooling", "siglip-cropping", "anyres-pooling")

VARIANTS = {
    "cropping-dfi": {"spatial_variant": "cropping", "spatial_projection_bias": True},
    "cropping": {"spatial_variant": "cropping", "use_detail_integrator": False, "spatial_projection_bias": True},
    "pooling-dfi": {"spatial_variant": "pooling", "spatial_projection_bias": False},
    "pooling": {"spatial_variant": "pooling", "use_detail_integrator": False, "spatial_projection_bias": False},
}
IMAGE_TOKEN_ID = 100

# An image of the miniature, a question and an answer: what the tests of training train on
RECORDS = [
    ("landscape.png", "What is it?", "A lake."),
    ("portrait.png", "Which flower is it?", "I do not know."),
    (None, "Name three primary colors.", "Red, yellow and blue."),
    ("square.png", "Who is it?", "A woman in an orange suit."),
    ("landscape.png", "Is it raining?", "No"),
    (None, "Say hello.", "Hello!"),
    ("square.png", "What colour is the suit?", "Orange"),
    ("portrait.png", "How many petals?", "Five or six of them."),
]


def tiny_config(variant: str, **text_overrides) -> LlavaSPConfig:
    """A configuration of one of the `VARIANTS`: a 12x12 grid, 150 tokens per image, sizes that all differ."""
    return LlavaSPConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=84,
            patch_size=7,
        ),
        text_config=LlamaConfig(
            **{
                "vocab_size": 128,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1024,
                "pad_token_id": 0,
                **text_overrides,
            }
        ),
        projector_config={"spatial_hidden_size": 16, **VARIANTS[variant]},
        image_token_id=IMAGE_TOKEN_ID,
    )


@torch.no_grad()
def randomize_(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Seeded weights without any symmetry: no tensor equals another, no norm is the identity, logits are spread."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.copy_(noise * scale + (1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0))
    return model


def tiny_model(variant: str, seed: int = 0, **text_overrides) -> LlavaSPForConditionalGeneration:
    """A seeded model of one of the `VARIANTS`, in evaluation mode, greedy and never emitting `<image>`."""
    model = randomize_(LlavaSPForConditionalGeneration(tiny_config(variant, **text_overrides)), seed).eval()
    model.generation_config.suppress_tokens = [IMAGE_TOKEN_ID]
    model.generation_config.eos_token_id = None
    return model


def tiny_inputs(
    model: LlavaSPForConditionalGeneration, texts: list[list[int]], images: list[int], seed: int = 1
) -> dict:
    """
    Left-padded inputs: sample `i` has `images[i]` images in front of the ids `texts[i]`.

    Returns `input_ids` and `attention_mask` of shape (samples, longest) and, where there are images, `pixel_values`.
    """
    num_tokens = model.config.projector_config.num_image_tokens
    rows = [
        [1] + ([IMAGE_TOKEN_ID] * num_tokens + [3]) * count + text for text, count in zip(texts, images, strict=True)
    ]
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }
    if sum(images):
        side = model.config.vision_config.image_size
        generator = torch.Generator().manual_seed(seed)
        inputs["pixel_values"] = torch.randn(sum(images), 3, side, side, generator=generator)
    return inputs


@pytest.fixture(params=list(VARIANTS))
def variant(request) -> str:
    return request.param


@pytest.fixture
def model(variant) -> LlavaSPForConditionalGeneration:
    return tiny_model(variant)


@dataclass
class Golden:
    """One golden folder: what the authors' code computed, and their checkpoint, converted by this package."""

    name: str
    folder: Path
    converted: Path

    def __post_init__(self):
        meta = json.loads((self.folder / "golden" / "golden.json").read_text())
        self.samples = meta["samples"]
        self.image_files = {name: self.folder / "golden" / image["file"] for name, image in meta["images"].items()}
        self.tensors = load_file(self.folder / "golden" / "golden.safetensors")
        self.vocab_size = json.loads((self.folder / "base" / "config.json").read_text())["vocab_size"]

    def num_tiles(self, image: str) -> int:
        """How many inputs of the vision tower the authors make of an image."""
        shape = json.loads((self.folder / "golden" / "golden.json").read_text())["images"][image]["pixel_values"][
            "shape"
        ]
        return shape[0] if len(shape) == 4 else 1

    def images(self, sample: str) -> list[Image.Image]:
        return [Image.open(self.image_files[name]) for name in self.samples[sample]["images"]]

    def last_logits(self, sample: str) -> torch.Tensor:
        """The prefill logits that are stored: the last 16 (miniatures) or up to 64 positions, original vocabulary."""
        return next(tensor for key, tensor in self.tensors.items() if key.startswith(f"{sample}.logits_last"))

    def load(self, **kwargs):
        """The converted model in evaluation mode, and its processor."""
        model = AutoModelForImageTextToText.from_pretrained(self.converted, **kwargs).eval()
        return model, AutoProcessor.from_pretrained(self.converted)


def golden_folder(name: str) -> Path:
    folder = FIXTURES / name if name in MINI_GOLDEN else GOLDEN_ROOT / name
    if not folder.is_dir():
        pytest.skip(f"golden folder {name} is not at {folder}; set LLAVA_SP_GOLDEN to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """`golden(name)`: the golden folder of that name, converted once per session."""
    cache: dict[str, Golden] = {}

    def get(name: str) -> Golden:
        if name not in cache:
            folder = golden_folder(name)
            converted = tmp_path_factory.mktemp("converted") / name
            convert_checkpoint(
                folder / "release", converted, base_model=folder / "base", vision_tower=folder / "vision"
            )
            cache[name] = Golden(name, folder, converted)
        return cache[name]

    return get


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """
    A folder with a tiny model to train, `model`, its vision tower, `tower`, and the `RECORDS` as LLaVA's JSON,
    `data.json`, whose images are in the miniature's `golden`.
    """
    folder = tmp_path_factory.mktemp("training")
    tower, base = folder / "tower", FIXTURES / "mini-cropping" / "base"
    torch.manual_seed(0)
    vision_config = tiny_config("cropping").vision_config
    CLIPVisionModel(vision_config).save_pretrained(tower)
    size = {"height": vision_config.image_size, "width": vision_config.image_size}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(tower)
    # The projector has 0.3 million parameters; at the default width, it would have 6
    model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(
        tower, base, spatial_hidden_size=16, dtype=torch.float32
    )
    model.save_pretrained(folder / "model")
    LlavaSPProcessor.from_vision_text_pretrained(tower, base, model.config).save_pretrained(folder / "model")
    records = [
        {
            "id": f"record {index}",
            **({"image": image} if image else {}),
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}" if image else question},
                {"from": "gpt", "value": answer},
            ],
        }
        for index, (image, question, answer) in enumerate(RECORDS)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return folder
