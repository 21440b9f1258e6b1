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
"""The model card of a converted repository, its README.md"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from .. import __version__
from ..configuration_llava_sp import LlavaSPConfig
from .original import Layout


VERSIONED_LIBRARIES = ("transformers", "torch", "huggingface_hub", "safetensors", "tokenizers")

FINE_TUNED_LAYOUTS = (Layout.SP_LORA.value, Layout.SP_FULL.value)

# What the authors of these publish them under, for copies that say nothing themselves
KNOWN_LICENSES = {
    "Levideus/llava-sp-cropping-lora": "cc-by-nc-4.0",
    "Levideus/llava-sp-pooling-lora": "cc-by-nc-4.0",
    "lmsys/vicuna-7b-v1.5": "llama2",
    "lmsys/vicuna-13b-v1.5": "llama2",
    "google/siglip-large-patch16-384": "apache-2.0",
}
NON_COMMERCIAL_LICENSE = "cc-by-nc-4.0"

# In plain words. Only these identifiers, all of them on the Hub's list, are written to a card's metadata: the Hub
# refuses a card with one that it does not know.
LICENSE_TEXTS = {
    NON_COMMERCIAL_LICENSE: (
        "[CC BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/). Share and change for non-commercial "
        "purposes, naming the authors and what you changed."
    ),
    "llama2": (
        "the [Llama 2 Community License](https://ai.meta.com/llama/license/). Commercial use is free below 700 "
        "million users a month; passed on, the weights go with the licence's text and its attribution notice (Llama "
        "2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.); "
        "its acceptable use policy applies; answers must not be used to improve other large language models than "
        "Llama 2 and its derivatives."
    ),
    "apache-2.0": "[Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0). Use, change and sell; keep the notices.",
    "mit": "[MIT](https://opensource.org/license/mit). Use, change and sell; keep the notices.",
}

VARIANT_TEXTS = {
    "cropping": (
        "each spatial token sees a centred crop of the patch grid, from the central region to the global image. The "
        "paper describes it as the variant for details."
    ),
    "pooling": (
        "each spatial token sees the whole patch grid, average-pooled, from abstract to specific. The paper describes "
        "it as the variant for the meaning of the whole."
    ),
}

# What the chat template writes for the question of the usage examples
PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nWhat is shown in this image? ASSISTANT:"
)

# arXiv 2507.00505, with CLIP ViT-L/14 at 336 pixels and Vicuna-7B-v1.5
BENCHMARKS = ("VQAv2", "GQA", "VizWiz", "SQA-I", "TextVQA", "POPE", "MME-P", "MMB", "SEED-I", "LLaVA-W", "MM-Vet")
PAPER_BASELINE = "LLaVA-1.5 (LoRA)"
PAPER_RESULTS = {
    PAPER_BASELINE: (78.4, 61.9, 45.7, 67.6, 56.2, 85.8, 1477.4, 64.5, 67.0, 64.2, 32.1),
    "LLaVA-SP-Cropping": (79.2, 62.4, 50.1, 69.7, 58.7, 86.4, 1473.8, 65.8, 67.6, 66.7, 32.2),
    "LLaVA-SP-Pooling": (79.1, 62.5, 51.6, 69.0, 58.3, 86.5, 1475.9, 65.7, 67.5, 68.3, 33.4),
}

# What must be as in the paper's models for its numbers to be about this architecture. The types come first: other
# models need not have the other fields.
PAPER_FIELDS = {
    "vision_config": (
        *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        "image_size",
    ),
    "text_config": (
        *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        "num_key_value_heads",
    ),
    "projector_config": (
        *("spatial_scales", "spatial_hidden_size", "use_detail_integrator", "detail_kernel_size", "detail_stride"),
        "num_patch_layers",
    ),
}

# Jinja drops the last line break, hence the empty line at the end
TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}{{ ", pre-trained only" if pretraining }}

[LLaVA-SP](https://arxiv.org/abs/2507.00505) (ICCV 2025) answers questions about images. It is LLaVA-1.5 with a few
more visual tokens, the spatial tokens, which convolutions over the vision tower's patch grid make and which tell the
language model what lies where in the image.

This is the {{ projector.spatial_variant }} variant: {{ variant_text }}
{%- if projector.use_detail_integrator %}
The spatial tokens also gather fine detail, by attention over the features of a strided convolution.
{%- endif %}

{% if merged -%}
It is a LLaVA-SP model in the format of Hugging Face Transformers, with an adapter merged into it.
{%- else -%}
It was converted for Hugging Face Transformers from {{ layout }}.
{%- endif %}
{%- if pretraining %}
Only the projector is trained: the model writes short captions, and follows no instructions before it is fine-tuned.
{%- endif %}

| part | sizes |
|---|---|
{%- for part, size in sizes.items() %}
| {{ part }} | {{ size }} |
{%- endfor %}
| parameters | {{ "{:,}".format(num_parameters) }} in {{ dtype }} |

## Use

It needs Transformers 5.19 or newer, below 6, with PyTorch, Pillow and Jinja2.
{%- if model == "." %}
Run this in the folder that holds this file, or put the folder's path or its id on the Hub in place of `"."`.
{%- endif %}

```python
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="{{ model }}", trust_remote_code=True)
{%- if pretraining %}
image = "photo.jpg"  # a file, or the URL of one
print(pipe(images=image, text="<image>\\n", max_new_tokens=64, return_full_text=False)[0]["generated_text"])
{%- else %}
content = [
    {"type": "image", "image": "photo.jpg"},  # a file, or the URL of one
    {"type": "text", "text": "What is shown in this image?"},
]
messages = [{"role": "user", "content": content}]
print(pipe(messages, max_new_tokens=64, return_full_text=False)[0]["generated_text"])
{%- endif %}
```

Model and processor by themselves:

```python
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained("{{ model }}", trust_remote_code=True).to(device)
processor = AutoProcessor.from_pretrained("{{ model }}", trust_remote_code=True)
{%- if pretraining %}
image = "photo.jpg"  # a file, or the URL of one
inputs = processor(images=image, text="<image>\\n", return_tensors="pt").to(device, model.dtype)
{%- else %}
content = [
    {"type": "image", "image": "photo.jpg"},  # a file, or the URL of one
    {"type": "text", "text": "What is shown in this image?"},
]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(device, model.dtype)
{%- endif %}
outputs = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`trust_remote_code=True` runs the Python files in this repository: read them first. Where the package
transformers-llava-sp is installed, `import transformers_llava_sp` takes its place and the package's code runs instead.

## Prompt
{% if pretraining %}
The image and a newline, and nothing else: `<image>` + `\\n`, as in pre-training. The chat template in this repository
is for models that are fine-tuned from this one.
{%- else %}
{%- if own_chat_template %}
The chat template in this repository is the language model's own, made to take images. The authors train and evaluate
with another conversation, which they call `vicuna_v1`.
{%- else %}
The authors evaluate with the conversation they call `vicuna_v1`. The chat template in this repository writes it:

```text
{{ prompt }}
```
{%- endif %}

They evaluate in float16, greedily, with one beam; greedy is the default here too.
{%- endif %}

## Limits

- A conversation, images included, has at most {{ text.max_position_embeddings }} tokens.
  The processor refuses a longer one; it never cuts it.
{%- if tiles %}
- An image is seen as a whole and in tiles, and takes up to {{ max_image_tokens }} of these tokens.
{%- endif %}
- Images come before the text of their turn, as in training. The authors train with one image in a turn.
{%- if paper_rows %}

## Results: the paper's, not measured with these files

The paper ([arXiv 2507.00505](https://arxiv.org/abs/2507.00505)) reports for this architecture, with CLIP ViT-L/14 at
336 pixels and Vicuna-7B-v1.5:

| model | {{ benchmarks | join(" | ") }} |
|---|{{ "---|" * (benchmarks | length) }}
{%- for name, values in paper_rows %}
| {{ name }} | {{ values | join(" | ") }} |
{%- endfor %}
{%- endif %}

## Licences

In plain words, and not legal advice; the licences themselves decide. This repository holds the weights of all parts,
so all their conditions hold for it together
{%- if non_commercial %}: **non-commercial use only**{% endif %}.
{% for source in sources %}
- **{{ source.role }}** ({{ source.name }}): {{ license_text(source) }}
{%- endfor %}
- **The Python files**: Apache-2.0, from transformers-llava-sp.
{%- if inner_parts %}

The weights of the {{ inner_parts | join(" and the ") }} came inside one of these. Their own licences apply to them as
well.
{%- endif %}

## Where the weights come from

transformers-llava-sp {{ versions["transformers-llava-sp"] }} made this repository with this command, to which an
output folder is to be added:

```bash
{{ command }}
```

What was changed:

{% if merged -%}
- Merging trains nothing. The adapter was merged into the weights that it adapts, and all cast to {{ dtype }}.
{%- else -%}
- Converting trains nothing. Tensors were renamed, adapters merged into the weights that they adapt, and all cast to
  {{ dtype }}.
{%- endif %}
{%- for note in notes %}
- {{ note }}
{%- endfor %}

Versions: {% for name, version in versions.items() %}{{ name }} {{ version }}{{ "." if loop.last else ", " }}
{%- endfor %}
{%- for source in sources %}

**{{ source.role }}**:
{%- if source.is_hub_id %} [{{ source.name }}](https://huggingface.co/{{ source.name }})
{%- if source.revision %} at revision `{{ source.revision }}`{% endif %}
{%- else %} a local folder named `{{ source.name }}`
{%- endif %}. SHA-256 of each file read:

```text
{%- for file, digest in source.sha256 | dictsort(case_sensitive=true) %}
{{ digest }}  {{ file }}
{%- endfor %}
```
{%- endfor %}

## Citation

LLaVA-SP is the work of its authors ([their code](https://github.com/CnFaker/LLaVA-SP)), who are not involved in
transformers-llava-sp and did not make this repository.

```bibtex
@inproceedings{lou2025llavasp,
  title     = {{ "{{LLaVA-SP}" }}: Enhancing Visual Representation with Visual Spatial Tokens for {MLLMs}},
  author    = {Lou, Haoran and Fan, Chunxiao and Liu, Ziyan and Wu, Yuexin and Wang, Xinliang},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  pages     = {22014--22024},
  year      = {2025}
}
```

"""


