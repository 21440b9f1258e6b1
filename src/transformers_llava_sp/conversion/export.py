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
"""What was trained with this package -> the layout of the authors' code, to compare results with theirs"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig

from ..configuration_llava_sp import LlavaSPProjectorConfig
from ..processing_llava_sp import VICUNA_V1_CHAT_TEMPLATE
from .checkpoint import ConversionError, SourceFolder, TensorFiles, join_keys, read_json, resolve_source
from .convert import SMALL_FILES_SIZE
from .lora import LoraAdapter
from .merge import ConvertedModel, open_adapter
from .original import (
    ADAPTER_WEIGHTS,
    DETAIL_STRIDE,
    IMAGE_NEWLINE_KEY,
    LANGUAGE_MODEL_KEYS,
    LORA_PREFIX,
    LORA_PROJECTOR_WEIGHTS,
    MODEL_WEIGHTS,
    OUR_BLOCKS_PREFIX,
    OUR_IMAGE_NEWLINE_KEY,
    OUR_LANGUAGE_MODEL_PREFIX,
    OUR_PROJECTOR_PREFIX,
    PRETRAINING_WEIGHTS,
    PROJECTOR_PREFIX,
    VARIANTS,
    VISION_TOWER_KEYS,
    Layout,
    OriginalConfig,
    original_language_model_key,
    rename_key,
)
from .parts import CONFIG_ERRORS, declared_fields, load_image_processor, plain_text_fields
from .plan import (
    EMBEDDINGS_KEY,
    HEAD_KEY,
    TOWER_LAYOUTS,
    OriginalWeights,
    check_layout,
    is_finite,
    split_rows,
    storage_dtype,
)
from .projector import original_projector_keys, read_projector
from .staging import Result, check_free_space, check_output, staged
from .verify import failed


# The name that newer versions of their Transformers look for
PROJECTOR_WEIGHTS = PRETRAINING_WEIGHTS[-1]
EXPORTED = Result(
    "export to the authors' layout",
    ("exported_by", "transformers-llava-sp"),
    re.compile(
        r"(adapter_)?config\.json|"
        + "|".join(map(re.escape, (ADAPTER_WEIGHTS[0], LORA_PROJECTOR_WEIGHTS, PROJECTOR_WEIGHTS)))
    ),
)

# What their Transformers (4.37) takes from a config.json about every language model, and about each kind that their
# code has
TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)
LANGUAGE_MODELS = {"llama": ("attention_bias",), "mistral": ("sliding_window",)}
ROPE_TYPES = {"llama": ("default", "linear", "dynamic"), "mistral": ("default",)}
# How far apart sums in another order can be, in parts of the embeddings' size
MEAN_TOLERANCE = 1e-5

# What their adapter_config.json holds. Their PEFT does not load one with entries that came later.
ADAPTER_CONFIG: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": None,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "task_type": "CAUSAL_LM",
    "use_rslora": False,
}


@dataclass(frozen=True)
class ExportReport:
    """
    What was exported.

    Args:
        output (`Path`): The folder written.
        layout (`Layout`): Which of the authors' layouts it has.
        variant (`str`, *optional*): What the authors' code calls this architecture, `None` if it does not have it.
        num_adapted_weights (`int`): How many weights of the language model the adapter adapts.
        num_projector_parameters (`int`): Of the projector, and of the separator of image tiles where there is one.
        notes (`list[str]`): Sentences that whoever uses the result should know.
    """

    output: Path
    layout: Layout
    variant: str | None
    num_adapted_weights: int
    num_projector_parameters: int
    notes: list[str]

    def __str__(self) -> str:
        lines = [
            f"Exported {self.layout.value} to {self.output}",
            f"  variant of the authors' code: {self.variant or 'none'}",
            f"  adapted weights: {self.num_adapted_weights}",
            f"  projector: {self.num_projector_parameters:,} parameters",
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def export_original(
    adapter: str | Path,
    output: str | Path,
    *,
    base_model: str | Path | None = None,
    language_model: str | Path | None = None,
    vision_tower: str | Path | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> ExportReport:
    """
    Write an adapter that was trained with this package as a LoRA release of the authors' code. Tensors keep their
    number formats. [`convert_checkpoint`] makes the same model of it as [`merge_adapter`] makes of the adapter.

    Args:
        adapter (`str` or `Path`): A plain LoRA adapter of the language model's blocks as PEFT saves it, with the
            projector if that was trained: a local folder, or a Hub id, which `@` and a branch, tag or commit may
            follow. Or a projector, as the first stage of training saves it, which becomes an output of the authors'
            pre-training.
        output (`str` or `Path`): The folder to write, which must not exist. It appears when all of it is written.
        base_model (`str` or `Path`, *optional*): The LLaVA-SP model that it was trained on, likewise. Defaults to the
            one that adapter_config.json names; a projector names none.
        language_model (`str` or `Path`, *optional*): The language model of that model by itself, likewise, as the
            authors' code is to load it. Its name is noted in the result.
        vision_tower (`str` or `Path`, *optional*): Its vision tower, likewise. The authors' code loads no result in
            which it is not noted.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace the result of an earlier export at
            `output`. Any other folder is left alone.
        verify (`bool`, *optional*, defaults to `True`): Whether to compare `language_model` and `vision_tower` with
            the parts of the model, which downloads those that are named by their Hub ids, and to read the result again
            and compare it with the inputs.

    Returns:
        [`ExportReport`]: What was written. Its string is a summary.

    Raises:
        ConversionError: If the authors' layout has no place for something, a part is not the model's, or `output`
            cannot be used. There is nothing at `output` then that was not there.
    """
    output = Path(output)
    check_output(output, [], overwrite, EXPORTED)
    trained: SourceFolder
    lora: LoraAdapter | None = None
    if is_projector(source := resolve_source(adapter, "adapter")):
        trained, model, projector = open_projector(source, base_model)
    else:
        check_layout(
            source.folder,
            "adapter",
            [Layout.OUR_ADAPTER, Layout.ADAPTER],
            "Only an adapter, or a projector as the first stage of training saves it, can be exported: of a model "
            "that was trained as a whole, there is no adapter to write.",
        )
        trained, lora, model = open_adapter(adapter, base_model)
        projector = trained_projector(lora, model)
    check_output(output, [trained.folder, model.source.folder], overwrite, EXPORTED)
    config: Any = model.config.projector_config
    check_projector(model.source.folder, config)
    pairs = rename_adapter(lora) if lora is not None else {}

    prefix = PROJECTOR_PREFIX if lora is None else LORA_PREFIX + PROJECTOR_PREFIX
    keys = {OUR_PROJECTOR_PREFIX + ours: prefix + key for ours, key in original_projector_keys(config).items()}
    if lora is not None and model.config.image_grid_pinpoints is not None:
        keys[OUR_IMAGE_NEWLINE_KEY] = prefix + IMAGE_NEWLINE_KEY
    tensors = {key: projector[ours] for ours, key in keys.items()}
    for ours, key in keys.items():
        check_finite(projector.file_of(ours), ours, tensors[key])
    original_config = make_config(model)
    notes = describe(model, lora, language_model, vision_tower)
    tower: SourceFolder | None = None
    if verify and language_model is not None:
        found = resolve_source(language_model, "language model")
        check_layout(found.folder, found.role, [Layout.LANGUAGE_MODEL], "Pass the language model by itself.")
        rows = compare_part(found, LANGUAGE_MODEL_KEYS, model, (OUR_LANGUAGE_MODEL_PREFIX, "lm_head."))
        original_config["vocab_size"] = rows[EMBEDDINGS_KEY]
    if verify and vision_tower is not None:
        tower = resolve_source(vision_tower, "vision tower")
        check_layout(tower.folder, tower.role, TOWER_LAYOUTS, "Pass the vision tower by itself.")
        compare_part(tower, VISION_TOWER_KEYS, model, ("model.vision_tower.",))
    named_model = None if language_model is None else name_for_their_code(language_model)
    if named_model is not None:
        original_config["_name_or_path"] = named_model
    if vision_tower is not None:
        original_config["mm_vision_tower"] = name_for_their_code(vision_tower)

    num_bytes = sum(tensor.nbytes for tensor in [*tensors.values(), *pairs.values()])
    layout = Layout.SP_PRETRAINING if lora is None else Layout.SP_LORA
    with staged(output, overwrite, EXPORTED) as folder:
        check_free_space(output, num_bytes + SMALL_FILES_SIZE)
        write_json(folder / "config.json", original_config)
        # Saving a part of a file that is mapped into memory would save all of the file
        stored = {key: tensor.clone() if is_view(tensor) else tensor for key, tensor in tensors.items()}
        torch.save(stored, folder / (PROJECTOR_WEIGHTS if lora is None else LORA_PROJECTOR_WEIGHTS))
        if lora is not None:
            write_json(folder / "adapter_config.json", make_adapter_config(lora, pairs, named_model))
            save_file(pairs, folder / ADAPTER_WEIGHTS[0], metadata={"format": "pt"})
        if verify:
            check_result(folder, layout, {**tensors, **pairs}, config, lora)
        if tower is not None:
            compare_pixels(tower, OriginalConfig.from_file(folder / "config.json"), model)
    return ExportReport(
        output=output,
        layout=layout,
        variant=find_variant(config),
        num_adapted_weights=len(pairs) // 2,
        num_projector_parameters=sum(tensor.numel() for tensor in tensors.values()),
        notes=notes,
    )


def name_for_their_code(source: str | Path) -> str:
    """A folder or a Hub id without its revision, which the authors' code does not take."""
    return str(source) if Path(source).expanduser().is_dir() else str(source).partition("@")[0]


