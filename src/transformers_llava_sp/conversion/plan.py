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
"""What a conversion is going to write: every tensor's source, and all the files around them, checked beforehand"""

import collections
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import GenerationConfig, SiglipVisionConfig

from ..configuration_llava_sp import LlavaSPConfig, vision_grid_size
from ..modeling_llava_sp import LlavaSPForConditionalGeneration
from ..processing_llava_sp import LlavaSPProcessor
from .checkpoint import ConversionError, SourceFolder, TensorFiles, join_keys, resolve_source
from .lora import LoraAdapter
from .original import (
    IMAGE_NEWLINE_KEY,
    LANGUAGE_MODEL_KEY,
    LANGUAGE_MODEL_KEYS,
    LORA_PREFIX,
    LORA_PROJECTOR_WEIGHTS,
    MODEL_WEIGHTS,
    OUR_IMAGE_NEWLINE_KEY,
    PRETRAINING_WEIGHTS,
    PROJECTOR_PREFIX,
    TOWER_PREFIX,
    VISION_TOWER_KEYS,
    Layout,
    OriginalConfig,
    identify_layout,
    rename_key,
)
from .parts import (
    IMAGE_TOKEN,
    check_pinpoints,
    check_widths,
    choose_chat_template,
    load_image_processor,
    load_tokenizer,
    make_generation_config,
    read_merged_text_config,
    read_text_config,
    read_vision_config,
)
from .projector import read_projector


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Matrix products are fastest when the vocabulary is a multiple of this
VOCABULARY_MULTIPLE = 64
EMBEDDINGS_KEY = "model.language_model.embed_tokens.weight"
HEAD_KEY = "lm_head.weight"

TOWER_LAYOUTS = (Layout.CLIP, Layout.SIGLIP)

NEW_IMAGE_NEWLINE_NOTE = (
    "The separator of image tiles (`image_newline`) was drawn at random: pre-training does not store it, since it is "
    "learned in fine-tuning."
)

# Numbers that are converted at a time: few enough that memory is used again while it is in the cache
BLOCK_SIZE = 2**20