@dataclass(frozen=True)
class Provenance:
    """
    One input of a conversion, as the model card names it.

    Args:
        role (`str`): What it is: "LLaVA-SP checkpoint", "language model", "vision tower", "adapter" or "LLaVA-SP
            model".
        name (`str`): Its Hub id, or the last component of its path.
        is_hub_id (`bool`): Whether `name` is a Hub id.
        revision (`str`, *optional*): The hash of the commit, for a Hub id.
        license (`str`, *optional*): The identifier that it states, see [`read_license`].
        sha256 (`dict[str, str]`): The digest of each file that was read, in hexadecimal digits, by the file's name.
    """

    role: str
    name: str
    is_hub_id: bool
    revision: str | None
    license: str | None
    sha256: dict[str, str]


def read_license(folder: Path, name: str) -> str | None:
    """
    The licence that a source is published under.

    Args:
        folder (`Path`): Its folder. The metadata of the README.md in it decides, where there are any.
        name (`str`): Its Hub id or name. Decides otherwise, for the checkpoints that are known.

    Returns:
        `str`, *optional*: The identifier, `None` where nothing is stated.
    """
    try:
        metadata = metadata_load(folder / "README.md") or {}
    except Exception:  # nothing that is wrong with somebody's README.md may stop a conversion
        metadata = {}
    license = metadata.get("license")
    if license == "other":
        license = metadata.get("license_name") or license
    elif license == "unknown":
        # What `create` writes where no source states any
        license = None
    return " ".join(license.split()) if isinstance(license, str) and license.strip() else KNOWN_LICENSES.get(name)


