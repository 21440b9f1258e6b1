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
"""Making a model to train: of parts that are trained already, and a projector that has yet to be"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import logging

from ..configuration_llava_sp import SPATIAL_VARIANTS, LlavaSPConfig, vision_image_size
from ..modeling_llava_sp import LlavaSPForConditionalGeneration
from ..processing_llava_sp import LlavaSPProcessor, load_tokenizer
from .card import Provenance, license_text, make_metadata, part_sizes, read_license
from .checkpoint import ConversionError, SourceFolder, read_json, resolve_source
from .convert import DEFAULT_MAX_SHARD_SIZE, SMALL_FILES_SIZE, WriteOptions, command_line
from .parts import CHAT_TEMPLATES, CONFIG_ERRORS
from .push import push_folder
from .staging import check_free_space, check_output, staged


# (rows, columns) of the tiles that the paper's larger model cuts images into, in the authors' order
PAPER_TILE_GRIDS = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))

# What loading somebody's files raises, beyond what Transformers says is wrong with them
CREATION_ERRORS = (*CONFIG_ERRORS, ArithmeticError, AttributeError, LookupError, RuntimeError, SafetensorError)

# Jinja drops the last line break, hence the empty line at the end
TEMPLATE = """\
---
{{ card_data }}
---

# LLaVA-SP-{{ variant }}, to be trained

