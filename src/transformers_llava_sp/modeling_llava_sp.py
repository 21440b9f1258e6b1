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
"""PyTorch LLaVA-SP model"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from os import PathLike
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    SuppressTokensLogitsProcessor,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_llava_sp import ImageLayout, LlavaSPConfig, LlavaSPProjectorConfig


try:  # Transformers 5.20 and later can keep only the hidden states that are used
    from transformers.utils.output_capturing import select_hidden_states
except ImportError:

    def select_hidden_states(selection: Callable) -> Callable:
        return lambda function: function


# What Transformers calls the language model's cache: `cache` from 5.24 on, `past_key_values` in earlier releases
CACHE = "cache" if "cache" in (field.name for field in fields(CausalLMOutputWithPast)) else "past_key_values"


def cache_argument(cache: Cache | None, past_key_values: Cache | None) -> dict[str, Cache]:
    """
    The cache, passed by either of its names, as an argument by the name that the installed Transformers has for it.

    Args:
        cache (`Cache`, *optional*): Keys and values of the tokens before.
        past_key_values (`Cache`, *optional*): The same.

    Returns:
        `dict[str, Cache]`: The argument, or nothing if there is no cache.

    Raises:
        ValueError: If both are passed.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError(
            "`cache` and `past_key_values` are two names of the same argument: pass one of them. PEFT's prefix tuning "
            "passes the second by itself, and works where Transformers has no name but that, before 5.24."
        )
    given = past_key_values if cache is None else cache
    return {} if given is None else {CACHE: given}


@dataclass
class LlavaSPProjectorOutput(ModelOutput):
    """
    Output of [`LlavaSPProjector`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(images, spatial_tokens + patch_tokens, text_hidden_size)`):
            The image's tokens in the language model's space, the spatial tokens first, in the order of their scales.
        detail_attentions (`torch.FloatTensor` of shape `(images, spatial_tokens, detail_tokens)`, *optional*):
            Attention weights of the Detail Feature Integrator, returned with `output_attentions=True` where there is
            one. Detail tokens are the positions of the strided convolution, row by row.
    """

    last_hidden_state: torch.Tensor | None = None
    detail_attentions: torch.Tensor | None = None


@dataclass
class LlavaSPImageFeaturesOutput(BaseModelOutputWithPooling):
    """
    Output of `get_image_features`: the vision tower's outputs and the projected tokens.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(images, vision_tokens, vision_hidden_size)`):
            The vision tower's last hidden state.
        pooler_output (`torch.FloatTensor` of shape `(images, spatial_tokens + patch_tokens, text_hidden_size)`):
            The tokens that replace each image's placeholders, the spatial tokens first. For images in tiles a list of
            tensors, each of shape `(image_tokens, text_hidden_size)`.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            The vision tower's hidden states. From Transformers 5.20 on only the one that is used is kept, the others
            are `None`, unless `output_hidden_states=True` is passed.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            The vision tower's attention weights, with `output_attentions=True` and an attention implementation that
            computes them.
        detail_attentions (`torch.FloatTensor` of shape `(images, spatial_tokens, detail_tokens)`, *optional*):
            Attention weights of the Detail Feature Integrator, with `output_attentions=True`.
    """

    detail_attentions: torch.Tensor | None = None


@dataclass
class LlavaSPModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of [`LlavaSPModel`]: the language model's, and the image's tokens.

    Args:
        image_hidden_states (`torch.FloatTensor`, *optional*):
            The tokens that replaced the images' placeholders, of shape
            `(images, spatial_tokens + patch_tokens, text_hidden_size)`, where `pixel_values` were passed. With tiles
            of shape `(image_tokens, text_hidden_size)`, one image after the other.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class LlavaSPCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Output of [`LlavaSPForConditionalGeneration`]: that of every causal language model, and the image's tokens.

    Args:
        image_hidden_states (`torch.FloatTensor`, *optional*):
            The tokens that replaced the images' placeholders, of shape
            `(images, spatial_tokens + patch_tokens, text_hidden_size)`, where `pixel_values` were passed. With tiles
            of shape `(image_tokens, text_hidden_size)`, one image after the other.
    """

    image_hidden_states: torch.Tensor | None = None


# Which libraries multiply on this CPU: MKL in float32, and oneDNN in bfloat16, with AMX where PyTorch can tell
HAS_MKL = torch.backends.mkl.is_available()
HAS_AMX = hasattr(torch.cpu, "get_capabilities") and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def is_eager_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a CPU computes at once and in a tensor's dtype: neither compiled nor traced, and without autocast."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled(tensor.device.type)
    )


def multiply_on_cpu(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    `F.linear`, and for the number formats and CPUs of which it is known in a form in which a library multiplies a
    large weight about as fast as it can be read: the released models' spatial path is 1.2 to 1.3 times as fast for one
    image, on two cores with AMX, and no slower for 64 (docs/performance.md).

    Args:
        rows (`torch.Tensor` of shape `(rows, in_features)`): What to multiply.
        weight (`torch.Tensor` of shape `(out_features, in_features)`): By what, contiguous.

    Returns:
        `torch.Tensor` of shape `(rows, out_features)`.
    """
    is_single = rows.shape[0] == 1
    if rows.dtype == torch.float32 and HAS_MKL:
        # MKL may leave a product to a single thread, but shares out a batch of them, and those of more than one row
        # further
        parts = weight.unflatten(0, (math.gcd(64 if is_single else 2, weight.shape[0]), -1))
        return torch.bmm(rows.expand(len(parts), -1, -1), parts.mT).transpose(0, 1).flatten(1)
    if rows.dtype == torch.bfloat16 and is_single and HAS_AMX:
        # oneDNN packs a product's right operand, and takes the left one as it is
        parts = weight.unflatten(0, (math.gcd(2, weight.shape[0]), -1))
        return torch.bmm(parts, rows.mT.expand(len(parts), -1, -1)).flatten()[None]
    return F.linear(rows, weight)


def average_on_cpu(maps: torch.Tensor, size: int) -> torch.Tensor:
    """
    `F.adaptive_avg_pool2d` of square maps by products, which take a CPU less than half of the time for one image: of
    the maps with the averages of columns, then with those of rows.

    Args:
        maps (`torch.Tensor` of shape `(images, channels, height, height)`): What to average, in float32 or float64.
        size (`int`): Side of the maps to return.

    Returns:
        `torch.Tensor` of shape `(images, channels, size, size)`.
    """
    unit = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)
    averages = F.adaptive_avg_pool1d(unit[None], size)[0]  # (height, size)
    return averages.mT @ (maps @ averages)


