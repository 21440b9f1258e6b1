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
"""Checking a converted folder, reloaded from disk, against the tensors that it was converted from"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GenerationConfig
from transformers.utils.logging import tqdm

from ..configuration_llava_sp import LlavaSPConfig, LlavaSPProjectorConfig
from ..modeling_llava_sp import LlavaSPProjector
from ..processing_llava_sp import LlavaSPProcessor
from .checkpoint import ConversionError, TensorFiles, join_keys
from .original import OUR_PROJECTOR_PREFIX
from .plan import ConversionPlan, Source, model_shapes, split_rows


# Rows of each sampled matrix that are computed again in float64
NUM_SAMPLED_ROWS = 64
# Both sides compute in float32, with sums in another order
PROJECTOR_TOLERANCE = 1e-4
SEED = 0


@dataclass(frozen=True)
class Verification:
    """
    What the checks of a converted folder have found.

    Args:
        num_tensors (`int`): Tensors whose keys, shapes, dtypes and values were compared.
        num_exact (`int`): Of these, tensors that are bit by bit their source after the cast.
        num_sampled (`int`): Merged matrices of which rows were computed again in float64.
        merge_error (`float`): Largest difference of these, in parts of what rounding may cause.
        projector_error (`float`, *optional*): Largest difference between the projector's output and that of the
            plain formulas, relative to the largest value. `None` where the authors' projector is not at hand.
    """

    num_tensors: int
    num_exact: int
    num_sampled: int
    merge_error: float
    projector_error: float | None

    def __str__(self) -> str:
        lines = [f"verified: {self.num_tensors} tensors, {self.num_exact} bit by bit their source after the cast"]
        if self.num_sampled:
            lines.append(
                f"  rows of {self.num_sampled} merged matrices against W + B A alpha / r in float64: "
                f"{self.merge_error:.2f} of the rounding error"
            )
        if self.projector_error is not None:
            lines.append(
                f"  the projector's output against plain convolutions: within {self.projector_error:.1e} of its "
                "largest value"
            )
        return "\n".join(lines)


def verify(folder: Path, plan: ConversionPlan) -> Verification:
    """
    Reload a converted folder and compare all of it with what it was converted from.

    Args:
        folder (`Path`): The folder.
        plan ([`ConversionPlan`]): What was to be written.

    Returns:
        [`Verification`]: The figures.

    Raises:
        ConversionError: If anything differs.
    """
    stored = TensorFiles.from_folder(folder, ("model.safetensors",))
    config = LlavaSPConfig.from_pretrained(folder)
    GenerationConfig.from_pretrained(folder).validate(strict=True)
    processor = LlavaSPProcessor.from_pretrained(folder)
    pinpoints = getattr(processor.image_processor, "image_grid_pinpoints", None)
    if processor.num_image_tokens != config.projector_config.num_image_tokens:
        raise failed(f"the processor has {processor.num_image_tokens} tokens for an image, not the model's number")
    if pinpoints != config.image_grid_pinpoints:
        raise failed(f"the processor cuts images into tiles at {pinpoints}, not at {config.image_grid_pinpoints}")
    check_keys(stored, config, plan.dtype)

    num_exact = 0
    for key, source in tqdm(plan.sources.items(), desc="Verifying", unit="tensor"):
        num_exact += compare(key, stored[key], source, plan.dtype)
    samples = sample_merged(plan.sources)
    merge_error = max((measure_merge(stored[key], plan.sources[key]) for key in samples), default=0.0)
    if not merge_error <= 1:
        raise failed(f"merged weights differ from W + B A alpha / r by {merge_error:.3g} times the rounding error")
    projector_error = None
    if plan.projector is not None:
        projector_error = measure_projector(
            stored, config.projector_config, plan.projector, plan.projector_prefix, plan.dtype
        )
        if not projector_error <= PROJECTOR_TOLERANCE:
            raise failed(f"the projector's output differs from the plain formulas by {projector_error:.1e}")
    return Verification(len(stored), num_exact, len(samples), merge_error, projector_error)


def failed(what: str) -> ConversionError:
    """The error for a folder that is not what it should be."""
    return ConversionError(
        f"The converted weights, read again, are wrong: {what}. Nothing was kept. If the disk is sound, this is an "
        "error of the converter: please report it."
    )


def check_keys(stored: TensorFiles, config: LlavaSPConfig, dtype: torch.dtype) -> None:
    """Raise a `ConversionError` if the stored tensors are not those of a model with this configuration."""
    shapes = model_shapes(config)
    if difference := sorted(shapes.keys() ^ set(stored)):
        raise failed(f"keys are missing or unexpected: {join_keys(difference)}")
    for key, shape in shapes.items():
        if tuple(stored[key].shape) != shape or stored[key].dtype != dtype:
            raise failed(f"{key!r} is {stored[key].dtype} of shape {tuple(stored[key].shape)}, not {dtype}, {shape}")


def compare(key: str, stored: torch.Tensor, source: Source, dtype: torch.dtype) -> bool:
    """
    Compare a stored tensor with its source after the cast.

    Args:
        key (`str`): Its key.
        stored (`torch.Tensor`): It, as stored.
        source ([`Source`]): Where it comes from.
        dtype (`torch.dtype`): The dtype of the cast.

    Returns:
        `bool`: Whether all of it is taken over from the source, without arithmetic.

    Raises:
        ConversionError: If it differs.
    """
    if source.is_merged:
        start = 0
        for block in source.convert(dtype):
            if not torch.equal(stored[start : start + len(block)], block):
                raise failed(f"{key!r} is not the merged matrix")
            start += len(block)
        return False
    tensor = source.weights[source.key]
    for start, rows in split_rows(tensor):
        if not torch.equal(stored[start : start + len(rows)], rows.to(dtype)):
            raise failed(f"{key!r} differs from {source}")
    new_rows = stored[len(tensor) :]
    if len(new_rows):
        total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
        for _, rows in split_rows(tensor):
            total += rows.sum(dim=0, dtype=torch.float64)
        mean = total / len(tensor)
        if not torch.equal(new_rows, mean.to(dtype).expand_as(new_rows)):
            raise failed(f"new rows of {key!r} are not the mean of the others")
    return not len(new_rows)


def sample_merged(sources: dict[str, Source]) -> list[str]:
    """The keys of the first and the last merged matrix of each kind, such as that of the queries."""
    samples: dict[str, list[str]] = {}
    for key, source in sources.items():
        if source.is_merged:
            samples.setdefault(re.sub(r"\.\d+\.", ".*.", key), []).append(key)
    return [key for keys in samples.values() for key in dict.fromkeys((keys[0], keys[-1]))]


def measure_merge(stored: torch.Tensor, source: Source) -> float:
    """
    How far rows of a merged matrix are from W + B A alpha / r in float64.

    Args:
        stored (`torch.Tensor`): The matrix as stored.
        source ([`Source`]): Where it comes from.

    Returns:
        `float`: The largest difference, in parts of what rounding may cause: once to the stored dtype, and before that
        each of the sums in float32.
    """
    adapter = source.adapter
    assert adapter is not None
    key_a, key_b = adapter.pairs[source.adapted_key]
    weight = source.weights[source.key]
    rows = torch.linspace(0, len(weight) - 1, min(len(weight), NUM_SAMPLED_ROWS)).long()
    original = weight[rows].double().flatten(1)
    lora_a, lora_b = adapter.tensors[key_a].double().flatten(1), adapter.tensors[key_b][rows].double().flatten(1)
    exact = original + lora_b @ lora_a * adapter.scaling
    terms = original.abs() + lora_b.abs() @ lora_a.abs() * abs(adapter.scaling)
    info = torch.finfo(stored.dtype)
    cast_error = (exact.abs() * info.eps + info.smallest_normal * info.eps) / 2
    sum_error = (adapter.rank + 2) * terms * torch.finfo(torch.float32).eps / 2
    return float(((stored[rows].double().flatten(1) - exact).abs() / (cast_error + sum_error)).max())


def measure_projector(
    stored: TensorFiles, config: LlavaSPProjectorConfig, original: TensorFiles, prefix: str, dtype: torch.dtype
) -> float:
    """
    How far the projector's output on a random patch grid is from that of the plain formulas on the authors' tensors.
    Both compute in float32, with one convolution in memory at a time.

    Args:
        stored (`TensorFiles`): The converted weights.
        config ([`LlavaSPProjectorConfig`]): The projector's configuration.
        original (`TensorFiles`): The authors' projector.
        prefix (`str`): What stands in front of every key of it.
        dtype (`torch.dtype`): That the weights were cast to.

    Returns:
        `float`: The largest difference, relative to the largest value.
    """
    generator = torch.Generator().manual_seed(SEED)
    patch_features = torch.randn(1, config.grid_size**2, config.vision_hidden_size, generator=generator)
    pooling = config.spatial_variant == "pooling"
    expected = plain_output(
        original, prefix, patch_features, config.grid_size, pooling=pooling, stride=config.detail_stride, dtype=dtype
    )
    found = projector_output(stored, config, patch_features)
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def projector_output(
    stored: TensorFiles, config: LlavaSPProjectorConfig, patch_features: torch.Tensor
) -> torch.Tensor:
    """
    The output of a [`LlavaSPProjector`] whose weights stay on disk until a module needs them.

    Args:
        stored (`TensorFiles`): The converted weights.
        config ([`LlavaSPProjectorConfig`]): The projector's configuration.
        patch_features (`torch.Tensor` of shape `(images, patches, vision_hidden_size)`): Its input, in float32.

    Returns:
        `torch.Tensor` of shape `(images, spatial_tokens + patch_tokens, text_hidden_size)`.
    """
    with torch.device("meta"):
        projector = LlavaSPProjector(config).eval()
    for name, module in projector.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            keys = {key: f"{OUR_PROJECTOR_PREFIX}{name}.{key}" for key, _ in module.named_parameters(recurse=False)}

            def load(module: torch.nn.Module, inputs: tuple, keys: dict[str, str] = keys) -> None:
                state = {key: stored[stored_key].float() for key, stored_key in keys.items()}
                module.load_state_dict(state, assign=True)

            module.register_forward_pre_hook(load)
            module.register_forward_hook(unload)
    return projector(patch_features).last_hidden_state


def unload(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    """A forward hook that frees a module's weights."""
    module.to("meta")


