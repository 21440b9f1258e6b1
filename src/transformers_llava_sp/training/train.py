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
"""The `llava-sp train` command: a recipe and what overrides it, the model, the data, and then the trainer"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..configuration_llava_sp import LlavaSPConfig, LlavaSPProjectorConfig
from ..conversion.checkpoint import find_model_type, join_keys, require_all_weights, require_llava_sp
from ..conversion.export import architecture_differences
from ..modeling_llava_sp import LlavaSPForConditionalGeneration, LlavaSPProjector
from ..processing_llava_sp import LlavaSPProcessor, vicuna_v1_chat_template
from ..tiny_models import resolve_model_name
from .card import DataSummary, find_origins, summarize_data
from .checkpoints import clear_staging, find_problem, newest_checkpoint
from .collator import LlavaSPDataCollator
from .data import (
    ConversationDataset,
    RecordError,
    StreamedConversationDataset,
    TrainingDataError,
    drop_long_records,
    load_conversations,
)
from .parts import METHODS, prepare_full, prepare_lora, prepare_projector
from .trainer import LlavaSPTrainer, LlavaSPTrainingArguments


RECIPES = Path(__file__).with_name("recipes")
# What stays in 16 bits where the language model is quantized. The list replaces Transformers' own.
UNQUANTIZED_MODULES = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


@dataclass
class ModelArguments:
    """What is trained, and how much of it."""

    model_name_or_path: str = field(
        metadata={"help": "A converted or created LLaVA-SP model: a folder, a Hub id, tiny-cropping or tiny-pooling."}
    )
    method: str = field(
        default="lora",
        metadata={"help": "What is trained: the projector; lora and the projector; or full, all but the tower."},
    )
    projector: str | None = field(
        default=None, metadata={"help": "The projector to start from, a folder: what method 'projector' has saved."}
    )
    train_vision_tower: bool = field(
        default=False, metadata={"help": "With method full, train the vision tower, too."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention, such as sdpa or flash_attention_2."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the language model to 4 bits (QLoRA)."})
    lora_r: int = field(default=128, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=256, metadata={"help": "Their product is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of them."})

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"Unknown method {self.method!r}: expected {', '.join(map(repr, METHODS))}.")
        if self.train_vision_tower and self.method != "full":
            raise ValueError(f"train_vision_tower needs method 'full', not {self.method!r}.")
        if self.load_in_4bit and self.method != "lora":
            raise ValueError(
                f"load_in_4bit needs method 'lora', not {self.method!r}: 4-bit weights cannot be trained."
            )


@dataclass
class DataArguments:
    """What it is trained on."""

    train_data: str = field(
        metadata={
            "help": "LLaVA JSON or JSON lines, or a data set with messages and images: a file, folder or Hub id."
        }
    )
    image_folder: str | None = field(default=None, metadata={"help": "What its images' paths are relative to."})
    eval_data: str | None = field(default=None, metadata={"help": "What to evaluate on, likewise."})
    eval_image_folder: str | None = field(default=None, metadata={"help": "Defaults to image_folder."})
    stage: str = field(
        default="finetune", metadata={"help": "finetune: conversations; pretrain: captions, without a conversation."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "'vicuna_v1' for that conversation. The processor's own if not given."}
    )
    max_length: int = field(
        default=2048, metadata={"help": "The longest example, in tokens. Longer ones are dropped."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the training data as they come, in their order."})
    skip_bad_records: bool = field(default=False, metadata={"help": "Skip and count bad records instead of stopping."})
    check_images: bool = field(default=False, metadata={"help": "Decode all images before training."})

    def __post_init__(self) -> None:
        if self.chat_template not in (None, "vicuna_v1"):
            raise ValueError(f"Unknown chat_template {self.chat_template!r}: expected 'vicuna_v1', or nothing.")


class RecipeParser(HfArgumentParser):
    """HfArgumentParser that raises a `ValueError` where argparse would print a usage of hundreds of lines."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. Keys are the fields of TrainingArguments, ModelArguments and DataArguments.")


