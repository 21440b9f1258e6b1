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
"""The projector's architecture, which stands nowhere but in the names and shapes of its tensors"""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from ..configuration_llava_sp import LlavaSPProjectorConfig
from ..modeling_llava_sp import LlavaSPProjector
from .checkpoint import ConversionError, TensorFiles, join_keys
from .original import (
    DETAIL_KEYS,
    DETAIL_STRIDE,
    NUMBERED_GRID_SIZE,
    NUMBERED_SCALES,
    OUR_PROJECTOR_PREFIX,
    PROJECTOR_KEYS,
    SPATIAL_KERNEL_KEY,
    UNSUPPORTED_KEYS,
    OriginalConfig,
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
    tensors: TensorFiles, prefix: str, original_config: OriginalConfig, grid_size: int | None = None
) -> tuple[LlavaSPProjectorConfig, dict[str, str]]:
    """
    The projector's architecture, from the names and shapes of its tensors: nothing else records it.

    Args:
        tensors (`TensorFiles`): The projector's tensors, and no others.
        prefix (`str`): What stands in front of every key.
        original_config (`OriginalConfig`): The authors' configuration.
        grid_size (`int`, *optional*): Side of the vision tower's patch grid, in patches. Where the tower is not known,
            the largest kernel's, which covers the whole grid in every variant.

    Returns:
        `tuple(LlavaSPProjectorConfig, dict[str, str])`: The configuration and, for each key of `tensors`, the key in
        our model.

    Raises:
        ConversionError: If tensors are missing, unexpected or of another shape, variants are mixed, or kernels do not
            fit the grid.
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
    # Without the tower, an incomplete checkpoint's largest kernel says little: most are made for the released grid
    released_grid_size = LlavaSPProjectorConfig().grid_size if missing else 0
    grid_size = grid_size or max([*sizes, released_grid_size])
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
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in LlavaSPProjector(config).state_dict().items()}
    for key, ours in renamed.items():
        tensors.check(prefix + key, shapes[ours])
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


def original_projector_keys(config: LlavaSPProjectorConfig) -> dict[str, str]:
    """
    The keys that the authors' code gives a projector's tensors: what [`read_projector`] finds, turned round.

    Args:
        config (`LlavaSPProjectorConfig`): The projector's configuration.

    Returns:
        `dict[str, str]`: The authors' key for each of ours, without prefixes.
    """
    sizes = list(config.spatial_scales or ())
    numbered = config.grid_size == NUMBERED_GRID_SIZE and sizes == NUMBERED_SCALES
    kernels = []
    for position, size in enumerate(sizes, start=1):
        number = position if numbered else size
        pooled = config.spatial_variant == "pooling" and size != config.grid_size
        kernels.append(SpatialKernel(f"conv_{number}{'.1' if pooled else ''}.weight", number, size, pooled))
    num_layers = config.num_patch_layers if config.num_patch_layers > 1 else None
    renamed = projector_keys(kernels, config.use_detail_integrator, config.spatial_projection_bias, num_layers)
    return {ours: key for key, ours in renamed.items()}


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
