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
)
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration_llava_sp import LlavaSPProjectorConfig, vision_grid_size
from .checkpoint import ConversionError, read_json
from .original import OriginalConfig


# What Transformers raises for a configuration that it cannot make sense of
CONFIG_ERRORS = (OSError, ValueError, TypeError, StrictDataclassError)

IMAGE_TOKEN = "<image>"

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
    if model_type not in (CLIPConfig.model_type, CLIPVisionConfig.model_type):
        raise ConversionError(
            f"{file}: model_type is {model_type!r}, expected {CLIPConfig.model_type!r} or "
            f"{CLIPVisionConfig.model_type!r}. Pass the vision tower that the checkpoint was trained with."
        )
    try:
        config = CLIPVisionConfig.from_pretrained(folder)
        vision_grid_size(config)
    except CONFIG_ERRORS as error:
        raise ConversionError(f"{file} does not describe a vision tower: {error}") from error
    return CLIPVisionConfig(**declared_fields(config))


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
        "padding_side": "left",
        "model_max_length": text_config.max_position_embeddings,
    }
    try:
        if (folder / "tokenizer_config.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(folder, config=text_config, **settings)
        else:
            # Nothing in a bare tokenizer.model says which class reads it, and AutoTokenizer takes a wrong one
            tokenizer = LlamaTokenizer.from_pretrained(folder, **settings)
    except Exception as error:  # the tokenizer libraries raise anything on a damaged file
        raise ConversionError(f"The tokenizer in {folder} cannot be loaded: {error}") from error
    if len(tokenizer) > text_config.vocab_size:
        raise ConversionError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens, but the language model has embeddings for "
            f"{text_config.vocab_size}. Pass the base model that the checkpoint was trained on."
        )
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    # How it was loaded here, which would be saved
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def load_image_processor(folder: Path, vision_config: PreTrainedConfig, pad_to_square: bool) -> BaseImageProcessor:
    """
    The vision tower's image processor.

    Args:
        folder (`Path`): The vision tower.
        vision_config (`PreTrainedConfig`): Its configuration.
        pad_to_square (`bool`): Whether images are padded to squares first; else they are cropped, if at all.

    Returns:
        `BaseImageProcessor`: The image processor.

    Raises:
        ConversionError: If there is none, or it makes images of another size than the tower takes.
    """
    file = folder / "preprocessor_config.json"
    read_json(file)
    try:
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        if pad_to_square:
            image_processor = LlavaImageProcessorPil(**{**image_processor.to_dict(), "do_pad": True})
        pixel_values = image_processor(PIL.Image.new("RGB", (2, 1)), return_tensors="pt")["pixel_values"]
    except (*CONFIG_ERRORS, KeyError) as error:
        raise ConversionError(f"{file} does not describe an image processor: {error}") from error
    size, expected = tuple(pixel_values.shape[-2:]), (vision_config.image_size, vision_config.image_size)
    if size != expected:
        raise ConversionError(f"{file} makes images of {size} pixels, but the vision tower takes {expected}.")
    return image_processor


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
