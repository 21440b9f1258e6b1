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
"""Conversion of a whole checkpoint: planned, written, verified, described, and then put at its place"""

import hashlib
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import tqdm

from ..configuration_llava_sp import LlavaSPConfig
from ..processing_llava_sp import VICUNA_V1_CHAT_TEMPLATE
from .card import Provenance, count_image_tokens, make_model_card, read_license
from .checkpoint import ConversionError, resolve_source
from .original import Layout
from .parts import CHAT_TEMPLATES
from .plan import DTYPES, ConversionPlan, plan_conversion
from .push import check_repo_id, push_folder
from .staging import check_free_space, check_output, staged
from .verify import Verification, verify
from .writer import plan_shards, write_weights


DEFAULT_MAX_SHARD_SIZE = "5GB"
# Tokenizer, configurations and code beside the weights: about 3 MB
SMALL_FILES_SIZE = 10**7
HASH_BLOCK_SIZE = 2**24


@dataclass(frozen=True)
class ConversionReport:
    """
    What a conversion found and wrote.

    Args:
        output (`Path`): The folder written.
        layout (`Layout`): What the checkpoint was.
        config (`LlavaSPConfig`): The configuration of the converted model.
        dtype (`torch.dtype`): Of all weights.
        num_parameters (`int`): Of the whole model.
        num_merged_weights (`int`): How many weights a LoRA adapter was merged into.
        dropped_keys (`list[str]`): Keys of the inputs that the model has no use for.
        notes (`list[str]`): Sentences about the checkpoint that whoever uses the result should know.
        verification (`Verification`, *optional*): What the checks found, if there were any.
        commit_url (`str`, *optional*): The commit on the Hub, if it was pushed.
        seconds (`dict[str, float]`): How long each step took.
    """

    output: Path
    layout: Layout
    config: LlavaSPConfig
    dtype: torch.dtype
    num_parameters: int
    num_merged_weights: int
    dropped_keys: list[str]
    notes: list[str]
    verification: Verification | None
    commit_url: str | None
    seconds: dict[str, float]

    def __str__(self) -> str:
        projector: Any = self.config.projector_config
        scales = ", ".join(map(str, projector.spatial_scales))
        detail = "no detail features"
        if projector.use_detail_integrator:
            kernel = projector.detail_kernel_size
            detail = f"{projector.num_detail_tokens} detail features (kernel {kernel}x{kernel})"
        lines = [
            f"{'Merged an adapter into its model' if is_merge(self.layout) else f'Converted {self.layout.value}'} "
            f"to {self.output}",
            f"  variant: {projector.spatial_variant}, scales {scales}, {detail}",
            f"  tokens per image: {projector.num_spatial_tokens} spatial + {projector.num_patch_tokens} patch"
            + (f", up to {count_image_tokens(self.config)} with tiles" if self.config.image_grid_pinpoints else ""),
            f"  parameters: {self.num_parameters:,} in {str(self.dtype).removeprefix('torch.')}",
            f"  weights merged with the LoRA adapter: {self.num_merged_weights}",
            f"  tensors without use dropped: {len(self.dropped_keys)}",
            *(f"  note: {note}" for note in self.notes),
        ]
        if self.verification is not None:
            lines += [f"  {line}" for line in str(self.verification).splitlines()]
        if self.commit_url is not None:
            lines.append(f"  pushed: {self.commit_url}")
        lines.append("  seconds: " + ", ".join(f"{step} {seconds:.1f}" for step, seconds in self.seconds.items()))
        return "\n".join(lines)


@dataclass(frozen=True)
class WriteOptions:
    """
    How a planned model is written; the arguments of [`convert_checkpoint`] of the same names.
    """

    dtype: str = "auto"
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE
    overwrite: bool = False
    verify: bool = True
    push_to_hub: str | None = None
    private: bool | None = None
    revision: str | None = None

    def check(self) -> None:
        """Raise a `ConversionError` for an option that can be seen to be wrong by itself."""
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ConversionError(f"Unknown dtype {self.dtype!r}: expected 'auto', {', '.join(map(repr, DTYPES))}.")
        plan_shards({}, torch.float32, self.max_shard_size)
        if self.push_to_hub is not None:
            check_repo_id(self.push_to_hub)
        elif self.revision is not None or self.private is not None:
            raise ConversionError("--revision and --private are about a push: pass --push-to-hub as well.")


