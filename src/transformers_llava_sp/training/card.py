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
"""The model card of what training makes, its README.md"""

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from .. import __version__
from ..conversion.card import (
    KNOWN_LICENSES,
    VARIANT_TEXTS,
    Provenance,
    license_text,
    make_metadata,
    part_sizes,
    read_license,
)
from ..processing_llava_sp import vicuna_v1_chat_template
from .collator import LlavaSPDataCollator
from .data import ConversationDataset, StreamedConversationDataset, TableRecords
from .parts import PROJECTOR


if TYPE_CHECKING:
    from .trainer import LlavaSPTrainer


logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
# Where the card goes if README.md is somebody's own
SPARE_CARD_NAME = "TRAINING.md"
# The card's last line. One that somebody has changed has another digest.
SIGNATURE = "<!-- Written by llava-sp train, which replaces it as long as it is unchanged: {} -->"

VERSIONED_LIBRARIES = ("transformers", "peft", "torch", "accelerate", "datasets", "tokenizers", "safetensors")
MAX_ROWS = 12  # of a table of losses

# What is published of the training arguments: numbers and names that lead to the result, nothing of the machine
RECIPE_FIELDS = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "projector_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha"),
    *("bf16", "fp16", "tf32", "sharding", "train_sampling_strategy", "seed", "data_seed"),
)

TITLES = {"lora": "LoRA adapter with its projector", "projector": "projector", "full": "fine-tuned model"}

# Jinja drops the last line break, hence the empty line at the end
TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