@dataclass(frozen=True)
class Source:
    """
    Where a tensor of the converted model comes from.

    Args:
        weights (`TensorFiles`): The files.
        key (`str`): Its key there.
        shape (`tuple[int, ...]`): The shape that it gets. Rows that the source lacks are the mean of its own.
        adapter (`LoraAdapter`, *optional*): An adapter to merge into it, if that has a part for it.
        adapted_key (`str`, *optional*): What the adapter calls it.
    """

    weights: TensorFiles
    key: str
    shape: tuple[int, ...]
    adapter: LoraAdapter | None = None
    adapted_key: str = ""

    @property
    def is_merged(self) -> bool:
        """Whether the adapter has a part for it."""
        return self.adapter is not None and self.adapted_key in self.adapter.pairs

    def __str__(self) -> str:
        merged = ", merged with the LoRA adapter," if self.is_merged else ""
        return f"{self.weights.file_of(self.key)}: {self.key!r}{merged}"

    def convert(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """
        Read the tensor block by block, merge the adapter into it, append rows where the vocabulary has grown, and cast
        it.

        Args:
            dtype (`torch.dtype`): The dtype it gets.

        Yields:
            `torch.Tensor`: Consecutive rows, contiguous, of a tensor of shape `shape`.

        Raises:
            ConversionError: If it holds NaN or infinite values, before or after the cast.
        """
        tensor = self.weights[self.key]
        factors, scaling = None, 1.0
        if self.adapter is not None:
            factors, scaling = self.adapter.factors(self.adapted_key), self.adapter.scaling
        num_new_rows = self.shape[0] - tensor.shape[0]
        total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
        for start, rows in split_rows(tensor):
            if factors is not None:
                lora_b, lora_a = factors
                product = lora_b[start : start + len(rows)] @ lora_a
                # A copy: the source's own memory is the file's
                rows = rows.to(torch.float32, copy=True)
                rows.add_(product.view(rows.shape), alpha=scaling)
            if num_new_rows:
                total += rows.sum(dim=0, dtype=torch.float64)
            yield self._cast(rows, dtype)
        if num_new_rows:
            yield self._cast((total / len(tensor)).expand(num_new_rows, *total.shape), dtype)

    def _cast(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        converted = rows.to(dtype, memory_format=torch.contiguous_format).contiguous()
        if not is_finite(converted):
            if is_finite(rows):
                raise ConversionError(f"{self} has values outside the range of {dtype}: choose another dtype.")
            raise ConversionError(f"{self} has values that are NaN or infinite.")
        return converted


def split_rows(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """
    Cut a tensor into blocks of rows of about `BLOCK_SIZE` numbers.

    Args:
        tensor (`torch.Tensor`): The tensor, of at least one dimension.

    Yields:
        `tuple(int, torch.Tensor)`: The index of the first row, and the rows.
    """
    step = max(1, BLOCK_SIZE * len(tensor) // max(1, tensor.numel()))
    for start in range(0, len(tensor), step):
        yield start, tensor[start : start + step]


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite. The extremes show it in one pass, as NaN counts as both."""
    return tensor.numel() == 0 or all(map(torch.isfinite, torch.aminmax(tensor)))


@dataclass
class ConversionPlan:
    """
    Everything about a conversion but the values of the tensors, whose keys and shapes are checked.

    Args:
        layout (`Layout`): What the checkpoint is.
        config (`LlavaSPConfig`): The model's configuration.
        generation_config (`GenerationConfig`): How it generates.
        processor (`LlavaSPProcessor`): Its processor.
        dtype (`torch.dtype`): Of all weights to write.
        sources (`dict[str, Source]`): Where each tensor of the model comes from, in the model's order.
        input_files (`dict[SourceFolder, list[Path]]`): The files of each folder that are read.
        dropped_keys (`list[str]`): Keys of the inputs that the model has no use for.
        notes (`list[str]`): Sentences about the checkpoint that whoever uses the result should know.
        projector (`TensorFiles`, *optional*): The projector in the authors' layout.
        projector_prefix (`str`): What stands in front of every key of it.
    """

    layout: Layout
    config: LlavaSPConfig
    generation_config: GenerationConfig
    processor: LlavaSPProcessor
    dtype: torch.dtype
    sources: dict[str, Source]
    input_files: dict[SourceFolder, list[Path]]
    dropped_keys: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    projector: TensorFiles | None = None
    projector_prefix: str = ""

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(torch.Size(source.shape).numel() for source in self.sources.values())

    @property
    def num_bytes(self) -> int:
        """Of the weights, as they are written."""
        return self.num_parameters * self.dtype.itemsize

    @property
    def num_merged_weights(self) -> int:
        """How many weights an adapter is merged into."""
        return sum(source.is_merged for source in self.sources.values())


@dataclass(frozen=True)
class OriginalWeights:
    """
    The tensors of a checkpoint of the authors, by part.

    Args:
        projector (`TensorFiles`): The projector's, and the separator of image tiles where there is one.
        projector_prefix (`str`): What stands in front of every key of them.
        language_model (`TensorFiles`, *optional*): The language model's, where the checkpoint has them.
        vision_tower (`TensorFiles`, *optional*): The vision tower's, where the checkpoint has them.
        adapter (`LoraAdapter`, *optional*): The adapter of the language model, where there is one.
    """

    projector: TensorFiles
    projector_prefix: str
    language_model: TensorFiles | None = None
    vision_tower: TensorFiles | None = None
    adapter: LoraAdapter | None = None

    @classmethod
    def from_folder(cls, folder: Path, layout: Layout) -> "OriginalWeights":
        """
        Open a checkpoint of the authors.

        Args:
            folder (`Path`): The folder.
            layout (`Layout`): Which of the three layouts it is.

        Raises:
            ConversionError: If a file is missing or cannot be read.
        """
        if layout is Layout.SP_LORA:
            projector = TensorFiles.open(folder / LORA_PROJECTOR_WEIGHTS)
            return cls(projector, LORA_PREFIX + PROJECTOR_PREFIX, adapter=LoraAdapter(folder))
        if layout is Layout.SP_PRETRAINING:
            name = next(name for name in PRETRAINING_WEIGHTS if (folder / name).exists())
            return cls(TensorFiles.open(folder / name), PROJECTOR_PREFIX)
        weights = TensorFiles.from_folder(folder, MODEL_WEIGHTS)
        tower = weights.select(lambda key: key.startswith(TOWER_PREFIX))
        language_model = weights.select(lambda key: LANGUAGE_MODEL_KEY.fullmatch(key) is not None)
        return cls(
            weights.select(lambda key: key not in tower and key not in language_model),
            PROJECTOR_PREFIX,
            language_model=language_model,
            vision_tower=tower if len(tower) else None,
        )

    @property
    def image_newline_key(self) -> str:
        """The key of the separator of image tiles, where there is one."""
        return self.projector_prefix + IMAGE_NEWLINE_KEY

    def without_image_newline(self) -> TensorFiles:
        """The projector's tensors alone."""
        return self.projector.select(lambda key: key != self.image_newline_key)


def plan_conversion(
    checkpoint: SourceFolder,
    base_model: str | Path | None,
    vision_tower: str | Path | None,
    dtype: str,
    chat_template: str = "vicuna_v1",
) -> ConversionPlan:
    """
    Find out what the inputs are, and check that they are complete and belong together.

    Args:
        checkpoint ([`SourceFolder`]): The authors' checkpoint.
        base_model (`str` or `Path`, *optional*): The language model, a folder or a Hub id.
        vision_tower (`str` or `Path`, *optional*): The vision tower, likewise.
        dtype (`str`): A key of `DTYPES` or `"auto"`.
        chat_template (`str`, *optional*, defaults to `"vicuna_v1"`): One of `CHAT_TEMPLATES`.

    Returns:
        `ConversionPlan`: What to write.

    Raises:
        ConversionError: If they cannot be converted.
    """
    layout = require_original_layout(checkpoint.folder)
    original_config = OriginalConfig.from_file(checkpoint.folder / "config.json")
    original = OriginalWeights.from_folder(checkpoint.folder, layout)
    has_tiles = original_config.image_grid_pinpoints is not None
    projector_weights = original.without_image_newline() if has_tiles else original.projector
    # Its own problems before those of the parts that it does not hold
    found_config, _ = read_projector(projector_weights, original.projector_prefix, original_config)
    if has_tiles:
        newline_weights, newline_key = find_image_newline(original, layout, found_config.text_hidden_size)
    base, language_weights = find_language_model(checkpoint, original, original_config, base_model)
    tower, tower_weights, tower_prefix = find_vision_tower(checkpoint, original, original_config, vision_tower)

    if original.language_model is None:
        text_config = read_text_config(base.folder, checkpoint.folder)
    else:
        text_config = read_merged_text_config(checkpoint.folder)
    vision_config = read_vision_config(tower.folder)
    projector_config, projector_keys = read_projector(
        projector_weights, original.projector_prefix, original_config, vision_grid_size(vision_config)
    )
    check_widths(original_config, projector_config, text_config, vision_config)
    if original_config.image_grid_pinpoints is not None:
        config_file = checkpoint.folder / "config.json"
        check_pinpoints(config_file, original_config.image_grid_pinpoints, vision_config.image_size)
    if original.adapter is not None:
        original.adapter.check_targets(language_weights)

    candidates = list(dict.fromkeys([checkpoint.folder, base.folder]))
    tokenizer = load_tokenizer(candidates, text_config)
    old_vocabulary_size = text_config.vocab_size
    text_config.vocab_size = round_up(max(old_vocabulary_size, len(tokenizer)), VOCABULARY_MULTIPLE)
    processor = LlavaSPProcessor(
        load_image_processor(tower.folder, vision_config, original_config),
        tokenizer,
        num_spatial_tokens=projector_config.num_spatial_tokens,
        grid_size=projector_config.grid_size,
        chat_template=choose_chat_template(chat_template, tokenizer),
    )
    language_folder = base.folder if original.language_model is None else checkpoint.folder
    target_dtype = storage_dtype(language_folder, language_weights) if dtype == "auto" else DTYPES[dtype]
    try:
        config = LlavaSPConfig(
            vision_config=vision_config,
            text_config=text_config,
            projector_config=projector_config,
            image_token_index=processor.image_token_id,
            vision_feature_layer=original_config.vision_feature_layer,
            # Transformers' LLaVA, too, says so of towers without a class token
            vision_feature_select_strategy="full" if isinstance(vision_config, SiglipVisionConfig) else "default",
            image_grid_pinpoints=original_config.image_grid_pinpoints,
            dtype=target_dtype,
            architectures=[LlavaSPForConditionalGeneration.__name__],
        )
    except ValueError as error:
        raise ConversionError(f"{checkpoint.folder} does not fit its base model or vision tower: {error}") from error

    set_dtype(config, target_dtype)

    shapes = model_shapes(config)
    language_keys, dropped_language_keys = rename_keys(
        language_folder,
        language_weights,
        # Some store a head that is tied to the embeddings all the same
        {**({re.escape(HEAD_KEY): None} if config.tie_word_embeddings else {}), **LANGUAGE_MODEL_KEYS},
        {key for key in shapes if key.startswith(("model.language_model.", "lm_head."))},
    )
    tower_keys, dropped_tower_keys = rename_keys(
        tower.folder,
        tower_weights,
        VISION_TOWER_KEYS,
        {key for key in shapes if key.startswith("model.vision_tower.")},
        tower_prefix,
    )
    found = {
        **{target: (language_weights, key, original.adapter) for key, target in language_keys.items()},
        **{target: (tower_weights, key, None) for key, target in tower_keys.items()},
        **{target: (projector_weights, key, None) for key, target in projector_keys.items()},
    }
    if has_tiles:
        found[OUR_IMAGE_NEWLINE_KEY] = (newline_weights, newline_key, None)
    sources = {}
    for target, shape in shapes.items():
        weights, key, adapter = found[target]
        stored_shape = (old_vocabulary_size, *shape[1:]) if target in (EMBEDDINGS_KEY, HEAD_KEY) else shape
        weights.check(key, stored_shape)
        sources[target] = Source(weights, key, shape, adapter, key)

    opened = {
        str(file): file
        for weights in (
            original.projector,
            language_weights,
            tower_weights,
            *([original.adapter.tensors] if original.adapter is not None else []),
        )
        for file in weights.files.values()
    }
    return ConversionPlan(
        layout=layout,
        config=config,
        generation_config=make_generation_config(language_folder, text_config, tokenizer),
        processor=processor,
        dtype=target_dtype,
        sources=sources,
        input_files={source: source.files(opened) for source in dict.fromkeys([checkpoint, base, tower])},
        dropped_keys=dropped_language_keys + dropped_tower_keys,
        notes=[
            *describe(layout, tower_prefix != "", original.vision_tower is not None),
            *describe_other_tower(original_config.vision_tower, tower),
            *([NEW_IMAGE_NEWLINE_NOTE] if has_tiles and original.image_newline_key not in original.projector else []),
            f"`{IMAGE_TOKEN}` was added to the vocabulary, which has {text_config.vocab_size} rows now. Those from "
            f"{old_vocabulary_size} on are the mean of the others in the embeddings and in the head.",
        ],
        projector=projector_weights,
        projector_prefix=original.projector_prefix,
    )


def find_image_newline(original: OriginalWeights, layout: Layout, text_hidden_size: int) -> tuple[TensorFiles, str]:
    """
    The separator of image tiles.

    Args:
        original ([`OriginalWeights`]): The checkpoint's tensors.
        layout (`Layout`): What the checkpoint is.
        text_hidden_size (`int`): Width of the language model's embeddings.

    Returns:
        `tuple(TensorFiles, str)`: Where it is, and its key there. For the output of pre-training, which never has it,
        it is drawn as the authors' code draws it, the same on every run.

    Raises:
        ConversionError: If it is missing where it should be, or has another shape.
    """
    key = original.image_newline_key
    if key in original.projector:
        original.projector.check(key, (text_hidden_size,))
        return original.projector, key
    if layout is not Layout.SP_PRETRAINING:
        file = original.projector.file_of(next(iter(original.projector)))
        raise ConversionError(f"{file} lacks {key!r}, which a checkpoint with image tiles has.")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(text_hidden_size, generator=generator) * text_hidden_size**-0.5
    return TensorFiles({key: drawn}, {key: Path("drawn at random")}), key


def require_original_layout(folder: Path) -> Layout:
    """The layout of a checkpoint, or a `ConversionError` that says what the folder is if none of the authors'."""
    layout = identify_layout(folder)
    if layout in (Layout.SP_LORA, Layout.SP_FULL, Layout.SP_PRETRAINING):
        return layout
    advice = {
        Layout.CONVERTED: "It can be loaded as it is.",
        Layout.OUR_ADAPTER: "Merge it with `llava-sp merge`.",
    }
    raise ConversionError(
        f"The checkpoint {folder} is {layout.value}, expected a checkpoint of the LLaVA-SP authors: a LoRA release, a "
        f"full checkpoint or the output of pre-training. {advice.get(layout, '')}".strip()
    )


def find_language_model(
    checkpoint: SourceFolder,
    original: OriginalWeights,
    original_config: OriginalConfig,
    base_model: str | Path | None,
) -> tuple[SourceFolder, TensorFiles]:
    """
    The language model: in the checkpoint, or the base model that is passed or that the checkpoint names.

    Args:
        checkpoint ([`SourceFolder`]): The authors' checkpoint.
        original ([`OriginalWeights`]): Its tensors.
        original_config ([`OriginalConfig`]): Its configuration.
        base_model (`str` or `Path`, *optional*): The base model that the user passes.

    Returns:
        `tuple(SourceFolder, TensorFiles)`: Where it is, and its weights.

    Raises:
        ConversionError: If there is none, or it is no language model.
    """
    role = "base model"
    if original.language_model is not None:
        # A base model that is passed all the same may have the tokenizer
        base = resolve_source(base_model, role, weights=False) if base_model is not None else checkpoint
        return base, original.language_model
    named = (original.adapter and original.adapter.base_model) or original_config.base_model
    if base_model is None and named is None:
        raise ConversionError(
            f"{checkpoint.folder} does not say which base model it was trained on: pass it with --base-model."
        )
    base = resolve_source(
        base_model or str(named),
        role,
        advice="" if base_model is not None else "The checkpoint names it; pass yours with --base-model.",
    )
    check_layout(base.folder, role, [Layout.LANGUAGE_MODEL], "Pass the model that the checkpoint was trained on.")
    return base, TensorFiles.from_folder(base.folder, MODEL_WEIGHTS)


def find_vision_tower(
    checkpoint: SourceFolder,
    original: OriginalWeights,
    original_config: OriginalConfig,
    vision_tower: str | Path | None,
) -> tuple[SourceFolder, TensorFiles, str]:
    """
    The vision tower: the one that is passed, or the one that the checkpoint names, with the weights that a full
    checkpoint holds of it.

    Args:
        checkpoint ([`SourceFolder`]): The authors' checkpoint.
        original ([`OriginalWeights`]): Its tensors.
        original_config ([`OriginalConfig`]): Its configuration.
        vision_tower (`str` or `Path`, *optional*): The tower that the user passes.

    Returns:
        `tuple(SourceFolder, TensorFiles, str)`: Where its configuration is, its weights, and what stands in front of
        each of their keys.

    Raises:
        ConversionError: If there is none, or it is none that can be converted.
    """
    role = "vision tower"
    if vision_tower is None and original_config.vision_tower is None:
        raise ConversionError(
            f"{checkpoint.folder / 'config.json'} names no vision tower (mm_vision_tower): pass it with "
            "--vision-tower."
        )
    if vision_tower is None:
        # The tower's configuration and preprocessing stand nowhere in the checkpoint
        advice = (
            f"{checkpoint.folder / 'config.json'} names it (mm_vision_tower), perhaps a path on the machine where it "
            "was trained: pass yours with --vision-tower."
        )
        source = original_config.vision_tower
        tower = resolve_source(str(source), role, weights=original.vision_tower is None, advice=advice)
        if original.vision_tower is not None:
            return tower, original.vision_tower, TOWER_PREFIX
    else:
        tower = resolve_source(vision_tower, role)
    check_layout(tower.folder, role, TOWER_LAYOUTS, "Pass the vision tower that the checkpoint was trained with.")
    return tower, TensorFiles.from_folder(tower.folder, MODEL_WEIGHTS), ""


def describe(layout: Layout, tower_inside: bool, has_tower: bool) -> list[str]:
    """What whoever uses the result should know of the checkpoint."""
    notes = []
    if layout is Layout.SP_PRETRAINING:
        notes.append(
            "This is the result of pre-training: the language model is the base model, unchanged, and the projector "
            "has learned from captions only. It captions an image for the prompt `<image>`; to answer questions it "
            "has to be fine-tuned first."
        )
    if tower_inside:
        notes.append(
            "The vision tower's weights are those in the checkpoint. The authors' own loader ignores them and loads "
            "the tower that config.json names."
        )
    elif has_tower:
        notes.append("The vision tower's weights are those of the given tower, not those in the checkpoint.")
    return notes


def describe_other_tower(named: str | None, tower: SourceFolder) -> list[str]:
    """
    A note if the vision tower is called otherwise than the one that the checkpoint names. Another tower may have the
    same width and the same patch grid, as the CLIP and the SigLIP of the paper have.
    """
    # What stands in front may be different on each machine
    if named is None or Path(named).name == Path(tower.name).name:
        return []
    return [
        f"config.json of the checkpoint calls its vision tower {Path(named).name!r}, and the one used here is called "
        f"{Path(tower.name).name!r}. Only that which the projector was trained with gives sensible answers."
    ]


def set_dtype(config: LlavaSPConfig, dtype: torch.dtype) -> None:
    """Note in a configuration and those in it which dtype the weights have."""
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = dtype


def model_shapes(config: LlavaSPConfig) -> dict[str, tuple[int, ...]]:
    """
    The tensors that a saved model has.

    Args:
        config (`LlavaSPConfig`): Its configuration.

    Returns:
        `dict[str, tuple[int, ...]]`: The shape of each key, in the model's order.
    """
    with torch.device("meta"):
        model = LlavaSPForConditionalGeneration(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD_KEY]
    return shapes


def check_layout(folder: Path, what: str, expected: Sequence[Layout], advice: str) -> None:
    """Raise a `ConversionError` that says what a folder is, if it is not what is expected."""
    layout = identify_layout(folder)
    if layout not in expected:
        names = " or ".join(layout.value for layout in expected)
        raise ConversionError(f"The {what} {folder} is {layout.value}, expected {names}. {advice}")


def rename_keys(
    folder: Path, weights: TensorFiles, table: dict[str, str | None], targets: set[str], prefix: str = ""
) -> tuple[dict[str, str], list[str]]:
    """
    Where the tensors of a tower or language model go.

    Args:
        folder (`Path`): Its folder, for error messages.
        weights (`TensorFiles`): Its tensors.
        table (`dict[str, str | None]`): Patterns of keys and what they become, `None` if they are dropped.
        targets (`set[str]`): The keys of our model that must come out.
        prefix (`str`, *optional*, defaults to `""`): What stands in front of every key.

    Returns:
        `tuple(dict[str, str], list[str])`: Our key for each key that is used, and the keys that are not.

    Raises:
        ConversionError: If keys are missing, or there are others.
    """
    renamed = {key: rename_key(key.removeprefix(prefix), table) for key in weights}
    used = {key: target for key, target in renamed.items() if target is not None}
    missing = sorted(targets.difference(used.values()))
    unexpected = [key for key, target in used.items() if target not in targets]
    if missing or unexpected:
        problems = [f"missing {join_keys(missing)}"] if missing else []
        problems += [f"unexpected {join_keys(unexpected)}"] if unexpected else []
        raise ConversionError(f"The weights in {folder} do not fit its config.json: {'; '.join(problems)}.")
    return used, [key for key, target in renamed.items() if target is None]


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


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not smaller than a number."""
    return -(-number // multiple) * multiple
