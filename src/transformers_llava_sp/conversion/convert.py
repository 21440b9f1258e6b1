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
"""Conversion of a whole checkpoint: towers and projector together, with configuration, tokenizer and processor"""

import collections
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
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
from transformers.utils.logging import tqdm

from ..configuration_llava_sp import LlavaSPConfig, LlavaSPProjectorConfig, vision_grid_size
from ..modeling_llava_sp import LlavaSPForConditionalGeneration
from ..processing_llava_sp import LlavaSPProcessor
from .checkpoint import ConversionError, TensorFiles, join_keys, read_json, resolve_folder
from .lora import LoraAdapter
from .original import (
    LANGUAGE_MODEL_KEYS,
    LORA_PREFIX,
    LORA_PROJECTOR_WEIGHTS,
    MODEL_WEIGHTS,
    PROJECTOR_PREFIX,
    VISION_TOWER_KEYS,
    Layout,
    OriginalConfig,
    identify_layout,
    read_projector,
    rename_key,
)


# What Transformers raises for a configuration that it cannot make sense of
CONFIG_ERRORS = (OSError, ValueError, TypeError, StrictDataclassError)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

IMAGE_TOKEN = "<image>"
# Matrix products are fastest when the vocabulary is a multiple of this
VOCABULARY_MULTIPLE = 64
EMBEDDINGS_KEY = "model.language_model.embed_tokens.weight"
HEAD_KEY = "lm_head.weight"

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


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """
    What a conversion found and wrote.

    Args:
        output (`Path`): The folder written.
        layout (`Layout`): What the checkpoint was.
        config (`LlavaSPConfig`): The configuration of the converted model.
        dtype (`torch.dtype`): Of all weights.
        num_parameters (`int`): Of the whole model.
        num_merged_weights (`int`): How many weights the LoRA adapter was merged into.
        dropped_keys (`list[str]`): Keys of the inputs that the model has no use for.
    """

    output: Path
    layout: Layout
    config: LlavaSPConfig
    dtype: torch.dtype
    num_parameters: int
    num_merged_weights: int
    dropped_keys: list[str]

    def __str__(self) -> str:
        projector: Any = self.config.projector_config
        scales = ", ".join(map(str, projector.spatial_scales or ()))
        detail = "no detail features"
        if projector.use_detail_integrator:
            kernel = projector.detail_kernel_size
            detail = f"{projector.num_detail_tokens} detail features (kernel {kernel}x{kernel})"
        return "\n".join(
            [
                f"Converted {self.layout.value} to {self.output}",
                f"  variant: {projector.spatial_variant}, scales {scales}, {detail}",
                f"  tokens per image: {projector.num_spatial_tokens} spatial + {projector.num_patch_tokens} patch",
                f"  parameters: {self.num_parameters:,} in {str(self.dtype).removeprefix('torch.')}",
                f"  weights merged with the LoRA adapter: {self.num_merged_weights}",
                f"  tensors without use dropped: {len(self.dropped_keys)}",
            ]
        )


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    base_model: str | Path,
    vision_tower: str | Path,
    dtype: str = "auto",
) -> ConversionReport:
    """
    Convert a checkpoint of the LLaVA-SP authors into a folder that Transformers loads: model, generation
    configuration, tokenizer, image processor and chat template. Which variant it is, is read from its tensors.

    Args:
        checkpoint (`str` or `Path`): A LoRA release of the authors, a local folder or a Hub id.
        output (`str` or `Path`): The folder to write, which must not exist. It appears when all of it is written.
        base_model (`str` or `Path`): The language model that the adapter was trained on, a local folder or a Hub id.
        vision_tower (`str` or `Path`): The vision tower that the projector was trained with, likewise.
        dtype (`str`, *optional*, defaults to `"auto"`): Of all weights written: `"float32"`, `"float16"`,
            `"bfloat16"`, or `"auto"` for the one that the base model's weights are stored in.

    Returns:
        [`ConversionReport`]: What was found and written. Its string is a summary.

    Raises:
        ConversionError: If the checkpoint is none that can be converted, a part is missing or damaged, the base model
            or the vision tower does not belong to it, or `output` cannot be used. Nothing is left at `output`.
    """
    output = Path(output)
    if os.path.lexists(output):
        raise ConversionError(f"The output {output} exists already: remove it or choose another.")
    if dtype != "auto" and dtype not in DTYPES:
        raise ConversionError(f"Unknown dtype {dtype!r}: expected 'auto', {', '.join(map(repr, DTYPES))}.")
    release_folder = resolve_folder(checkpoint, "checkpoint")
    base_folder = resolve_folder(base_model, "base model")
    tower_folder = resolve_folder(vision_tower, "vision tower")
    for folder in (release_folder, base_folder, tower_folder):
        if output.resolve().is_relative_to(folder.resolve()):
            raise ConversionError(f"The output {output} lies inside {folder}, which is an input: choose another.")

    plan = plan_conversion(release_folder, base_folder, tower_folder, dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".incomplete", dir=output.parent) as staging:
        folder = Path(staging) / output.name
        load_weights(plan)
        plan.model.save_pretrained(folder)
        plan.processor.save_pretrained(folder)
        folder.rename(output)
    return ConversionReport(
        output=output,
        layout=plan.layout,
        config=plan.model.config,
        dtype=plan.dtype,
        num_parameters=plan.model.num_parameters(),
        num_merged_weights=plan.num_merged_weights,
        dropped_keys=plan.dropped_keys,
    )