class MatmulConv2d(nn.Conv2d):
    """
    A convolution as a matrix product over its windows. Kernels here are large and windows few: on a CPU, PyTorch's
    own convolution takes several times as long for them, and its gradient tens of times. In training the windows are
    kept, 13 MB for each image with the released models' details in bfloat16. No convolution here has padding, dilation
    or groups, nor have PEFT's layers beside one, which are of this class as well. The weight keeps its shape
    `(out_channels, in_channels, size, size)`, as checkpoints store it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if (self.padding, self.dilation, self.groups) != ((0, 0), (1, 1), 1):
            raise ValueError(f"a convolution here has neither padding nor dilation nor groups: {self}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input (`torch.Tensor` of shape `(images, in_channels, height, width)`): The map.

        Returns:
            `torch.Tensor` of shape `(images, out_channels, rows, columns)`.
        """
        (height, width), (row_stride, column_stride) = self.kernel_size, self.stride
        windows = input.unfold(2, height, row_stride).unfold(3, width, column_stride)
        windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)  # (images, rows, columns, in_channels * size * size)
        weight = self.weight.flatten(1)
        # For training nothing else is known to be faster
        if is_eager_on_cpu(windows) and not torch.is_grad_enabled():
            products = multiply_on_cpu(windows.flatten(0, 2), weight).unflatten(0, windows.shape[:3])
            products = products if self.bias is None else products + self.bias
        else:
            products = F.linear(windows, weight, self.bias)
        return products.permute(0, 3, 1, 2)


