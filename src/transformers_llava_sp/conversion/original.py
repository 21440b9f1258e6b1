# Copyright 2026 The transformers-llava-sp authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The layout of the LLaVA-SP authors' checkpoints: which key is what, and which architecture a checkpoint has"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from .checkpoint import ConversionError, TensorFiles, read_json


MODEL_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
LORA_PROJECTOR_WEIGHTS = "non_lora_trainables.bin"
PRETRAINING_WEIGHTS = ("model.bin", "mm_projector.bin")

# In front of every key of a LoRA release, both in the adapter and in the projector's file
LORA_PREFIX = "base_model.model."
PROJECTOR_PREFIX = "model."
# In front of the vision tower's keys where a full checkpoint has them
TOWER_PREFIX = "model.vision_tower.vision_tower."

# In front of the language model's keys in our model, but for its head's
OUR_LANGUAGE_MODEL_PREFIX = "model.language_model."
# What an adapter of ours has to adapt to be one that the authors' layout has
OUR_BLOCKS_PREFIX = OUR_LANGUAGE_MODEL_PREFIX + "layers."

# Where each of the authors' keys goes, `None` for what is dropped. The first pattern that matches a whole key decides.
LANGUAGE_MODEL_KEYS: dict[str, str | None] = {
    # Recomputed from the configuration; checkpoints from before Transformers 4.32 still store it
    r".*\.rotary_emb\.inv_freq": None,
    r"model\.(.+)": OUR_LANGUAGE_MODEL_PREFIX + r"\1",
    r"(lm_head\..+)": r"\1",
}
VISION_TOWER_KEYS: dict[str, str | None] = {
    # 0, 1, 2, ...: a buffer that checkpoints from before Transformers 4.31 still store
    r"(?:.+\.)?embeddings\.position_ids": None,
    # The other half of a contrastive checkpoint, and what joins the two
    r"text_model\..+": None,
    r"(?:visual|text)_projection\..+": None,
    r"logit_(?:scale|bias)": None,
    # What SigLIP makes one feature of the whole image with
    r"(?:vision_model\.)?head\..+": None,
    r"(?:vision_model\.)?(.+)": r"model.vision_tower.\1",
}
# Of a full checkpoint, what is the language model's; all else that is not the tower's is the projector's
LANGUAGE_MODEL_KEY = re.compile(r"lm_head\..+|model\.(embed_tokens|layers|norm)\..+")
# Only checkpoints with image tiles have it; their pre-training never stores it
IMAGE_NEWLINE_KEY = "image_newline"
OUR_IMAGE_NEWLINE_KEY = "model.image_newline.weight"
# Behind their prefix. `{number}` is a mere name: the 224 pixel variant calls kernels of size 2, 4, ... conv_1, conv_2,
# ...; `{scale}` is the kernel's place among the sizes. `{position}` is 0, 2, ...: it counts the activations too.
PROJECTOR_KEYS = {
    "conv_{number}.weight": "spatial_feature_extractor.convolutions.{scale}.weight",
    "conv_{number}.1.weight": "spatial_feature_extractor.convolutions.{scale}.weight",
    "conv_CM.weight": "detail_feature_integrator.detail_convolution.weight",
    "query_projector.0.weight": "detail_feature_integrator.query_norm.weight",
    "query_projector.0.bias": "detail_feature_integrator.query_norm.bias",
    "query_projector.1.weight": "detail_feature_integrator.query_proj.weight",
    "query_projector.1.bias": "detail_feature_integrator.query_proj.bias",
    "key_projector.0.weight": "detail_feature_integrator.key_norm.weight",
    "key_projector.0.bias": "detail_feature_integrator.key_norm.bias",
    "key_projector.1.weight": "detail_feature_integrator.key_proj.weight",
    "key_projector.1.bias": "detail_feature_integrator.key_proj.bias",
    "value_projector.0.weight": "detail_feature_integrator.value_norm.weight",
    "value_projector.0.bias": "detail_feature_integrator.value_norm.bias",
    "value_projector.1.weight": "detail_feature_integrator.value_proj.weight",
    "value_projector.1.bias": "detail_feature_integrator.value_proj.bias",
    "conv_linear.1.weight": "spatial_projection.weight",
    "conv_linear.1.bias": "spatial_projection.bias",
    "mm_projector.{position}.weight": "patch_mlp.layers.{layer}.weight",
    "mm_projector.{position}.bias": "patch_mlp.layers.{layer}.bias",
    "mm_projector.weight": "patch_mlp.layers.0.weight",
    "mm_projector.bias": "patch_mlp.layers.0.bias",
}
OUR_PROJECTOR_PREFIX = "model.multi_modal_projector."
DETAIL_KEYS = [key for key in PROJECTOR_KEYS if re.match(r"conv_CM|(query|key|value)_projector", key)]

