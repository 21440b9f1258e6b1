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
"""What each spatial token reads of an image, and what it attends to: as numbers, and as a picture"""

import io
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
import torch.nn.functional as F
from transformers.image_processing_utils import BaseImageProcessor, select_best_resolution

from .configuration_llava_sp import ImageLayout, LlavaSPConfig, LlavaSPProjectorConfig
from .modeling_llava_sp import (
    CACHE,
    LlavaSPForConditionalGeneration,
    SpatialFeatureExtractor,
    image_token_positions,
)
from .processing_llava_sp import LlavaSPProcessor


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

# How many output channels of a convolution are looked at together
CHANNELS_AT_ONCE = 8

# What a figure can be saved as, and what would otherwise write the time into it
FORMATS: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".svg": {"Creator": None, "Date": None},
}

# Panels beside each other, and sizes in inches. matplotlib's own layouts are left aside: their solver's last digits
# differ from run to run, and so would the files
COLUMNS = 6
FIGURE_WIDTH, MARGIN, GAP = 14.0, 0.12, 0.1
PANEL_WIDTH = 2.05
TOP_HEIGHT = 2.6
# A colour bar's five numbers and its meaning need as much
MIN_BAR_HEIGHT = 1.2
LINE_HEIGHT = 0.2
# The picture is drawn once for each token: at this many pixels none of them shows, and a large photo stays cheap
MAX_DRAWN_PIXELS = 640
# Colours go at least this far from even, so that no noise looks like a difference, and at most that far
MIN_RATIO, MAX_RATIO = 1.25, 16.0
HEAT_COLOURS, SCALE_COLOURS = "RdBu_r", "viridis"
# Longer questions and answers are cut in the figure
MAX_TEXT_LINES, LINE_LENGTH = 4, 140


@dataclass(frozen=True)
class Box:
    """
    A rectangle in pixels of the original image, which it may reach out of where the image is padded.

    Args:
        left (`float`): Its left side.
        top (`float`): Its upper side.
        right (`float`): Its right side.
        bottom (`float`): Its lower side.
    """

    left: float
    top: float
    right: float
    bottom: float

    def part(self, left: float, top: float, right: float, bottom: float) -> "Box":
        """The part between fractions of its width and of its height, 0 being its left and its upper side."""
        width, height = self.right - self.left, self.bottom - self.top
        return Box(
            self.left + left * width, self.top + top * height, self.left + right * width, self.top + bottom * height
        )

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """`tuple[float]`: Left, right, bottom, top, as matplotlib takes them."""
        return self.left, self.right, self.bottom, self.top


@dataclass(frozen=True)
class TileExplanation:
    """
    What the spatial tokens of one input of the vision tower see: of the whole image, or of one of its tiles.

    Args:
        name (`str`): Which input it is.
        box ([`Box`]): What of the image the vision tower is given.
        grid_box ([`Box`]): What of it the patch grid covers: the same, unless the tower's image size is no multiple
            of its patch size.
        regions (`tuple[Box]`): What each spatial token reads: the centred crop, or with pooling the whole grid.
        reading (`tuple[torch.Tensor]`): For each spatial token how strongly it reads each cell of its region, of shape
            `(scale, scale)`, adding up to 1: the length of what the cell adds to the token's spatial feature, which is
            the sum of them all. A cell is a patch of the crop, or with pooling the mean of the patches that it covers.
        detail_attention (`torch.Tensor` of shape `(spatial_tokens, details, details)`, *optional*): Attention of each
            spatial token to each detail feature, adding up to 1. `None` without the Detail Feature Integrator.
        patch_attention (`torch.Tensor` of shape `(spatial_tokens, grid_size, grid_size)`, *optional*): The same on the
            patch grid; see [`spread_over_patches`].
    """

    name: str
    box: Box
    grid_box: Box
    regions: tuple[Box, ...]
    reading: tuple[torch.Tensor, ...]
    detail_attention: torch.Tensor | None
    patch_attention: torch.Tensor | None


@dataclass(frozen=True)
class AnswerAttention:
    """
    How much the answer's tokens attend to the image's tokens: the language model's attention weights, from the
    positions that the answer's tokens are predicted at, averaged over those, all heads and all layers. The weights of
    all tokens of the sequence add up to 1.

    Args:
        spatial_tokens (`torch.Tensor` of shape `(tiles, spatial_tokens)`): The weight of each spatial token.
        patch_tokens (`torch.Tensor` of shape `(tiles, side, side)`): The weight of each patch token, NaN where a patch
            only shows padding and is left out of the sequence.
        separators (`float`): The weight of the separators of tiles' rows together.
        text (`float`): The weight of the text together, the answer's own tokens included.
    """

    spatial_tokens: torch.Tensor
    patch_tokens: torch.Tensor
    separators: float
    text: float