@dataclasses.dataclass(frozen=True)
class Source:
    """
    Where a tensor of the converted model comes from.

    Args:
        weights (`TensorFiles`): The files.
        key (`str`): Its key there.
        adapter (`LoraAdapter`, *optional*): An adapter to merge into it, if that has a part for it.
    """

    weights: TensorFiles
    key: str
    adapter: LoraAdapter | None = None


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """
    Everything about a conversion but the values of the tensors, whose keys and shapes are checked.

    Args:
        layout (`Layout`): What the checkpoint is.
        model (`LlavaSPForConditionalGeneration`): The model, with all configurations, on the meta device.
        processor (`LlavaSPProcessor`): Its processor.
        dtype (`torch.dtype`): Of all weights to write.
        sources (`dict[str, Source]`): Where each tensor of the model comes from.
        num_merged_weights (`int`): How many weights the LoRA adapter is merged into.
        dropped_keys (`list[str]`): Keys of the inputs that the model has no use for.
    """

    layout: Layout
    model: LlavaSPForConditionalGeneration
    processor: LlavaSPProcessor
    dtype: torch.dtype
    sources: dict[str, Source]
    num_merged_weights: int
    dropped_keys: list[str]


def plan_conversion(release_folder: Path, base_folder: Path, tower_folder: Path, dtype: str) -> ConversionPlan:
    """
    Find out what the inputs are, and check that they are complete and belong together.

    Args:
        release_folder (`Path`): The authors' checkpoint.
        base_folder (`Path`): The base model.
        tower_folder (`Path`): The vision tower.
        dtype (`str`): A key of `DTYPES` or `"auto"`.

    Returns:
        `ConversionPlan`: What to write.

    Raises:
        ConversionError: If they cannot be converted.
    """
    check_layout(
        release_folder, "checkpoint", Layout.SP_LORA, "Only LoRA releases of the LLaVA-SP authors can be converted."
    )
    check_layout(base_folder, "base model", Layout.LANGUAGE_MODEL, "Pass the model that the adapter was trained on.")
    check_layout(
        tower_folder, "vision tower", Layout.CLIP, "Only checkpoints with a CLIP vision tower can be converted."
    )
    original_config = OriginalConfig.from_file(release_folder / "config.json")
    text_config = read_text_config(base_folder, release_folder)
    vision_config = read_vision_config(tower_folder)
    projector_weights = TensorFiles([release_folder / LORA_PROJECTOR_WEIGHTS])
    projector_config, projector_keys = read_projector(
        projector_weights, LORA_PREFIX + PROJECTOR_PREFIX, original_config, vision_grid_size(vision_config)
    )
    check_widths(original_config, projector_config, text_config, vision_config)
    base_weights = TensorFiles.from_folder(base_folder, MODEL_WEIGHTS)
    tower_weights = TensorFiles.from_folder(tower_folder, MODEL_WEIGHTS)
    adapter = LoraAdapter(release_folder)
    adapter.check_targets(base_weights)

    tokenizer = load_tokenizer(release_folder, base_folder, text_config)
    old_vocabulary_size = text_config.vocab_size
    text_config.vocab_size = round_up(max(old_vocabulary_size, len(tokenizer)), VOCABULARY_MULTIPLE)
    processor = LlavaSPProcessor(
        load_image_processor(tower_folder, vision_config, original_config.pad_to_square),
        tokenizer,
        num_spatial_tokens=projector_config.num_spatial_tokens,
        grid_size=projector_config.grid_size,
    )
    target_dtype = storage_dtype(base_folder, base_weights) if dtype == "auto" else DTYPES[dtype]
    try:
        config = LlavaSPConfig(
            vision_config=vision_config,
            text_config=text_config,
            projector_config=projector_config,
            image_token_index=processor.image_token_id,
            vision_feature_layer=original_config.vision_feature_layer,
            vision_feature_select_strategy="default",
            dtype=target_dtype,
        )
    except ValueError as error:
        raise ConversionError(f"{release_folder} does not fit its base model or vision tower: {error}") from error
    with torch.device("meta"):
        model = LlavaSPForConditionalGeneration(config)
    model.generation_config = make_generation_config(base_folder, text_config, tokenizer)

    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD_KEY]
    for key in shapes.keys() & {EMBEDDINGS_KEY, HEAD_KEY}:
        shapes[key] = (old_vocabulary_size, *shapes[key][1:])
    language_keys, dropped_language_keys = rename_keys(
        base_folder,
        base_weights,
        LANGUAGE_MODEL_KEYS,
        {key for key in shapes if key.startswith(("model.language_model.", "lm_head."))},
    )
    tower_keys, dropped_tower_keys = rename_keys(
        tower_folder,
        tower_weights,
        VISION_TOWER_KEYS,
        {key for key in shapes if key.startswith("model.vision_tower.")},
    )
    sources = {
        **{target: Source(base_weights, key, adapter) for key, target in language_keys.items()},
        **{target: Source(tower_weights, key) for key, target in tower_keys.items()},
        **{target: Source(projector_weights, key) for key, target in projector_keys.items()},
    }
    for target, source in sources.items():
        source.weights.check(source.key, shapes[target])
    return ConversionPlan(
        layout=Layout.SP_LORA,
        model=model,
        processor=processor,
        dtype=target_dtype,
        sources=sources,
        num_merged_weights=len(adapter.pairs),
        dropped_keys=dropped_language_keys + dropped_tower_keys,
    )