def read_recipe(
    recipe: str | Path, overrides: Sequence[str] = ()
) -> tuple[ModelArguments, DataArguments, LlavaSPTrainingArguments]:
    """
    Read a recipe.

    Args:
        recipe (`str` or `Path`): A YAML file, or the name of a recipe that comes with the package.
        overrides (`Sequence[str]`): `--key value` pairs, which go before the recipe's.

    Returns:
        `tuple(ModelArguments, DataArguments, LlavaSPTrainingArguments)`: The arguments.

    Raises:
        ValueError: If the recipe cannot be read, has unknown keys, or required ones are missing.
    """
    file = Path(recipe)
    if not file.exists():
        file = RECIPES / f"{recipe}.yaml"
    if not file.exists():
        names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise ValueError(f"There is no recipe {str(recipe)!r}: pass a YAML file or one of {names}.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a YAML {type(content).__name__}, expected keys and values.")
    arguments: list[str] = []
    for key, value in content.items():
        if isinstance(value, dict):
            arguments += [f"--{key}", json.dumps(value)]
        elif isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        elif value is not None:
            arguments += [f"--{key}", str(value)]
    arguments = [current_name(argument) for argument in [*arguments, *overrides]]
    parser = RecipeParser((ModelArguments, DataArguments, LlavaSPTrainingArguments), allow_abbrev=False)
    # Before the values, which may not fit this machine
    unknown = parser.parse_known_args(arguments)[1]
    if unknown:
        arguments_classes = (ModelArguments, DataArguments, LlavaSPTrainingArguments)
        known = [f"--{field.name}" for arguments_class in arguments_classes for field in fields(arguments_class)]
        nearest = get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(
            f"Unknown arguments, or more than one value: {' '.join(unknown)}.{hint} Keys are the fields of "
            "TrainingArguments, ModelArguments and DataArguments."
        )
    model, data, training = parser.parse_args_into_dataclasses(arguments)
    return model, data, training


def current_name(argument: str) -> str:
    """
    An argument under the name that the installed Transformers has for it: newer ones have renamed two. Words of a name
    may be joined by dashes.
    """
    if not argument.startswith("--"):
        return argument
    name, *value = argument.split("=", maxsplit=1)
    name = f"--{name[2:].replace('-', '_')}"
    if "activation_checkpointing" in {field.name for field in fields(TrainingArguments)}:
        name = re.sub(r"^--gradient_checkpointing(?=_kwargs$|$)", "--activation_checkpointing", name)
    return "=".join([name, *value])


def load_model(arguments: ModelArguments, training: LlavaSPTrainingArguments) -> Any:
    """
    Load the model and make it what is trained.

    Args:
        arguments ([`ModelArguments`]): Which, and how much of it.
        training ([`LlavaSPTrainingArguments`]): Say in which number format to compute.

    Returns:
        [`LlavaSPForConditionalGeneration`] or [`~peft.PeftModel`]: The model.

    Raises:
        ValueError: If it is to be both quantized and divided over GPUs, or has another projector.
    """
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    quantization = None
    if arguments.load_in_4bit:
        if is_deepspeed_zero3_enabled() or training.fsdp:
            raise ValueError(
                "load_in_4bit needs the whole model on each GPU: leave out sharding, or take `--sharding zero2`."
            )
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=UNQUANTIZED_MODULES,
        )
    model, loading = AutoModelForImageTextToText.from_pretrained(
        arguments.model_name_or_path,
        dtype=dtype,
        attn_implementation=arguments.attn_implementation,
        quantization_config=quantization,
        output_loading_info=True,
    )
    require_all_weights(arguments.model_name_or_path, loading)
    if is_deepspeed_zero3_enabled():
        # Loading pieces of weights, Transformers notes renamings that it has not made, and would undo them in saving
        model._weight_conversions = []
    if arguments.projector is not None:
        load_projector(model, arguments.projector)
    if arguments.method == "projector":
        return prepare_projector(model)
    if arguments.method == "full":
        return prepare_full(model, train_vision_tower=arguments.train_vision_tower)
    return prepare_lora(
        model, r=arguments.lora_r, lora_alpha=arguments.lora_alpha, lora_dropout=arguments.lora_dropout
    )


def require_projector(name: str) -> None:
    """Raise a `ValueError` if a folder or Hub id is not a projector: of another model, none of it would be loaded."""
    model_type = find_model_type(name)
    if model_type != LlavaSPProjectorConfig.model_type:
        raise ValueError(
            f"projector {name!r} is not a projector by itself, as method 'projector' saves it: its config.json has "
            f"model_type {model_type!r}, not {LlavaSPProjectorConfig.model_type!r}. To train on from a whole model or "
            "a merged adapter, pass that as model_name_or_path, without projector."
        )