@dataclass
class Stopwatch:
    """How long each step of something took, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        """Measure what is done inside."""
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start


def convert_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    base_model: str | Path | None = None,
    vision_tower: str | Path | None = None,
    chat_template: str = "vicuna_v1",
    dtype: str = "auto",
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
    verify: bool = True,
    push_to_hub: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> ConversionReport:
    """
    Convert a checkpoint of the LLaVA-SP authors into a folder that Transformers loads: model, generation
    configuration, tokenizer, image processor, chat template, model card, and the code for `trust_remote_code=True`.
    Which variant it is, is read from its tensors. Little more memory is used than one block of one tensor takes.

    Args:
        checkpoint (`str` or `Path`): A LoRA release, a full checkpoint or a pre-training output of the authors' code:
            a local folder, or a Hub id, which `@` and a branch, tag or commit may follow.
        output (`str` or `Path`): The folder to write, which must not exist. It appears when all of it is written.
        base_model (`str` or `Path`, *optional*): The language model that training started from, likewise. Defaults to
            the one that the checkpoint names; a full checkpoint needs none.
        vision_tower (`str` or `Path`, *optional*): The vision tower that the projector was trained with, likewise.
            Defaults to the one that the checkpoint names, with the weights that a full checkpoint holds of it.
        chat_template (`str`, *optional*, defaults to `"vicuna_v1"`): The conversation format of the result:
            `"vicuna_v1"`, which the authors train and evaluate with, or `"tokenizer"` for the tokenizer's own, to
            which images are added.
        dtype (`str`, *optional*, defaults to `"auto"`): Of all weights written: `"float32"`, `"float16"`,
            `"bfloat16"`, or `"auto"` for the one that the language model's weights are stored in.
        max_shard_size (`str`, *optional*, defaults to `"5GB"`): Size of the largest file of weights.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace the result of an earlier conversion at
            `output`. Any other folder is left alone.
        verify (`bool`, *optional*, defaults to `True`): Whether to read the result again and compare it with the
            inputs.
        push_to_hub (`str`, *optional*): The repository on the Hub to push the result to, in one commit.
        private (`bool`, *optional*): Whether that repository is private, if it is created.
        revision (`str`, *optional*): The branch to push to.

    Returns:
        [`ConversionReport`]: What was found and written. Its string is a summary.

    Raises:
        ConversionError: If the checkpoint is none that can be converted, a part is missing or damaged, the base model
            or the vision tower does not belong to it, or `output` cannot be used: then there is nothing at `output`
            that was not there. Or if the push fails: then `output` is complete.
    """
    options = WriteOptions(dtype, max_shard_size, overwrite, verify, push_to_hub, private, revision)
    options.check()
    if chat_template not in CHAT_TEMPLATES:
        raise ConversionError(
            f"Unknown chat template {chat_template!r}: expected {' or '.join(map(repr, CHAT_TEMPLATES))}."
        )
    output = Path(output)
    check_output(output, [], overwrite)
    stopwatch = Stopwatch()
    with stopwatch.measure("planning"):
        source = resolve_source(checkpoint, "checkpoint")
        check_output(output, [source.folder], overwrite)
        plan = plan_conversion(source, base_model, vision_tower, dtype, chat_template)
    arguments = ["convert", str(source)]
    for option, folder in (("--base-model", base_model), ("--vision-tower", vision_tower)):
        role = option.removeprefix("--").replace("-", " ")
        if folder is not None:
            named = [used for used in plan.input_files if used.role == role]
            arguments += [option, str(named[0] if named else Path(folder).name)]
    if chat_template != "vicuna_v1":
        arguments += ["--chat-template", chat_template]
    return write_model(plan, output, options, arguments, stopwatch)


def write_model(
    plan: ConversionPlan, output: Path, options: WriteOptions, arguments: list[str], stopwatch: Stopwatch
) -> ConversionReport:
    """
    Write a planned model, verify and describe it, and push it if that is asked for.

    Args:
        plan ([`ConversionPlan`]): What to write.
        output (`Path`): The folder to write.
        options ([`WriteOptions`]): How.
        arguments (`list[str]`): What the `llava-sp` command gets, without what is particular to this machine.
        stopwatch (`Stopwatch`): Measures the steps.

    Returns:
        [`ConversionReport`]: What was written.

    Raises:
        ConversionError: If it cannot be written, is wrong when read again, or cannot be pushed.
    """
    check_output(output, [source.folder for source in plan.input_files], options.overwrite)
    verification = None
    with staged(output, options.overwrite) as folder:
        # Now that what an earlier conversion has left takes no space any more
        check_free_space(output, plan.num_bytes + SMALL_FILES_SIZE)
        with stopwatch.measure("writing"):
            plan.config.save_pretrained(folder)
            plan.generation_config.save_pretrained(folder)
            plan.processor.save_pretrained(folder)
            shards = plan_shards(plan.sources, plan.dtype, options.max_shard_size)
            write_weights(folder, plan.sources, plan.dtype, shards)
        if options.verify:
            with stopwatch.measure("verifying"):
                verification = verify(folder, plan)
        with stopwatch.measure("hashing"):
            sources = describe_sources(plan)
        card = make_model_card(
            plan.config,
            layout=plan.layout.value,
            dtype=plan.dtype,
            num_parameters=plan.num_parameters,
            sources=sources,
            command=command_line(arguments, options),
            notes=plan.notes,
            repo_id=options.push_to_hub,
            own_chat_template=plan.processor.chat_template != VICUNA_V1_CHAT_TEMPLATE,
        )
        card.save(folder / "README.md")
    commit_url = None
    if options.push_to_hub is not None:
        with stopwatch.measure("pushing"):
            commit_url = push_folder(
                output,
                options.push_to_hub,
                private=options.private,
                revision=options.revision,
                commit_message=(
                    "Add a LLaVA-SP model with an adapter merged into it"
                    if is_merge(plan.layout)
                    else f"Add {plan.layout.value}, converted by transformers-llava-sp"
                ),
            )
    return ConversionReport(
        output=output,
        layout=plan.layout,
        config=plan.config,
        dtype=plan.dtype,
        num_parameters=plan.num_parameters,
        num_merged_weights=plan.num_merged_weights,
        dropped_keys=plan.dropped_keys,
        notes=plan.notes,
        verification=verification,
        commit_url=commit_url,
        seconds=stopwatch.seconds,
    )


def is_merge(layout: Layout) -> bool:
    """Whether what was written is a converted model with an adapter merged into it."""
    return layout is Layout.OUR_ADAPTER


def command_line(arguments: Sequence[str], options: WriteOptions) -> str:
    """The command that gives the same bytes again."""
    arguments = ["llava-sp", *arguments]
    if options.dtype != "auto":
        arguments += ["--dtype", options.dtype]
    if options.max_shard_size != DEFAULT_MAX_SHARD_SIZE:
        arguments += ["--max-shard-size", options.max_shard_size]
    return shlex.join(arguments)


def describe_sources(plan: ConversionPlan) -> list[Provenance]:
    """Where the weights of a planned model come from, with the digest of every file that is read."""
    files = {source: paths for source, paths in plan.input_files.items() if paths}
    num_bytes = sum(path.stat().st_size for paths in files.values() for path in paths)
    with tqdm(total=num_bytes, desc="Hashing the inputs", unit="B", unit_scale=True) as progress:
        return [
            Provenance(
                role=source.published_role,
                name=source.name,
                is_hub_id=source.revision is not None,
                revision=source.revision,
                license=read_license(source.folder, source.name),
                sha256={path.name: digest(path, progress) for path in paths},
            )
            for source, paths in files.items()
        ]


def digest(path: Path, progress: tqdm) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    result = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_SIZE):
            result.update(block)
            progress.update(len(block))
    return result.hexdigest()
