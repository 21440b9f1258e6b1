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
"""LLaVA-SP model configuration"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.image_processing_utils import select_best_resolution


SPATIAL_VARIANTS = ("cropping", "pooling")

# The paper places its scales at equal fractions of the grid and the detail kernel at two thirds of it.
NUM_DEFAULT_SCALES = 6
DETAIL_KERNEL_SIXTHS = 4

# What `trust_remote_code=True` needs in a repository, next to the weights
HUB_MODULES = ("configuration_llava_sp.py", "modeling_llava_sp.py", "processing_llava_sp.py")
MODEL_AUTO_MAP = {
    "AutoConfig": "configuration_llava_sp.LlavaSPConfig",
    "AutoModel": "modeling_llava_sp.LlavaSPModel",
    "AutoModelForImageTextToText": "modeling_llava_sp.LlavaSPForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_llava_sp.LlavaSPForConditionalGeneration",
}
PROJECTOR_AUTO_MAP = {
    "AutoConfig": "configuration_llava_sp.LlavaSPProjectorConfig",
    "AutoModel": "modeling_llava_sp.LlavaSPProjector",
}


def copy_hub_modules(folder: str | PathLike) -> None:
    """
    Copy the modules that define configuration, model and processor into a saved folder, so that it loads with
    `trust_remote_code=True` where this package is not installed.

    Args:
        folder (`str` or `PathLike`): The folder to copy into.
    """
    for name in HUB_MODULES:
        module = Path(__file__).with_name(name)
        # Code that was itself loaded from the Hub lies beside only what its loading needed
        if module.is_file() and module.parent != Path(folder).resolve():
            shutil.copyfile(module, Path(folder) / name)


class LlavaSPPreTrainedConfig(PreTrainedConfig):
    """Base of the LLaVA-SP configurations: saving one writes what `trust_remote_code=True` needs to load it."""

    _hub_auto_map: ClassVar[dict[str, str]] = {}

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        Save the configuration and the Hub modules to a folder.

        Args:
            save_directory (`str` or `PathLike`): The folder, created if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to push them to the Hub as well.
            kwargs (`dict[str, Any]`, *optional*): `repo_id` (the folder's name by default) and the other arguments of
                [`~utils.PushToHubMixin.push_to_hub`].
        """
        self.auto_map = dict(self._hub_auto_map)
        super().save_pretrained(save_directory)
        copy_hub_modules(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)


