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
"""Saying what a checkpoint is, without loading its weights"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..configuration_llava_sp import LlavaSPConfig, LlavaSPProjectorConfig
from .checkpoint import ConversionError, TensorFiles, read_json, resolve_source
from .lora import LoraAdapter
from .original import MODEL_WEIGHTS, Layout, OriginalConfig, identify_layout
from .plan import OriginalWeights, find_image_newline
from .projector import read_projector


Result = TypeVar("Result")


@dataclass
class Inspection:
    """
    What a checkpoint is. Fields that do not apply, or that a problem hides, are `None` or empty.

    Args:
        checkpoint (`str`): Its name.
        layout (`str`): What it is: the name of a [`Layout`] in lower case.
        description (`str`): The same, in words.
        variant (`str`, *optional*): `"cropping"` or `"pooling"`.
        spatial_scales (`list[int]`, *optional*): Sizes of the spatial kernels, in patches.
        spatial_hidden_size (`int`, *optional*): Width of the spatial features.
        grid_size (`int`, *optional*): Side of the vision tower's patch grid, in patches.
        vision_hidden_size (`int`, *optional*): Width of the vision tower's features.
        text_hidden_size (`int`, *optional*): Width of the language model.
        detail_integrator (`bool`, *optional*): Whether there are detail features.
        detail_kernel_size (`int`, *optional*): Size of their kernel, in patches.
        num_detail_tokens (`int`, *optional*): Their number.
        spatial_projection_bias (`bool`, *optional*): Whether the spatial tokens' projection has a bias.
        num_patch_layers (`int`, *optional*): Layers of the patch path.
        image_tokens (`int`, *optional*): Tokens for one image, spatial and patch.
        image_grid_pinpoints (`list[list[int]]`, *optional*): The resolutions that images are cut into tiles at, each
            as (height, width) in pixels. Then `image_tokens` are those of the whole image, and its tiles take more.
        images (`str`, *optional*): What is done to the images first.
        vision_tower (`str`, *optional*): The tower that it names.
        base_model (`str`, *optional*): The base model that it names.
        lora_rank (`int`, *optional*): Rank of its adapter.
        lora_alpha (`float`, *optional*): Alpha of its adapter.
        lora_targets (`dict[str, int]`): How many weights of each kind its adapter is for.
        parameters (`dict[str, int]`): Number of parameters in the checkpoint, by part.
        needs (`list[str]`): What a conversion needs beside it.
        problems (`list[str]`): Why it cannot be converted.
    """

    checkpoint: str
    layout: str
    description: str
    variant: str | None = None
    spatial_scales: list[int] | None = None
    spatial_hidden_size: int | None = None
    grid_size: int | None = None
    vision_hidden_size: int | None = None
    text_hidden_size: int | None = None
    detail_integrator: bool | None = None
    detail_kernel_size: int | None = None
    num_detail_tokens: int | None = None
    spatial_projection_bias: bool | None = None
    num_patch_layers: int | None = None
    image_tokens: int | None = None
    image_grid_pinpoints: list[list[int]] | None = None
    images: str | None = None
    vision_tower: str | None = None
    base_model: str | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return asdict(self)

    def __str__(self) -> str:
        rows: list[tuple[str, str]] = [("checkpoint", self.checkpoint), ("is", self.description)]
        if self.variant is not None:
            detail = "none"
            if self.detail_integrator:
                size = self.detail_kernel_size
                detail = f"{self.num_detail_tokens} features, kernel {size}x{size}"
            tokens = str(self.image_tokens)
            if self.image_grid_pinpoints is not None:
                tokens += " for the whole image; its tiles take more"
            rows += [
                ("variant", self.variant),
                ("scales", ", ".join(map(str, self.spatial_scales or []))),
                ("details (DFI)", detail),
                (
                    "widths",
                    f"vision {self.vision_hidden_size}, spatial {self.spatial_hidden_size}, text "
                    f"{self.text_hidden_size}",
                ),
                ("patch grid", f"{self.grid_size}x{self.grid_size}"),
                ("patch path", f"{self.num_patch_layers} layer{'s' * (self.num_patch_layers != 1)}"),
                ("projection bias", "yes" if self.spatial_projection_bias else "no"),
                ("tokens per image", tokens),
            ]
        images = self.images
        if self.image_grid_pinpoints is not None:
            resolutions = ", ".join(f"{height}x{width}" for height, width in self.image_grid_pinpoints)
            images = f"{images}, in the best-fitting of {resolutions} (height x width)"
        rows += [
            (name, str(value))
            for name, value in (
                ("images", images),
                ("vision tower", self.vision_tower),
                ("base model", self.base_model),
            )
            if value is not None
        ]
        if self.lora_rank is not None:
            targets = ", ".join(f"{name} x {count}" for name, count in self.lora_targets.items())
            rows.append(("LoRA", f"rank {self.lora_rank}, alpha {self.lora_alpha}, on {targets or 'nothing'}"))
        rows += [(f"parameters, {part}", f"{count:,}") for part, count in self.parameters.items()]
        rows += [("needs", need) for need in self.needs]
        rows += [("problem", problem) for problem in self.problems] or [("problems", "none seen")]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def describe_projector(self, config: LlavaSPProjectorConfig) -> None:
        """Take over what a projector's configuration says."""
        self.variant = config.spatial_variant
        self.spatial_scales = list(config.spatial_scales or [])
        self.spatial_hidden_size = config.spatial_hidden_size
        self.grid_size = config.grid_size
        self.vision_hidden_size = config.vision_hidden_size
        self.text_hidden_size = config.text_hidden_size
        self.detail_integrator = config.use_detail_integrator
        self.detail_kernel_size = config.detail_kernel_size if config.use_detail_integrator else None
        self.num_detail_tokens = config.num_detail_tokens
        self.spatial_projection_bias = config.spatial_projection_bias
        self.num_patch_layers = config.num_patch_layers
        self.image_tokens = config.num_image_tokens

    def describe_tiles(self, image_grid_pinpoints: list[list[int]]) -> None:
        """Take over what images are cut into tiles at."""
        self.image_grid_pinpoints = image_grid_pinpoints
        self.images = "cut into tiles"

    def describe_adapter(self, adapter: LoraAdapter) -> None:
        """Take over what an adapter is."""
        self.lora_rank, self.lora_alpha = adapter.rank, adapter.alpha
        for target in adapter.pairs:
            name = target.removesuffix(".weight").rsplit(".", 1)[-1]
            self.lora_targets[name] = self.lora_targets.get(name, 0) + 1
        self.parameters["LoRA"] = sum(adapter.tensors[key].numel() for pair in adapter.pairs.values() for key in pair)
        self.base_model = adapter.base_model or self.base_model


