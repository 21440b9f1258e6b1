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
"""What surrounds the weights: configurations, tokenizer, image processor and generation settings of the parts"""

import dataclasses
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaTokenizer,
    LlavaImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration_llava_sp import LlavaSPProjectorConfig, vision_grid_size
from ..processing_llava_sp import (
    VICUNA_V1_CHAT_TEMPLATE,
    add_image_token,
    make_chat_template,
    make_image_processor,
)
from .checkpoint import ConversionError, read_json
from .original import OriginalConfig


# What Transformers raises for a configuration that it cannot make sense of
CONFIG_ERRORS = (OSError, ValueError, TypeError, StrictDataclassError)

IMAGE_TOKEN = "<image>"

# The conversation that the authors evaluate with, or that of the tokenizer
CHAT_TEMPLATES = ("vicuna_v1", "tokenizer")

# The vision towers that the authors' code can have, whole or as one half of a contrastive model
VISION_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    CLIPConfig.model_type: CLIPVisionConfig,
    CLIPVisionConfig.model_type: CLIPVisionConfig,
    SiglipConfig.model_type: SiglipVisionConfig,
    SiglipVisionConfig.model_type: SiglipVisionConfig,
}

# What must agree between the configurations of release and base model, as far as the release states it
ARCHITECTURE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
)
# As Transformers 4 calls them
FORMER_NAMES = {"rope_parameters": ("rope_theta", "rope_scaling")}


def declared_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """
    What a configuration says about the architecture. Leaves out what all configurations have, such as where they were
    loaded from and in which dtype, and what older versions of Transformers wrote besides.
    """
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(type(config))
        if field.name not in common
    }


def read_text_config(base_folder: Path, release_folder: Path) -> PreTrainedConfig:
    """
    The language model's configuration, from the base model.

    Args:
        base_folder (`Path`): The base model.
        release_folder (`Path`): The authors' checkpoint.

    Raises:
        ConversionError: If the release's configuration, which the authors' code takes instead, says something else.
    """
    base_file = base_folder / "config.json"
    read_json(base_file)
    try:
        base_config = AutoConfig.from_pretrained(base_folder)
    except CONFIG_ERRORS as error:
        raise ConversionError(f"{base_file} is not a configuration that Transformers can read: {error}") from error
    release_file = release_folder / "config.json"
    release = read_json(release_file)
    model_type = str(release.get("model_type", ""))
    if model_type.startswith("llava_") and model_type != f"llava_{base_config.model_type}":
        raise ConversionError(
            f"{release_file}: model_type is {model_type!r}, but the base model {base_folder} is a "
            f"{base_config.model_type!r}. Pass the base model that the checkpoint was trained on."
        )
    fields = plain_text_fields(base_config)
    release_config = parse_text_config(release_file, type(base_config))
    for name in ARCHITECTURE_FIELDS:
        stated = not release.keys().isdisjoint({name, *FORMER_NAMES.get(name, ())})
        if stated and name in fields and getattr(release_config, name) != fields[name]:
            raise ConversionError(
                f"{release_file}: {name} is {getattr(release_config, name)!r}, but {fields[name]!r} in the base model "
                f"{base_folder}. Pass the base model that the checkpoint was trained on."
            )
    return type(base_config)(**fields)


def read_merged_text_config(folder: Path) -> PreTrainedConfig:
    """
    The language model's configuration, from the authors' own where the checkpoint holds the language model.

    Args:
        folder (`Path`): The authors' checkpoint.

    Raises:
        ConversionError: If it does not describe a language model that Transformers has.
    """
    file = folder / "config.json"
    model_type = str(read_json(file).get("model_type", "")).removeprefix("llava_")
    if model_type not in CONFIG_MAPPING:
        raise ConversionError(
            f"{file}: model_type is {model_type!r}, expected 'llava_llama' or another language model of Transformers "
            "behind 'llava_'."
        )
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**plain_text_fields(parse_text_config(file, config_class)))