[LLaVA-SP](https://arxiv.org/abs/2507.00505) adds spatial visual tokens, which convolutions over the vision tower's
patch grid make, to LLaVA. This model is made of the parts below. **{{ untrained }} random: the model has to be trained
before it can tell what an image shows.** To text without images it answers as its language model does.

| part | |
|---|---|
{%- for part, size in sizes.items() %}
| {{ part }} | {{ size }} |
{%- endfor %}

{{ "{:,}".format(num_parameters) }} parameters in {{ dtype }}.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{{ model }}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{{ model }}", trust_remote_code=True)
```

## Where the weights come from
{% for source in sources %}
- {{ source.role }}: {{ source.name }}{{ " at revision " ~ source.revision if source.revision }}; licence:
  {{ license_text(source) }}
{%- endfor %}

Made by `{{ command }}`.

"""


@dataclass(frozen=True)
class CreationReport:
    """
    What was made.

    Args:
        output (`Path`): The folder written.
        config (`LlavaSPConfig`): The model's configuration.
        dtype (`torch.dtype`): Of all weights.
        num_parameters (`int`): Of the whole model.
        num_new_parameters (`int`): Of the parts that have yet to be trained.
        commit_url (`str`, *optional*): The commit on the Hub, if it was pushed.
    """

    output: Path
    config: LlavaSPConfig
    dtype: torch.dtype
    num_parameters: int
    num_new_parameters: int
    commit_url: str | None

    def __str__(self) -> str:
        lines = [f"Made {self.output}", *(f"  {part}: {size}" for part, size in part_sizes(self.config).items())]
        lines.append(
            f"  parameters: {self.num_parameters:,} in {str(self.dtype).removeprefix('torch.')}, "
            f"{self.num_new_parameters:,} of them random, to be trained"
        )
        if self.commit_url is not None:
            lines.append(f"  pushed: {self.commit_url}")
        return "\n".join(lines)


def create_model(
    output: str | Path,
    *,
    vision_tower: str | Path | None = None,
    base_model: str | Path | None = None,
    from_llava: str | Path | None = None,
    spatial_variant: str = "cropping",
    detail_integrator: bool = True,
    image_tiles: bool = False,
    vision_feature_layer: int | None = None,
    chat_template: str | None = None,
    seed: int = 0,
    dtype: str = "auto",
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> CreationReport:
    """
    Make a model to train: of a vision tower and a language model, or of a LLaVA or InternVL that gets spatial tokens.

    Args:
        output (`str` or `Path`): The folder to write, which must not exist. It appears when all of it is written.
        vision_tower (`str` or `Path`, *optional*): The vision tower: a local folder, or a Hub id, which `@` and a
            branch, tag or commit may follow.
        base_model (`str` or `Path`, *optional*): The language model, likewise.
        from_llava (`str` or `Path`, *optional*): Instead of the two, a LLaVA, LLaVA-NeXT or InternVL in Transformers'
            format, likewise.
        spatial_variant (`str`, *optional*, defaults to `"cropping"`): `"cropping"` or `"pooling"`.
        detail_integrator (`bool`, *optional*, defaults to `True`): Whether the spatial tokens attend to detail
            features.
        image_tiles (`bool`, *optional*, defaults to `False`): Whether images are cut into tiles, of the grids that the
            paper has.
        vision_feature_layer (`int`, *optional*): Index into the vision tower's hidden states. Defaults to -2, or to
            that of the LLaVA or InternVL.
        chat_template (`str`, *optional*): `"vicuna_v1"` for the conversation of the released checkpoints,
            `"tokenizer"` for the language model's own. Defaults to that where there is one.
        seed (`int`, *optional*, defaults to 0): Seed of the random weights.
        dtype (`str`, *optional*, defaults to `"auto"`): Of all weights written: `"float32"`, `"float16"`,
            `"bfloat16"`, or `"auto"` for the one that the language model's weights are stored in.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): Size of the largest file of weights.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace the result of an earlier conversion at
            `output`. Any other folder is left alone.
        push_to_hub (`str`, *optional*): The repository on the Hub to push the result to, in one commit.
        private (`bool`, *optional*): Whether that repository is private, if it is created.
        revision (`str`, *optional*): The branch to push to.

    Returns:
        [`CreationReport`]: What was made. Its string is a summary.

    Raises:
        ConversionError: If a part is missing or cannot be used: then there is nothing at `output` that was not there.
            Or if the push fails: then `output` is complete.
    """
    options = WriteOptions(dtype, max_shard_size, overwrite, False, push_to_hub, private, revision)
    options.check()
    for name, value, allowed in (
        ("spatial variant", spatial_variant, SPATIAL_VARIANTS),
        ("chat template", chat_template, CHAT_TEMPLATES),
    ):
        if value is not None and value not in allowed:
            raise ConversionError(f"Unknown {name} {value!r}: expected {' or '.join(map(repr, allowed))}.")
    if (from_llava is None) == (vision_tower is None and base_model is None):
        raise ConversionError("Pass either --vision-tower and --base-model, or --from-llava alone.")
    if from_llava is None and (vision_tower is None or base_model is None):
        raise ConversionError("Pass both --vision-tower and --base-model, or --from-llava instead.")
    output = Path(output)
    check_output(output, [], overwrite)
    sources = (
        [resolve_source(from_llava, "LLaVA")]
        if from_llava is not None
        else [resolve_source(str(vision_tower), "vision tower"), resolve_source(str(base_model), "base model")]
    )
    check_output(output, [source.folder for source in sources], overwrite)

    fields: dict[str, Any] = {"spatial_variant": spatial_variant, "use_detail_integrator": detail_integrator}
    if vision_feature_layer is not None:
        fields["vision_feature_layer"] = vision_feature_layer
    names = " and ".join(str(source.folder) for source in sources)
    torch.manual_seed(seed)
    try:
        if image_tiles:
            config = AutoConfig.from_pretrained(sources[0].folder)
            size = vision_image_size(getattr(config, "vision_config", config))
            fields["image_grid_pinpoints"] = [[rows * size, columns * size] for rows, columns in PAPER_TILE_GRIDS]
        with without_warnings():
            model, processor = load_parts(sources, dtype, fields, chat_template)
    except CREATION_ERRORS as error:
        raise ConversionError(f"No LLaVA-SP model can be made of {names}: {error}") from error
    arguments = ["create", "--spatial-variant", spatial_variant, *(["--image-tiles"] if image_tiles else [])]
    roles = ["--vision-tower", "--base-model"] if from_llava is None else ["--from-llava"]
    for option, source in zip(roles, sources, strict=True):
        arguments += [option, str(source)]
    if not detail_integrator:
        arguments.append("--no-detail-integrator")
    if vision_feature_layer is not None:
        arguments += ["--vision-feature-layer", str(vision_feature_layer)]
    if chat_template is not None:
        arguments += ["--chat-template", chat_template]
    if seed:
        arguments += ["--seed", str(seed)]

    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    with staged(output, overwrite) as folder:
        check_free_space(output, num_bytes + SMALL_FILES_SIZE)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        card = make_card(model, sources, command_line(arguments, options), push_to_hub)
        card.save(folder / "README.md")
    commit_url = None
    if push_to_hub is not None:
        commit_url = push_folder(
            output,
            push_to_hub,
            private=private,
            revision=revision,
            commit_message="Add a LLaVA-SP model to be trained",
        )
    return CreationReport(
        output=output,
        config=model.config,
        dtype=model.dtype,
        num_parameters=model.num_parameters(),
        num_new_parameters=count_new_parameters(model, sources),
        commit_url=commit_url,
    )


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep Transformers from listing each weight of a contrastive model's other half; what is missing is an error."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_parts(
    sources: Sequence[SourceFolder], dtype: str, fields: dict[str, Any], chat_template: str | None
) -> tuple[LlavaSPForConditionalGeneration, LlavaSPProcessor]:
    """
    Load the parts of a model and join them.

    Args:
        sources (`Sequence[SourceFolder]`): A vision tower and a language model, or a LLaVA or InternVL.
        dtype (`str`): Of all weights, `"auto"` for the one that they are stored in.
        fields (`dict[str, Any]`): Fields of the model's and of the projector's configuration.
        chat_template (`str`, *optional*): One of `CHAT_TEMPLATES`.

    Returns:
        `tuple(LlavaSPForConditionalGeneration, LlavaSPProcessor)`: The model and its processor.
    """
    template = chat_template if chat_template == "vicuna_v1" else None
    if has_patch_path(sources):
        [llava] = (source.folder for source in sources)
        model = LlavaSPForConditionalGeneration.from_llava(llava, dtype=dtype, **fields)
        return model, LlavaSPProcessor.from_llava(llava, model.config, chat_template=template)
    vision, text = (source.folder for source in sources)
    if chat_template == "tokenizer" and load_tokenizer(text).chat_template is None:
        raise ValueError("the tokenizer has no chat template: leave out --chat-template")
    model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(vision, text, dtype=dtype, **fields)
    processor = LlavaSPProcessor.from_vision_text_pretrained(vision, text, model.config, chat_template=template)
    return model, processor


def has_patch_path(sources: Sequence[SourceFolder]) -> bool:
    """Whether a model was made of one that projects patches already."""
    return [source.role for source in sources] == ["LLaVA"]


def count_new_parameters(model: LlavaSPForConditionalGeneration, sources: Sequence[SourceFolder]) -> int:
    """How many weights of a created model no source has."""
    projector = model.model.multi_modal_projector
    known = [projector.patch_mlp] if has_patch_path(sources) else []
    new = projector.num_parameters() - sum(parameter.numel() for module in known for parameter in module.parameters())
    newline = getattr(model.model, "image_newline", None)
    has_newline = any(read_json(source.folder / "config.json").get("image_grid_pinpoints") for source in sources)
    return new if newline is None or has_newline else new + newline.weight.numel()


def make_card(
    model: LlavaSPForConditionalGeneration, sources: Sequence[SourceFolder], command: str, repo_id: str | None
) -> ModelCard:
    """
    The model card of a created model.

    Args:
        model ([`LlavaSPForConditionalGeneration`]): The model.
        sources (`Sequence[SourceFolder]`): What it was made of.
        command (`str`): The command that made it, without the output folder and paths of this machine.
        repo_id (`str`, *optional*): Where it is going to be published, for the usage example.

    Returns:
        `ModelCard`: The card, to be saved as README.md.
    """
    provenance = [
        Provenance(
            role=source.published_role,
            name=source.name,
            is_hub_id=source.revision is not None,
            revision=source.revision,
            license=read_license(source.folder, source.name),
            sha256={},
        )
        for source in sources
    ]
    projector: Any = model.config.projector_config
    new = "The weights that make the spatial tokens are" if has_patch_path(sources) else "The projector's weights are"
    return ModelCard.from_template(
        make_metadata(provenance),
        template_str=TEMPLATE,
        variant=projector.spatial_variant.capitalize(),
        untrained=new,
        sizes=part_sizes(model.config),
        num_parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        model=repo_id or ".",
        sources=provenance,
        license_text=license_text,
        command=command,
    )