def inspect_checkpoint(checkpoint: str | Path) -> Inspection:
    """
    Find out what a checkpoint is. Its weights are mapped, not read.

    Args:
        checkpoint (`str` or `Path`): A local folder, or a Hub id, which `@` and a branch, tag or commit may follow.

    Returns:
        [`Inspection`]: What it is, and the problems that can be seen without its base model and vision tower.

    Raises:
        ConversionError: If there is no such folder, or what it holds cannot be read.
    """
    source = resolve_source(checkpoint, "checkpoint")
    folder = source.folder
    layout = identify_layout(folder)
    inspection = Inspection(str(source), layout.name.lower(), layout.value)

    def attempt(step: Callable[[], Result]) -> Result | None:
        try:
            return step()
        except ConversionError as error:
            inspection.problems.append(str(error))
            return None

    if layout in (Layout.SP_LORA, Layout.SP_FULL, Layout.SP_PRETRAINING):
        inspect_original(inspection, folder, layout, attempt)
    elif layout is Layout.CONVERTED:
        if LlavaSPConfig.model_type == read_json(folder / "config.json").get("model_type"):
            config = LlavaSPConfig.from_pretrained(folder)
            inspection.describe_projector(config.projector_config)
            if config.image_grid_pinpoints is not None:
                inspection.describe_tiles(config.image_grid_pinpoints)
        weights = TensorFiles.from_folder(folder, MODEL_WEIGHTS)
        inspection.parameters = count_parameters(weights)
        inspection.problems.append("It is converted already: load it as it is.")
    elif layout is Layout.OUR_ADAPTER:
        adapter = attempt(lambda: LoraAdapter(folder, replacements=True))
        if adapter is not None:
            inspection.describe_adapter(adapter)
            replaced = sum(adapter.tensors[key].numel() for key in adapter.replaced.values())
            if replaced:
                inspection.parameters["trained in full"] = replaced
        inspection.problems.append("It is an adapter of a converted model: merge it with `llava-sp merge`.")
    else:
        inspection.problems.append(f"It is {layout.value}, not a LLaVA-SP checkpoint.")
    return inspection