def load_projector(model: LlavaSPForConditionalGeneration, folder: str) -> None:
    """Give a model the projector that a folder or Hub id has. Raises a `ValueError` if that is not one for it."""
    ours = model.model.multi_modal_projector
    # Cropping and Pooling have weights of the same shapes
    different = architecture_differences(LlavaSPProjectorConfig.from_pretrained(folder), ours.config)
    if different:
        raise ValueError(
            f"The projector {folder!r} is not one for the model {model.name_or_path!r}, they differ in "
            f"{join_keys(different)}. Pass the projector that was trained in this model."
        )
    theirs, loading = LlavaSPProjector.from_pretrained(folder, dtype=ours.dtype, output_loading_info=True)
    require_all_weights(folder, loading)
    if not is_deepspeed_zero3_enabled():
        ours.load_state_dict(theirs.state_dict())
        return
    import deepspeed

    # Their weights are in pieces, both
    for parameter, source in zip(ours.parameters(), theirs.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter, source], modifier_rank=0):
            parameter.data.copy_(source.data)


def train(recipe: str | Path, overrides: Sequence[str] = ()) -> LlavaSPTrainer:
    """
    Train a model as a recipe says. Writes to the recipe's `output_dir`: the projector, the adapter with the projector,
    or the whole model, with checkpoints on the way.

    Args:
        recipe (`str` or `Path`): A YAML file, or the name of a recipe that comes with the package: `pretrain`, `lora`,
            `qlora` or `full`.
        overrides (`Sequence[str]`): `--key value` pairs, which go before the recipe's.

    Returns:
        [`LlavaSPTrainer`]: The trainer, after training.

    Raises:
        ImportError: If the extra `train` is not installed.
        ValueError: If an argument, the model or a record is wrong.
        FloatingPointError: If the loss or the gradient becomes NaN or infinite.
        OSError: If a checkpoint or the result cannot be written.
    """
    require_extra()
    model_arguments, data_arguments, training_arguments = read_recipe(recipe, overrides)
    model_arguments.model_name_or_path = resolve_model_name(model_arguments.model_name_or_path)
    checkpoint = find_checkpoint(training_arguments)
    check_output(Path(training_arguments.output_dir), model_arguments.method)
    if checkpoint is None:
        check_checkpoints(Path(training_arguments.output_dir))
    elif is_of_another_kind(Path(checkpoint), model_arguments.method):
        raise ValueError(f"{checkpoint} is not a checkpoint of method {model_arguments.method!r}: choose another.")
    set_seed(training_arguments.seed)
    if data_arguments.streaming:
        if training_arguments.max_steps <= 0:
            raise ValueError("`streaming` needs `max_steps`: nobody knows how long a stream is.")
        # One process would read for all and stack their batches, whose images differ in number
        training_arguments.accelerator_config.dispatch_batches = False
    require_llava_sp(model_arguments.model_name_or_path)
    if model_arguments.projector is not None:
        require_projector(model_arguments.projector)
    processor = AutoProcessor.from_pretrained(model_arguments.model_name_or_path)
    collator = make_collator(processor, data_arguments, training_arguments, model_arguments.method)
    # Before the model: a wrong record should not have to wait for it
    with training_arguments.main_process_first(desc="reading the data"):
        train_dataset, train_summary = load_data(
            data_arguments,
            collator,
            data_arguments.train_data,
            data_arguments.image_folder,
            streaming=data_arguments.streaming,
        )
        eval_dataset = None
        summaries = {"training": train_summary}
        if data_arguments.eval_data is not None:
            folder = data_arguments.eval_image_folder or data_arguments.image_folder
            eval_dataset, eval_summary = load_data(data_arguments, collator, data_arguments.eval_data, folder)
            summaries["evaluation"] = eval_summary
    trainer = LlavaSPTrainer(
        model=load_model(model_arguments, training_arguments),
        args=training_arguments,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
    )
    if training_arguments.should_save:
        trainer.origins = find_origins(trainer.unwrapped_model, summaries, model_arguments.projector)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    return trainer


def require_extra() -> None:
    """Raise an `ImportError` that names the extra, where Trainer would name packages one after the other."""
    missing = [name for name in ("accelerate", "datasets", "peft") if find_spec(name) is None]
    if missing:
        raise ImportError(f"Training needs {', '.join(missing)}: pip install 'transformers-llava-sp[train]'.")