def is_projector(source: SourceFolder) -> bool:
    """Whether a folder holds a projector by itself, as the first stage of training saves it."""
    file = source.folder / "config.json"
    return file.exists() and read_json(file).get("model_type") == LlavaSPProjectorConfig.model_type


def open_projector(
    source: SourceFolder, base_model: str | Path | None
) -> tuple[SourceFolder, ConvertedModel, TensorFiles]:
    """
    A projector by itself, and the model that it was trained in.

    Args:
        source ([`SourceFolder`]): The projector.
        base_model (`str` or `Path`, *optional*): The model, a folder or a Hub id.

    Returns:
        `tuple(SourceFolder, ConvertedModel, TensorFiles)`: Where the projector is, the model, and the projector's
        tensors under the model's keys.

    Raises:
        ConversionError: If there is no model, or it has another projector.
    """
    if base_model is None:
        raise ConversionError(
            f"{source.folder} is a projector, which does not say which model it was trained in: pass that with "
            "--base-model."
        )
    model = ConvertedModel.open(
        resolve_source(base_model, "LLaVA-SP model"), "Pass the model that the projector was trained in."
    )
    try:
        config = LlavaSPProjectorConfig.from_pretrained(source.folder)
    except CONFIG_ERRORS as error:
        raise ConversionError(f"{source.folder / 'config.json'} describes no projector: {error}") from error
    different = architecture_differences(config, model.config.projector_config)
    weights = TensorFiles.from_folder(source.folder, MODEL_WEIGHTS)
    stored = TensorFiles(
        {OUR_PROJECTOR_PREFIX + key: tensor for key, tensor in weights.items()},
        {OUR_PROJECTOR_PREFIX + key: file for key, file in weights.files.items()},
    )
    wanted = {key: shape for key, shape in model.shapes.items() if key.startswith(OUR_PROJECTOR_PREFIX)}
    different += sorted(wanted.keys() ^ set(stored))
    if different:
        raise ConversionError(
            f"The projector {source.folder} is not one of the model {model.source.folder}, they differ in "
            f"{join_keys(different)}. Pass the model that it was trained in."
        )
    for key, shape in wanted.items():
        stored.check(key, shape)
    return source, model, stored


