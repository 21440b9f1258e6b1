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

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..configuration_llava_sp import LlavaSPProjectorConfig
from .checkpoint import ConversionError, TensorFiles, join_keys, read_json


MODEL_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
LORA_PROJECTOR_WEIGHTS = "non_lora_trainables.bin"
PRETRAINING_WEIGHTS = ("model.bin", "mm_projector.bin")

# In front of every key of a LoRA release, both in the adapter and in the projector's file
LORA_PREFIX = "base_model.model."
PROJECTOR_PREFIX = "model."

# Where each of the authors' keys goes, `None` for what is dropped. The first pattern that matches a whole key decides.
LANGUAGE_MODEL_KEYS: dict[str, str | None] = {
    # Recomputed from the configuration; checkpoints from before Transformers 4.32 still store it
    r".*\.rotary_emb\.inv_freq": None,
    r"model\.(.+)": r"model.language_model.\1",
    r"(lm_head\..+)": r"\1",
}
VISION_TOWER_KEYS: dict[str, str | None] = {
    # 0, 1, 2, ...: a buffer that checkpoints from before Transformers 4.31 still store
    r"(?:.+\.)?embeddings\.position_ids": None,
    # The other half of a contrastive checkpoint, and what joins the two
    r"text_model\..+": None,
    r"(?:visual|text)_projection\..+": None,
    r"logit_scale": None,
    r"(?:vision_model\.)?(.+)": r"model.vision_tower.\1",
}
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
    names = {path.name for path in folder.iterdir()}
    if not names:
        return Layout.EMPTY
    if LORA_PROJECTOR_WEIGHTS in names:
        return (
            Layout.SP_LORA if has_spatial_keys(TensorFiles([folder / LORA_PROJECTOR_WEIGHTS])) else Layout.LLAVA_LORA
        )
    if "adapter_config.json" in names or names.intersection(ADAPTER_WEIGHTS):
        return Layout.ADAPTER
    if any(name in names or f"{name}.index.json" in names for name in MODEL_WEIGHTS):
        return identify_model(TensorFiles.from_folder(folder, MODEL_WEIGHTS))
    for name in PRETRAINING_WEIGHTS:
        if name in names:
            spatial = has_spatial_keys(TensorFiles([folder / name]))
            return Layout.SP_PRETRAINING if spatial else Layout.LLAVA_PRETRAINING
    return Layout.UNKNOWN


def has_spatial_keys(tensors: TensorFiles) -> bool:
    """Whether there is anything in a checkpoint that LLaVA-SP adds to LLaVA."""
    return any(SPATIAL_KEY.match(key.removeprefix(LORA_PREFIX).removeprefix(PROJECTOR_PREFIX)) for key in tensors)