class SpatialFeatureExtractor(nn.Module):
    """
    The Spatial Feature Extractor (section 3.2 of the paper): one feature per scale, each a convolution over a whole
    square map of the patch grid. Cropping takes centred crops, from central region to global; pooling takes the grid
    average-pooled to each size, from abstract to specific.
    """

    def __init__(self, config: LlavaSPProjectorConfig):
        super().__init__()
        self.spatial_variant = config.spatial_variant
        self.spatial_scales: list[int] = config.spatial_scales  # type: ignore[assignment]  # filled in by the config
        self.convolutions = nn.ModuleList(
            MatmulConv2d(config.vision_hidden_size, config.spatial_hidden_size, kernel_size=size, bias=False)
            for size in self.spatial_scales
        )

    def get_feature_maps(self, patch_grid: torch.Tensor) -> list[torch.Tensor]:
        """
        Args:
            patch_grid (`torch.Tensor` of shape `(images, channels, grid_size, grid_size)`): The patch grid.

        Returns:
            `list[torch.Tensor]`: For each scale the map, of shape `(images, channels, scale, scale)`.
        """
        grid_size = patch_grid.shape[-1]
        if self.spatial_variant == "cropping":
            starts = [(grid_size - size) // 2 for size in self.spatial_scales]
            return [
                patch_grid[:, :, start : start + size, start : start + size]
                for start, size in zip(starts, self.spatial_scales, strict=True)
            ]
        pool: Callable[[torch.Tensor, int], torch.Tensor] = F.adaptive_avg_pool2d
        source = patch_grid
        if is_eager_on_cpu(patch_grid):
            # Converted once for all scales
            pool, source = average_on_cpu, patch_grid.to(torch.promote_types(patch_grid.dtype, torch.float32))
        return [
            patch_grid if size == grid_size else pool(source, size).to(patch_grid.dtype)
            for size in self.spatial_scales
        ]

    def forward(self, patch_grid: torch.Tensor) -> torch.Tensor:
        """
        Args:
            patch_grid (`torch.Tensor` of shape `(images, vision_hidden_size, grid_size, grid_size)`): The patch grid.

        Returns:
            `torch.Tensor` of shape `(images, scales, spatial_hidden_size)`.
        """
        maps = self.get_feature_maps(patch_grid)
        features = [convolution(each).flatten(1) for convolution, each in zip(self.convolutions, maps, strict=True)]
        return torch.stack(features, dim=1)


class DetailFeatureIntegrator(nn.Module):
    """
    The Detail Feature Integrator (section 3.3 of the paper): the spatial features attend, with one head and without
    output projection, to detail features that a strided convolution takes from the patch grid, and the result is
    concatenated behind them.
    """

    def __init__(self, config: LlavaSPProjectorConfig):
        super().__init__()
        hidden_size = config.spatial_hidden_size
        self.scaling = hidden_size**-0.5
        self.detail_convolution = MatmulConv2d(
            config.vision_hidden_size,
            hidden_size,
            kernel_size=config.detail_kernel_size,
            stride=config.detail_stride,
            bias=False,
        )
        self.query_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.query_proj = nn.Linear(hidden_size, hidden_size)
        self.key_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.key_proj = nn.Linear(hidden_size, hidden_size)
        self.value_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.value_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, spatial_features: torch.Tensor, patch_grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            spatial_features (`torch.Tensor` of shape `(images, scales, spatial_hidden_size)`): The queries.
            patch_grid (`torch.Tensor` of shape `(images, vision_hidden_size, grid_size, grid_size)`): The patch grid.

        Returns:
            `tuple(torch.Tensor)`: The features of shape `(images, scales, 2 * spatial_hidden_size)` and the attention
            weights of shape `(images, scales, detail_tokens)`.
        """
        detail_features = self.detail_convolution(patch_grid).flatten(2).transpose(1, 2)  # (images, details, dim)

        query = self.query_proj(self.query_norm(spatial_features))  # (images, scales, dim)
        key = self.key_proj(self.key_norm(detail_features))  # (images, details, dim)
        value = self.value_proj(self.value_norm(detail_features))  # (images, details, dim)

        scores = torch.matmul(query, key.transpose(1, 2)) * self.scaling  # (images, scales, details)
        attention = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        integrated = torch.matmul(attention, value)  # (images, scales, dim)
        return torch.cat([spatial_features, integrated], dim=-1), attention


class PatchMLP(nn.Module):
    """
    The patch path of LLaVA-1.5, linear layers with an activation between them; or that of InternVL, which first makes
    one feature of several neighbouring patches and normalises it.
    """

    def __init__(self, config: LlavaSPProjectorConfig):
        super().__init__()
        self.grid_size = config.grid_size
        self.downsample_factor = config.patch_downsample_factor
        hidden_size = config.vision_hidden_size * self.downsample_factor**2
        self.norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps) if config.patch_layer_norm else nn.Identity()
        widths = [hidden_size, *[config.text_hidden_size] * config.num_patch_layers]
        self.layers = nn.ModuleList(nn.Linear(width, next_width) for width, next_width in pairwise(widths))
        self.act = ACT2FN[config.hidden_act]

    def downsample(self, patch_features: torch.Tensor) -> torch.Tensor:
        """
        Concatenate each square of `downsample_factor` patches in each direction, row by row: the pixel shuffle of
        InternVL, with its order of channels.

        Args:
            patch_features (`torch.Tensor` of shape `(images, patches, channels)`): The patches, row by row.

        Returns:
            `torch.Tensor` of shape `(images, patches / factor ** 2, channels * factor ** 2)`.
        """
        factor, side = self.downsample_factor, self.grid_size // self.downsample_factor
        squares = patch_features.unflatten(1, (side, factor, side, factor)).transpose(2, 3)
        return squares.flatten(3, 5).flatten(1, 2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(images, patches, vision_hidden_size)`): The patch features.

        Returns:
            `torch.Tensor` of shape `(images, patch_tokens, text_hidden_size)`.
        """
        if self.downsample_factor > 1:
            hidden_states = self.downsample(hidden_states)
        hidden_states = self.layers[0](self.norm(hidden_states))
        for layer in self.layers[1:]:
            hidden_states = layer(self.act(hidden_states))
        return hidden_states


def image_token_positions(layout: ImageLayout) -> torch.Tensor:
    """
    Where an image's tokens come from.

    Args:
        layout ([`ImageLayout`]): The image's layout.

    Returns:
        `torch.LongTensor` of shape `(num_tokens,)`: Positions in the tokens of all its tiles, one tile after another,
        each with its spatial tokens first; -1 for a separator.
    """
    num_spatial, side = layout.num_spatial_tokens, layout.patch_grid_size
    starts = torch.arange(layout.num_tiles) * (num_spatial + side**2)
    positions = [(starts[:, None] + torch.arange(num_spatial)).flatten(), torch.arange(side**2) + num_spatial]
    if layout.num_tiles > 1:
        patches = starts[1:].view(layout.tile_rows, 1, layout.tile_columns, 1) + num_spatial
        patches = patches + torch.arange(side**2).view(side, 1, side)
        grid = patches.reshape(layout.tile_rows * side, layout.tile_columns * side)
        grid = grid[layout.row_padding : layout.row_padding + layout.num_rows]
        grid = grid[:, layout.column_padding : layout.column_padding + layout.num_columns]
        positions.append(F.pad(grid, (0, 1), value=-1).flatten())
    return torch.cat(positions)


class LlavaSPPreTrainedModel(PreTrainedModel):
    """Base of the LLaVA-SP models: weight initialisation, loading, saving and what the attention backends may be."""

    config_class = LlavaSPConfig
    config: LlavaSPConfig
    base_model_prefix = "model"
    input_modalities: ClassVar[tuple[str, ...]] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["LlavaSPProjector"]
    _skip_keys_device_placement: ClassVar = ["cache", "past_key_values"]

    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def post_init(self) -> None:
        """As every model's, without the classes that a vision tower names for its text half: FSDP looks for each."""
        super().post_init()
        classes = {type(module).__name__ for module in self.modules()}
        named: Any = self._no_split_modules
        named &= classes


class LlavaSPProjector(LlavaSPPreTrainedModel):
    """
    The multi-modal projector of LLaVA-SP: spatial tokens from the Spatial Feature Extractor and the Detail Feature
    Integrator, and one token per patch, in the language model's space. It is a model of its own, the product of
    pre-training, and can be loaded, saved and pushed alone.

    Args:
        config ([`LlavaSPProjectorConfig`]): Configuration of the projector.

    Example:

    ```python
    >>> import torch
    >>> from transformers_llava_sp import LlavaSPProjector, LlavaSPProjectorConfig

    >>> config = LlavaSPProjectorConfig(vision_hidden_size=64, text_hidden_size=96, grid_size=12)
    >>> projector = LlavaSPProjector(config)
    >>> projector(torch.randn(2, 144, 64)).last_hidden_state.shape
    torch.Size([2, 150, 96])
    ```"""

    config_class = LlavaSPProjectorConfig
    config: LlavaSPProjectorConfig
    main_input_name = "patch_features"
    input_modalities = ("image",)
    supports_gradient_checkpointing = False

    def __init__(self, config: LlavaSPProjectorConfig):
        super().__init__(config)
        self.spatial_feature_extractor = SpatialFeatureExtractor(config)
        self.detail_feature_integrator = DetailFeatureIntegrator(config) if config.use_detail_integrator else None
        self.spatial_act = ACT2FN[config.hidden_act]
        self.spatial_projection = nn.Linear(
            config.spatial_hidden_size * (2 if config.use_detail_integrator else 1),
            config.text_hidden_size,
            bias=config.spatial_projection_bias,
        )
        self.patch_mlp = PatchMLP(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # PyTorch's own initialisation, as the authors train from: a fixed standard deviation would make the largest
        # map's output some hundred times larger than the smallest's, for they add up 16 to 576 positions.
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self, patch_features: torch.Tensor, output_attentions: bool = False, **kwargs: Any
    ) -> tuple | LlavaSPProjectorOutput:
        """
        Args:
            patch_features (`torch.Tensor` of shape `(images, grid_size ** 2, vision_hidden_size)`):
                The vision tower's patch features without class token, row by row. Cast to the projector's dtype.
            output_attentions (`bool`, *optional*, defaults to `False`):
                Whether to return the attention weights of the Detail Feature Integrator.

        Returns:
            [`LlavaSPProjectorOutput`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: If the features do not form the configured grid.
        """
        grid_size, channels = self.config.grid_size, self.config.vision_hidden_size
        if patch_features.ndim != 3 or patch_features.shape[1:] != (grid_size**2, channels):
            raise ValueError(
                f"The projector expects patch features of shape (images, {grid_size**2}, {channels}), a grid of "
                f"{grid_size}x{grid_size}, but got {tuple(patch_features.shape)}. Check the size of the images and "
                "whether `vision_feature_select_strategy` drops the class token where, and only where, the vision "
                "tower has one."
            )
        patch_features = patch_features.to(self.dtype)
        # In the weights' layout, for all maps at once
        patch_grid = patch_features.mT.unflatten(2, (grid_size, grid_size)).contiguous()  # (images, dim, grid, grid)

        spatial_features = self.spatial_feature_extractor(patch_grid)  # (images, scales, dim)
        detail_attentions = None
        if self.detail_feature_integrator is not None:
            spatial_features, detail_attentions = self.detail_feature_integrator(spatial_features, patch_grid)
        spatial_tokens = self.spatial_projection(self.spatial_act(spatial_features))  # (images, scales, text_dim)
        patch_tokens = self.patch_mlp(patch_features)  # (images, patches, text_dim)

        return LlavaSPProjectorOutput(
            last_hidden_state=torch.cat([spatial_tokens, patch_tokens], dim=1),  # (images, scales + patches, text_dim)
            detail_attentions=detail_attentions if output_attentions else None,
        )


class ImageNewline(nn.Module):
    """
    What separates the rows of an image that is cut into tiles: a vector in the language model's space. A module, so
    that PEFT can train and save it beside an adapter.
    """

    def __init__(self, config: LlavaSPConfig):
        super().__init__()
        text_config: Any = config.text_config
        self.weight = nn.Parameter(torch.empty(text_config.hidden_size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append the vector to `tokens` of shape `(num_tokens, text_hidden_size)`."""
        return torch.cat([tokens, self.weight.to(tokens.device, tokens.dtype)[None]])


class LlavaSPModel(LlavaSPPreTrainedModel):
    """
    The LLaVA-SP model without a language modeling head: vision tower, projector and language model.

    Args:
        config ([`LlavaSPConfig`]): Configuration of the model.
    """

    def __init__(self, config: LlavaSPConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        # The first forward would do it, under a lock that torch.compile cannot trace
        maybe_install_capturing_hooks(self.vision_tower)
        self.multi_modal_projector = LlavaSPProjector._from_config(config.projector_config)
        self.language_model = AutoModel.from_config(config.text_config)
        if config.image_grid_pinpoints is not None:
            self.image_newline = ImageNewline(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ImageNewline):
            # As the authors: of unit length, about
            init.normal_(module.weight, mean=0.0, std=module.weight.numel() ** -0.5)

    @can_return_tuple
    @select_hidden_states(lambda model: [model.config.vision_feature_layer])
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaSPImageFeaturesOutput:
        """
        Encode images with the vision tower and project them into the language model's space.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`):
                The processed images. With tiles of shape `(images, tiles, channels, height, width)`, the whole image
                first; what is behind an image's last tile is ignored. A single tile is the whole image alone.
            image_sizes (`torch.LongTensor` of shape `(images, 2)`, *optional*):
                (height, width) of each image in pixels before it was processed; needed for tiles.
            output_attentions (`bool`, *optional*, defaults to `False`):
                Whether to return the attention weights of the Detail Feature Integrator, and the vision tower's.

        Returns:
            [`LlavaSPImageFeaturesOutput`], or a tuple with `return_dict=False`. Its `pooler_output` is one tensor of
            shape `(images, spatial_tokens + patch_tokens, text_hidden_size)`, or with tiles a list of one tensor of
            shape `(image_tokens, text_hidden_size)` per image. The other tensors have one row for each tile.

        Raises:
            ValueError: If the images or tiles have another size or number than the configuration and `image_sizes`
                imply.
        """
        self.check_pixel_values(pixel_values)
        layouts = self.get_image_layouts(pixel_values, image_sizes)
        if layouts is not None:
            pixel_values = self.select_tiles(pixel_values, layouts)
        elif pixel_values.ndim == 5:
            pixel_values = pixel_values.squeeze(1)

        kwargs["output_hidden_states"] = kwargs.get("output_hidden_states") or True
        image_outputs = self.vision_tower(
            pixel_values, output_attentions=output_attentions, return_dict=True, **kwargs
        )
        patch_features = image_outputs.hidden_states[self.config.vision_feature_layer]  # (images, tokens, channels)
        if patch_features.shape[0] != pixel_values.shape[0]:
            raise ValueError(
                f"{type(self.vision_tower).__name__} makes {patch_features.shape[0]} sequences of "
                f"{pixel_values.shape[0]} images: LLaVA-SP needs a tower that makes one of each."
            )
        if self.config.vision_feature_select_strategy == "default":
            patch_features = patch_features[:, -(self.config.projector_config.grid_size**2) :]
        projected = self.multi_modal_projector(patch_features, output_attentions=output_attentions, return_dict=True)

        image_features = projected.last_hidden_state  # (tiles, scales + patches, text_dim)
        if layouts is not None:
            image_features = self.join_tiles(image_features, layouts)

        return LlavaSPImageFeaturesOutput(
            last_hidden_state=image_outputs.last_hidden_state,
            pooler_output=image_features,
            hidden_states=image_outputs.hidden_states,
            attentions=image_outputs.attentions,
            detail_attentions=projected.detail_attentions,
        )

    def check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        """Raise a `ValueError` if images have another size or number of dimensions than the model takes."""
        size = self.config.tile_size
        num_dimensions = (4,) if self.config.image_grid_pinpoints is None else (4, 5)
        if pixel_values.ndim not in num_dimensions or pixel_values.shape[-2:] != (size, size):
            expected = f"(images, channels, {size}, {size})"
            if len(num_dimensions) == 2:
                expected += f" or (images, tiles, channels, {size}, {size})"
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}, expected {expected}: the vision tower takes "
                f"{size}x{size} pixels, and `image_grid_pinpoints` is {self.config.image_grid_pinpoints}."
            )

    def get_image_layouts(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None
    ) -> list[ImageLayout] | None:
        """
        How the tokens of images in tiles stand in the sequence.

        Args:
            pixel_values (`torch.Tensor`): The processed images.
            image_sizes (`torch.LongTensor` of shape `(images, 2)`, *optional*): (height, width) of each in pixels.

        Returns:
            `list[ImageLayout]`: One layout per image, `None` if the images have no tiles.

        Raises:
            ValueError: If `image_sizes` is missing or does not fit `pixel_values`.
        """
        if pixel_values.ndim == 4 or pixel_values.shape[1] == 1:
            return None
        num_images, num_tiles = pixel_values.shape[:2]
        if image_sizes is None or len(image_sizes) != num_images:
            raise ValueError(
                f"`pixel_values` has {num_images} images in tiles, but `image_sizes` is "
                f"{'missing' if image_sizes is None else f'that of {len(image_sizes)}'}: pass everything that the "
                "processor returns."
            )
        sizes = image_sizes.tolist() if isinstance(image_sizes, torch.Tensor) else image_sizes
        layouts = [self.config.get_image_layout(size) for size in sizes]
        for size, layout in zip(sizes, layouts, strict=True):
            if layout.num_tiles > num_tiles:
                raise ValueError(
                    f"An image of {size[0]}x{size[1]} pixels (`image_sizes`) has {layout.num_tiles} tiles by "
                    f"`image_grid_pinpoints` {self.config.image_grid_pinpoints}, but `pixel_values` only has "
                    f"{num_tiles} for each. Model and processor must have the same `image_grid_pinpoints`."
                )
        return layouts

    def select_tiles(self, pixel_values: torch.Tensor, layouts: list[ImageLayout]) -> torch.Tensor:
        """
        The tiles of all images, without what stands behind each image's last one to make a tensor of them.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, tiles, channels, height, width)`): The processed images.
            layouts (`list[ImageLayout]`): Their layouts.

        Returns:
            `torch.Tensor` of shape `(all_tiles, channels, height, width)`.
        """
        # In numbers of Python's, so that torch.compile knows how many there are
        num_tiles = pixel_values.shape[1]
        indices = [
            image * num_tiles + tile for image, layout in enumerate(layouts) for tile in range(layout.num_tiles)
        ]
        return pixel_values.flatten(0, 1).index_select(0, torch.tensor(indices, device=pixel_values.device))

    def join_tiles(self, tile_features: torch.Tensor, layouts: list[ImageLayout]) -> list[torch.Tensor]:
        """
        Put the tokens of images in tiles into their order, and separators between the rows.

        Args:
            tile_features (`torch.Tensor` of shape `(all_tiles, spatial_tokens + patch_tokens, text_hidden_size)`): The
                tokens of each tile.
            layouts (`list[ImageLayout]`): The images' layouts.

        Returns:
            `list[torch.Tensor]`: For each image a tensor of shape `(image_tokens, text_hidden_size)`.
        """
        tokens_per_tile, num_tokens = tile_features.shape[1], tile_features.shape[0] * tile_features.shape[1]
        indices, start = [], 0
        for layout in layouts:
            positions = image_token_positions(layout)
            # The separator stands behind all tokens
            indices.append(torch.where(positions < 0, num_tokens, positions + start))
            start += layout.num_tiles * tokens_per_tile
        tokens = self.image_newline(tile_features.flatten(0, 1))
        joined = tokens.index_select(0, torch.cat(indices).to(tokens.device))
        return list(joined.split([layout.num_tokens for layout in layouts]))

    def count_image_tokens(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> int | list[int]:
        """
        How many tokens images take.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): The processed images. With
                tiles of shape `(images, tiles, channels, height, width)`.
            image_sizes (`torch.LongTensor` of shape `(images, 2)`, *optional*): (height, width) of each in pixels.

        Returns:
            `int` or `list[int]`: The number of tokens of every image, or with tiles that of each.

        Raises:
            ValueError: If `image_sizes` is missing or does not fit `pixel_values`.
        """
        layouts = self.get_image_layouts(pixel_values, image_sizes)
        if layouts is None:
            return self.config.projector_config.num_image_tokens
        return [layout.num_tokens for layout in layouts]

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Where the sequence has `<image>` placeholders: by their id, or by their embedding where there are no ids.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): The token ids.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, text_hidden_size)`, *optional*):
                The embeddings, used where `input_ids` is `None`.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, sequence_length)`.
        """
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)

    def check_placeholders(
        self, placeholder_mask: torch.Tensor, num_images: int, tokens_per_image: int | list[int]
    ) -> None:
        """
        Raise a `ValueError` if the number of placeholders is not the number of image features.

        Args:
            placeholder_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Where placeholders are.
            num_images (`int`): Number of images in the batch.
            tokens_per_image (`int` or `list[int]`): Number of features of each image.
        """
        each = tokens_per_image
        num_features = sum(each) if isinstance(each, list) else num_images * each
        num_placeholders = placeholder_mask.sum()
        projector_config = self.config.projector_config
        torch_compilable_check(
            num_placeholders == num_features,
            lambda: (
                f"Image features and image tokens do not match: {int(num_placeholders)} image tokens in the input, "
                f"but {num_features} features, {tokens_per_image} for each of {num_images} images (variant "
                f"{projector_config.spatial_variant!r}, {projector_config.num_spatial_tokens} spatial tokens)."
            ),
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaSPModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids, with a run of `<image>` ids for each image.
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`, *optional*):
                The processed images of the whole batch, in the order of their placeholders. With tiles of shape
                `(images, tiles, channels, height, width)`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of the tokens.
            cache (`Cache`, *optional*):
                Keys and values of the tokens before.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, text_hidden_size)`, *optional*):
                Embeddings in place of `input_ids`.
            image_sizes (`torch.LongTensor` of shape `(images, 2)`, *optional*):
                (height, width) of each image in pixels before it was processed; needed for tiles.
            past_key_values (`Cache`, *optional*):
                Another name of `cache`, the only one before Transformers 5.24.

        Returns:
            [`LlavaSPModelOutputWithPast`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: If neither or both of `input_ids` and `inputs_embeds` are passed, or two caches; if images have
                another size than the model takes; or if there are more or fewer placeholders than image features.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_features = None
        if pixel_values is not None:
            placeholder_mask = self.get_placeholder_mask(input_ids, inputs_embeds).to(inputs_embeds.device)
            # Before the images are encoded, since the check waits for the GPU
            self.check_pixel_values(pixel_values)
            self.check_placeholders(
                placeholder_mask, pixel_values.shape[0], self.count_image_tokens(pixel_values, image_sizes)
            )
            image_features = self.get_image_features(pixel_values, image_sizes, return_dict=True).pooler_output
            if isinstance(image_features, list):
                image_features = torch.cat(image_features)
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(
                placeholder_mask.unsqueeze(-1).expand_as(inputs_embeds), image_features
            )

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **cache_argument(cache, past_key_values),
            **kwargs,
        )
        return LlavaSPModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            **{CACHE: outputs.get(CACHE)},
        )


SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What loading a language model and loading its tokenizer have in common
TOKENIZER_KWARGS = (
    "cache_dir",
    "gguf_file",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
VOCABULARY_MULTIPLE = 64
PLAIN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# As many are named in an error
MAX_KEYS = 10


def attention_of(vision_config: PreTrainedConfig, text_config: PreTrainedConfig) -> dict[str, str | None]:
    """The attention implementations of loaded parts, as a configuration takes them, which would forget them."""
    return {
        "": text_config._attn_implementation,
        "vision_config": vision_config._attn_implementation,
        "text_config": text_config._attn_implementation,
    }


def split_config_fields(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Arguments that are fields of the projector's configuration, of the model's, and all others."""
    common = {field.name for field in fields(PreTrainedConfig)}
    kwargs = {**kwargs, **(kwargs.get("projector_config") or {})}
    kwargs.pop("projector_config", None)
    split: list[dict[str, Any]] = []
    for config_class in (LlavaSPProjectorConfig, LlavaSPConfig):
        names = {field.name for field in fields(config_class)} - common
        own = {LlavaSPConfig.attribute_map.get(name, name): name for name in kwargs}
        split.append({name: kwargs[passed] for name, passed in own.items() if name in names})
        kwargs = {passed: kwargs[passed] for name, passed in own.items() if name not in names}
    return split[0], split[1], kwargs


def load_part(
    auto_class: Any, name_or_model: str | PathLike | PreTrainedModel, role: str, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """
    Load a part of a model, unless it is loaded already.

    Args:
        auto_class (`type`): The Auto class that loads it.
        name_or_model (`str`, `PathLike` or [`PreTrainedModel`]): A folder, a Hub id, or the part itself.
        role (`str`): What it is, for the error message.
        kwargs (`dict[str, Any]`): Arguments of `from_pretrained`.

    Raises:
        ValueError: If it is something else, or weights are missing, of other shapes or quantized.
    """
    if isinstance(name_or_model, PreTrainedModel):
        return name_or_model
    try:
        model, loading = auto_class.from_pretrained(
            name_or_model,
            **kwargs,
            # Refused below, by name: on its own, Transformers would fill in what is missing at random
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        # Transformers goes on to list all classes that it has
        raise ValueError(f"{name_or_model} is no {role}: {auto_class.__name__} has no class for it.") from error
    if random_weights := sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}):
        more = f" and {len(random_weights) - MAX_KEYS} more" if len(random_weights) > MAX_KEYS else ""
        raise ValueError(
            f"The {role} {name_or_model} lacks weights in the shapes that its config.json implies: "
            f"{', '.join(random_weights[:MAX_KEYS])}{more}."
        )
    if hasattr(model.config, "quantization_config"):
        if any(parameter.dtype not in PLAIN_DTYPES for parameter in model.parameters()):
            raise ValueError(
                f"The {role} {name_or_model} is quantized: pass plain weights, and quantize the model that is made."
            )
        # GGUF files are dequantized when they are loaded, but the note that they were quantized stays
        del model.config.quantization_config
    return model


def load_vision_tower(name_or_model: str | PathLike | PreTrainedModel, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load a vision tower, or that of a contrastive model; see [`load_part`]."""
    if not isinstance(name_or_model, PreTrainedModel):
        config: Any = AutoConfig.from_pretrained(
            name_or_model, **{key: kwargs[key] for key in TOKENIZER_KWARGS if key in kwargs}
        )
        config = getattr(config, "vision_config", config)
        if config.model_type == "siglip_vision_model":
            # Its feature of the whole image, which the patches do not depend on, would be weights without use
            config.vision_use_head = False
        kwargs = {"config": config, **kwargs}
    return load_part(AutoModel, name_or_model, "vision tower", kwargs)


def authors_variant(spatial_variant: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a projector to be trained: of those variants that the authors trained, only one has this bias."""
    bias = spatial_variant == "cropping" and fields.get("use_detail_integrator", True)
    return {"spatial_variant": spatial_variant, "spatial_projection_bias": bias, **fields}


@torch.no_grad()
def grow_embeddings(text_model: PreTrainedModel, num_tokens: int) -> None:
    """
    Append rows to a language model's embeddings and head, so that they are `num_tokens` at least and a multiple of 64.
    They are the mean of the others, so that none of them is ever the likeliest token.
    """
    old_size = text_model.get_input_embeddings().weight.shape[0]
    if old_size >= num_tokens and old_size % VOCABULARY_MULTIPLE == 0:
        return
    text_model.resize_token_embeddings(
        max(old_size, num_tokens), pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False
    )
    for embeddings in (text_model.get_input_embeddings(), text_model.get_output_embeddings()):
        weight = embeddings.weight
        weight[old_size:] = weight[:old_size].mean(dim=0, dtype=torch.float64).to(weight.dtype)


class MaskTokensLogitsProcessor(LogitsProcessor):
    """
    As [`SuppressTokensLogitsProcessor`], which finds out anew with each token which of the vocabulary it masks: from
    some fifty on, as many as a grown vocabulary may have unused, it sorts them and waits for the GPU.

    Args:
        suppress_tokens (`torch.LongTensor` of shape `(tokens,)`): Ids of the tokens that are not to be generated.
    """

    def __init__(self, suppress_tokens: torch.Tensor):
        self.suppress_tokens = suppress_tokens
        self.mask: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Not used.
            scores (`torch.FloatTensor` of shape `(batch_size, vocab_size)`): The scores of the next token.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, vocab_size)`: The scores, minus infinity for the tokens.
        """
        # An assistant may have another vocabulary
        if self.mask is None or self.mask.shape[0] != scores.shape[-1] or self.mask.device != scores.device:
            vocabulary = torch.arange(scores.shape[-1], device=scores.device)
            self.mask = torch.isin(vocabulary, self.suppress_tokens.to(scores.device))
        return scores.masked_fill(self.mask, -torch.inf)


class LlavaSPForConditionalGeneration(LlavaSPPreTrainedModel, GenerationMixin):
    """
    LLaVA-SP: a vision tower, the projector and a language model with its head. It answers questions about images.

    Args:
        config ([`LlavaSPConfig`]): Configuration of the model.
    """

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan: ClassVar = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LlavaSPConfig):
        super().__init__(config)
        self.model = LlavaSPModel(config)
        if not hasattr(self.model.language_model, "embed_tokens"):
            raise ValueError(
                f"{type(self.model.language_model).__name__} has no `embed_tokens`: LLaVA-SP needs a language model "
                "whose embeddings are called so, as those of Llama, Mistral, Qwen and Gemma are."
            )
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        if self.generation_config.suppress_tokens is None:
            # An answer has no images. Checkpoints bring their own generation config
            self.generation_config.suppress_tokens = [config.image_token_id]

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | PathLike | PreTrainedModel,
        text_model_name_or_path: str | PathLike | PreTrainedModel,
        *,
        spatial_variant: str = "cropping",
        image_token: str = "<image>",
        vision_kwargs: dict[str, Any] | None = None,
        text_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "LlavaSPForConditionalGeneration":
        """
        Join a vision tower and a language model with a projector that has yet to be trained. The image token gets the
        first id that the tokenizer leaves free, and embeddings, where they have to be appended, that are the mean of
        the others.

        Args:
            vision_model_name_or_path (`str`, `PathLike` or [`PreTrainedModel`]):
                Folder or Hub id of a vision tower, or of a contrastive model that has one, or a loaded vision tower.
            text_model_name_or_path (`str`, `PathLike` or [`PreTrainedModel`]):
                Folder or Hub id of a language model with its tokenizer, or a loaded language model with its head,
                which is taken over and changed. A loaded one needs `image_token_id` unless it was loaded from a folder
                or Hub id with its tokenizer.
            spatial_variant (`str`, *optional*, defaults to `"cropping"`): `"cropping"` or `"pooling"`.
            image_token (`str`, *optional*, defaults to `"<image>"`): The token that stands for an image.
            vision_kwargs (`dict[str, Any]`, *optional*): Arguments for loading the vision tower alone.
            text_kwargs (`dict[str, Any]`, *optional*): Arguments for loading the language model alone, and its
                tokenizer, such as `gguf_file`.
            kwargs (`dict[str, Any]`, *optional*): Fields of [`LlavaSPProjectorConfig`] and [`LlavaSPConfig`], such as
                `use_detail_integrator`, `vision_feature_layer`, `image_grid_pinpoints` or `image_token_id`; all else,
                such as `dtype` or `attn_implementation`, goes to `from_pretrained` of both.

        Returns:
            [`LlavaSPForConditionalGeneration`]: The model, in evaluation mode and in the language model's dtype.
            [`LlavaSPProcessor.from_vision_text_pretrained`] gives its processor.

        Raises:
            ValueError: If the vision tower has no square grid of patches, weights are missing, or the language model
                is of a kind that cannot be taken over.

        Example:

        ```python
        >>> from transformers_llava_sp import LlavaSPForConditionalGeneration, LlavaSPProcessor

        >>> names = "openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"
        >>> model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(*names, spatial_variant="pooling")
        >>> processor = LlavaSPProcessor.from_vision_text_pretrained(*names, model.config)
        ```"""
        projector_fields, config_fields, kwargs = split_config_fields(kwargs)
        vision_tower = load_vision_tower(vision_model_name_or_path, {**kwargs, **(vision_kwargs or {})})
        text_kwargs = {**kwargs, **(text_kwargs or {})}
        text_model = load_part(AutoModelForCausalLM, text_model_name_or_path, "language model", text_kwargs)
        lm_head: Any = text_model.get_output_embeddings()
        text_config: Any = text_model.config
        if text_config.get_text_config() is not text_config or not isinstance(lm_head, nn.Linear):
            raise ValueError(
                f"{type(text_model).__name__} is no language model with a linear head: pass one that takes text alone."
            )
        if getattr(lm_head, "bias", None) is not None:
            raise ValueError(f"The head of {type(text_model).__name__} has a bias, which LLaVA-SP's has not.")

        if "image_token_index" in config_fields:
            # Which of the other ids mean something is not known
            num_tokens = max(config_fields["image_token_index"] + 1, len(text_model.get_input_embeddings().weight))
        else:
            # Added as the processor adds it, so that both get the same id
            name = text_model_name_or_path
            if isinstance(name, PreTrainedModel) and not (name := name.name_or_path):
                raise ValueError("The language model was not loaded from a folder or Hub id: pass `image_token_id`.")
            tokenizer_kwargs = {key: text_kwargs[key] for key in TOKENIZER_KWARGS if key in text_kwargs}
            tokenizer = AutoTokenizer.from_pretrained(name, **tokenizer_kwargs)
            tokenizer.add_tokens([image_token], special_tokens=True)
            config_fields["image_token_index"] = tokenizer.convert_tokens_to_ids(image_token)
            num_tokens = len(tokenizer)
        grow_embeddings(text_model, num_tokens)
        lm_head = text_model.get_output_embeddings()

        config = cls.config_class(
            vision_config=vision_tower.config,
            text_config=text_model.config,
            projector_config=authors_variant(spatial_variant, projector_fields),
            attn_implementation=attention_of(vision_tower.config, text_config),
            **config_fields,
        )
        suppressed = [*{config.image_token_id, *range(num_tokens, config.text_config.vocab_size)}]
        return cls._from_parts(
            config, vision_tower, text_model.base_model, lm_head, text_model.generation_config, suppressed
        )

    @classmethod
    def from_llava(
        cls,
        pretrained_model_name_or_path: str | PathLike | PreTrainedModel,
        *,
        spatial_variant: str = "cropping",
        **kwargs: Any,
    ) -> "LlavaSPForConditionalGeneration":
        """
        Add spatial tokens, which have yet to be trained, to a LLaVA, a LLaVA-NeXT or an InternVL in Transformers'
        format: vision tower, patch path and language model are its own.

        Args:
            pretrained_model_name_or_path (`str`, `PathLike` or [`PreTrainedModel`]):
                Its folder or Hub id, or the loaded model, which is taken over.
            spatial_variant (`str`, *optional*, defaults to `"cropping"`): `"cropping"` or `"pooling"`.
            kwargs (`dict[str, Any]`, *optional*): Fields of [`LlavaSPProjectorConfig`] and [`LlavaSPConfig`]; all
                else, such as `dtype` or `attn_implementation`, goes to `from_pretrained`.

        Returns:
            [`LlavaSPForConditionalGeneration`]: The model, in evaluation mode. [`LlavaSPProcessor.from_llava`] gives
            its processor.

        Raises:
            ValueError: If it is another kind of model, or one that reads several layers of its vision tower.

        Example:

        ```python
        >>> from transformers_llava_sp import LlavaSPForConditionalGeneration, LlavaSPProcessor

        >>> name = "llava-hf/llava-1.5-7b-hf"
        >>> model = LlavaSPForConditionalGeneration.from_llava(name, spatial_variant="cropping")
        >>> processor = LlavaSPProcessor.from_llava(name, model.config)
        ```"""
        projector_fields, config_fields, kwargs = split_config_fields(kwargs)
        source = load_part(AutoModelForImageTextToText, pretrained_model_name_or_path, "LLaVA or InternVL", kwargs)
        origin: Any = source.config
        if origin.model_type not in ("llava", "llava_next", "internvl"):
            raise ValueError(
                f"{source.name_or_path or type(source).__name__} is of type {origin.model_type!r}, expected 'llava', "
                "'llava_next' or 'internvl' in Transformers' format."
            )
        if not isinstance(origin.vision_feature_layer, int):
            raise ValueError(
                f"`vision_feature_layer` is {origin.vision_feature_layer}: LLaVA-SP reads one layer of the tower."
            )
        if origin.model_type == "internvl" and not origin.vision_config.use_mean_pooling:
            raise ValueError(
                "`vision_config.use_mean_pooling` is False: this InternVL normalises the last layer of its vision "
                "tower, which LLaVA-SP does not."
            )
        parts = source.model
        patch_fields: dict[str, Any] = {"hidden_act": origin.projector_hidden_act, "num_patch_layers": 2}
        if origin.model_type == "internvl":
            patch_fields.update(patch_downsample_factor=round(1 / origin.downsample_ratio), patch_layer_norm=True)
        for name, value in patch_fields.items():
            if projector_fields.get(name, value) != value:
                raise ValueError(f"`{name}` is {projector_fields[name]!r}, but {value!r} in the model it starts from.")
        config = cls.config_class(
            vision_config=origin.vision_config,
            text_config=origin.text_config,
            projector_config={**authors_variant(spatial_variant, projector_fields), **patch_fields},
            attn_implementation=attention_of(origin.vision_config, origin.text_config),
            **{
                "image_token_index": origin.image_token_id,
                "vision_feature_layer": origin.vision_feature_layer,
                "vision_feature_select_strategy": origin.vision_feature_select_strategy,
                "image_grid_pinpoints": getattr(origin, "image_grid_pinpoints", None),
                "tie_word_embeddings": origin.tie_word_embeddings,
                **config_fields,
            },
        )
        model = cls._from_parts(
            config,
            parts.vision_tower,
            parts.language_model,
            source.lm_head,
            source.generation_config,
            [config.image_token_id],
        )
        patch_mlp, theirs = model.model.multi_modal_projector.patch_mlp, parts.multi_modal_projector
        with torch.no_grad():
            for layer, linear in zip(patch_mlp.layers, (theirs.linear_1, theirs.linear_2), strict=True):
                layer.weight.copy_(linear.weight)
                layer.bias.copy_(linear.bias) if linear.bias is not None else layer.bias.zero_()
            if config.projector_config.patch_layer_norm:
                patch_mlp.norm.load_state_dict(theirs.layer_norm.state_dict())
            if config.image_grid_pinpoints is not None and hasattr(parts, "image_newline"):
                model.model.image_newline.weight.copy_(parts.image_newline)
        return model

    @classmethod
    def _from_parts(
        cls,
        config: LlavaSPConfig,
        vision_tower: PreTrainedModel,
        language_model: PreTrainedModel,
        lm_head: nn.Linear,
        generation_config: GenerationConfig | None,
        suppress_tokens: list[int],
    ) -> "LlavaSPForConditionalGeneration":
        """A model of loaded parts and a new projector, which generates greedily and never the `suppress_tokens`."""
        dtype, device = lm_head.weight.dtype, vision_tower.device
        for part in (config, config.vision_config, config.text_config, config.projector_config):
            part.dtype = dtype
            # Where the parts came from, which may be a folder of this machine
            part._name_or_path = ""
        config.architectures = [cls.__name__]
        with torch.device("meta"):
            model = cls(config)
        expected = type(model.model.language_model)
        if type(language_model) is not expected:
            raise ValueError(f"The language model is a {type(language_model).__name__}, expected {expected.__name__}.")
        model.model.vision_tower, model.model.language_model = vision_tower, language_model
        model.lm_head = lm_head
        maybe_install_capturing_hooks(vision_tower)
        model.model.multi_modal_projector = LlavaSPProjector._from_config(config.projector_config)
        if config.image_grid_pinpoints is not None:
            model.model.image_newline = ImageNewline(config).to(device, dtype)
            model.model._init_weights(model.model.image_newline)
        vision_tower.to(dtype)
        model.model.multi_modal_projector.to(device, dtype)
        model.tie_weights()

        special_ids = {name: getattr(generation_config, name, None) for name in SPECIAL_IDS}
        for name, token_id in special_ids.items():
            special_ids[name] = getattr(config.text_config, name, None) if token_id is None else token_id
        model.generation_config = GenerationConfig(
            **special_ids, do_sample=False, suppress_tokens=sorted(suppress_tokens)
        )
        model.eval()
        try:
            with torch.no_grad():
                size = config.tile_size
                channels = getattr(config.vision_config, "num_channels", 3)
                model.get_image_features(
                    torch.zeros(2, channels, size, size, dtype=vision_tower.dtype, device=vision_tower.device)
                )
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{type(vision_tower).__name__} cannot be the vision tower: its hidden states are not one for each "
                f"patch of a square grid ({error})."
            ) from error
        return model

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def enable_input_require_grads(self) -> None:
        """As Transformers', for the language model alone: a frozen vision tower would run backwards for nothing."""
        self.model.language_model.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        """Undo what `enable_input_require_grads` did."""
        self.model.language_model.disable_input_require_grads()

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaSPImageFeaturesOutput:
        """See [`LlavaSPModel.get_image_features`]."""
        return self.model.get_image_features(
            pixel_values, image_sizes=image_sizes, output_attentions=output_attentions, **kwargs
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaSPCausalLMOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids, with a run of `<image>` ids for each image.
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`, *optional*):
                The processed images of the whole batch, in the order of their placeholders. With tiles of shape
                `(images, tiles, channels, height, width)`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of the tokens.
            cache (`Cache`, *optional*):
                Keys and values of the tokens before.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, text_hidden_size)`, *optional*):
                Embeddings in place of `input_ids`.
            image_sizes (`torch.LongTensor` of shape `(images, 2)`, *optional*):
                (height, width) of each image in pixels before it was processed; needed for tiles.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids to predict, -100 where there is nothing to learn. They are shifted by the model.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute only the last `logits_to_keep` logits (0: all), or those at the given positions.
            past_key_values (`Cache`, *optional*):
                Another name of `cache`, the only one before Transformers 5.24.

        Returns:
            [`LlavaSPCausalLMOutputWithPast`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: If neither or both of `input_ids` and `inputs_embeds` are passed, or two caches; if images have
                another size than the model takes; or if there are more or fewer placeholders than image features.

        Example:

        ```python
        >>> import torch
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> import transformers_llava_sp

        >>> model = AutoModelForImageTextToText.from_pretrained("path/to/llava-sp", dtype=torch.float16)
        >>> processor = AutoProcessor.from_pretrained("path/to/llava-sp")
        >>> content = [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is this?"}]
        >>> inputs = processor.apply_chat_template(
        ...     [{"role": "user", "content": content}],
        ...     add_generation_prompt=True,
        ...     tokenize=True,
        ...     return_dict=True,
        ...     return_tensors="pt",
        ... ).to(model.device, model.dtype)
        >>> output = model.generate(**inputs, max_new_tokens=64)
        >>> processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ```"""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_sizes=image_sizes,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return LlavaSPCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As `GenerationMixin.generate`, with checks of the prompt in front.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The prompt's token ids, also `input_ids`.
            cache, past_key_values (`Cache`, *optional*):
                Keys and values of the tokens before, by either name.
            args, kwargs: The other arguments of [`~generation.GenerationMixin.generate`], and the model's inputs.

        Raises:
            ValueError: If the prompt is longer than the language model's positions, has image tokens but comes without
                `pixel_values`, or has images and `prefill_chunk_size` would cut through them; or if there are two
                caches.
        """
        kwargs |= cache_argument(cache, past_key_values)
        generation_config = kwargs.get("generation_config")
        if generation_config is not None and generation_config.is_assistant:
            # What an assistant of speculative decoding continues is not a prompt, and it is not shown the images
            return super().generate(inputs, *args, **kwargs)

        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        inputs_embeds = kwargs.get("inputs_embeds")
        prompt = input_ids if inputs_embeds is None else inputs_embeds
        max_length = self.config.text_config.max_position_embeddings
        if prompt is not None and prompt.shape[1] > max_length:
            raise ValueError(
                f"The prompt is {prompt.shape[1]} tokens long, but the language model has {max_length} positions "
                "(max_position_embeddings). Shorten the text or pass fewer images: each takes "
                f"{self.config.projector_config.num_image_tokens} tokens"
                f"{'' if self.config.image_grid_pinpoints is None else ', and its tiles take more'}."
            )
        if input_ids is not None and inputs_embeds is None and kwargs.get("pixel_values") is None:
            past, attention_mask = kwargs.get(CACHE), kwargs.get("attention_mask")
            # With a cache, either the whole sequence is passed or, beside a longer mask, only what is new
            only_new = attention_mask is not None and attention_mask.shape[1] > input_ids.shape[1]
            num_cached = 0 if past is None or only_new else past.get_seq_length()
            if self.model.get_placeholder_mask(input_ids[:, num_cached:]).any():
                raise ValueError(
                    "The prompt has image tokens, but `pixel_values` is missing: pass everything that the processor "
                    "returns to `generate`."
                )
        chunk_size = (
            kwargs.get("prefill_chunk_size") or (generation_config or self.generation_config).prefill_chunk_size
        )
        if chunk_size is not None and kwargs.get("pixel_values") is not None:
            raise ValueError("`prefill_chunk_size` would cut through an image's tokens: leave it out for images.")
        return super().generate(inputs, *args, **kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        return LogitsProcessorList(
            MaskTokensLogitsProcessor(processor.suppress_tokens)
            if type(processor) is SuppressTokensLogitsProcessor
            else processor
            for processor in super()._get_logits_processor(*args, **kwargs)
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        # The images of one sample must stay together: repeating each image by itself, as for any other input, would
        # give the copies of a sample with two images the first one twice.
        images = {name: model_kwargs.pop(name, None) for name in ("pixel_values", "image_sizes")}
        images = {name: tensor for name, tensor in images.items() if tensor is not None}
        if expand_size > 1 and "pixel_values" in images:
            inputs_embeds = model_kwargs.get("inputs_embeds")
            placeholder_mask = self.model.get_placeholder_mask(
                input_ids if inputs_embeds is None else None, inputs_embeds
            )
            if "image_sizes" in images:
                images["image_sizes"] = torch.as_tensor(images["image_sizes"])
            images_per_sample = self.count_images(placeholder_mask, **images)
            images = {
                name: torch.cat([part.repeat(expand_size, *[1] * (part.ndim - 1)) for part in parts])
                for name, parts in (
                    (name, tensor.split(images_per_sample.tolist())) for name, tensor in images.items()
                )
            }
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **images}

    def count_images(
        self, placeholder_mask: torch.Tensor, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        How many of the images belong to each sample.

        Args:
            placeholder_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Where placeholders are.
            pixel_values (`torch.Tensor`): The processed images of the whole batch.
            image_sizes (`torch.LongTensor` of shape `(images, 2)`, *optional*): (height, width) of each in pixels.

        Returns:
            `torch.LongTensor` of shape `(batch_size,)`.

        Raises:
            ValueError: If the placeholders of a sample are not those of whole images.
        """
        num_tokens = self.model.count_image_tokens(pixel_values, image_sizes)
        if isinstance(num_tokens, int):
            num_tokens = [num_tokens] * pixel_values.shape[0]
        self.model.check_placeholders(placeholder_mask, pixel_values.shape[0], num_tokens)
        placeholders_per_sample = placeholder_mask.sum(dim=1).cpu()
        sample_ends, image_ends = placeholders_per_sample.cumsum(0), torch.tensor([0, *num_tokens]).cumsum(0)
        if not torch.isin(sample_ends, image_ends).all():
            raise ValueError(
                "Image features and image tokens do not match: the samples have "
                f"{placeholders_per_sample.tolist()} image tokens, expected those of whole images, which take "
                f"{num_tokens} tokens."
            )
        images_so_far = torch.searchsorted(image_ends, sample_ends)
        return images_so_far.diff(prepend=images_so_far.new_zeros(1))


__all__ = [
    "LlavaSPForConditionalGeneration",
    "LlavaSPModel",
    "LlavaSPPreTrainedModel",
    "LlavaSPProjector",
]