def architecture_differences(config: Any, other: Any) -> list[str]:
    """The fields in which two projectors' configurations say something else about what is computed."""
    ignored = () if config.use_detail_integrator else ("detail_kernel_size", "detail_stride")
    return [
        name
        for name, value in declared_fields(config).items()
        if name not in ignored and value != getattr(other, name)
    ]


def trained_projector(lora: LoraAdapter, model: ConvertedModel) -> TensorFiles:
    """
    The projector that belongs to an adapter: its own tensors, and the model's where it has none.

    Args:
        lora ([`LoraAdapter`]): The adapter.
        model ([`ConvertedModel`]): The model that it was trained on.

    Returns:
        `TensorFiles`: The projector's tensors, and the separator of image tiles, under the model's keys.

    Raises:
        ConversionError: If the adapter holds other weights that were trained in full.
    """
    keys = [key for key in model.shapes if key.startswith(OUR_PROJECTOR_PREFIX) or key == OUR_IMAGE_NEWLINE_KEY]
    if others := sorted(lora.replaced.keys() - set(keys)):
        raise ConversionError(
            f"{lora.config_file.parent} holds weights that were trained in full, {join_keys(others)}: the authors' "
            f"layout has such of the projector alone ({LORA_PROJECTOR_WEIGHTS}). Merge it with `llava-sp merge`."
        )
    return TensorFiles(
        {key: lora.tensors[lora.replaced[key]] if key in lora.replaced else model.weights[key] for key in keys},
        {
            key: lora.tensors.file_of(lora.replaced[key]) if key in lora.replaced else model.weights.file_of(key)
            for key in keys
        },
    )