def identify_model(tensors: TensorFiles) -> Layout:
    """What a checkpoint without an adapter is, judged by its keys."""

    def has(pattern: str) -> bool:
        return any(re.match(pattern, key) for key in tensors)

    if has(r"(model\.multi_modal_projector\.)?spatial_feature_extractor\."):
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
        vision_tower (`str`, *optional*): Hub id or path of the vision tower.
        vision_hidden_size (`int`, *optional*): Width of its features.
        vision_feature_layer (`int`): Which of its hidden states is read.
        num_patch_layers (`int`, *optional*): Layers of the patch MLP, `None` for a single one without an index.
        pad_to_square (`bool`): Whether images are padded to squares.
    """

    vision_tower: str | None
    vision_hidden_size: int | None
    vision_feature_layer: int
    num_patch_layers: int | None
    pad_to_square: bool

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
        if aspect_ratio is not None and aspect_ratio.startswith("anyres"):
            raise refuse(
                "image_aspect_ratio",
                aspect_ratio,
                "this checkpoint cuts images into tiles, which cannot be converted yet; checkpoints with 'pad' can",
            )
        merge_type = config.get("mm_patch_merge_type", "flat")
        if merge_type != "flat":
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
        return cls(
            vision_tower=config.get("mm_vision_tower"),
            vision_hidden_size=hidden_size,
            vision_feature_layer=layer,
            num_patch_layers=int(match[1]) if match else None,
            pad_to_square=aspect_ratio == "pad",
        )


@dataclass(frozen=True)
class SpatialKernel:
    """
    A convolution of the Spatial Feature Extractor.

    Args:
        key (`str`): Its key, without the prefix.
        number (`int`): The number in the key.
        size (`int`): Its size, which is its scale, in patches.
        pooled (`bool`): Whether the key says that a pooling precedes it.
    """

    key: str
    number: int
    size: int
    pooled: bool


def read_projector(
    tensors: TensorFiles, prefix: str, original_config: OriginalConfig, grid_size: int
) -> tuple[LlavaSPProjectorConfig, dict[str, str]]:
    """
    The projector's architecture, from the names and shapes of its tensors: nothing else records it.

    Args:
        tensors (`TensorFiles`): The projector's tensors, and no others.
        prefix (`str`): What stands in front of every key.
        original_config (`OriginalConfig`): The authors' configuration.
        grid_size (`int`): Side of the vision tower's patch grid, in patches.

    Returns:
        `tuple(LlavaSPProjectorConfig, dict[str, str])`: The configuration and, for each key of `tensors`, the key in
        our model.

    Raises:
        ConversionError: If tensors are missing or unexpected, variants are mixed, or kernels do not fit the grid.
    """
    file = tensors.file_of(next(iter(tensors)))
    keys = {key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
    refuse_ablations(file, keys)
    kernels = read_spatial_kernels(tensors, prefix)
    variant = read_variant(file, kernels)

    use_detail_integrator = not keys.isdisjoint(DETAIL_KEYS)
    # Only where the authors' code always writes one can a bias be missing
    has_bias = "conv_linear.1.bias" in keys or (variant == "cropping" and use_detail_integrator)
    renamed = projector_keys(kernels, use_detail_integrator, has_bias, original_config.num_patch_layers)

    missing = [prefix + key for key in renamed if key not in keys]
    unexpected = sorted(set(tensors) - {prefix + key for key in renamed})
    sizes = [kernel.size for kernel in kernels]
    missing_kernels = find_missing_kernels(kernels, grid_size) if kernels else {0: "conv_*.weight"}
    missing_keys = [prefix + key for key in missing_kernels.values()]
    if missing or unexpected or any(size < max(sizes, default=1) for size in missing_kernels):
        problems = [f"missing {join_keys(missing_keys + missing)}"] if missing_keys + missing else []
        problems += [f"unexpected {join_keys(unexpected)}"] if unexpected else []
        num_layers = original_config.num_patch_layers or 1
        raise ConversionError(
            f"{file} does not hold a projector with spatial kernels of sizes {sizes}, "
            f"{'with' if use_detail_integrator else 'without'} detail features, and a patch path of {num_layers} "
            f"layer{'s' * (num_layers > 1)} (mm_projector_type in config.json): {'; '.join(problems)}. The authors' "
            "intermediate checkpoints lack tensors: convert a final one."
        )
    if sizes[-1] != grid_size:
        alternative = f", or the checkpoint lacks {join_keys(missing_keys)}" if missing_keys else ""
        raise ConversionError(
            f"{file}: the largest spatial kernel is {sizes[-1]}x{sizes[-1]}, so it belongs to a vision tower with a "
            f"grid of {sizes[-1]}x{sizes[-1]} patches, but this one has {grid_size}x{grid_size}. It is not the one "
            f"that the checkpoint was trained with (config.json names {original_config.vision_tower!r})"
            f"{alternative}."
        )

    spatial_hidden_size, vision_hidden_size = tensors[prefix + kernels[-1].key].shape[:2]
    projection = prefix + "conv_linear.1.weight"
    if tensors[projection].ndim != 2:
        raise ConversionError(
            f"{file}: {projection!r} has shape {tuple(tensors[projection].shape)}, expected a matrix."
        )
    try:
        config = LlavaSPProjectorConfig(
            vision_hidden_size=vision_hidden_size,
            text_hidden_size=tensors[projection].shape[0],
            grid_size=grid_size,
            spatial_variant=variant,
            spatial_scales=sizes,
            spatial_hidden_size=spatial_hidden_size,
            use_detail_integrator=use_detail_integrator,
            detail_kernel_size=kernel_size(tensors, prefix + "conv_CM.weight") if use_detail_integrator else None,
            detail_stride=DETAIL_STRIDE,
            spatial_projection_bias=has_bias,
            num_patch_layers=original_config.num_patch_layers or 1,
        )
    except ValueError as error:
        raise ConversionError(f"{file}: {error}") from error
    return config, {prefix + key: OUR_PROJECTOR_PREFIX + ours for key, ours in renamed.items()}


def projector_keys(
    kernels: list[SpatialKernel], use_detail_integrator: bool, has_bias: bool, num_patch_layers: int | None
) -> dict[str, str]:
    """
    The keys of a complete projector, by `PROJECTOR_KEYS`.

    Args:
        kernels (`list[SpatialKernel]`): Its spatial kernels, by growing size.
        use_detail_integrator (`bool`): Whether it has detail features.
        has_bias (`bool`): Whether the projection of its spatial features has a bias.
        num_patch_layers (`int`, *optional*): Layers of its patch MLP, `None` for a single one without an index.

    Returns:
        `dict[str, str]`: Our key for each of the authors' keys, without prefixes.
    """
    kernel_template = PROJECTOR_KEYS["conv_{number}.weight"]
    renamed = {kernel.key: kernel_template.format(scale=scale) for scale, kernel in enumerate(kernels)}
    fixed = DETAIL_KEYS if use_detail_integrator else []
    fixed = [*fixed, "conv_linear.1.weight", *(["conv_linear.1.bias"] if has_bias else [])]
    if num_patch_layers is None:
        fixed += ["mm_projector.weight", "mm_projector.bias"]
    renamed.update((key, PROJECTOR_KEYS[key]) for key in fixed)
    for layer in range(num_patch_layers or 0):
        for kind in ("weight", "bias"):
            template = PROJECTOR_KEYS[f"mm_projector.{{position}}.{kind}"]
            renamed[f"mm_projector.{2 * layer}.{kind}"] = template.format(layer=layer)
    return renamed


def refuse_ablations(file: Path, keys: set[str]) -> None:
    """Raise a `ConversionError` for ablations of the authors' code that the model does not express."""
    for key in sorted(keys):
        for pattern, ablation in UNSUPPORTED_KEYS.items():
            if re.fullmatch(pattern, key):
                raise ConversionError(f"{file}: {key!r} belongs to {ablation}, which this model does not have.")
    if keys.intersection(DETAIL_KEYS) == {"conv_CM.weight"} and not any(map(SPATIAL_KERNEL_KEY.fullmatch, keys)):
        raise ConversionError(
            f"{file}: 'conv_CM.weight' without spatial convolutions is the ablation that takes the detail features "
            "themselves as tokens (conv336_conv_49), which this model does not have."
        )