SPATIAL_KERNEL_KEY = re.compile(r"conv_(?P<number>\d+)(?P<pooled>\.1)?\.weight")
# What no plain LLaVA has
SPATIAL_KEY = re.compile(r"(conv_\w+|(query|key|value)_projector\w*|tfm_\w+|CM_[LP])\.")

# Ablations of the authors' code that have more, or other, parts than the model
UNSUPPORTED_KEYS = {
    r"(conv|query_projector|key_projector|value_projector)_(small|mid|huge)\..+": (
        "the ablation with three detail convolutions (multi-fuse queries)"
    ),
    r"CM_[LP]\..+": "the ablation with a transformer over the detail features (conv336_CM)",
    r"tfm_\w+\..+|query_\d+": "the ablation with transformers in place of the spatial convolutions (tfm336)",
    r"conv_\d+\.(0\..+|[2-9].*|1\.(?!weight).+)": (
        "the ablation with blocks of several convolutions and BatchNorm (conv_block)"
    ),
}

# What the authors' code calls its variants with all six scales, by whether the maps are crops or pooled, there are
# detail features, and the projection has a bias. It has no others, and finds nothing of this in a checkpoint.
VARIANTS = {
    ("cropping", True, True): "conv336_cropping_sfe_dfi",
    ("cropping", False, False): "conv336",
    ("pooling", True, False): "conv336_adptive_pooling_fuse_49",
    ("pooling", False, False): "conv336_pooling_sfe",
}
# Of the variant for 224 pixels, whose kernels are numbered 1, 2, ... in place of their sizes
NUMBERED_GRID_SIZE, NUMBERED_SCALES = 16, [2, 4, 6, 8, 10, 12, 14, 16]

# All strided convolutions of the authors' code have this stride, which leaves no trace in a checkpoint
DETAIL_STRIDE = 2


class Layout(Enum):
    """What a checkpoint folder can turn out to be. The value is how messages call it."""

    SP_LORA = "a LLaVA-SP LoRA release"
    SP_FULL = "a full LLaVA-SP checkpoint with the language model merged in"
    SP_PRETRAINING = "the output of LLaVA-SP pre-training, the projector alone"
    CONVERTED = "an already converted LLaVA-SP model"
    LLAVA_LORA = "a LoRA release of plain LLaVA-1.5, which has no spatial tokens"
    LLAVA_FULL = "a plain LLaVA-1.5 checkpoint, which has no spatial tokens"
    LLAVA_PRETRAINING = "the projector of a plain LLaVA-1.5, which has no spatial tokens"
    LLAVA_TRANSFORMERS = "a plain LLaVA checkpoint in Transformers' format, which has no spatial tokens"
    ADAPTER = f"a LoRA adapter alone, without the projector ({LORA_PROJECTOR_WEIGHTS})"
    OUR_ADAPTER = "an adapter of an already converted LLaVA-SP model"
    LANGUAGE_MODEL = "a text-only language model"
    CLIP = "a CLIP checkpoint"
    SIGLIP = "a SigLIP checkpoint"
    EMPTY = "an empty folder"
    UNKNOWN = "nothing known: it holds neither weights nor an adapter under the usual names"
    UNKNOWN_WEIGHTS = "a checkpoint of some other model"