@torch.no_grad()
def plain_output(
    original: TensorFiles,
    prefix: str,
    patch_features: torch.Tensor,
    grid_size: int,
    *,
    pooling: bool,
    stride: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """
    The projector's formulas on the authors' tensors, as the paper writes them: maps cut out or pooled, convolutions as
    convolutions. Shares nothing with the model.

    Args:
        original (`TensorFiles`): The authors' projector.
        prefix (`str`): What stands in front of every key of it.
        patch_features (`torch.Tensor` of shape `(images, patches, vision_hidden_size)`): Its input, in float32.
        grid_size (`int`): Side of the patch grid, in patches.
        pooling (`bool`): Whether maps are pooled, not cropped.
        stride (`int`): Of the detail convolution, in patches.
        dtype (`torch.dtype`): That the tensors are rounded to first.

    Returns:
        `torch.Tensor` of shape `(images, spatial_tokens + patch_tokens, text_hidden_size)`.
    """

    def tensor(key: str) -> torch.Tensor:
        return original[prefix + key].to(dtype).float()

    def convolve(features: torch.Tensor, key: str, stride: int = 1) -> torch.Tensor:
        # PyTorch reorders kernels in memory, and a second copy of the largest in float32 would be too much
        blocks = (rows.to(dtype).float() for _, rows in split_rows(original[prefix + key]))
        return torch.cat([F.conv2d(features, block, stride=stride) for block in blocks], dim=1)

    names = [key.removeprefix(prefix) for key in original]
    grid = patch_features.transpose(1, 2).unflatten(2, (grid_size, grid_size))
    kernels = [name for name in names if re.match(r"conv_\d", name)]
    spatial = []
    for name in sorted(kernels, key=lambda name: original[prefix + name].shape[-1]):
        size = original[prefix + name].shape[-1]
        margin = (grid_size - size) // 2
        feature_map = F.adaptive_avg_pool2d(grid, size) if pooling else F.pad(grid, [-margin] * 4)
        spatial.append(convolve(feature_map, name).flatten(1))
    tokens = torch.stack(spatial, dim=1)

    if "conv_CM.weight" in names:
        details = convolve(grid, "conv_CM.weight", stride).flatten(2).transpose(1, 2)

        def project(name: str, features: torch.Tensor) -> torch.Tensor:
            norm_weight, norm_bias = tensor(f"{name}_projector.0.weight"), tensor(f"{name}_projector.0.bias")
            normed = F.layer_norm(features, features.shape[-1:], norm_weight, norm_bias)
            return F.linear(normed, tensor(f"{name}_projector.1.weight"), tensor(f"{name}_projector.1.bias"))

        attended = F.scaled_dot_product_attention(
            project("query", tokens), project("key", details), project("value", details)
        )
        tokens = torch.cat([tokens, attended], dim=-1)
    bias = tensor("conv_linear.1.bias") if "conv_linear.1.bias" in names else None
    tokens = F.linear(F.gelu(tokens), tensor("conv_linear.1.weight"), bias)

    patches = patch_features
    layers = sorted({name.rsplit(".", 1)[0] for name in names if name.startswith("mm_projector")})
    for index, layer in enumerate(layers):
        patches = F.linear(F.gelu(patches) if index else patches, tensor(f"{layer}.weight"), tensor(f"{layer}.bias"))
    return torch.cat([tokens, patches], dim=1)