def load_weights(plan: ConversionPlan) -> None:
    """Convert all tensors of a plan and give them to its model."""
    shapes = {key: tuple(tensor.shape) for key, tensor in plan.model.state_dict().items()}
    state_dict = {
        target: convert_tensor(source, shapes[target], plan.dtype)
        for target, source in tqdm(plan.sources.items(), desc="Converting", unit="tensor")
    }
    if plan.model.config.tie_word_embeddings:
        state_dict[HEAD_KEY] = state_dict[EMBEDDINGS_KEY]
    plan.model.load_state_dict(state_dict, assign=True)
    plan.model.tie_weights()


def convert_tensor(source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """
    Read a tensor, merge the adapter into it, append rows where the vocabulary has grown, and cast it.

    Args:
        source (`Source`): Where it comes from.
        shape (`tuple[int, ...]`): The shape it gets. New rows are the mean of the old ones.
        dtype (`torch.dtype`): The dtype it gets.

    Returns:
        `torch.Tensor` of shape `shape`: The tensor, in memory.

    Raises:
        ConversionError: If it holds NaN or infinite values, before or after the cast.
    """
    tensor = source.weights[source.key]
    if source.adapter is not None:
        tensor = source.adapter.merge(source.key, tensor)
    if new_rows := shape[0] - tensor.shape[0] if shape else 0:
        tensor = tensor.float()
        tensor = torch.cat([tensor, tensor.mean(dim=0, keepdim=True).expand(new_rows, -1)])
    converted = tensor.to(dtype, memory_format=torch.contiguous_format, copy=True)
    if not converted.isfinite().all():
        what = f"{source.weights.file_of(source.key)}: {source.key!r}"
        if source.adapter is not None and source.key in source.adapter.pairs:
            what += ", merged with the LoRA adapter,"
        if tensor.isfinite().all():
            raise ConversionError(f"{what} has values outside the range of {dtype}: choose another dtype.")
        raise ConversionError(f"{what} has values that are NaN or infinite.")
    return converted


def rename_keys(
    folder: Path, weights: TensorFiles, table: dict[str, str | None], targets: set[str]
) -> tuple[dict[str, str], list[str]]:
    """
    Where the tensors of a tower or language model go.

    Args:
        folder (`Path`): Its folder, for error messages.
        weights (`TensorFiles`): Its tensors.
        table (`dict[str, str | None]`): Patterns of keys and what they become, `None` if they are dropped.
        targets (`set[str]`): The keys of our model that must come out.

    Returns:
        `tuple(dict[str, str], list[str])`: Our key for each key that is used, and the keys that are not.

    Raises:
        ConversionError: If keys are missing, or there are others.
    """
    renamed = {key: rename_key(key, table) for key in weights}
    used = {key: target for key, target in renamed.items() if target is not None}
    missing = sorted(targets.difference(used.values()))
    unexpected = [key for key, target in used.items() if target not in targets]
    if missing or unexpected:
        problems = [f"missing {join_keys(missing)}"] if missing else []
        problems += [f"unexpected {join_keys(unexpected)}"] if unexpected else []
        raise ConversionError(f"The weights in {folder} do not fit its config.json: {'; '.join(problems)}.")
    return used, [key for key, target in renamed.items() if target is None]


def check_layout(folder: Path, what: str, expected: Layout, advice: str) -> None:
    """Raise a `ConversionError` that says what a folder is, if it is not what is expected."""
    layout = identify_layout(folder)
    if layout is not expected:
        raise ConversionError(f"The {what} {folder} is {layout.value}, expected {expected.value}. {advice}")


def storage_dtype(folder: Path, weights: TensorFiles) -> torch.dtype:
    """The dtype that most of a model's weights are stored in; its configuration may say another."""
    sizes: collections.Counter[torch.dtype] = collections.Counter()
    for tensor in weights.values():
        sizes[tensor.dtype] += tensor.numel()
    [(dtype, _)] = sizes.most_common(1)
    if dtype not in DTYPES.values():
        raise ConversionError(
            f"The weights in {folder} are stored as {dtype}, which is not a dtype to write: expected "
            f"{', '.join(map(str, DTYPES.values()))}. Pass unquantized weights, or choose a dtype."
        )
    return dtype


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
    model_type = release.get("model_type", "")
    if model_type.startswith("llava_") and model_type != f"llava_{base_config.model_type}":
        raise ConversionError(
            f"{release_file}: model_type is {model_type!r}, but the base model {base_folder} is a "
            f"{base_config.model_type!r}. Pass the base model that the checkpoint was trained on."
        )
    fields = declared_fields(base_config)
    fields.pop("pretraining_tp", None)
    try:
        release_config = type(base_config).from_dict({**release, "model_type": base_config.model_type})
    except CONFIG_ERRORS as error:
        raise ConversionError(f"{release_file} does not describe a {base_config.model_type!r}: {error}") from error
    for name in ARCHITECTURE_FIELDS:
        stated = not release.keys().isdisjoint({name, *FORMER_NAMES.get(name, ())})
        if stated and name in fields and getattr(release_config, name) != fields[name]:
            raise ConversionError(
                f"{release_file}: {name} is {getattr(release_config, name)!r}, but {fields[name]!r} in the base model "
                f"{base_folder}. Pass the base model that the checkpoint was trained on."
            )
    return type(base_config)(**fields)


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


def load_tokenizer(release_folder: Path, base_folder: Path, text_config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """
    The release's tokenizer, or the base model's where it has none, with the image token added.

    Args:
        release_folder (`Path`): The release.
        base_folder (`Path`): The base model.
        text_config (`PreTrainedConfig`): The language model's configuration.

    Returns:
        `PreTrainedTokenizerBase`: The tokenizer, set up for generation.

    Raises:
        ConversionError: If neither has a tokenizer, it cannot be loaded, or has more tokens than embeddings.
    """
    folders = [
        folder
        for folder in (release_folder, base_folder)
        if any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
    ]
    if not folders:
        raise ConversionError(
            f"Neither {release_folder} nor {base_folder} has a tokenizer: expected tokenizer.model or tokenizer.json."
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
            f"The tokenizer in {folder} has {len(tokenizer)} tokens, but the base model {base_folder} has embeddings "
            f"for {text_config.vocab_size}. Pass the base model that the checkpoint was trained on."
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
    base_folder: Path, text_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """
    Greedy decoding, as the authors evaluate, which never yields the image token or ids that stand for no token.

    Args:
        base_folder (`Path`): The base model, which says how texts begin and end.
        text_config (`PreTrainedConfig`): The language model's configuration.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, with the image token.

    Returns:
        `GenerationConfig`: The configuration.
    """
    file = base_folder / "generation_config.json"
    stated = read_json(file) if file.exists() else {}
    special_ids = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        candidates = (stated.get(name), getattr(text_config, name), getattr(tokenizer, name))
        special_ids[name] = next((value for value in candidates if value is not None), None)
    suppressed = {tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), *range(len(tokenizer), text_config.vocab_size)}
    return GenerationConfig(**special_ids, do_sample=False, suppress_tokens=sorted(suppressed))


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not smaller than a number."""
    return -(-number // multiple) * multiple