def make_collator(
    processor: LlavaSPProcessor, data: DataArguments, training: LlavaSPTrainingArguments, method: str
) -> LlavaSPDataCollator:
    """The collator that the arguments ask for; `processor` gets the chat template, which is saved with it."""
    if data.chat_template == "vicuna_v1":
        processor.chat_template = vicuna_v1_chat_template(processor.tokenizer, processor.image_token)
    return LlavaSPDataCollator(
        processor,
        max_length=data.max_length,
        stage=data.stage,
        # Processes that train together wait for each other in every module; and where the projector alone is trained,
        # a batch of texts would have no gradient at all
        dummy_image=training.world_size > 1 or method == "projector",
        return_ids=True,
    )


def load_data(
    arguments: DataArguments,
    collator: LlavaSPDataCollator,
    source: str,
    image_folder: str | None,
    streaming: bool = False,
) -> tuple[ConversationDataset | StreamedConversationDataset, DataSummary]:
    """
    The records of a source without those that are too long, checked, or as a stream that begins anew at its end; and
    what the card says of them.
    """
    try:
        dataset = load_conversations(
            source,
            image_folder,
            streaming=streaming,
            skip_bad_records=arguments.skip_bad_records,
            check_images=arguments.check_images,
        )
    except RecordError as error:
        advice = "Mend it, or pass --skip_bad_records true to leave out and count such records."
        raise RecordError(f"{error} {advice}", error.reason) from error
    num_valid = None if isinstance(dataset, StreamedConversationDataset) else len(dataset)
    dataset = drop_long_records(dataset, collator)
    if isinstance(dataset, StreamedConversationDataset):
        if next(iter(dataset), None) is None:
            raise TrainingDataError(f"{dataset.name} has no record to train on.")
        dataset.repeat = True
    return dataset, summarize_data(dataset, num_valid)


def check_output(output_dir: Path, method: str) -> None:
    """
    Raise a `ValueError` if a folder cannot be written to, or has a result of another kind, whose files would stay
    among those of this one.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {str(output_dir)!r} cannot be made: {error.strerror}.") from error
    if not os.access(output_dir, os.W_OK):
        raise ValueError(f"output_dir {str(output_dir)!r} cannot be written to.")
    if is_of_another_kind(output_dir, method):
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds something else than method {method!r} makes, whose files would be "
            "mixed up with its own: choose another folder, or empty that one."
        )


def is_of_another_kind(folder: Path, method: str) -> bool:
    """Whether a folder has what another method makes."""
    has_adapter = (folder / "adapter_config.json").is_file()
    model_type = find_model_type(str(folder)) if (folder / "config.json").is_file() else None
    expected = {"lora": None, "projector": LlavaSPProjectorConfig.model_type, "full": LlavaSPConfig.model_type}[method]
    return (has_adapter and method != "lora") or model_type not in (None, expected)


def check_checkpoints(output_dir: Path) -> None:
    """Raise a `ValueError` if a folder has checkpoints of another run, which could be taken for the new one's."""
    names = sorted(path.name for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    if names:
        raise ValueError(
            f"output_dir {str(output_dir)!r} has checkpoints of another run: {join_keys(names)}. Go on with it by "
            "--resume_from_checkpoint true, or choose another folder."
        )


def find_checkpoint(arguments: LlavaSPTrainingArguments) -> str | None:
    """
    The checkpoint to resume from: the one named, or for `True` the newest whole one in `output_dir`.

    Raises:
        ValueError: If the one named is not whole, or there is none.
    """
    asked = arguments.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return None
    with arguments.main_process_first(local=arguments.save_on_each_node, desc="looking for the checkpoint"):
        if arguments.should_save:
            clear_staging(arguments.output_dir)
    if str(asked).lower() == "true":
        newest = newest_checkpoint(arguments.output_dir, arguments.save_only_model)
        if newest is None:
            raise ValueError(f"There is no whole checkpoint to resume from in {arguments.output_dir}.")
        return str(newest)
    problem = find_problem(Path(asked), arguments.save_only_model)
    if problem is not None:
        raise ValueError(
            f"{asked} cannot be resumed from: {problem}. Choose another checkpoint, or let "
            "--resume_from_checkpoint true take the newest whole one."
        )
    return str(asked)