def kernel_size(tensors: TensorFiles, key: str) -> int:
    """The size of a square convolution kernel in patches, or a `ConversionError` if the tensor is none."""
    shape = tuple(tensors[key].shape)
    if len(shape) != 4 or shape[2] != shape[3] or min(shape) < 1:
        raise ConversionError(
            f"{tensors.file_of(key)}: {key!r} has shape {shape}, expected a square kernel (out, in, size, size)."
        )
    return shape[2]


def read_spatial_kernels(tensors: TensorFiles, prefix: str) -> list[SpatialKernel]:
    """The spatial kernels of a checkpoint by growing size, or a `ConversionError` if two have the same size."""
    kernels: dict[int, SpatialKernel] = {}
    for key in tensors:
        match = SPATIAL_KERNEL_KEY.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if match is not None:
            kernel = SpatialKernel(
                match[0], int(match["number"]), kernel_size(tensors, key), match["pooled"] is not None
            )
            if other := kernels.get(kernel.size):
                raise ConversionError(
                    f"{tensors.file_of(key)}: {prefix + other.key!r} and {key!r} both have kernels of size "
                    f"{kernel.size}, expected one for each scale."
                )
            kernels[kernel.size] = kernel
    return [kernels[size] for size in sorted(kernels)]


def read_variant(file: Path, kernels: list[SpatialKernel]) -> str:
    """
    Cropping or pooling. For the whole grid there is nothing to pool, so the largest kernel's key is the same in both,
    and with that one alone so is all they compute.
    """
    pooled = [kernel.key for kernel in kernels if kernel.pooled]
    cropped = [kernel.key for kernel in kernels[:-1] if not kernel.pooled]
    if pooled and cropped:
        raise ConversionError(
            f"{file} mixes two variants: {join_keys(cropped)} of cropping, {join_keys(pooled)} of pooling."
        )
    return "pooling" if pooled else "cropping"


def find_missing_kernels(kernels: list[SpatialKernel], grid_size: int) -> dict[int, str]:
    """
    The kernels that a checkpoint should have and has not: in all variants the sizes are the multiples of the smallest
    one, up to the whole grid.

    Args:
        kernels (`list[SpatialKernel]`): The kernels there are, by growing size.
        grid_size (`int`): Side of the vision tower's patch grid, in patches.

    Returns:
        `dict[int, str]`: The key of each size that is missing, without the prefix.
    """
    sizes = [kernel.size for kernel in kernels]
    step = min(larger - smaller for smaller, larger in pairwise([0, *sizes]))
    first, whole = kernels[0], max(sizes[-1], grid_size)
    missing = {}
    for size in range(step, whole + 1, step):
        if size not in sizes:
            pooling = ".1" if first.pooled and size < whole else ""
            missing[size] = f"conv_{size * first.number // first.size}{pooling}.weight"
    return missing