def rename_adapter(lora: LoraAdapter) -> dict[str, torch.Tensor]:
    """
    An adapter's matrices under the authors' keys.

    Args:
        lora ([`LoraAdapter`]): The adapter.

    Returns:
        `dict[str, torch.Tensor]`: The matrices.

    Raises:
        ConversionError: If there are none, some are for other modules than those of the language model's blocks, or
            hold NaN or infinite values.
    """
    if not lora.pairs:
        raise ConversionError(
            f"{lora.config_file.parent} holds no LoRA matrices, only weights that were trained in full. Merge it with "
            "`llava-sp merge`."
        )
    if others := sorted(key for key in lora.pairs if not key.startswith(OUR_BLOCKS_PREFIX)):
        raise ConversionError(
            f"{lora.config_file.parent} adapts {join_keys(others)}: the authors' layout has adapters of the language "
            "model's blocks alone. Merge it with `llava-sp merge`, or train one without them."
        )
    renamed = {}
    for target, keys in lora.pairs.items():
        module = LORA_PREFIX + original_language_model_key(target).removesuffix(".weight")
        for matrix, key in zip("AB", keys, strict=True):
            check_finite(lora.tensors.file_of(key), key, lora.tensors[key])
            renamed[f"{module}.lora_{matrix}.weight"] = lora.tensors[key].contiguous()
    return dict(sorted(renamed.items()))