def make_model_card(
    config: LlavaSPConfig,
    *,
    layout: str,
    dtype: torch.dtype,
    num_parameters: int,
    sources: Sequence[Provenance],
    command: str,
    notes: Sequence[str] = (),
    repo_id: str | None = None,
    own_chat_template: bool = False,
) -> ModelCard:
    """
    The model card of a converted repository. The same arguments give the same text, with the same libraries installed.

    Args:
        config (`LlavaSPConfig`): The configuration of the converted model.
        layout (`str`): What was converted, in words: the value of a [`Layout`].
        dtype (`torch.dtype`): Of the weights.
        num_parameters (`int`): Of the whole model.
        sources (`Sequence[Provenance]`): Where the weights come from. All of this is published: names of local folders
            must be without the path to them.
        command (`str`): The command that converted them, without the output folder and paths of this machine.
        notes (`Sequence[str]`, *optional*): Sentences on what the conversion dropped or added.
        repo_id (`str`, *optional*): Where it is going to be published, for the usage examples. They load the folder
            that the card lies in by default.
        own_chat_template (`bool`, *optional*, defaults to `False`): Whether the chat template is the language model's
            own, not `vicuna_v1`.

    Returns:
        `ModelCard`: The card, to be saved as README.md.
    """
    projector: Any = config.projector_config
    title = f"LLaVA-SP-{projector.spatial_variant.capitalize()}"
    roles = {source.role for source in sources}
    return ModelCard.from_template(
        make_metadata(sources),
        template_str=TEMPLATE,
        title=title,
        pretraining=layout == Layout.SP_PRETRAINING.value,
        layout=layout,
        merged="adapter" in roles,
        sizes=part_sizes(config),
        num_parameters=num_parameters,
        dtype=str(dtype).removeprefix("torch."),
        projector=projector,
        text=config.text_config,
        variant_text=VARIANT_TEXTS[projector.spatial_variant],
        model=repo_id or ".",
        prompt=PROMPT,
        own_chat_template=own_chat_template,
        tiles=config.image_grid_pinpoints is not None,
        max_image_tokens=count_image_tokens(config),
        benchmarks=BENCHMARKS,
        paper_rows=[(name, PAPER_RESULTS[name]) for name in (PAPER_BASELINE, title)]
        if layout in FINE_TUNED_LAYOUTS and "adapter" not in roles and has_paper_architecture(config)
        else [],
        sources=sources,
        license_text=license_text,
        non_commercial=common_license(sources) == NON_COMMERCIAL_LICENSE,
        inner_parts=[role for role in ("language model", "vision tower") if role not in roles],
        command=command,
        notes=notes,
        versions={
            "transformers-llava-sp": __version__,
            **{library: importlib.metadata.version(library) for library in VERSIONED_LIBRARIES},
        },
    )