def parse_text_config(file: Path, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Read the language model's fields of an authors' config.json, which has them beside its own."""
    try:
        return config_class.from_dict({**read_json(file), "model_type": config_class.model_type})
    except CONFIG_ERRORS as error:
        raise ConversionError(f"{file} does not describe a {config_class.model_type!r}: {error}") from error


def plain_text_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What a language model's configuration declares, less a switch of training that changes no result."""
    fields = declared_fields(config)
    fields.pop("pretraining_tp", None)
    return fields


def read_vision_config(folder: Path) -> PreTrainedConfig:
    """The vision tower's configuration, from its own or that of the contrastive model it is one half of."""
    file = folder / "config.json"
    model_type = read_json(file).get("model_type")
    if model_type not in VISION_CONFIGS:
        raise ConversionError(
            f"{file}: model_type is {model_type!r}, expected {', '.join(map(repr, VISION_CONFIGS))}. Pass the vision "
            "tower that the checkpoint was trained with."
        )
    config_class = VISION_CONFIGS[model_type]
    try:
        config = config_class.from_pretrained(folder)
        vision_grid_size(config)
    except CONFIG_ERRORS as error:
        raise ConversionError(f"{file} does not describe a vision tower: {error}") from error
    config = config_class(**declared_fields(config))
    if isinstance(config, SiglipVisionConfig):
        # Its feature of the whole image, which the patches do not depend on, would be weights without use
        config.vision_use_head = False
    return config


def check_widths(
    original_config: OriginalConfig,
    projector_config: LlavaSPProjectorConfig,
    text_config: PreTrainedConfig,
    vision_config: PreTrainedConfig,
) -> None:
    """Raise a `ConversionError` if the projector stands between features of other widths."""
    for source, width in (
        ("config.json of the checkpoint (mm_hidden_size)", original_config.vision_hidden_size),
        ("the checkpoint's projector", projector_config.vision_hidden_size),
    ):
        if width not in (None, vision_config.hidden_size):
            raise ConversionError(
                f"{source} takes vision features of width {width}, but the vision tower's have width "
                f"{vision_config.hidden_size}. Pass the vision tower that the checkpoint was trained with (its "
                f"config.json names {original_config.vision_tower!r})."
            )
    if projector_config.text_hidden_size != text_config.hidden_size:
        raise ConversionError(
            f"The checkpoint's projector makes tokens of width {projector_config.text_hidden_size}, but the base "
            f"model's have width {text_config.hidden_size}. Pass the base model that the checkpoint was trained on."
        )


def check_pinpoints(file: Path, image_grid_pinpoints: list[list[int]], tile_size: int) -> None:
    """
    Check that the vision tower takes what images are cut into.

    Args:
        file (`Path`): The config.json that has the resolutions.
        image_grid_pinpoints (`list[list[int]]`): The resolutions, each as (height, width) in pixels.
        tile_size (`int`): Side of the images that the vision tower takes, in pixels.

    Raises:
        ConversionError: If one of them cannot be cut into tiles of that size.
    """
    for height, width in image_grid_pinpoints:
        if height % tile_size or width % tile_size:
            raise ConversionError(
                f"{file}: image_grid_pinpoints has {[width, height]}, expected multiples of {tile_size} pixels, which "
                "is what the vision tower takes. Pass the vision tower that the checkpoint was trained with."
            )


def load_tokenizer(candidates: list[Path], text_config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """
    The checkpoint's tokenizer, or the base model's where it has none, with the image token added.

    Args:
        candidates (`list[Path]`): The folders that may have it, the preferred one first.
        text_config (`PreTrainedConfig`): The language model's configuration.

    Returns:
        `PreTrainedTokenizerBase`: The tokenizer, set up for generation.

    Raises:
        ConversionError: If none has a tokenizer, it cannot be loaded, or has more tokens than embeddings.
    """
    folders = [
        folder
        for folder in candidates
        if any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
    ]
    if not folders:
        raise ConversionError(
            f"There is no tokenizer in {' or '.join(map(str, candidates))}: expected tokenizer.model or "
            "tokenizer.json. Copy the base model's there."
        )
    folder = folders[0]
    settings = {
        "add_bos_token": True,
        "legacy": False,
        "model_max_length": text_config.max_position_embeddings,
    }
    try:
        # AutoTokenizer takes a class that drops the `▁` in front of a text: for a bare tokenizer.model, where nothing
        # says which class reads it, and for a Mistral, whatever its tokenizer_config.json says
        if tokenizer_class(folder) in (None, "LlamaTokenizer", "LlamaTokenizerFast"):
            tokenizer = LlamaTokenizer.from_pretrained(folder, **settings)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, config=text_config, **settings)
    except Exception as error:  # the tokenizer libraries raise anything on a damaged file
        raise ConversionError(f"The tokenizer in {folder} cannot be loaded: {error}") from error
    if len(tokenizer) > text_config.vocab_size:
        raise ConversionError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens, but the language model has embeddings for "
            f"{text_config.vocab_size}. Pass the base model that the checkpoint was trained on."
        )
    add_image_token(tokenizer, IMAGE_TOKEN)
    # How it was loaded here, which would be saved
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def tokenizer_class(folder: Path) -> str | None:
    """The class that a tokenizer's configuration names, `None` where there is no configuration."""
    file = folder / "tokenizer_config.json"
    return str(read_json(file).get("tokenizer_class")) if file.exists() else None