[LLaVA-SP](https://arxiv.org/abs/2507.00505) (ICCV 2025) answers questions about images. It is LLaVA-1.5 with a few
more visual tokens, the spatial tokens, which convolutions over the vision tower's patch grid make.

{% if method == "lora" -%}
This is a LoRA adapter for the language model of a LLaVA-SP model, and that model's projector, which was trained in
full beside it. It is of no use without the model that it was trained on, {{ base_link }}.
{%- elif method == "projector" -%}
This is the projector of a LLaVA-SP model, and nothing else: what comes between the vision tower and the language
model, and makes the visual tokens. It was trained alone, inside of {{ base_link }}, all of whose other weights were
frozen.
{%- else -%}
This is a whole LLaVA-SP model. All of it{{ " but the vision tower" if not train_vision_tower }} was trained, starting
from {{ base_link }}.
{%- endif %} The variant is {{ variant }}: {{ variant_text }}

| part | sizes |
|---|---|
{%- for part, size in sizes.items() %}
| {{ part }} | {{ size }} |
{%- endfor %}
{%- for part, count in trained.items() %}
| trained parameters: {{ part }} | {{ "{:,}".format(count) }} |
{%- endfor %}

## Use
{% if model == "." %}
Run this in the folder that holds this file, or put the folder's path or its id on the Hub in place of `.`.
{%- endif %}
{%- if method != "full" and not base.is_hub_id %}
The model that it was trained on is not named by an id on the Hub: put the path to it in place of `{{ base_name }}`.
{%- endif %}
{% if method == "projector" %}
The second stage starts from it:

```bash
llava-sp train lora --model_name_or_path {{ base_name }} --projector {{ model }} \\
  --train_data conversations.json --image_folder images --output_dir adapter
```

In Python, put it into the model by hand, for which transformers-llava-sp has to be installed:

```python
from transformers import AutoModelForImageTextToText
from transformers_llava_sp import LlavaSPProjector

model = AutoModelForImageTextToText.from_pretrained("{{ base_name }}")
projector = LlavaSPProjector.from_pretrained("{{ model }}")
model.model.multi_modal_projector.load_state_dict(projector.state_dict())
```
{%- else %}
```python
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
{%- if method == "lora" and not base.is_hub_id %}
from peft import PeftModel
{%- endif %}

device = "cuda" if torch.cuda.is_available() else "cpu"
{%- if method == "lora" and not base.is_hub_id %}
base = AutoModelForImageTextToText.from_pretrained("{{ base_name }}", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "{{ model }}").to(device).eval()
{%- else %}
model = AutoModelForImageTextToText.from_pretrained("{{ model }}", trust_remote_code=True).to(device)
{%- endif %}
processor = AutoProcessor.from_pretrained("{{ model }}", trust_remote_code=True)
content = [
    {"type": "image", "image": "photo.jpg"},  # a file, or the URL of one
    {"type": "text", "text": "What is shown in this image?"},
]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(device, model.dtype)
outputs = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`trust_remote_code=True` runs the Python files that come with the model: read them first. Where the package
transformers-llava-sp is installed, `import transformers_llava_sp` takes its place and the package's code runs instead.
{%- if method == "lora" %}

PEFT has to be installed. `PeftModel.from_pretrained` puts LoRA and projector on a model that is loaded already, and
this makes one model of both:

```bash
llava-sp merge {{ model }} {{ "../" if model == "." }}merged{{ " --base-model " ~ base_name if not base.is_hub_id }}
```
{%- endif %}
{%- endif %}

## Trained on

- **model**: {{ describe(base) }}.
{%- if projector %}
- **projector**: it started from {{ describe(projector) }}.
{%- endif %}
{%- for name, data in datasets.items() %}
- **{{ name }} data**: {{ data_text(data) }}
{%- endfor %}

## How

| | |
|---|---|
| optimizer steps | {{ num_steps }}, which are {{ "%.4g" | format(num_epochs) }} epochs |
| examples in a step | {{ global_batch }} |
| in a batch | {{ per_device }} |
| batches in a step | {{ accumulation }} in each process |
| processes | {{ num_processes }} |
| computed in | {{ computed_in }} |
| trained weights in | {{ trained_in }} |
{%- if sharding %}
| divided over the processes by | {{ sharding }} |
{%- endif %}
{%- if max_length %}
| longest example | {{ max_length }} tokens |
{%- endif %}
{%- if lora_layers %}
| LoRA on layers that match | `{{ lora_layers }}` |
{%- endif %}

With this as `recipe.yaml`,

```yaml
{{ recipe }}
```

the command is

```bash
llava-sp train recipe.yaml --model_name_or_path {{ base_name }}{{ " --projector " ~ projector_name if projector }} \\
  --train_data DATA --image_folder IMAGES --output_dir OUTPUT
```

## Losses, as measured
{% if training_rows %}
On the training data, each the mean since the one before:

{{ training_rows }}
{%- if train_loss is not none %}

The mean over all steps up to the last of these is {{ "%.4f" | format(train_loss) }}.
{%- endif %}
{%- else %}
None was logged on the training data.
{%- endif %}
{% if evaluation_rows %}
On the evaluation data:

{{ evaluation_rows }}
{%- else %}
No evaluation was made.
{%- endif %}

## Licence

In plain words, and not legal advice. What is made from a model is under that model's conditions.

- **The model it was trained on** ({{ base_link }}): {{ license_text(base) }}
{%- if projector %}
- **The projector it started from** ({{ projector_link }}): {{ license_text(projector) }}
{%- endif %}
- **The data** may have conditions of their own.
- **The Python files**: Apache-2.0, from transformers-llava-sp.

## Versions

{% for name, version in versions.items() %}{{ name }} {{ version }}{{ "." if loop.last else ", " }}
{%- endfor %}

LLaVA-SP is the work of its authors ([paper](https://arxiv.org/abs/2507.00505),
[code](https://github.com/CnFaker/LLaVA-SP)), who are not involved in transformers-llava-sp and did not make this.

"""


@dataclass(frozen=True)
class DataSummary:
    """
    Data, as the card names them.

    Args:
        name (`str`): The Hub id, or the last component of the path.
        is_hub_id (`bool`): Whether it is a Hub id.
        num_used (`int`, *optional*): How many records are used. Not known of data that are read as they come.
        num_with_images (`int`, *optional*): How many of these have images, where their lengths are known.
        num_skipped (`int`, *optional*): How many others were bad, where bad and long ones were told apart.
        num_dropped (`int`, *optional*): How many others were too long, likewise.
        num_records (`int`, *optional*): All records.
    """

    name: str
    is_hub_id: bool
    num_used: int | None = None
    num_with_images: int | None = None
    num_skipped: int | None = None
    num_dropped: int | None = None
    num_records: int | None = None


@dataclass(frozen=True)
class Origins:
    """
    What a training started from.

    Args:
        base ([`Provenance`]): The model.
        projector ([`Provenance`], *optional*): The projector that replaced the model's.
        data (`dict[str, DataSummary]`): The data, by what they are for: "training" or "evaluation".
    """

    base: Provenance
    projector: Provenance | None
    data: dict[str, DataSummary]


def summarize_data(dataset: Any, num_valid: int | None = None) -> DataSummary:
    """
    Describe data for a card.

    Args:
        dataset ([`ConversationDataset`] or other): What is trained or evaluated on.
        num_valid (`int`, *optional*): How many records there were when bad ones had been skipped, and long ones had
            not been dropped yet.

    Returns:
        [`DataSummary`]: As much of it as is known.
    """
    if not isinstance(dataset, (ConversationDataset, StreamedConversationDataset)):
        return DataSummary(f"a {type(dataset).__name__}", False)
    name = dataset.name
    is_hub_id = isinstance(dataset.records, TableRecords) and is_repo_id(name)
    name = name if is_hub_id else Path(name).name
    if isinstance(dataset, StreamedConversationDataset):
        return DataSummary(name, is_hub_id)
    try:
        lengths = dataset.modality_lengths
    except ValueError:
        lengths = None
    return DataSummary(
        name,
        is_hub_id,
        num_used=len(dataset),
        num_with_images=None if lengths is None else sum(length > 0 for length in lengths),
        num_skipped=None if num_valid is None else len(dataset.records) - num_valid,
        num_dropped=None if num_valid is None else num_valid - len(dataset),
        num_records=len(dataset.records),
    )


def find_origins(model: Any, data: Mapping[str, DataSummary], projector: str | None = None) -> Origins:
    """
    What a training starts from.

    Args:
        model ([`LlavaSPForConditionalGeneration`]): The model.
        data (`dict[str, DataSummary]`): The data, by what they are for: "training" or "evaluation".
        projector (`str`, *optional*): The folder or Hub id of the projector that it was given.

    Returns:
        [`Origins`]: All that a card says of it.
    """
    return Origins(
        find_origin("LLaVA-SP model", model.name_or_path),
        None if projector is None else find_origin("projector", projector),
        dict(data),
    )


def is_repo_id(name: str) -> bool:
    """Whether data that were loaded by this name are from the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def cached_snapshot(name: str) -> Path | None:
    """The folder to which a model of this name was downloaded, `None` if it is not from the Hub."""
    if Path(name).exists():
        return None
    try:
        return Path(hf_hub_download(name, "config.json", local_files_only=True)).parent
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def find_origin(role: str, name: str) -> Provenance:
    """
    Describe where weights come from, without anything of this machine.

    Args:
        role (`str`): What they are.
        name (`str`): The folder or Hub id that they were loaded from, empty if there is none.

    Returns:
        [`Provenance`]: For a folder, with the digest of its config.json alone.
    """
    snapshot = cached_snapshot(name)
    if snapshot is not None:
        # The cache calls it by the commit
        revision, license = snapshot.name, KNOWN_LICENSES.get(name)
        try:
            license = read_license(Path(hf_hub_download(name, CARD_NAME, revision=revision)).parent, name)
        except Exception as error:  # neither a missing card nor an unreachable Hub may stop a training
            logger.info(f"The card of {name} cannot be read: {error}")
        return Provenance(role, name, True, revision, license, {})
    folder = Path(os.path.abspath(name))
    digests = {}
    if name and (folder / "config.json").is_file():
        digests["config.json"] = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return Provenance(
        role,
        folder.name if name else "",
        False,
        None,
        read_license(folder, folder.name) if digests else None,
        digests,
    )


def make_training_card(trainer: "LlavaSPTrainer", **metadata: Any) -> ModelCard:
    """
    The model card of what a trainer has trained so far.

    Args:
        trainer ([`LlavaSPTrainer`]): The trainer.
        metadata (`dict[str, Any]`, *optional*): What goes before the card's own metadata, such as `license`. A list
            is added to it.

    Returns:
        `ModelCard`: The card, to be written by [`save_card`].
    """
    origins, arguments, model = trainer.origins, trainer.args, trainer.unwrapped_model
    config: Any = model.config
    method = trainer.method
    lora = trainer.lora_config
    base, projector = origins.base, origins.projector
    evaluations = sorted(
        {
            key
            for entry in trainer.state.log_history
            for key in entry
            if key.startswith("eval_") and key.endswith("loss")
        }
    )
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    has_ended = any("train_loss" in entry for entry in trainer.state.log_history)
    collator = trainer.data_collator
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    variant = config.projector_config.spatial_variant
    return ModelCard.from_template(
        make_training_metadata(method, origins, metadata),
        template_str=TEMPLATE,
        title=f"LLaVA-SP-{variant.capitalize()}, {TITLES[method]}",
        method=method,
        train_vision_tower=trainer.trains_vision_tower,
        variant=variant,
        variant_text=VARIANT_TEXTS[variant],
        sizes=part_sizes(config),
        trained=count_trained(trainer),
        base=base,
        base_name=shell_name(base),
        base_link=link(base),
        describe=describe,
        projector=projector,
        projector_name=None if projector is None else shell_name(projector),
        projector_link=None if projector is None else link(projector),
        model=trainer.hub_model_id or ".",
        datasets=origins.data,
        data_text=data_text,
        num_steps=trainer.state.global_step,
        num_epochs=trainer.state.epoch or 0,
        per_device=arguments.train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        num_processes=arguments.world_size,
        global_batch=arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        computed_in="bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32",
        trained_in=" and ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained})),
        sharding="FSDP" if trainer.is_fsdp_enabled else "DeepSpeed" if trainer.is_deepspeed_enabled else None,
        max_length=collator.max_length if isinstance(collator, LlavaSPDataCollator) else None,
        lora_layers=lora_layers(lora),
        recipe=make_recipe(trainer),
        training_rows=loss_table(steps, ["loss", "grad_norm", "learning_rate"]),
        train_loss=mean_loss(steps) if has_ended else None,
        evaluation_rows=loss_table(
            [entry for entry in trainer.state.log_history if any(key in entry for key in evaluations)], evaluations
        ),
        license_text=license_text,
        versions={
            "transformers-llava-sp": __version__,
            **{name: importlib.metadata.version(name) for name in VERSIONED_LIBRARIES if find_spec(name) is not None},
        },
    )


def make_training_metadata(method: str, origins: Origins, metadata: Mapping[str, Any]) -> ModelCardData:
    """
    What the Hub reads of a card.

    Args:
        method (`str`): What was trained: "lora", "projector" or "full".
        origins ([`Origins`]): Where it comes from.
        metadata (`dict[str, Any]`): What goes before it. A list is added to it.

    Returns:
        `ModelCardData`: The metadata. They name a base model and data only if these are on the Hub.
    """
    data = make_metadata([origins.base, *([] if origins.projector is None else [origins.projector])])
    data.base_model = origins.base.name if origins.base.is_hub_id else None
    if origins.base.is_hub_id:
        data["base_model_relation"] = "adapter" if method == "lora" else "finetune"
    data.library_name = "peft" if method == "lora" else "transformers"
    if method == "projector":
        # Nothing answers with it alone
        data.pipeline_tag = None
    data.tags = [*(data.tags or []), *(["lora"] if method == "lora" else [])]
    data.datasets = list(dict.fromkeys(summary.name for summary in origins.data.values() if summary.is_hub_id)) or None
    for key, value in metadata.items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = list(dict.fromkeys([*(data.get(key) or []), *value]))
        data[key] = value
    return data


def count_trained(trainer: "LlavaSPTrainer") -> dict[str, int]:
    """How many parameters are trained, by the part that they belong to."""
    counts: dict[str, int] = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            part = "LoRA" if ".lora_" in name else "projector" if f"{PROJECTOR}." in name else "other weights"
            # DeepSpeed keeps the whole's size beside a piece
            counts[part] = counts.get(part, 0) + getattr(parameter, "ds_numel", parameter.numel())
    return counts


def make_recipe(trainer: "LlavaSPTrainer") -> str:
    """The YAML file that leads to the same training, without a model, data and places."""
    arguments: Any = trainer.args
    recipe: dict[str, Any] = {"method": trainer.method}
    if trainer.trains_vision_tower:
        recipe["train_vision_tower"] = True
    # Only a quantized model has this
    if getattr(trainer.unwrapped_model, "is_loaded_in_4bit", False):
        recipe["load_in_4bit"] = True
    lora = trainer.lora_config
    if lora is not None:
        recipe |= {"lora_r": lora.r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout}
    collator = trainer.data_collator
    if isinstance(collator, LlavaSPDataCollator):
        recipe |= {"stage": collator.stage, "max_length": collator.max_length}
        processor = collator.processor
        if processor.chat_template == vicuna_v1_chat_template(processor.tokenizer, processor.image_token):
            recipe["chat_template"] = "vicuna_v1"
    for key in RECIPE_FIELDS:
        value = getattr(arguments, key)
        if value is not None and value != {}:
            recipe[key] = value.value if isinstance(value, Enum) else value
    recipe.pop("num_train_epochs" if arguments.max_steps > 0 else "max_steps")
    newer_name = "activation_checkpointing"
    recipe["gradient_checkpointing"] = getattr(
        arguments, newer_name if hasattr(arguments, newer_name) else "gradient_checkpointing"
    )
    return yaml.safe_dump(recipe, sort_keys=False).rstrip()


def lora_layers(lora: Any) -> str | None:
    """Which layers an adapter is on: the pattern, or the ends of their names as one, for a cell of a table."""
    if lora is None:
        return None
    layers = lora.target_modules
    pattern = layers if isinstance(layers, str) else f".*({'|'.join(sorted(layers))})"
    return pattern.replace("|", r"\|")


def loss_table(entries: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """
    A table of what was logged: the first and the last entry, and some between.

    Args:
        entries (`list[dict]`): The entries, each with `step` and `epoch`.
        keys (`list[str]`): What to show of them.

    Returns:
        `str`: The table, empty if there is no entry.
    """
    if not entries:
        return ""
    if len(entries) > MAX_ROWS:
        last = len(entries) - 1
        entries = [entries[round(row * last / (MAX_ROWS - 1))] for row in range(MAX_ROWS)]
    rows = [
        "| step | epoch | " + " | ".join(key.replace("_", " ") for key in keys) + " |",
        "|---:" * (2 + len(keys)) + "|",
    ]
    for entry in entries:
        cells = [f"{entry[key]:.4g}" if key in entry else "-" for key in ("epoch", *keys)]
        rows.append(f"| {entry['step']} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def mean_loss(entries: Sequence[Mapping[str, Any]]) -> float | None:
    """
    The mean loss of all steps, `None` if there is no entry. Trainer's `train_loss` is that of the steps since a run
    was resumed.

    Args:
        entries (`list[dict]`): What was logged, each with `step` and the `loss` since the one before.
    """
    if not entries:
        return None
    firsts = [0, *(entry["step"] for entry in entries)]
    total = sum(entry["loss"] * (entry["step"] - first) for entry, first in zip(entries, firsts, strict=False))
    return total / entries[-1]["step"]


def link(origin: Provenance) -> str:
    """What weights come from, in a few words."""
    if origin.is_hub_id:
        return f"[{origin.name}](https://huggingface.co/{origin.name})"
    return f"`{origin.name}`" if origin.name else "a model without a name"


def describe(origin: Provenance) -> str:
    """The same, so that it can be told from others of that name."""
    if origin.is_hub_id:
        return link(origin) + (f" at revision `{origin.revision}`" if origin.revision else "")
    if not origin.name:
        return "one that was not loaded from a folder"
    digest = "".join(f", whose {file} has the SHA-256 `{digest}`" for file, digest in origin.sha256.items())
    return f"a local folder named `{origin.name}`{digest}"


def shell_name(origin: Provenance) -> str:
    """The same as an argument of a command."""
    return origin.name if re.fullmatch(r"[\w./-]+", origin.name) else "MODEL"


def data_text(data: DataSummary) -> str:
    """Which data and how many, in words."""
    name = f"[{data.name}](https://huggingface.co/datasets/{data.name})" if data.is_hub_id else f"`{data.name}`"
    if data.num_used is None:
        return f"{name}, read as they came and not counted."
    images = "" if data.num_with_images is None else f", {data.num_with_images:,} of them with images"
    left_out = ""
    if data.num_skipped is not None:
        left_out = f" {data.num_skipped:,} bad ones were skipped, {data.num_dropped:,} too long ones dropped."
    return f"{name}, {data.num_used:,} of {data.num_records:,} records{images}.{left_out}"


def save_card(card: ModelCard, folder: str | Path) -> None:
    """
    Write a card, as README.md, or as TRAINING.md where README.md is somebody's own or has been changed by somebody.

    Args:
        card (`ModelCard`): The card.
        folder (`str` or `Path`): The folder to write to.
    """
    text = str(card).rstrip("\n") + "\n"
    file = Path(folder, SPARE_CARD_NAME if has_own_card(folder) else CARD_NAME)
    file.write_text(f"{text}\n{sign(text)}\n", encoding="utf-8")


def make_way(folder: str | Path, place: str | Path) -> bool:
    """
    Rename the card in a folder to TRAINING.md if README.md in another one, where its files are to go, is somebody's
    own. Returns whether it is.
    """
    own = has_own_card(place)
    if own:
        Path(folder, CARD_NAME).rename(Path(folder, SPARE_CARD_NAME))
    return own


def sign(text: str) -> str:
    """The last line of a card with this text."""
    return SIGNATURE.format(hashlib.sha256(text.encode()).hexdigest())


def has_own_card(folder: str | Path) -> bool:
    """Whether a folder has a README.md that [`save_card`] did not write, or that was changed since."""
    file = Path(folder, CARD_NAME)
    if not file.is_file():
        return False
    text, mark, signature = file.read_text(encoding="utf-8", errors="replace").rpartition("\n<!--")
    return f"{mark}{signature}" != f"\n{sign(text)}\n"