def inspect_original(
    inspection: Inspection, folder: Path, layout: Layout, attempt: Callable[[Callable[[], Any]], Any]
) -> None:
    """
    Fill in what a checkpoint of the authors is.

    Args:
        inspection ([`Inspection`]): What to fill in.
        folder (`Path`): The checkpoint.
        layout (`Layout`): Its layout.
        attempt (`Callable`): Calls a function and notes the `ConversionError` that it raises.
    """
    original_config = attempt(lambda: OriginalConfig.from_file(folder / "config.json"))
    if original_config is not None:
        inspection.vision_tower = original_config.vision_tower
        inspection.base_model = original_config.base_model if layout is not Layout.SP_FULL else None
        if original_config.image_grid_pinpoints is not None:
            inspection.describe_tiles(original_config.image_grid_pinpoints)
        elif original_config.pad_to_square:
            inspection.images = "padded to squares"
        else:
            inspection.images = "resized and cropped at the centre"
    original = attempt(lambda: OriginalWeights.from_folder(folder, layout))
    if original is None:
        return
    if original_config is not None:
        has_tiles = original_config.image_grid_pinpoints is not None
        tensors = original.without_image_newline() if has_tiles else original.projector
        found = attempt(lambda: read_projector(tensors, original.projector_prefix, original_config))
        if found is not None:
            inspection.describe_projector(found[0])
            if has_tiles:
                attempt(lambda: find_image_newline(original, layout, found[0].text_hidden_size))
    inspection.parameters["projector"] = sum(tensor.numel() for tensor in original.projector.values())
    if original.adapter is not None:
        inspection.describe_adapter(original.adapter)
    for part, weights in (("language model", original.language_model), ("vision tower", original.vision_tower)):
        if weights is not None:
            inspection.parameters[part] = sum(tensor.numel() for tensor in weights.values())
    if original.language_model is None:
        inspection.needs.append(describe_need("the base model", inspection.base_model, "--base-model"))
    what = "the vision tower" if original.vision_tower is None else "the vision tower's configuration"
    inspection.needs.append(describe_need(what, inspection.vision_tower, "--vision-tower"))


def describe_need(what: str, named: str | None, option: str) -> str:
    """What a conversion needs, and whether the checkpoint's own name for it is of any use."""
    if named is None:
        return f"{what}, which the checkpoint does not name: pass {option}"
    if not Path(named).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", named):
        return f"{what}, named {named!r}, a path that does not exist on this machine: pass {option}"
    return f"{what} {named!r}, or another one passed with {option}"


def count_parameters(weights: TensorFiles) -> dict[str, int]:
    """The number of parameters of each part of a converted model."""
    parts = {"projector": "multi_modal_projector.", "vision tower": "vision_tower."}
    counts: dict[str, int] = {}
    for key, tensor in weights.items():
        part = next((part for part, name in parts.items() if name in key), "language model")
        counts[part] = counts.get(part, 0) + tensor.numel()
    return counts