def identify_layout(folder: Path) -> Layout:
    """
    What a folder holds, judged by its files and the keys of its tensors.

    Args:
        folder (`Path`): The folder.

    Returns:
        `Layout`: What it is.

    Raises:
        ConversionError: If a file that must be looked into cannot be read.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ConversionError(f"{folder} cannot be read: {error.strerror}.") from error
    if not names:
        return Layout.EMPTY
    if LORA_PROJECTOR_WEIGHTS in names:
        spatial = has_spatial_keys(TensorFiles.open(folder / LORA_PROJECTOR_WEIGHTS))
        return Layout.SP_LORA if spatial else Layout.LLAVA_LORA
    if "adapter_config.json" in names or names.intersection(ADAPTER_WEIGHTS):
        ours = any(
            ".language_model." in key or ".multi_modal_projector.spatial_feature_extractor." in key
            for name in ADAPTER_WEIGHTS
            if name in names
            for key in TensorFiles.open(folder / name)
        )
        return Layout.OUR_ADAPTER if ours else Layout.ADAPTER
    if any(name in names or f"{name}.index.json" in names for name in MODEL_WEIGHTS):
        return identify_model(TensorFiles.from_folder(folder, MODEL_WEIGHTS))
    for name in PRETRAINING_WEIGHTS:
        if name in names:
            spatial = has_spatial_keys(TensorFiles.open(folder / name))
            return Layout.SP_PRETRAINING if spatial else Layout.LLAVA_PRETRAINING
    return Layout.UNKNOWN


def has_spatial_keys(tensors: TensorFiles) -> bool:
    """Whether there is anything in a checkpoint that LLaVA-SP adds to LLaVA."""
    return any(SPATIAL_KEY.match(key.removeprefix(LORA_PREFIX).removeprefix(PROJECTOR_PREFIX)) for key in tensors)


def identify_model(tensors: TensorFiles) -> Layout:
    """What a checkpoint without an adapter is, judged by its keys."""

    def has(pattern: str) -> bool:
        return any(re.match(pattern, key) for key in tensors)

    if has(r"(model\.)?(multi_modal_projector\.)?spatial_feature_extractor\."):
        return Layout.CONVERTED
    if has_spatial_keys(tensors):
        return Layout.SP_FULL
    if has(r"model\.mm_projector\."):
        return Layout.LLAVA_FULL
    if has(r"(model\.)?multi_modal_projector\."):
        return Layout.LLAVA_TRANSFORMERS
    if has(r"(vision_model\.)?embeddings\.patch_embedding\."):
        return Layout.CLIP if has(r"(vision_model\.)?embeddings\.class_embedding") else Layout.SIGLIP
    if has(r"(model|transformer)\.(embed_tokens|wte|layers|h)\."):
        return Layout.LANGUAGE_MODEL
    return Layout.UNKNOWN_WEIGHTS


def original_language_model_key(key: str) -> str:
    """The authors' key of a tensor of the language model's blocks: what `LANGUAGE_MODEL_KEYS` gives, turned round."""
    return "model." + key.removeprefix(OUR_LANGUAGE_MODEL_PREFIX)


def rename_key(key: str, table: Mapping[str, str | None]) -> str | None:
    """
    Where a key goes.

    Args:
        key (`str`): A key of the source.
        table (`Mapping[str, str | None]`): Patterns and what they become.

    Returns:
        `str`: The key in our model, `None` if the tensor is dropped, or `key` itself if no pattern matches it.
    """
    for pattern, replacement in table.items():
        if match := re.fullmatch(pattern, key):
            return None if replacement is None else match.expand(replacement)
    return key


@dataclass(frozen=True)
class OriginalConfig:
    """
    What the authors' config.json says about the model beside the language model. Its other fields are about training.

    Args:
        base_model (`str`, *optional*): Hub id or path of what training started from.
        vision_tower (`str`, *optional*): Hub id or path of the vision tower.
        vision_hidden_size (`int`, *optional*): Width of its features.
        vision_feature_layer (`int`): Which of its hidden states is read.
        num_patch_layers (`int`, *optional*): Layers of the patch MLP, `None` for a single one without an index.
        pad_to_square (`bool`): Whether images are padded to squares.
        image_grid_pinpoints (`list[list[int]]`, *optional*): The resolutions that images are cut into tiles at, each
            as (height, width) in pixels, in the authors' order. `None` if they are not.
    """

    base_model: str | None
    vision_tower: str | None
    vision_hidden_size: int | None
    vision_feature_layer: int
    num_patch_layers: int | None
    pad_to_square: bool
    image_grid_pinpoints: list[list[int]] | None

    @classmethod
    def from_file(cls, path: Path) -> "OriginalConfig":
        """
        Read config.json, with the defaults of the authors' code for what it leaves out.

        Args:
            path (`Path`): The file.

        Raises:
            ConversionError: If it asks for something that the model, or this converter, cannot do.
        """
        config = read_json(path)

        def refuse(name: str, value: Any, reason: str) -> ConversionError:
            return ConversionError(f"{path}: {name} is {value!r}: {reason}.")

        aspect_ratio = config.get("image_aspect_ratio")
        if aspect_ratio is not None and not isinstance(aspect_ratio, str):
            raise refuse("image_aspect_ratio", aspect_ratio, "expected a string such as 'pad'")
        image_tiles = aspect_ratio == "anyres"
        if aspect_ratio is not None and aspect_ratio.startswith("anyres") and not image_tiles:
            raise refuse("image_aspect_ratio", aspect_ratio, "of the ways to cut images into tiles, expected 'anyres'")
        pinpoints = read_pinpoints(config.get("image_grid_pinpoints")) if image_tiles else None
        if image_tiles and pinpoints is None:
            raise refuse(
                "image_grid_pinpoints",
                config.get("image_grid_pinpoints"),
                "with image_aspect_ratio 'anyres', expected a list of resolutions [width, height] in pixels",
            )
        merge_type = config.get("mm_patch_merge_type", "flat")
        if image_tiles and merge_type != "spatial_unpad":
            raise refuse("mm_patch_merge_type", merge_type, "with image tiles, expected 'spatial_unpad'")
        if not image_tiles and merge_type != "flat":
            raise refuse("mm_patch_merge_type", merge_type, "without image tiles only 'flat' has a meaning")

        feature = config.get("mm_vision_select_feature", "patch")
        if feature != "patch":
            raise refuse(
                "mm_vision_select_feature",
                feature,
                "only 'patch' can be converted, since with the class token the features form no square grid",
            )
        layer = config.get("mm_vision_select_layer")
        if type(layer) is not int:
            raise refuse("mm_vision_select_layer", layer, "expected the index of a hidden state, such as -2")
        hidden_size = config.get("mm_hidden_size")
        if hidden_size is not None and type(hidden_size) is not int:
            raise refuse("mm_hidden_size", hidden_size, "expected the width of the vision tower's features")

        # Absent, their loader takes the first for false and the second for true
        if config.get("mm_use_im_start_end", False):
            raise refuse(
                "mm_use_im_start_end",
                True,
                "tokens around each image's tokens are not supported; the releases have none",
            )
        if config.get("mm_use_im_patch_token", True):
            raise refuse(
                "mm_use_im_patch_token",
                config.get("mm_use_im_patch_token"),
                "an <im_patch> token is not supported. The authors' loader takes an absent value for true; if the "
                "checkpoint was trained without the token, write false into the file",
            )

        projector_type = config.get("mm_projector_type", "linear")
        match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", str(projector_type))
        if match is None and projector_type != "linear":
            raise refuse("mm_projector_type", projector_type, "expected 'linear' or 'mlpNx_gelu'")
        # Their loader looks for the older name as well
        vision_tower = config.get("mm_vision_tower", config.get("vision_tower"))
        if vision_tower is not None and not isinstance(vision_tower, str):
            raise refuse("mm_vision_tower", vision_tower, "expected the Hub id or the path of the vision tower")
        base_model = config.get("_name_or_path")
        return cls(
            base_model=base_model if isinstance(base_model, str) and base_model else None,
            vision_tower=vision_tower,
            vision_hidden_size=hidden_size,
            vision_feature_layer=layer,
            num_patch_layers=int(match[1]) if match else None,
            pad_to_square=aspect_ratio == "pad",
            image_grid_pinpoints=pinpoints,
        )


def read_pinpoints(stated: Any) -> list[list[int]] | None:
    """
    The resolutions that images are cut into tiles at.

    Args:
        stated (`Any`): The value of `image_grid_pinpoints` in config.json: pairs of (width, height), or text that
            stands for them, as the authors' training writes it.

    Returns:
        `list[list[int]]`: Pairs of (height, width), as Transformers has them, in the same order; `None` if the value
        is something else.
    """
    if isinstance(stated, str):
        try:
            stated = ast.literal_eval(stated)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return None
    if not isinstance(stated, (list, tuple)) or not stated:
        return None
    for pair in stated:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            return None
        if any(type(side) is not int or side < 1 for side in pair):
            return None
    return [[height, width] for width, height in stated]