@dataclass(frozen=True)
class Explanation:
    """
    What the spatial tokens of an image see; what [`explain`] returns and [`draw`] draws.

    Args:
        image (`PIL.Image.Image`): The image, in RGB and upright.
        config ([`LlavaSPProjectorConfig`]): The projector's configuration, with scales, variant and grid.
        tiles (`tuple[TileExplanation]`): The whole image, and its tiles if the model takes some.
        question (`str`, *optional*): What was asked.
        answer (`str`, *optional*): What the model answered.
        answer_attention ([`AnswerAttention`], *optional*): What the answer attends to. `None` without a question, or
            if the language model has no attention weights.
    """

    image: PIL.Image.Image
    config: LlavaSPProjectorConfig
    tiles: tuple[TileExplanation, ...]
    question: str | None = None
    answer: str | None = None
    answer_attention: AnswerAttention | None = None

    @property
    def scales(self) -> list[int]:
        """`list[int]`: The scale of each spatial token, in patches, or with pooling in cells."""
        return list(self.config.spatial_scales or ())


def spread_over_patches(detail_attention: torch.Tensor, config: LlavaSPProjectorConfig) -> torch.Tensor:
    """
    Attention to detail features as attention to patches. A detail feature is a convolution over a square of
    `detail_kernel_size` patches, every `detail_stride` patches: its weight is spread evenly over those that it sees,
    each of them getting the sum from all squares that it lies in.

    Args:
        detail_attention (`torch.Tensor` of shape `(..., details, details)`): Weights of the detail features.
        config ([`LlavaSPProjectorConfig`]): The projector's configuration.

    Returns:
        `torch.Tensor` of shape `(..., grid_size, grid_size)`: Weights of the patches, with the same sum. Patches that
        no detail feature sees get 0.

    Raises:
        ValueError: If the projector has no Detail Feature Integrator.
    """
    kernel, stride, grid = config.detail_kernel_size, config.detail_stride, config.grid_size
    if kernel is None:
        raise ValueError("Without a Detail Feature Integrator (`use_detail_integrator`), there is no attention.")
    details = detail_attention.shape[-1]
    flat = detail_attention.reshape(-1, 1, details, details)
    square = torch.full((1, 1, kernel, kernel), 1 / kernel**2, dtype=flat.dtype, device=flat.device)
    spread = F.conv_transpose2d(flat, square, stride=stride)
    left_over = grid - spread.shape[-1]
    return F.pad(spread, (0, left_over, 0, left_over)).reshape(*detail_attention.shape[:-2], grid, grid)


@torch.no_grad()
def reading_strengths(extractor: SpatialFeatureExtractor, patch_grid: torch.Tensor) -> list[torch.Tensor]:
    """
    How strongly each spatial token reads each cell of its map. A spatial feature is the sum, over the cells, of the
    kernel's matrix at the cell times the cell's features; the strength is the length of that product.

    Args:
        extractor ([`SpatialFeatureExtractor`]): The model's.
        patch_grid (`torch.Tensor` of shape `(images, channels, grid_size, grid_size)`): The patch grid.

    Returns:
        `list[torch.Tensor]`: For each scale the strengths, of shape `(images, scale, scale)` and type float32, adding
        up to 1 for each image.
    """
    strengths = []
    for feature_map, convolution in zip(extractor.get_feature_maps(patch_grid), extractor.convolutions, strict=True):
        weight: Any = convolution.weight
        # Some channels at a time, as the products of all would take as much memory as the largest kernel
        products = [
            (channels * feature_map[:, None]).sum(dim=2).float()  # (images, some channels, size, size)
            for channels in weight.split(CHANNELS_AT_ONCE)
        ]
        strength = torch.cat(products, dim=1).norm(dim=1).cpu()  # (images, size, size)
        strengths.append(strength / strength.sum(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny))
    return strengths


def input_boxes(
    image_processor: BaseImageProcessor, image_size: tuple[int, int], layout: ImageLayout, tile_size: int
) -> list[Box]:
    """
    What of an image each input of the vision tower shows.

    Args:
        image_processor (`BaseImageProcessor`): What makes the inputs of the image.
        image_size (`tuple[int, int]`): (height, width) of the image in pixels.
        layout ([`ImageLayout`]): How it is cut into tiles.
        tile_size (`int`): Side of the vision tower's inputs in pixels.

    Returns:
        `list[Box]`: The whole image, and then its tiles, row by row.

    Raises:
        ValueError: If the image processor's `size` is of a kind that is not known.
    """
    height, width = image_size
    processor: Any = image_processor
    pinpoints = getattr(processor, "image_grid_pinpoints", None)
    if pinpoints is None:
        return [_whole_image_box(processor, height, width)]

    # Squeezed to a square, whatever its proportions
    boxes = [Box(0, 0, width, height)]
    if layout.num_tiles > 1:
        best_height, best_width = select_best_resolution((height, width), pinpoints)
        scale = min(best_height / height, best_width / width)
        # In the middle of the joined tiles, and padded around
        left = (width - best_width / scale) / 2
        top = (height - best_height / scale) / 2
        side = tile_size / scale
        boxes += [
            Box(left + column * side, top + row * side, left + (column + 1) * side, top + (row + 1) * side)
            for row in range(layout.tile_rows)
            for column in range(layout.tile_columns)
        ]
    return boxes