def choose_chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """
    The chat template of the converted model.

    Args:
        name (`str`): One of `CHAT_TEMPLATES`.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer. Its own template is taken from it, so that the processor
            alone has one.

    Returns:
        `str`: The Jinja template.

    Raises:
        ConversionError: If that of the tokenizer is asked for, and it has none.
    """
    template = VICUNA_V1_CHAT_TEMPLATE
    if name == "tokenizer":
        own = tokenizer.chat_template
        if own is None or (isinstance(own, dict) and "default" not in own):
            raise ConversionError(
                f"The tokenizer in {tokenizer.name_or_path} has no chat template: leave out --chat-template, for the "
                "conversation that the authors train with, or copy the tokenizer of a model that has one there."
            )
        template = make_chat_template(tokenizer, IMAGE_TOKEN)
    tokenizer.chat_template = None
    tokenizer.init_kwargs.pop("chat_template", None)
    return template


def load_image_processor(
    folder: Path, vision_config: PreTrainedConfig, original_config: OriginalConfig
) -> BaseImageProcessor:
    """
    The image processor that the checkpoint was trained with.

    Args:
        folder (`Path`): The vision tower.
        vision_config (`PreTrainedConfig`): Its configuration.
        original_config ([`OriginalConfig`]): The authors' configuration, which says whether images are padded to
            squares or cut into tiles; else they are what the vision tower's own image processor makes of them.

    Returns:
        `BaseImageProcessor`: The image processor.

    Raises:
        ConversionError: If there is none, it makes images of another size than the tower takes, or it does with
            squares what cannot be combined with making them.
    """
    file = folder / "preprocessor_config.json"
    read_json(file)
    makes_squares = original_config.pad_to_square or original_config.image_grid_pinpoints is not None
    example = PIL.Image.linear_gradient("L").convert("RGB")
    if not makes_squares:
        example = example.crop((0, 0, example.width, example.height // 2))
    try:
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        pixel_values = image_processor(example, return_tensors="pt")["pixel_values"]
    except (*CONFIG_ERRORS, KeyError) as error:
        raise ConversionError(f"{file} does not describe an image processor: {error}") from error
    size, expected = tuple(pixel_values.shape[-2:]), (vision_config.image_size, vision_config.image_size)
    if size != expected:
        raise ConversionError(f"{file} makes images of {size} pixels, but the vision tower takes {expected}.")
    # The authors give the squares that they make to the tower's own, whatever else that does
    if original_config.pad_to_square:
        crops = bool(getattr(image_processor, "do_center_crop", False))
        return LlavaImageProcessorPil(**{**image_processor.to_dict(), "do_pad": True, "do_center_crop": crops})
    if original_config.image_grid_pinpoints is None:
        return image_processor
    of_tiles = make_image_processor(image_processor, vision_config.image_size, original_config.image_grid_pinpoints)
    if not torch.equal(of_tiles(example, return_tensors="pt")["pixel_values"].flatten(0, -4)[:1], pixel_values):
        raise ConversionError(
            f"{file} describes something else than resizing, rescaling and normalising, such as a crop after resizing "
            "to more pixels, which cannot be combined with tiles."
        )
    return of_tiles


def make_generation_config(
    folder: Path, text_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """
    Greedy decoding, as the authors evaluate, which never yields the image token or ids that stand for no token.

    Args:
        folder (`Path`): The language model's, which says how texts begin and end.
        text_config (`PreTrainedConfig`): The language model's configuration.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, with the image token.

    Returns:
        `GenerationConfig`: The configuration.
    """
    file = folder / "generation_config.json"
    stated = read_json(file) if file.exists() else {}
    special_ids = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        candidates = (stated.get(name), getattr(text_config, name), getattr(tokenizer, name))
        special_ids[name] = next((value for value in candidates if value is not None), None)
    suppressed = {tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), *range(len(tokenizer), text_config.vocab_size)}
    return GenerationConfig(**special_ids, do_sample=False, suppress_tokens=sorted(suppressed))