def make_adapter_config(lora: LoraAdapter, keys: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """The authors' adapter_config.json for an adapter with matrices of the given keys."""
    config = read_json(lora.config_file)
    return {
        **ADAPTER_CONFIG,
        "base_model_name_or_path": base_model,
        "lora_alpha": lora.alpha,
        "lora_dropout": config.get("lora_dropout", 0.0),
        "r": lora.rank,
        # The last part of a module's name, which is what their code looks for
        "target_modules": sorted({key.split(".")[-3] for key in keys}),
        "use_rslora": bool(config.get("use_rslora")),
    }


def check_projector(folder: Path, config: Any) -> None:
    """
    Check that the authors' layout can express a projector.

    Args:
        folder (`Path`): The model that has it.
        config (`LlavaSPProjectorConfig`): Its configuration.

    Raises:
        ConversionError: If it would be read as another projector.
    """
    scales, grid_size = list(config.spatial_scales), config.grid_size
    step = min(later - earlier for earlier, later in pairwise([0, *scales]))
    is_cropping = config.spatial_variant == "cropping"
    has_details = config.use_detail_integrator
    # Of each field: whether it is as the authors' layout has it, and how that is
    expected = {
        "patch_downsample_factor": (config.patch_downsample_factor == 1, "1"),
        "patch_layer_norm": (not config.patch_layer_norm, "False"),
        "hidden_act": (config.hidden_act == "gelu", "'gelu'"),
        "layer_norm_eps": (config.layer_norm_eps == 1e-5, "1e-05"),
        "detail_stride": (not has_details or config.detail_stride == DETAIL_STRIDE, str(DETAIL_STRIDE)),
        "spatial_scales": (
            scales == list(range(step, grid_size + 1, step)) and scales[-1] == grid_size,
            f"the multiples of one size, up to the whole grid of {grid_size}",
        ),
        "spatial_projection_bias": (
            config.spatial_projection_bias or not (is_cropping and has_details),
            "True, since Cropping with details always has that bias there",
        ),
        "spatial_variant": (
            is_cropping or len(scales) > 1,
            "'cropping', which is the same where the whole grid is the only scale",
        ),
    }
    for name, (fits, description) in expected.items():
        if not fits:
            raise ConversionError(
                f"{folder}: projector_config.{name} is {getattr(config, name)!r}, which the authors' layout cannot "
                f"express: expected {description}."
            )


def find_variant(config: Any) -> str | None:
    """What the authors' code calls a projector's architecture, `None` if it has none that computes the same."""
    released = LlavaSPProjectorConfig()
    same = ["grid_size", "spatial_scales", *(["detail_kernel_size"] if config.use_detail_integrator else [])]
    if any(getattr(config, name) != getattr(released, name) for name in same):
        return None
    return VARIANTS.get((config.spatial_variant, config.use_detail_integrator, config.spatial_projection_bias))


def make_config(model: ConvertedModel) -> dict[str, Any]:
    """
    The authors' config.json for a model.

    Args:
        model ([`ConvertedModel`]): The model.

    Returns:
        `dict[str, Any]`: Its fields, less the names of the language model and of the vision tower.

    Raises:
        ConversionError: If their code has no such language model or vision tower.
    """
    folder, config = model.source.folder, model.config
    vision: Any = config.vision_config
    text: Any = config.text_config
    projector: Any = config.projector_config
    if not isinstance(vision, (CLIPVisionConfig, SiglipVisionConfig)):
        raise ConversionError(
            f"{folder} has a vision tower of type {vision.model_type!r}: the authors' code has CLIP and SigLIP alone."
        )
    tiles: dict[str, Any] = {"image_aspect_ratio": "square", "mm_patch_merge_type": "flat"}
    if config.image_grid_pinpoints is not None:
        tiles = {
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": [[width, height] for height, width in config.image_grid_pinpoints],
            "mm_patch_merge_type": "spatial_unpad",
        }
    elif getattr(model.processor.image_processor, "do_pad", False):
        tiles["image_aspect_ratio"] = "pad"
    num_layers = projector.num_patch_layers
    return {
        **text_fields(folder, text),
        "architectures": [f"{text.model_type.capitalize()}ForCausalLM"],
        "freeze_mm_mlp_adapter": False,
        **tiles,
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": f"mlp{num_layers}x_gelu" if num_layers > 1 else "linear",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.vision_feature_layer,
        "model_type": f"llava_{text.model_type}",
        "tokenizer_padding_side": "right",
        "torch_dtype": str(storage_dtype(folder, model.weights)).removeprefix("torch."),
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "vocab_size": original_vocabulary_size(model),
        EXPORTED.entry[0]: EXPORTED.entry[1],
    }


def text_fields(folder: Path, text: PreTrainedConfig) -> dict[str, Any]:
    """
    The fields of the authors' config.json that are about the language model, as their Transformers calls them.

    Args:
        folder (`Path`): The model that has it.
        text (`PreTrainedConfig`): Its configuration.

    Returns:
        `dict[str, Any]`: The fields.

    Raises:
        ConversionError: If their code has no such language model.
    """
    if text.model_type not in LANGUAGE_MODELS:
        raise ConversionError(
            f"{folder} has a language model of type {text.model_type!r}: the authors' code has "
            f"{' and '.join(LANGUAGE_MODELS)} alone."
        )
    fields = plain_text_fields(text)
    rope = dict(fields["rope_parameters"])
    kept = {name: fields[name] for name in (*TEXT_FIELDS, *LANGUAGE_MODELS[text.model_type]) if name in fields}
    plain = type(text)(**kept, rope_parameters=rope)
    others = {name: value for name, value in fields.items() if getattr(plain, name) != value}
    if rope["rope_type"] not in ROPE_TYPES[text.model_type]:
        others["rope_parameters"] = rope
    for name, value in others.items():
        raise ConversionError(
            f"{folder}: text_config.{name} is {value!r}, which the authors' code does not have for a language model "
            f"of type {text.model_type!r}."
        )
    scaling = {"type": rope["rope_type"], "factor": rope["factor"]} if rope["rope_type"] != "default" else None
    return {**kept, "rope_scaling": scaling, "rope_theta": rope["rope_theta"]}


def original_vocabulary_size(model: ConvertedModel) -> int:
    """
    How many embeddings the language model had before `<image>` was added: all up to those at the end that are the mean
    of the others. Where none were appended, all.
    """
    embeddings = model.weights[EMBEDDINGS_KEY]
    appended = 0
    while appended < len(embeddings) and torch.equal(embeddings[-1 - appended], embeddings[-1]):
        appended += 1
    size = len(embeddings) - appended
    if not 0 < size <= model.config.image_token_id:
        return len(embeddings)
    total, squares = torch.zeros(embeddings.shape[1], dtype=torch.float64), 0.0
    for _, rows in split_rows(embeddings[:size]):
        total += rows.sum(dim=0, dtype=torch.float64)
        squares += float(rows.double().square().sum())
    scale = (squares / (size * len(total))) ** 0.5
    rounding = 2 * torch.finfo(embeddings.dtype).eps
    is_mean = torch.allclose(embeddings[-1].double(), total / size, rtol=rounding, atol=MEAN_TOLERANCE * scale)
    return size if is_mean else len(embeddings)


def compare_part(
    source: SourceFolder, table: dict[str, str | None], model: ConvertedModel, prefixes: tuple[str, ...]
) -> dict[str, int]:
    """
    Check that a language model or a vision tower is that of a model.

    Args:
        source ([`SourceFolder`]): The part by itself.
        table (`dict[str, str | None]`): Where its keys go.
        model ([`ConvertedModel`]): The model.
        prefixes (`tuple[str, ...]`): What stands in front of the part's keys in the model.

    Returns:
        `dict[str, int]`: How many rows each tensor of the part has, by the model's keys.

    Raises:
        ConversionError: If a tensor is missing or has other values.
    """
    weights = TensorFiles.from_folder(source.folder, MODEL_WEIGHTS)
    renamed = {rename_key(key, table): tensor for key, tensor in weights.items()}
    # Some store a head that is tied to the embeddings all the same
    tied = {HEAD_KEY} if model.config.tie_word_embeddings else set()
    wanted = {key for key in model.shapes if key.startswith(prefixes)}
    different = sorted(wanted.symmetric_difference(key for key in renamed if key is not None) - tied)
    for target, tensor in renamed.items():
        if target in wanted and not is_equal(tensor, model.weights[target], target in (EMBEDDINGS_KEY, HEAD_KEY)):
            different.append(target)
    if different:
        raise ConversionError(
            f"The {source.role} {source.folder} is not that of the model {model.source.folder}: {len(different)} "
            f"tensors are missing, unexpected or others, such as {different[0]!r}. If an earlier adapter was merged "
            "into the model, or it was trained as a whole, pass the part as it is there, in a folder of its own."
        )
    return {target: len(tensor) for target, tensor in renamed.items() if target is not None and tensor.ndim}


def compare_pixels(tower: SourceFolder, original_config: OriginalConfig, model: ConvertedModel) -> None:
    """
    Check that the authors' code makes of an image what a model's processor makes of it.

    Args:
        tower ([`SourceFolder`]): The vision tower, whose preprocessing their code takes.
        original_config ([`OriginalConfig`]): The configuration that is exported.
        model ([`ConvertedModel`]): The model.

    Raises:
        ConversionError: If it makes something else.
    """
    theirs = load_image_processor(tower.folder, model.config.vision_config, original_config)
    example = PIL.Image.linear_gradient("L").convert("RGB").crop((0, 0, 256, 100))
    pixels = [
        processor(example, return_tensors="pt")["pixel_values"]
        for processor in (theirs, model.processor.image_processor)
    ]
    if not torch.equal(*pixels):
        raise ConversionError(
            f"The processor of the model {model.source.folder} makes other pixels of an image than the authors' code, "
            f"which takes {tower.folder / 'preprocessor_config.json'}. Pass the vision tower with the preprocessing "
            "that was trained with."
        )


def is_equal(tensor: torch.Tensor, ours: torch.Tensor, may_have_grown: bool) -> bool:
    """Whether a tensor of ours holds the values of another one after the cast, with or without appended rows."""
    if (
        tensor.shape[1:] != ours.shape[1:]
        or len(tensor) > len(ours)
        or (len(tensor) < len(ours) and not may_have_grown)
    ):
        return False
    return all(torch.equal(rows.to(ours.dtype), ours[start : start + len(rows)]) for start, rows in split_rows(tensor))


def describe(
    model: ConvertedModel,
    lora: LoraAdapter | None,
    language_model: str | Path | None,
    vision_tower: str | Path | None,
) -> list[str]:
    """What whoever uses the export should know, which its files do not tell."""
    config: Any = model.config.projector_config
    notes = []
    variant = find_variant(config)
    if variant is None:
        notes.append(
            f"The authors' code has no variant with {config.spatial_variant} of scales {list(config.spatial_scales)}, "
            f"{'a' if config.use_detail_integrator else 'no'} detail convolution"
            + (f" of size {config.detail_kernel_size}" if config.use_detail_integrator else "")
            + f" and {'a' if config.spatial_projection_bias else 'no'} bias in conv_linear that is known here. It "
            "ignores what it does not have without a word, so it has to be changed before it can compute the same. "
            "`llava-sp convert` needs nothing."
        )
    else:
        notes.append(
            f"The authors' code must be set to {variant}: it reads the variant from no file, and loads others without "
            "a word."
        )
    if lora is not None and language_model is None:
        notes.append(
            f"The language model was compared with none: it is that of {model.source}, which another adapter may have "
            "been merged into. Pass --language-model to compare and name it."
        )
    if vision_tower is None:
        notes.append(
            "config.json names no vision tower, which the authors' code needs: export with --vision-tower, or add "
            "mm_vision_tower."
        )
    if lora is not None and not lora.replaced:
        notes.append("The adapter holds no projector, so the one written is that of the model it was trained on.")
    if model.processor.chat_template != VICUNA_V1_CHAT_TEMPLATE:
        notes.append(
            "The model's chat template is not vicuna_v1, and the authors' layout has no place for it: choose the "
            "conversation in their code, and convert with --chat-template tokenizer if it is the language model's own."
        )
    return notes


def check_result(
    folder: Path, layout: Layout, tensors: Mapping[str, torch.Tensor], config: Any, lora: LoraAdapter | None
) -> None:
    """
    Read an export as [`convert_checkpoint`] reads it.

    Args:
        folder (`Path`): The export.
        layout (`Layout`): Its layout.
        tensors (`Mapping[str, torch.Tensor]`): What it should hold.
        config (`LlavaSPProjectorConfig`): The projector's configuration.
        lora ([`LoraAdapter`], *optional*): The adapter that was exported.

    Raises:
        ConversionError: If it holds something else.
    """
    original = OriginalWeights.from_folder(folder, layout)
    stored = {**original.projector, **(original.adapter.tensors if original.adapter is not None else {})}
    found, _ = read_projector(
        original.without_image_newline(),
        original.projector_prefix,
        OriginalConfig.from_file(folder / "config.json"),
        config.grid_size,
    )
    different = sorted(stored.keys() ^ tensors.keys()) + architecture_differences(found, config)
    different += [key for key in stored.keys() & tensors.keys() if not torch.equal(stored[key], tensors[key])]
    if lora is not None and (original.adapter is None or original.adapter.scaling != lora.scaling):
        different.append("lora_alpha")
    if different:
        raise failed(f"{join_keys(different)} of the export")


def check_finite(file: Path, key: str, tensor: torch.Tensor) -> None:
    """Raise a `ConversionError` if a tensor holds NaN or infinite values."""
    if not all(is_finite(rows) for _, rows in split_rows(tensor)):
        raise ConversionError(f"{file}: {key!r} has values that are NaN or infinite.")


def is_view(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a part of something larger in memory."""
    return tensor.untyped_storage().nbytes() != tensor.nbytes


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as the authors' code does, sorted by key."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