def _whole_image_box(processor: Any, height: int, width: int) -> Box:
    """What is left of an image that is padded to a square, resized and cropped in the centre, each if asked for."""
    left, top = 0, 0
    if getattr(processor, "do_pad", False):
        side = max(height, width)
        left, top = -((side - width) // 2), -((side - height) // 2)
        height = width = side
    box = Box(left, top, left + width, top + height)
    if processor.do_resize:
        size = {name: value for name, value in dict(processor.size).items() if value is not None}
        if set(size) == {"height", "width"}:
            height, width = size["height"], size["width"]
        elif set(size) == {"shortest_edge"}:
            edge, shortest = size["shortest_edge"], min(height, width)
            height, width = int(edge * height / shortest), int(edge * width / shortest)
        else:
            raise ValueError(
                f"{type(processor).__name__} resizes images to {size}: expected a `size` of 'height' and 'width', or "
                "of 'shortest_edge'."
            )
    if getattr(processor, "do_center_crop", False):
        crop_size = dict(processor.crop_size)
        crop_height, crop_width = crop_size["height"], crop_size["width"]
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        box = box.part(left / width, top / height, (left + crop_width) / width, (top + crop_height) / height)
    return box


def load_rgb_image(processor: LlavaSPProcessor, image: str | os.PathLike | PIL.Image.Image) -> PIL.Image.Image:
    """
    Load an image as the processor does.

    Args:
        processor ([`LlavaSPProcessor`]): The model's processor.
        image (`str`, `PathLike` or `PIL.Image.Image`): A file, a URL, a data URI or a PIL image.

    Returns:
        `PIL.Image.Image`: The image, in RGB.

    Raises:
        ValueError: If it cannot be read; the message says why.
    """
    loaded = processor._load_images(image, "the image")
    if not isinstance(loaded, PIL.Image.Image):
        raise ValueError(
            f"Expected one image as a path, URL or PIL image, got {type(image).__name__}. Pass arrays as "
            "PIL.Image.fromarray(array)."
        )
    return loaded


@torch.no_grad()
def explain(
    model: LlavaSPForConditionalGeneration,
    processor: LlavaSPProcessor,
    image: str | os.PathLike | PIL.Image.Image,
    question: str | None = None,
    max_new_tokens: int = 64,
) -> Explanation:
    """
    Say what each spatial token of an image reads and attends to.

    Args:
        model ([`LlavaSPForConditionalGeneration`]): The model.
        processor ([`LlavaSPProcessor`]): Its processor.
        image (`str`, `PathLike` or `PIL.Image.Image`): A file, a URL, a data URI or a PIL image.
        question (`str`, *optional*): A question about the image. With one, the model answers, and what its answer
            attends to is said as well. That computes the language model's attention anew in its plain ("eager")
            implementation, as no other gives the weights.
        max_new_tokens (`int`, *optional*, defaults to 64): Longest answer, in tokens. It is greedy.

    Returns:
        [`Explanation`]: Regions, strengths and attention, all tensors being float32 and on the CPU.

    Raises:
        ValueError: If the model is no LLaVA-SP, the image cannot be read, or image and question are too long for it.

    Example:

    ```python
    >>> from transformers import AutoModelForImageTextToText, AutoProcessor
    >>> from transformers_llava_sp.visualization import draw, explain, save_figure

    >>> model = AutoModelForImageTextToText.from_pretrained("path/to/llava-sp")
    >>> processor = AutoProcessor.from_pretrained("path/to/llava-sp")
    >>> explanation = explain(model, processor, "photo.jpg", question="What is shown in this image?")
    >>> explanation.tiles[0].patch_attention.shape
    torch.Size([6, 24, 24])

    >>> save_figure(draw(explanation), "explanation.png")
    ```"""
    if model.config.model_type != LlavaSPConfig.model_type:
        raise ValueError(
            f"Expected a LLaVA-SP model, got {type(model).__name__}, whose model_type is {model.config.model_type!r}."
        )
    image = load_rgb_image(processor, image)
    pixels: Any = processor.image_processor(image, return_tensors="pt").to(model.device, model.dtype)
    with _keep_outputs(model) as kept:
        model.get_image_features(pixels["pixel_values"], image_sizes=pixels.get("image_sizes"))

    config: Any = model.config.projector_config
    layout = ImageLayout(config.num_spatial_tokens, config.patch_grid_size)
    if pixels["pixel_values"].ndim == 5:
        layout = model.config.get_image_layout((image.height, image.width))
    boxes = input_boxes(
        processor.image_processor, (image.height, image.width), layout, tile_size=model.config.tile_size
    )
    explanation = Explanation(image=image, config=config, tiles=_explain_tiles(model.config, layout, boxes, kept))
    if question is None:
        return explanation
    answer, answer_attention = _answer(model, processor, image, question, max_new_tokens, layout)
    return Explanation(image, config, explanation.tiles, question, answer, answer_attention)


@contextmanager
def _keep_outputs(model: LlavaSPForConditionalGeneration) -> Iterator[dict[str, Any]]:
    """What happens inside the projector on its next pass: `"reading"` strengths and, if any, detail `"attention"`."""
    projector = model.model.multi_modal_projector
    kept: dict[str, Any] = {}

    def keep_reading(extractor: Any, inputs: tuple, output: torch.Tensor) -> None:
        kept["reading"] = reading_strengths(extractor, inputs[0])

    def keep_attention(integrator: Any, inputs: tuple, output: tuple) -> None:
        attention = output[1].float().cpu()
        # Rounded to 16 bits, the weights no longer add up to 1
        kept["attention"] = attention / attention.sum(dim=-1, keepdim=True)

    hooks = [projector.spatial_feature_extractor.register_forward_hook(keep_reading)]
    if projector.detail_feature_integrator is not None:
        hooks.append(projector.detail_feature_integrator.register_forward_hook(keep_attention))
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _explain_tiles(
    model_config: LlavaSPConfig, layout: ImageLayout, boxes: list[Box], kept: dict[str, Any]
) -> tuple[TileExplanation, ...]:
    vision_config: Any = model_config.vision_config
    config: Any = model_config.projector_config
    patch_size = vision_config.patch_size
    patch_size = patch_size[0] if isinstance(patch_size, (list, tuple)) else patch_size
    covered = config.grid_size * patch_size / model_config.tile_size
    names = ["whole image"] + [
        f"tile in row {row + 1}, column {column + 1}"
        for row in range(layout.tile_rows)
        for column in range(layout.tile_columns)
    ]
    tiles = []
    for index, (name, box) in enumerate(zip(names, boxes, strict=True)):
        grid_box = box.part(0, 0, covered, covered)
        edges = [
            (config.grid_size - (scale if config.spatial_variant == "cropping" else config.grid_size))
            / (2 * config.grid_size)
            for scale in config.spatial_scales
        ]
        detail_attention = patch_attention = None
        if "attention" in kept:
            side = round(config.num_detail_tokens**0.5)
            detail_attention = kept["attention"][index].unflatten(-1, (side, side))
            patch_attention = spread_over_patches(detail_attention, config)
        tiles.append(
            TileExplanation(
                name=name,
                box=box,
                grid_box=grid_box,
                regions=tuple(grid_box.part(edge, edge, 1 - edge, 1 - edge) for edge in edges),
                reading=tuple(strengths[index] for strengths in kept["reading"]),
                detail_attention=detail_attention,
                patch_attention=patch_attention,
            )
        )
    return tuple(tiles)


def _answer(
    model: LlavaSPForConditionalGeneration,
    processor: LlavaSPProcessor,
    image: PIL.Image.Image,
    question: str,
    max_new_tokens: int,
    layout: ImageLayout,
) -> tuple[str, AnswerAttention | None]:
    """The greedy answer, and what it attends to."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs: Any = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    prompt = inputs["input_ids"]
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    answer_ids = output[:, prompt.shape[1] :]
    end_ids = model.generation_config.eos_token_id
    end_ids = end_ids if isinstance(end_ids, list) else [end_ids]
    if answer_ids.shape[1] > 1 and answer_ids[0, -1].item() in end_ids:
        # What an answer ends with is not what it says
        answer_ids = answer_ids[:, :-1]

    # The prompt first and without weights, which would be as many as it is long, squared; then only the positions that
    # predict the answer: the prompt's last one and all of the answer's but the last
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    prefill = model(input_ids=prompt[:, :-1], **images, use_cache=True, logits_to_keep=1)
    language_model = model.model.language_model
    with _eager_attention(language_model):
        attentions = model(
            input_ids=torch.cat([prompt[:, -1:], answer_ids[:, :-1]], dim=1),
            **{CACHE: prefill[CACHE]},
            output_attentions=True,
        ).attentions
    answer = processor.decode(answer_ids[0], skip_special_tokens=True).strip()
    # Layers of another kind than attention, which some language models mix in, give none
    layers = [attention[0].float().mean(dim=(0, 1)).cpu() for attention in attentions or () if attention is not None]
    if not layers:
        return answer, None
    length = prompt.shape[1] + answer_ids.shape[1] - 1
    # Sliding windows have only the last positions
    weights = torch.stack([F.pad(layer, (length - len(layer), 0)) for layer in layers]).mean(dim=0)
    is_image = prompt[0].cpu() == model.config.image_token_id
    return answer, _attention_to_image(weights, is_image, layout)


@contextmanager
def _eager_attention(language_model: Any) -> Iterator[None]:
    """Attention in the implementation that returns its weights."""
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)


def _attention_to_image(weights: torch.Tensor, is_image: torch.Tensor, layout: ImageLayout) -> AnswerAttention:
    """
    Sort the weights of a sequence's tokens by what they stand for.

    Args:
        weights (`torch.Tensor` of shape `(sequence_length,)`): The weight of each token.
        is_image (`torch.BoolTensor` of shape `(prompt_length,)`): Which tokens of the prompt are the image's.
        layout ([`ImageLayout`]): How they stand in the sequence.
    """
    of_image = weights[: len(is_image)][is_image]
    positions = image_token_positions(layout)
    is_separator = positions < 0
    num_spatial, side = layout.num_spatial_tokens, layout.patch_grid_size
    tokens = torch.full((layout.num_tiles * (num_spatial + side**2),), float("nan"))
    tokens[positions[~is_separator]] = of_image[~is_separator]
    tokens = tokens.view(layout.num_tiles, -1)
    return AnswerAttention(
        spatial_tokens=tokens[:, :num_spatial],
        patch_tokens=tokens[:, num_spatial:].unflatten(1, (side, side)),
        separators=of_image[is_separator].sum().item(),
        text=(weights.sum() - of_image.sum()).item(),
    )


def require_matplotlib() -> None:
    """Raise an `ImportError` that says what to install, if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ImportError("Pictures need matplotlib: pip install 'transformers-llava-sp[demo]'.")


def check_output(path: str | os.PathLike) -> Path:
    """
    Check that a figure can be saved, before any work is done for it.

    Args:
        path (`str` or `PathLike`): The file to write.

    Returns:
        `Path`: The same.

    Raises:
        OSError: If its folder does not exist or cannot be written to, or it is a folder itself.
        ValueError: If its name says no format that figures can be saved as.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"The output {path} ends in {path.suffix!r}: expected one of {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The output {path} cannot be written: there is no folder {path.parent}.")
    if path.is_dir():
        raise IsADirectoryError(f"The output {path} is a folder: name a file.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"The output {path} cannot be written: the folder {path.parent} allows no new files.")
    return path


def save_figure(figure: "Figure", path: str | os.PathLike) -> None:
    """
    Save a figure, whole or not at all, and the same to the byte whenever it is drawn.

    Args:
        figure (`matplotlib.figure.Figure`): What [`draw`] returns.
        path (`str` or `PathLike`): The file to write, ending in .png, .pdf or .svg. It is replaced if it exists.

    Raises:
        OSError: If it cannot be written.
        ValueError: If its name says no such format.
    """
    import matplotlib

    path = check_output(path)
    drawn = io.BytesIO()
    suffix = path.suffix.lower()
    with matplotlib.rc_context({"svg.hashsalt": "llava-sp"}):
        figure.savefig(drawn, format=suffix.removeprefix("."), metadata=FORMATS[suffix])
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(drawn.getvalue())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def draw(explanation: Explanation) -> "Figure":
    """
    Draw an explanation: the picture with the region of each spatial token; for each token how strongly it reads each
    cell of that region and, with the Detail Feature Integrator, how much it attends to each patch; with a question
    also the answer and what it attends to. All colours say how many times an even share something is. Images in tiles
    have rows of panels for the whole image and for each tile.

    Args:
        explanation ([`Explanation`]): What [`explain`] returns.

    Returns:
        `matplotlib.figure.Figure`: The figure, which belongs to no window; [`save_figure`] saves it.

    Raises:
        ImportError: If matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    image = explanation.image.copy()
    image.thumbnail((MAX_DRAWN_PIXELS, MAX_DRAWN_PIXELS))
    text = _wrapped_text(explanation)
    top_height = LINE_HEIGHT * len(text) + TOP_HEIGHT + 1.0
    sections = [(tile, kind) for tile in explanation.tiles for kind in ("reading", "attention")]
    sections = [(tile, kind) for tile, kind in sections if kind == "reading" or tile.patch_attention is not None]
    heights = [_section_height(explanation, tile) for tile, _ in sections]
    figure = Figure(figsize=(FIGURE_WIDTH, top_height + sum(heights)), dpi=100)
    _draw_top(figure, explanation, image, text)
    top = top_height
    for (tile, kind), height in zip(sections, heights, strict=True):
        _draw_section(figure, top, explanation, tile, kind, image)
        top += height
    return figure


def _add_axes(figure: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """Axes at a place in inches from the figure's upper left corner."""
    figure_width, figure_height = figure.get_size_inches()
    return figure.add_axes(
        (left / figure_width, 1 - (top + height) / figure_height, width / figure_width, height / figure_height)
    )


def _add_text(figure: "Figure", left: float, top: float, text: str, size: float) -> None:
    """Text at a place in inches from the figure's upper left corner."""
    figure_width, figure_height = figure.get_size_inches()
    x, y = left / figure_width, 1 - top / figure_height
    # A question about prices is no formula
    figure.text(x, y, text, fontsize=size, va="top", parse_math=False)


def _fit(view: Box, width: float, height: float) -> tuple[float, float]:
    """The largest width and height in these proportions."""
    ratio = (view.bottom - view.top) / (view.right - view.left)
    return min(width, height / ratio), min(height, width * ratio)


def _panel_size(explanation: Explanation, tile: TileExplanation) -> tuple[float, float]:
    """Width and height of a panel in inches: as wide as there is room, unless the picture is very high."""
    return _fit(_view(explanation, tile), PANEL_WIDTH, 1.6 * PANEL_WIDTH)


def _row_height(explanation: Explanation, tile: TileExplanation) -> float:
    """Height of a row of panels in inches, with text above and below."""
    return max(_panel_size(explanation, tile)[1], MIN_BAR_HEIGHT) + 2.4 * LINE_HEIGHT


def _section_height(explanation: Explanation, tile: TileExplanation) -> float:
    """Height of a section in inches: a title and rows of panels."""
    return 1.5 * LINE_HEIGHT + -(-len(explanation.scales) // COLUMNS) * _row_height(explanation, tile)


def _view(explanation: Explanation, tile: TileExplanation) -> Box:
    """What a panel shows: what the tower sees, and of the whole image also what is cropped away."""
    box = tile.box
    if tile is not explanation.tiles[0]:
        return box
    width, height = explanation.image.size
    return Box(min(box.left, 0), min(box.top, 0), max(box.right, width), max(box.bottom, height))


def _wrapped_text(explanation: Explanation) -> list[str]:
    """Question and answer, in lines that fit."""
    lines: list[str] = []
    if explanation.question is not None:
        for name, text in (("Question", explanation.question), ("Answer", explanation.answer or "(nothing)")):
            lines += textwrap.wrap(f"{name}: {text}", LINE_LENGTH, max_lines=MAX_TEXT_LINES, placeholder=" ...")
    return lines


def _scale_colours(explanation: Explanation) -> list[tuple]:
    """One colour for each scale, the palest of the map left out."""
    import matplotlib

    colours = matplotlib.colormaps[SCALE_COLOURS]
    num_tokens = len(explanation.scales)
    return [colours(0.9 * index / max(num_tokens - 1, 1)) for index in range(num_tokens)]


def _draw_top(figure: "Figure", explanation: Explanation, image: PIL.Image.Image, text: list[str]) -> None:
    """The picture with all regions, and, after a question, what the answer attends to."""
    _add_text(figure, MARGIN, MARGIN, "\n".join(text), 10.5)
    top = LINE_HEIGHT * len(text) + 0.5
    whole = explanation.tiles[0]
    width, height = _fit(_view(explanation, whole), 1.2 * TOP_HEIGHT, TOP_HEIGHT)
    axes = _add_axes(figure, MARGIN, top, width, height)
    _show_image(axes, explanation, whole, image)
    colours = _scale_colours(explanation)
    handles = [
        _outline(axes, region, colour, label=_reads(explanation, index))
        for index, (region, colour) in enumerate(zip(whole.regions, colours, strict=True))
    ]
    for tile in explanation.tiles[1:]:
        _outline(axes, tile.box, "white", linestyle=":", clip_on=True)
    axes.set_title("What the spatial tokens read", fontsize=10)
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)

    attention = explanation.answer_attention
    middle = MARGIN + 1.2 * TOP_HEIGHT + 2.2
    if attention is None:
        hint = [textwrap.fill(line, 90) for line in _how_to_read(explanation)]
        _add_text(figure, middle, top + 0.3, "\n\n".join(hint), 10)
        return

    patches = attention.patch_tokens[0]
    ratio = patches / patches.mean()
    width, height = _fit(_view(explanation, whole), 1.1 * TOP_HEIGHT, TOP_HEIGHT)
    axes = _add_axes(figure, middle, top, width, height)
    mappable = _show_heat(axes, explanation, whole, image, ratio, whole.grid_box, _limit([ratio]))
    of_whole = " (whole image)" if len(explanation.tiles) > 1 else ""
    axes.set_title(f"What the answer attends to: patch tokens{of_whole}", fontsize=10)
    _colour_bar(figure, mappable, middle + width + GAP, top, height, "times their mean")

    shares = attention.spatial_tokens.mean(dim=0)
    bars = [*(100 * shares).tolist(), 100 * attention.patch_tokens.nanmean().item()]
    names = [_reads(explanation, index, short=True) for index in range(len(shares))] + ["a patch token (mean)"]
    axes = _add_axes(figure, FIGURE_WIDTH - 2.9, top + 0.1, 2.7, TOP_HEIGHT - 0.3)
    axes.barh(range(len(bars)), bars, color=[*colours, "grey"])
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)
    of_tiles = ", mean of the tiles" if len(explanation.tiles) > 1 else ""
    axes.set_xlabel(f"% of the attention, each token{of_tiles}", fontsize=8)
    spatial, patch = attention.spatial_tokens.sum().item(), attention.patch_tokens.nansum().item()
    separators = f"separators {attention.separators:.1%}, " if len(explanation.tiles) > 1 else ""
    axes.set_title(
        f"Of the answer's attention: spatial tokens {spatial:.1%},\n"
        f"patch tokens {patch:.1%}, {separators}text {attention.text:.1%}",
        fontsize=8.5,
    )


def _how_to_read(explanation: Explanation) -> list[str]:
    """What the maps show, for a figure that has room to say so."""
    config = explanation.config
    region = "a centred crop of the patches" if config.spatial_variant == "cropping" else "the whole grid, pooled"
    lines = [
        f"Each spatial token reads {region}. Its map shows how much each cell adds to the token's spatial feature: "
        "the length of what is added, as a multiple of an even share.",
    ]
    if config.use_detail_integrator:
        lines.append(
            f"It also attends to {config.num_detail_tokens} detail features, each of {config.detail_kernel_size} x "
            f"{config.detail_kernel_size} patches. Their weights are spread over these patches; red is attended to "
            "more than if all weights were the same, blue less."
        )
    return [*lines, "Neither says what the language model makes of the token."]


def _draw_section(
    figure: "Figure", top: float, explanation: Explanation, tile: TileExplanation, kind: str, image: PIL.Image.Image
) -> None:
    """A panel for each spatial token: how strongly it reads its cells, or what it attends to."""
    config, attention = explanation.config, tile.detail_attention
    of_tile = f" ({tile.name})" if len(explanation.tiles) > 1 else ""
    if kind == "reading" or attention is None or tile.patch_attention is None:
        title = f"How strongly each spatial token reads each cell of its region{of_tile}"
        ratios = [reading * reading.numel() for reading in tile.reading]
        boxes = list(tile.regions)
    else:
        title = (
            f"Detail Feature Integrator: what each spatial token attends to{of_tile}; "
            f"dashed: the {config.detail_kernel_size} x {config.detail_kernel_size} patches of the strongest of "
            f"{config.num_detail_tokens} detail features"
        )
        even = spread_over_patches(torch.full_like(attention[0], 1 / config.num_detail_tokens), config)
        # Patches that no detail feature sees are neither more nor less than even
        ratios = list((tile.patch_attention / even).where(even > 0, float("nan")))
        boxes = [tile.grid_box] * len(ratios)
    _add_text(figure, MARGIN, top, title, 10)
    top += 1.2 * LINE_HEIGHT
    width, height = _panel_size(explanation, tile)
    row_height = _row_height(explanation, tile)
    limit = _limit(ratios)
    for index, (ratio, box) in enumerate(zip(ratios, boxes, strict=True)):
        row, column = divmod(index, COLUMNS)
        panel = _add_axes(
            figure, MARGIN + column * (PANEL_WIDTH + GAP), top + row * row_height + LINE_HEIGHT, width, height
        )
        mappable = _show_heat(panel, explanation, tile, image, ratio, box, limit)
        panel.set_title(_reads(explanation, index), fontsize=8, pad=3)
        for spine in panel.spines.values():
            spine.set(visible=True, color=_scale_colours(explanation)[index], linewidth=2)
        if kind == "attention" and attention is not None:
            _mark_strongest(panel, explanation, tile, attention[index])
    columns, rows = min(len(ratios), COLUMNS), -(-len(ratios) // COLUMNS)
    left = MARGIN + columns * (PANEL_WIDTH + GAP) - PANEL_WIDTH + width
    _colour_bar(figure, mappable, left, top + LINE_HEIGHT, (rows - 1) * row_height + height, "times an even share")


def _mark_strongest(panel: "Axes", explanation: Explanation, tile: TileExplanation, attention: torch.Tensor) -> None:
    """Outline what the detail feature with the largest weight sees, and say the weight."""
    config = explanation.config
    weight, strongest = attention.flatten().max(dim=0)
    row, column = divmod(int(strongest), attention.shape[-1])
    stride, size = config.detail_stride / config.grid_size, (config.detail_kernel_size or 0) / config.grid_size
    left, top = column * stride, row * stride
    _outline(panel, tile.grid_box.part(left, top, left + size, top + size), "black", linestyle="--")
    panel.set_xlabel(f"strongest {weight:.1%}, even {1 / config.num_detail_tokens:.1%}", fontsize=8)


def _reads(explanation: Explanation, index: int, short: bool = False) -> str:
    """What a spatial token reads, in words."""
    scale, grid_size = explanation.scales[index], explanation.config.grid_size
    if short:
        return f"{index + 1}: {scale} x {scale}"
    if explanation.config.spatial_variant == "pooling":
        return f"{index + 1}: all, as {scale} x {scale} cells"
    return f"{index + 1}: {'all' if scale == grid_size else 'central'} {scale} x {scale} patches"


def _show_image(axes: "Axes", explanation: Explanation, tile: TileExplanation, image: PIL.Image.Image) -> None:
    """The picture in its own pixels, with what is padded around it."""
    view = _view(explanation, tile)
    width, height = explanation.image.size
    # Under colours a picture is light, so that those of dark parts can be told apart
    colours: dict[str, Any] = {"cmap": "gray", "vmin": -255, "vmax": 255} if image.mode == "L" else {}
    axes.imshow(image, extent=(0, width, height, 0), **colours)
    axes.set(xlim=(view.left, view.right), ylim=(view.bottom, view.top), xticks=[], yticks=[], facecolor="0.8")


def _show_heat(
    axes: "Axes",
    explanation: Explanation,
    tile: TileExplanation,
    image: PIL.Image.Image,
    ratio: torch.Tensor,
    box: Box,
    limit: float,
) -> "ScalarMappable":
    """A map of ratios to an even share over the grey picture, what is outside of the map being darkened."""
    from matplotlib.colors import LogNorm

    _show_image(axes, explanation, tile, image.convert("L"))
    mappable = axes.imshow(
        ratio.clamp(1 / limit, limit).numpy(),
        extent=box.extent,
        cmap=HEAT_COLOURS,
        norm=LogNorm(1 / limit, limit),
        alpha=0.6,
        interpolation="nearest",
    )
    view = _view(explanation, tile)
    axes.set(xlim=(view.left, view.right), ylim=(view.bottom, view.top))
    for left, top, right, bottom in (
        (view.left, view.top, view.right, box.top),
        (view.left, box.bottom, view.right, view.bottom),
        (view.left, box.top, box.left, box.bottom),
        (box.right, box.top, view.right, box.bottom),
    ):
        axes.fill([left, right, right, left], [top, top, bottom, bottom], color="black", alpha=0.45, linewidth=0)
    return mappable


def _outline(
    axes: "Axes", box: Box, colour: Any, linestyle: str = "-", label: str | None = None, clip_on: bool = False
) -> Any:
    """A rectangle on a picture."""
    (line,) = axes.plot(
        [box.left, box.right, box.right, box.left, box.left],
        [box.top, box.top, box.bottom, box.bottom, box.top],
        color=colour,
        linestyle=linestyle,
        linewidth=1.5,
        label=label,
        clip_on=clip_on,
    )
    return line


def _limit(ratios: list[torch.Tensor]) -> float:
    """How far the colours of these maps go: up to so many times an even share, and down to its so many-th part."""
    # By what is more than even alone: next to nothing, some thousandth of it, would leave no colours for the rest
    return torch.cat([ratio.flatten() for ratio in ratios]).nan_to_num(1.0).max().clamp(MIN_RATIO, MAX_RATIO).item()


def _colour_bar(
    figure: "Figure", mappable: "ScalarMappable", left: float, top: float, height: float, label: str
) -> None:
    """The colours' meaning, beside the panels that share it."""
    from matplotlib.ticker import NullLocator

    colour_bar = figure.colorbar(mappable, cax=_add_axes(figure, left, top, 0.15, max(height, MIN_BAR_HEIGHT)))
    limit = float(mappable.get_clim()[1] or MAX_RATIO)
    ticks = [1 / limit, limit**-0.5, 1, limit**0.5, limit]
    # What is beyond has the same colour
    labels = [f"{tick:.2g}" for tick in ticks]
    labels[0] = f"\N{LESS-THAN OR EQUAL TO} {labels[0]}"
    if limit == MAX_RATIO:
        labels[-1] = f"\N{GREATER-THAN OR EQUAL TO} {labels[-1]}"
    colour_bar.set_ticks(ticks, labels=labels)
    colour_bar.ax.yaxis.set_minor_locator(NullLocator())
    colour_bar.ax.tick_params(labelsize=8)
    colour_bar.set_label(label, fontsize=8)


__all__ = ["AnswerAttention", "Box", "Explanation", "TileExplanation", "draw", "explain", "save_figure"]
