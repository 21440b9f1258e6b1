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
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_llava_sp import LlavaSPConfig, LlavaSPProjectorConfig


try:  # Transformers 5.20 and later can keep only the hidden states that are used
    from transformers.utils.output_capturing import select_hidden_states
except ImportError:

    def select_hidden_states(selection: Callable) -> Callable:
        return lambda function: function


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
            The tokens that replace each image's placeholders, the spatial tokens first.
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
            `(images, spatial_tokens + patch_tokens, text_hidden_size)`, where `pixel_values` were passed.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class LlavaSPCausalLMOutputWithPast(ModelOutput):
    """
    Output of [`LlavaSPForConditionalGeneration`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is provided):
            Next-token cross-entropy over the labels that are not -100.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores before the softmax, for the positions that `logits_to_keep` selects.
        past_key_values (`Cache`, *optional*, returned with `use_cache=True`, the language model's default):
            The keys and values computed so far.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned with `output_hidden_states=True`):
            The language model's hidden states, each of shape `(batch_size, sequence_length, text_hidden_size)`.
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned with `output_attentions=True`):
            The language model's attentions, each of shape `(batch_size, heads, sequence_length, sequence_length)`.
        image_hidden_states (`torch.FloatTensor`, *optional*):
            The tokens that replaced the images' placeholders, of shape
            `(images, spatial_tokens + patch_tokens, text_hidden_size)`, where `pixel_values` were passed.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


class FullMapConv2d(nn.Conv2d):
    """
    A convolution whose kernel covers its whole input. It has one output position, so it is one matrix product; the
    weight keeps its convolution shape `(out_channels, in_channels, size, size)`, as checkpoints store it.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input (`torch.Tensor` of shape `(images, in_channels, size, size)`): A map as large as the kernel.

        Returns:
            `torch.Tensor` of shape `(images, out_channels, 1, 1)`.
        """
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None]


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
            FullMapConv2d(config.vision_hidden_size, config.spatial_hidden_size, kernel_size=size, bias=False)
            for size in self.spatial_scales
        )

    def get_feature_map(self, patch_grid: torch.Tensor, size: int) -> torch.Tensor:
        """
        Args:
            patch_grid (`torch.Tensor` of shape `(images, channels, grid_size, grid_size)`): The patch grid.
            size (`int`): Side of the map, in patches.

        Returns:
            `torch.Tensor` of shape `(images, channels, size, size)`.
        """
        if self.spatial_variant == "pooling":
            return F.adaptive_avg_pool2d(patch_grid, size)
        start = (patch_grid.shape[-1] - size) // 2
        return patch_grid[:, :, start : start + size, start : start + size]

    def forward(self, patch_grid: torch.Tensor) -> torch.Tensor:
        """
        Args:
            patch_grid (`torch.Tensor` of shape `(images, vision_hidden_size, grid_size, grid_size)`): The patch grid.

        Returns:
            `torch.Tensor` of shape `(images, scales, spatial_hidden_size)`.
        """
        features = [
            convolution(self.get_feature_map(patch_grid, size)).flatten(1)
            for size, convolution in zip(self.spatial_scales, self.convolutions, strict=True)
        ]
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
        self.detail_convolution = nn.Conv2d(
            config.vision_hidden_size,
            hidden_size,
            kernel_size=config.detail_kernel_size,  # type: ignore[arg-type]  # filled in by the config
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
    """The patch path of LLaVA-1.5: linear layers with an activation between them."""

    def __init__(self, config: LlavaSPProjectorConfig):
        super().__init__()
        widths = [config.vision_hidden_size, *[config.text_hidden_size] * config.num_patch_layers]
        self.layers = nn.ModuleList(nn.Linear(width, next_width) for width, next_width in pairwise(widths))
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(images, patches, vision_hidden_size)`): The patch features.

        Returns:
            `torch.Tensor` of shape `(images, patches, text_hidden_size)`.
        """
        hidden_states = self.layers[0](hidden_states)
        for layer in self.layers[1:]:
            hidden_states = layer(self.act(hidden_states))
        return hidden_states