def sixths_of_grid(grid_size: int, sixths: int) -> int:
    """
    The size nearest to `sixths / 6` of the grid that has the grid's parity, ties going to the larger one, so that a
    square map of that size can be centred on the grid exactly.

    Args:
        grid_size (`int`): Side of the patch grid, in patches.
        sixths (`int`): How many sixths of the grid, 1 to 6.

    Returns:
        `int`: The size, in patches.
    """
    parity = grid_size % 2
    return 2 * ((sixths * grid_size - 6 * parity + 6) // 12) + parity


@dataclass(frozen=True)
class ImageLayout:
    """
    How an image's tokens stand in the language model's sequence: the spatial tokens of every tile, the patch tokens of
    the whole image, and, if it is cut into tiles, the patch tokens of the tiles, row by row over the joined tiles
    without the padding, each row followed by one separator. The model, the processor and the converter all count
    with it.

    Args:
        num_spatial_tokens (`int`): Spatial tokens of each tile.
        patch_grid_size (`int`): Side of the grid of patch tokens of each tile.
        tile_rows (`int`, *optional*, defaults to 0): Rows of tiles, 0 if the whole image is the only one.
        tile_columns (`int`, *optional*, defaults to 0): Columns of tiles.
        row_padding (`int`, *optional*, defaults to 0): Rows of the joined tiles' grid that are dropped above, and as
            many below.
        column_padding (`int`, *optional*, defaults to 0): Columns that are dropped on the left, and on the right.
    """

    num_spatial_tokens: int
    patch_grid_size: int
    tile_rows: int = 0
    tile_columns: int = 0
    row_padding: int = 0
    column_padding: int = 0

    @property
    def num_tiles(self) -> int:
        """`int`: How often the vision tower runs for it: once for the whole image and once for each tile."""
        return 1 + self.tile_rows * self.tile_columns

    @property
    def num_rows(self) -> int:
        """`int`: Rows of the joined tiles' patch tokens that are kept."""
        return self.tile_rows * self.patch_grid_size - 2 * self.row_padding

    @property
    def num_columns(self) -> int:
        """`int`: Columns of the joined tiles' patch tokens that are kept."""
        return self.tile_columns * self.patch_grid_size - 2 * self.column_padding

    @property
    def num_tokens(self) -> int:
        """`int`: How many tokens the image takes."""
        tile_tokens = self.num_rows * (self.num_columns + 1) if self.num_tiles > 1 else 0
        return self.num_tiles * self.num_spatial_tokens + self.patch_grid_size**2 + tile_tokens


def get_image_layout(
    num_spatial_tokens: int,
    patch_grid_size: int,
    image_size: Sequence[int] | None = None,
    image_grid_pinpoints: Sequence[Sequence[int]] | None = None,
    tile_size: int = 0,
) -> ImageLayout:
    """
    The layout of an image's tokens.

    Args:
        num_spatial_tokens (`int`): Spatial tokens of each tile.
        patch_grid_size (`int`): Side of the grid of patch tokens of each tile.
        image_size (`Sequence[int]`, *optional*): (height, width) of the image in pixels.
        image_grid_pinpoints (`Sequence[Sequence[int]]`, *optional*): The resolutions that images are cut into tiles
            at, each as (height, width) in pixels. Without them, an image has no tiles.
        tile_size (`int`, *optional*): Side of a tile in pixels.

    Returns:
        [`ImageLayout`]: The layout. Where the best resolution is a single tile, the whole image stands alone, for the
        tile would show the same.

    Raises:
        ValueError: If the image has no pixels.
    """
    if image_grid_pinpoints is None or image_size is None:
        return ImageLayout(num_spatial_tokens, patch_grid_size)
    height, width = map(int, image_size)
    if min(height, width) < 1:
        raise ValueError(f"An image of {height}x{width} pixels cannot be cut into tiles.")
    best_height, best_width = select_best_resolution((height, width), image_grid_pinpoints)
    tile_rows, tile_columns = best_height // tile_size, best_width // tile_size
    if tile_rows * tile_columns == 1:
        return ImageLayout(num_spatial_tokens, patch_grid_size)
    # The image fills the joined tiles in one direction; half of what it leaves of the other is dropped on either side.
    # The authors cut fractions off. Transformers' LLaVA-NeXT rounds to seven digits first, which keeps two more rows
    # or columns where, say, 14.999... stands for 15.
    rows, columns = tile_rows * patch_grid_size, tile_columns * patch_grid_size
    row_padding = column_padding = 0
    if width / height > columns / rows:
        row_padding = (rows - int(height * (columns / width))) // 2
    else:
        column_padding = (columns - int(width * (rows / height))) // 2
    return ImageLayout(num_spatial_tokens, patch_grid_size, tile_rows, tile_columns, row_padding, column_padding)


@strict
class LlavaSPProjectorConfig(LlavaSPPreTrainedConfig):
    r"""
    Configuration of a [`LlavaSPProjector`]: the Spatial Feature Extractor, the Detail Feature Integrator and the patch
    MLP that turn a vision tower's patch grid into tokens of the language model. The defaults are those of the released
    LLaVA-SP-Cropping 7B.

    Args:
        vision_hidden_size (`int`, *optional*, defaults to 1024):
            Width of the vision tower's patch features.
        text_hidden_size (`int`, *optional*, defaults to 4096):
            Width of the language model's embeddings.
        grid_size (`int`, *optional*, defaults to 24):
            Side of the square patch grid, in patches.
        spatial_variant (`str`, *optional*, defaults to `"cropping"`):
            How the map of each scale is taken from the grid (section 3.2 of the paper): `"cropping"` takes the centred
            crop of that size, from central region to global; `"pooling"` pools the whole grid to that size, from
            abstract to specific.
        spatial_scales (`list[int]`, *optional*):
            Sides of the maps, in patches, in growing order: one spatial token each. Defaults to the six sixths of the
            grid, each rounded to the nearest size of the grid's parity (4, 8, ..., 24 for a grid of 24).
        spatial_hidden_size (`int`, *optional*, defaults to 512):
            Width of the spatial and detail features.
        use_detail_integrator (`bool`, *optional*, defaults to `True`):
            Whether the spatial features attend to detail features, and the result is concatenated to them.
        detail_kernel_size (`int`, *optional*):
            Kernel of the convolution that makes the detail features, in patches. Defaults to two thirds of the grid,
            rounded like the scales (16 for a grid of 24). Ignored without the detail integrator.
        detail_stride (`int`, *optional*, defaults to 2):
            Stride of that convolution, in patches. Ignored without the detail integrator.
        spatial_projection_bias (`bool`, *optional*, defaults to `True`):
            Whether the projection of the spatial features to the language model's width has a bias. The released
            Cropping checkpoint has one, the released Pooling checkpoint has none.
        num_patch_layers (`int`, *optional*, defaults to 2):
            Number of linear layers of the patch MLP, with the activation between them.
        patch_downsample_factor (`int`, *optional*, defaults to 1):
            How many patches in each direction are concatenated to one, so that there are so many times fewer patch
            tokens in each direction: 2 for the pixel shuffle of InternVL. The spatial tokens see the whole grid.
        patch_layer_norm (`bool`, *optional*, defaults to `False`):
            Whether a layer norm stands in front of the patch MLP, as in InternVL.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            The activation of the patch MLP and of the spatial projection.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer norms: in front of the query, key and value projections, and of the patch MLP.

    Raises:
        ValueError: If values contradict each other; the message names both.

    Example:

    ```python
    >>> from transformers_llava_sp import LlavaSPProjector, LlavaSPProjectorConfig

    >>> config = LlavaSPProjectorConfig(vision_hidden_size=64, text_hidden_size=96, grid_size=12)
    >>> config.spatial_scales, config.detail_kernel_size, config.num_image_tokens
    ([2, 4, 6, 8, 10, 12], 8, 150)

    >>> model = LlavaSPProjector(config)
    ```"""

    model_type = "llava_sp_projector"
    base_config_key = "projector_config"
    _hub_auto_map = PROJECTOR_AUTO_MAP

    vision_hidden_size: int = 1024
    text_hidden_size: int = 4096
    grid_size: int = 24
    spatial_variant: str = "cropping"
    spatial_scales: list[int] | tuple[int, ...] | None = None
    spatial_hidden_size: int = 512
    use_detail_integrator: bool = True
    detail_kernel_size: int | None = None
    detail_stride: int = 2
    spatial_projection_bias: bool = True
    num_patch_layers: int = 2
    patch_downsample_factor: int = 1
    patch_layer_norm: bool = False
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        if self.grid_size < 1:
            raise ValueError(f"`grid_size` must be at least 1, got {self.grid_size}.")
        if self.spatial_scales is None:
            self.spatial_scales = [
                sixths_of_grid(self.grid_size, sixths) for sixths in range(1, NUM_DEFAULT_SCALES + 1)
            ]
            if len(set(self.spatial_scales)) < NUM_DEFAULT_SCALES:
                raise ValueError(
                    f"A grid of {self.grid_size}x{self.grid_size} patches is too small for "
                    f"{NUM_DEFAULT_SCALES} different default scales (they would be {self.spatial_scales}). List "
                    "`spatial_scales` yourself."
                )
        self.spatial_scales = list(self.spatial_scales)
        if self.use_detail_integrator and self.detail_kernel_size is None:
            self.detail_kernel_size = sixths_of_grid(self.grid_size, DETAIL_KERNEL_SIXTHS)
        super().__post_init__(**kwargs)
        self.validate_geometry()

    def validate_geometry(self) -> None:
        """
        Raise a `ValueError` where sizes contradict each other. Runs on creation, and before saving, where it arrives
        as the cause of a `StrictDataclassClassValidationError`.
        """
        if self.spatial_variant not in SPATIAL_VARIANTS:
            raise ValueError(
                f"Unknown `spatial_variant` {self.spatial_variant!r}: expected one of {', '.join(SPATIAL_VARIANTS)}."
            )
        for name in (
            "vision_hidden_size",
            "text_hidden_size",
            "spatial_hidden_size",
            "num_patch_layers",
            "patch_downsample_factor",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.grid_size % self.patch_downsample_factor:
            raise ValueError(
                f"`patch_downsample_factor` {self.patch_downsample_factor} does not divide `grid_size` "
                f"{self.grid_size}: patches would be left over."
            )

        scales = list(self.spatial_scales or [])
        if not scales:
            raise ValueError("`spatial_scales` is empty: LLaVA-SP needs at least one scale.")
        if any(later <= earlier for earlier, later in pairwise(scales)):
            raise ValueError(f"`spatial_scales` must grow strictly, got {scales}.")
        if scales[0] < 1:
            raise ValueError(f"`spatial_scales` must be at least 1, got {scales}.")
        for scale in scales:
            if scale > self.grid_size:
                raise ValueError(
                    f"Scale {scale} of `spatial_scales` is larger than `grid_size` {self.grid_size}: a map cannot be "
                    "larger than the grid it is taken from."
                )
            if self.spatial_variant == "cropping" and (self.grid_size - scale) % 2:
                raise ValueError(
                    f"Scale {scale} of `spatial_scales` cannot be centred on `grid_size` {self.grid_size}: cropping "
                    "needs scales of the grid's parity (both even or both odd)."
                )
        if self.use_detail_integrator:
            if self.detail_kernel_size is None or not 1 <= self.detail_kernel_size <= self.grid_size:
                raise ValueError(
                    f"`detail_kernel_size` {self.detail_kernel_size} does not fit `grid_size` {self.grid_size}: it "
                    "must be between 1 and the grid size."
                )
            if self.detail_stride < 1:
                raise ValueError(f"`detail_stride` must be at least 1, got {self.detail_stride}.")

    @property
    def num_spatial_tokens(self) -> int:
        """`int`: Number of spatial tokens per image, one per scale."""
        return len(self.spatial_scales or ())

    @property
    def num_patch_tokens(self) -> int:
        """`int`: Number of patch tokens per image."""
        return self.patch_grid_size**2

    @property
    def patch_grid_size(self) -> int:
        """`int`: Side of the grid of patch tokens, which is the patch grid's unless patches are downsampled."""
        return self.grid_size // self.patch_downsample_factor

    @property
    def num_image_tokens(self) -> int:
        """`int`: Number of tokens per image, or per tile of one, the spatial tokens first."""
        return get_image_layout(self.num_spatial_tokens, self.patch_grid_size).num_tokens

    @property
    def num_detail_tokens(self) -> int:
        """`int`: Number of detail features that the spatial features attend to, 0 without the integrator."""
        if not self.use_detail_integrator or self.detail_kernel_size is None:
            return 0
        return ((self.grid_size - self.detail_kernel_size) // self.detail_stride + 1) ** 2


# What a vision tower's configuration has where its features are no fixed square grid of patches
UNSUITABLE_TOWERS = {
    "depths": "its stages make the grid of patches smaller and smaller",
    "insert_layer_id": "it merges patches between its layers",
    "mask_ratio": "it leaves out patches at random",
    "num_detection_tokens": "detection tokens stand among its patches",
    "num_frames": "it takes videos",
    "spatial_merge_size": "it takes the patches of images of any size in one sequence",
    "text_config": "it is a model of images and text, whose `vision_config` is meant",
    "window_size": "its features are a map, not a sequence of patches",
}


def vision_image_size(vision_config: PreTrainedConfig) -> int:
    """Side of the images that a vision tower of square images takes, in pixels."""
    size = vision_config.image_size
    return size[0] if isinstance(size, (list, tuple)) else size


def vision_grid_size(vision_config: PreTrainedConfig) -> int:
    """
    The side of a vision tower's square patch grid.

    Args:
        vision_config ([`PreTrainedConfig`]): A vision configuration with `image_size` and `patch_size`, in pixels.

    Returns:
        `int`: Side of the patch grid, in patches.

    Raises:
        ValueError: If the tower has no such sizes, its grid is not square, or its features are not those of patches.
    """
    sides = []
    for name in ("image_size", "patch_size"):
        if not hasattr(vision_config, name):
            raise ValueError(
                f"`vision_config` of type {vision_config.model_type!r} has no `{name}`: LLaVA-SP needs a tower whose "
                "patches form a square grid."
            )
        size = getattr(vision_config, name)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        if height != width:
            raise ValueError(
                f"`vision_config.{name}` is {height}x{width}: LLaVA-SP needs square images and square patches."
            )
        sides.append(height)
    for name, reason in UNSUITABLE_TOWERS.items():
        if getattr(vision_config, name, None) is not None:
            raise ValueError(
                f"`vision_config` of type {vision_config.model_type!r} has `{name}`, so {reason}: LLaVA-SP needs a "
                "tower whose hidden states are one per patch, row by row."
            )
    for name in ("hidden_size", "num_hidden_layers"):
        if type(getattr(vision_config, name, None)) is not int:
            raise ValueError(
                f"`vision_config` of type {vision_config.model_type!r} has no `{name}`: LLaVA-SP needs a tower of "
                "layers of one width."
            )
    image_side, patch_side = sides
    return image_side // patch_side


# What a language model's configuration has where scores are changed behind the head; neutral values do nothing
HEAD_CHANGES: dict[str, tuple[float | None, ...]] = {
    "final_logit_softcapping": (None,),
    "lm_head_multiplier": (None, 1.0),
    "logits_soft_cap": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
}


@strict
class LlavaSPConfig(LlavaSPPreTrainedConfig):
    r"""
    Configuration of a [`LlavaSPForConditionalGeneration`]. The defaults are those of the released LLaVA-SP-Cropping
    7B: CLIP ViT-L/14 at 336 pixels and Vicuna-7B-v1.5, its vocabulary grown by `<image>` to a multiple of 64.

    Args:
        vision_config (`PreTrainedConfig | dict`, *optional*, defaults to `CLIPVisionConfig`):
            Configuration of the vision tower.
        text_config (`PreTrainedConfig | dict`, *optional*, defaults to `LlamaConfig`):
            Configuration of the language model.
        projector_config (`LlavaSPProjectorConfig | dict`, *optional*, defaults to `LlavaSPProjectorConfig`):
            Configuration of the projector. Sizes that follow from the towers (`vision_hidden_size`,
            `text_hidden_size`, `grid_size`) are filled in where a dict leaves them out, and must agree otherwise.
        image_token_index (`int`, *optional*, defaults to 32000):
            Id of the `<image>` token, whose embeddings the image's tokens replace. Also `image_token_id`.
        vision_feature_layer (`int`, *optional*, defaults to -2):
            Index into the vision tower's hidden states.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`):
            `"default"` keeps the patches, the last tokens of the tower, and drops what stands in front of them: a
            class token, registers, or nothing. `"full"` keeps every token, for towers that have only patches.
        image_grid_pinpoints (`list[list[int]]`, *optional*):
            Resolutions, each as (height, width) in pixels, that images are cut into tiles of the vision tower's size
            at (LLaVA-1.6's "anyres"). Of several that fit an image equally well, the first is taken. Without them,
            each image is seen as a whole only.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the language model's head shares the weights of its input embeddings. True where `text_config`
            says so.

    Raises:
        ValueError: If values contradict each other; the message names both.

    Example:

    ```python
    >>> from transformers import CLIPVisionConfig, LlamaConfig
    >>> from transformers_llava_sp import LlavaSPConfig, LlavaSPForConditionalGeneration

    >>> vision_config = CLIPVisionConfig(hidden_size=96, num_hidden_layers=2, image_size=84, patch_size=7)
    >>> text_config = LlamaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=128)
    >>> config = LlavaSPConfig(
    ...     vision_config=vision_config,
    ...     text_config=text_config,
    ...     projector_config={"spatial_variant": "pooling", "spatial_hidden_size": 16},
    ...     image_token_id=100,
    ... )
    >>> config.projector_config.spatial_scales
    [2, 4, 6, 8, 10, 12]

    >>> model = LlavaSPForConditionalGeneration(config)
    ```"""

    model_type = "llava_sp"
    # What Trainer must not collect as predictions; Transformers renamed the cache in 5.24
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values", "image_hidden_states"]
    attribute_map: ClassVar[dict[str, str]] = {"image_token_id": "image_token_index"}
    sub_configs: ClassVar[dict[str, type]] = {
        "vision_config": AutoConfig,
        "text_config": AutoConfig,
        "projector_config": LlavaSPProjectorConfig,
    }

    _hub_auto_map = MODEL_AUTO_MAP

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector_config: dict | PreTrainedConfig | None = None
    image_token_index: int = 32000
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    image_grid_pinpoints: list | tuple | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = AutoConfig.for_model(
                "clip_vision_model",
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
                projection_dim=768,
            )
        elif isinstance(self.vision_config, dict):
            self.vision_config = AutoConfig.for_model(**{"model_type": "clip_vision_model", **self.vision_config})

        if self.text_config is None:
            # Vicuna's 32000 pieces and `<image>`, padded to a multiple of 64
            self.text_config = AutoConfig.for_model(
                "llama", vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5, pad_token_id=0
            )
        elif isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama", **self.text_config})

        if self.projector_config is None or isinstance(self.projector_config, dict):
            derived = {
                "grid_size": vision_grid_size(self.vision_config),
                "vision_hidden_size": self.vision_config.hidden_size,
                "text_hidden_size": self.text_config.hidden_size,
            }
            self.projector_config = LlavaSPProjectorConfig(**{**derived, **(self.projector_config or {})})

        if self.image_grid_pinpoints is not None:
            self.image_grid_pinpoints = [
                list(pinpoint) if isinstance(pinpoint, (list, tuple)) else pinpoint
                for pinpoint in self.image_grid_pinpoints
            ]

        # The language model alone knows whether its checkpoint ties its embeddings
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)
        self.validate_towers()
        self.validate_tiles()

    def validate_towers(self) -> None:
        """
        Raise a `ValueError` where towers and projector disagree. Runs on creation, and before saving, where it
        arrives as the cause of a `StrictDataclassClassValidationError`.
        """
        vision, text, projector = self.vision_config, self.text_config, self.projector_config
        if not isinstance(projector, LlavaSPProjectorConfig):
            raise ValueError(f"`projector_config` must be a LlavaSPProjectorConfig, got {type(projector).__name__}.")
        projector.validate_geometry()
        grid_size = vision_grid_size(vision)
        if projector.grid_size != grid_size:
            raise ValueError(
                f"`projector_config.grid_size` is {projector.grid_size}, but `vision_config` gives a grid of "
                f"{grid_size} (image_size {vision.image_size}, patch_size {vision.patch_size})."
            )
        if projector.vision_hidden_size != vision.hidden_size:
            raise ValueError(
                f"`projector_config.vision_hidden_size` is {projector.vision_hidden_size}, but "
                f"`vision_config.hidden_size` is {vision.hidden_size}."
            )
        if projector.text_hidden_size != text.hidden_size:
            raise ValueError(
                f"`projector_config.text_hidden_size` is {projector.text_hidden_size}, but "
                f"`text_config.hidden_size` is {text.hidden_size}."
            )
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise ValueError(
                f"Unknown `vision_feature_select_strategy` {self.vision_feature_select_strategy!r}: expected "
                "'default' (keep the patches) or 'full' (keep every token)."
            )
        num_states = vision.num_hidden_layers + 1
        if not -num_states <= self.vision_feature_layer < num_states:
            raise ValueError(
                f"`vision_feature_layer` is {self.vision_feature_layer}, but `vision_config.num_hidden_layers` "
                f"{vision.num_hidden_layers} gives {num_states} hidden states."
            )
        for name, neutral in HEAD_CHANGES.items():
            if getattr(text, name, None) not in neutral:
                raise ValueError(
                    f"`text_config.{name}` is {getattr(text, name)}: language models of type {text.model_type!r} "
                    "change the scores behind their head, which LLaVA-SP does not."
                )
        if not 0 <= self.image_token_index < text.vocab_size:
            raise ValueError(
                f"`image_token_index` is {self.image_token_index}, which is outside `text_config.vocab_size` "
                f"{text.vocab_size}."
            )

    def validate_tiles(self) -> None:
        """Raise a `ValueError` where images cannot be cut into tiles of the vision tower's size. Runs likewise."""
        if self.image_grid_pinpoints is None:
            return
        if not self.image_grid_pinpoints:
            raise ValueError("`image_grid_pinpoints` is empty: list resolutions, or leave it out for whole images.")
        for pinpoint in self.image_grid_pinpoints:
            if (
                not isinstance(pinpoint, list)
                or len(pinpoint) != 2
                or any(type(side) is not int or side < 1 for side in pinpoint)
            ):
                raise ValueError(f"`image_grid_pinpoints` has {pinpoint}, expected (height, width) in pixels.")
            if any(side % self.tile_size for side in pinpoint):
                raise ValueError(
                    f"`image_grid_pinpoints` has {pinpoint}, which is no multiple of the {self.tile_size} pixels that "
                    "the vision tower takes (`vision_config.image_size`)."
                )

    @property
    def tile_size(self) -> int:
        """`int`: Side of the images that the vision tower takes, in pixels."""
        return vision_image_size(self.vision_config)

    def get_image_layout(self, image_size: Sequence[int] | None = None) -> ImageLayout:
        """
        How an image's tokens stand in the sequence.

        Args:
            image_size (`Sequence[int]`, *optional*): (height, width) of the image in pixels. Without it, the layout
                is that of a whole image without tiles.

        Returns:
            [`ImageLayout`]: The layout.
        """
        projector = self.projector_config
        return get_image_layout(
            projector.num_spatial_tokens,
            projector.patch_grid_size,
            image_size,
            self.image_grid_pinpoints,
            self.tile_size,
        )


__all__ = ["LlavaSPConfig", "LlavaSPProjectorConfig"]