def make_metadata(sources: Sequence[Provenance]) -> ModelCardData:
    """
    What the Hub reads of a card.

    Args:
        sources (`Sequence[Provenance]`): Where the weights come from.

    Returns:
        `ModelCardData`: The metadata.
    """
    license = common_license(sources)
    base_models = list(dict.fromkeys(source.name for source in sources if source.is_hub_id))
    return ModelCardData(
        license=license,
        license_name="see-model-card" if license == "other" else None,
        base_model=base_models or None,
        # The Hub's word for several models that became one, and its own guess for a list
        base_model_relation="merge" if len(base_models) > 1 else None,
        pipeline_tag="image-text-to-text",
        library_name="transformers",
        tags=["llava", "llava-sp", "multimodal", "vision", "custom_code", "arxiv:2507.00505"],
    )


def part_sizes(config: LlavaSPConfig) -> dict[str, str]:
    """The sizes of a model's parts, in words."""
    vision: Any = config.vision_config
    projector: Any = config.projector_config
    text: Any = config.text_config
    grid, image, kernel = (
        f"{side} x {side}" for side in (projector.grid_size, config.tile_size, projector.detail_kernel_size)
    )
    scales = ", ".join(map(str, projector.spatial_scales))
    detail = "none"
    if projector.use_detail_integrator:
        detail = f"{projector.num_detail_tokens} (kernel {kernel}, stride {projector.detail_stride})"
    num_spatial, num_patch = projector.num_spatial_tokens, projector.num_patch_tokens
    tokens = f"{projector.num_image_tokens}: {num_spatial} spatial, {num_patch} patch"
    tiles = {}
    if config.image_grid_pinpoints is not None:
        resolutions = ", ".join(f"{height} x {width}" for height, width in config.image_grid_pinpoints)
        tiles["image tiles"] = f"of {image} pixels, in the best-fitting of {resolutions} (height x width)"
        tokens += (
            f" for the whole image; {num_spatial} and its patches for each tile, and 1 for each row of patches; up to "
            f"{count_image_tokens(config)} in all"
        )
    return {
        "vision tower": (
            f"`{vision.model_type}`, {vision.num_hidden_layers} layers, width {vision.hidden_size}; images of {image} "
            f"pixels, a grid of {grid} patches"
        ),
        "spatial tokens": f"{projector.num_spatial_tokens}, one for each scale: {scales}",
        "detail features": detail,
        **tiles,
        "tokens per image": tokens,
        "language model": (
            f"`{text.model_type}`, {text.num_hidden_layers} layers, width {text.hidden_size}, {text.vocab_size} "
            f"embeddings, {text.max_position_embeddings} tokens of context"
        ),
    }


def count_image_tokens(config: LlavaSPConfig) -> int:
    """How many tokens an image takes: in tiles, at most, which an image does that fills one of the resolutions."""
    pinpoints: Sequence = config.image_grid_pinpoints or [None]
    return max(config.get_image_layout(pinpoint).num_tokens for pinpoint in pinpoints)


def common_license(sources: Sequence[Provenance]) -> str:
    """
    The licence of all sources together, for the metadata: the non-commercial one if any has it, the one that all
    state, `"other"` if they differ, and `"unknown"` if none states any.
    """
    licenses = {source.license for source in sources}
    if NON_COMMERCIAL_LICENSE in licenses:
        return NON_COMMERCIAL_LICENSE
    if licenses == {None}:
        return "unknown"
    [first, *others] = licenses
    return first if first in LICENSE_TEXTS and not others else "other"


def license_text(source: Provenance) -> str:
    """What a source's licence is, and what it asks for, in plain words."""
    if source.license is not None:
        return LICENSE_TEXTS.get(source.license, f"`{source.license}`, as its source states.")
    if source.is_hub_id and source.name.startswith("openai/clip-"):
        return "not stated by its source. OpenAI publishes CLIP's code under the MIT licence."
    return "not stated by its source."


def has_paper_architecture(config: LlavaSPConfig) -> bool:
    """Whether a model is built as the 7B models of the paper are, of either variant."""
    released = LlavaSPConfig()
    names = ("vision_feature_layer", "image_grid_pinpoints")
    return all(getattr(config, name) == getattr(released, name) for name in names) and all(
        getattr(getattr(config, part), name) == getattr(getattr(released, part), name)
        for part, names in PAPER_FIELDS.items()
        for name in names
    )