class LlavaSPPreTrainedModel(PreTrainedModel):
    """Base of the LLaVA-SP models: weight initialisation, loading, saving and what the attention backends may be."""

    config_class = LlavaSPConfig
    config: LlavaSPConfig
    base_model_prefix = "model"
    input_modalities: ClassVar[tuple[str, ...]] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["LlavaSPProjector"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]

    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True


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
        patch_grid = patch_features.mT.unflatten(2, (grid_size, grid_size))  # (images, channels, grid, grid)

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
        self.post_init()

    @can_return_tuple
    @select_hidden_states(lambda model: [model.config.vision_feature_layer])
    def get_image_features(
        self, pixel_values: torch.Tensor, output_attentions: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | LlavaSPImageFeaturesOutput:
        """
        Encode images with the vision tower and project them into the language model's space.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`):
                The processed images.
            output_attentions (`bool`, *optional*, defaults to `False`):
                Whether to return the attention weights of the Detail Feature Integrator, and the vision tower's.

        Returns:
            [`LlavaSPImageFeaturesOutput`], or a tuple with `return_dict=False`. Its `pooler_output` is one tensor of
            shape `(images, spatial_tokens + patch_tokens, text_hidden_size)`.
        """
        kwargs["output_hidden_states"] = kwargs.get("output_hidden_states") or True
        image_outputs = self.vision_tower(
            pixel_values, output_attentions=output_attentions, return_dict=True, **kwargs
        )
        patch_features = image_outputs.hidden_states[self.config.vision_feature_layer]  # (images, tokens, channels)
        if self.config.vision_feature_select_strategy == "default":
            patch_features = patch_features[:, 1:]
        projected = self.multi_modal_projector(patch_features, output_attentions=output_attentions, return_dict=True)

        return LlavaSPImageFeaturesOutput(
            last_hidden_state=image_outputs.last_hidden_state,
            pooler_output=projected.last_hidden_state,
            hidden_states=image_outputs.hidden_states,
            attentions=image_outputs.attentions,
            detail_attentions=projected.detail_attentions,
        )

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

    def check_placeholders(self, placeholder_mask: torch.Tensor, num_images: int, tokens_per_image: int) -> None:
        """
        Raise a `ValueError` if the number of placeholders is not the number of image features.

        Args:
            placeholder_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): Where placeholders are.
            num_images (`int`): Number of images in the batch.
            tokens_per_image (`int`): Number of features of each image.
        """
        num_placeholders, num_features = placeholder_mask.sum(), num_images * tokens_per_image
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
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaSPModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids, with a run of `<image>` ids for each image.
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`, *optional*):
                The processed images of the whole batch, in the order of their placeholders.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of the tokens.
            past_key_values (`Cache`, *optional*):
                Keys and values of the tokens before.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, text_hidden_size)`, *optional*):
                Embeddings in place of `input_ids`.

        Returns:
            [`LlavaSPModelOutputWithPast`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: If neither or both of `input_ids` and `inputs_embeds` are passed, or if the number of
                placeholders is not the number of image features.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_features = None
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values, return_dict=True).pooler_output
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            placeholder_mask = self.get_placeholder_mask(input_ids, inputs_embeds).to(inputs_embeds.device)
            self.check_placeholders(placeholder_mask, *image_features.shape[:2])
            inputs_embeds = inputs_embeds.masked_scatter(
                placeholder_mask.unsqueeze(-1).expand_as(inputs_embeds), image_features
            )

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        return LlavaSPModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )


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
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        if self.generation_config.suppress_tokens is None:
            # An answer has no images. Checkpoints bring their own generation config
            self.generation_config.suppress_tokens = [config.image_token_id]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self, pixel_values: torch.Tensor, output_attentions: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | LlavaSPImageFeaturesOutput:
        """See [`LlavaSPModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, output_attentions=output_attentions, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaSPCausalLMOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids, with a run of `<image>` ids for each image.
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`, *optional*):
                The processed images of the whole batch, in the order of their placeholders.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions of the tokens.
            past_key_values (`Cache`, *optional*):
                Keys and values of the tokens before.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, text_hidden_size)`, *optional*):
                Embeddings in place of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids to predict, -100 where there is nothing to learn. They are shifted by the model.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute only the last `logits_to_keep` logits (0: all), or those at the given positions.

        Returns:
            [`LlavaSPCausalLMOutputWithPast`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: If neither or both of `input_ids` and `inputs_embeds` are passed, or if the number of
                placeholders is not the number of image features.

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
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
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
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As `GenerationMixin.generate`, with two checks of the prompt in front.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The prompt's token ids, also `input_ids`.
            args, kwargs: The other arguments of [`~generation.GenerationMixin.generate`], and the model's inputs.

        Raises:
            ValueError: If the prompt is longer than the language model's positions, has image tokens but comes without
                `pixel_values`, or has images and `prefill_chunk_size` would cut through them.
        """
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
                f"{self.config.projector_config.num_image_tokens} tokens."
            )
        if input_ids is not None and inputs_embeds is None and kwargs.get("pixel_values") is None:
            past_key_values, attention_mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
            # With a cache, either the whole sequence is passed or, beside a longer mask, only what is new
            only_new = attention_mask is not None and attention_mask.shape[1] > input_ids.shape[1]
            num_cached = 0 if past_key_values is None or only_new else past_key_values.get_seq_length()
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

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        # The images of one sample must stay together: repeating each image by itself, as for any other input, would
        # give the copies of a sample with two images the first one twice.
        pixel_values = model_kwargs.pop("pixel_values", None)
        if expand_size > 1 and pixel_values is not None:
            inputs_embeds = model_kwargs.get("inputs_embeds")
            placeholder_mask = self.model.get_placeholder_mask(
                input_ids if inputs_embeds is None else None, inputs_embeds
            )
            tokens_per_image = self.config.projector_config.num_image_tokens
            self.model.check_placeholders(placeholder_mask, pixel_values.shape[0], tokens_per_image)
            placeholders_per_sample = placeholder_mask.sum(dim=1)
            if (placeholders_per_sample % tokens_per_image).any():
                raise ValueError(
                    "Image features and image tokens do not match: the samples have "
                    f"{placeholders_per_sample.tolist()} image tokens, expected multiples of the {tokens_per_image} "
                    "that each image takes."
                )
            images_per_sample = placeholders_per_sample // tokens_per_image
            pixel_values = torch.cat(
                [images.repeat(expand_size, 1, 1, 1) for images in pixel_values.split(images_per_sample.tolist())]
            )
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs


__all__ = [
    "LlavaSPForConditionalGeneration",
    "LlavaSPModel",
    "LlavaSPPreTrainedModel",
    "LlavaSPProjector",
]
