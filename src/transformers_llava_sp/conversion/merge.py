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
"""Merging an adapter that was trained with this package into the model that it was trained on"""

from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig

from ..configuration_llava_sp import LlavaSPConfig
from ..processing_llava_sp import LlavaSPProcessor
from .checkpoint import ConversionError, SourceFolder, TensorFiles, join_keys, resolve_source
from .convert import DEFAULT_MAX_SHARD_SIZE, ConversionReport, Stopwatch, WriteOptions, write_model
from .lora import LoraAdapter
from .original import MODEL_WEIGHTS, Layout, identify_layout
from .parts import CONFIG_ERRORS
from .plan import DTYPES, ConversionPlan, Source, check_layout, model_shapes, set_dtype, storage_dtype
from .staging import check_output


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    base_model: str | Path | None = None,
    dtype: str = "auto",
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
    verify: bool = True,
    push_to_hub: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> ConversionReport:
    """
    Merge an adapter into the LLaVA-SP model that it was trained on, and write the result as a folder of its own. Works
    in float32, one block of one tensor in memory at a time.

    Args:
        adapter (`str` or `Path`): A plain LoRA adapter as PEFT saves it, with the weights that were trained in full
            (`modules_to_save`), such as the projector: a local folder, or a Hub id, which `@` and a branch, tag or
            commit may follow.
        output (`str` or `Path`): The folder to write, which must not exist. It appears when all of it is written.
        base_model (`str` or `Path`, *optional*): The converted LLaVA-SP model, likewise. Defaults to the one that
            adapter_config.json names.
        dtype (`str`, *optional*, defaults to `"auto"`): Of all weights written: `"float32"`, `"float16"`,
            `"bfloat16"`, or `"auto"` for the one that the model's weights are stored in.
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
        ConversionError: If the adapter is no plain LoRA, does not belong to the model, or `output` cannot be used:
            then there is nothing at `output` that was not there. Or if the push fails: then `output` is complete.
    """
    options = WriteOptions(dtype, max_shard_size, overwrite, verify, push_to_hub, private, revision)
    options.check()
    output = Path(output)
    check_output(output, [], overwrite)
    stopwatch = Stopwatch()
    with stopwatch.measure("planning"):
        plan = plan_merge(adapter, base_model, dtype)
    arguments = ["merge", *(str(source) for source in plan.input_files if source.role == "adapter")]
    if base_model is not None:
        arguments += ["--base-model", *(str(source) for source in plan.input_files if source.role != "adapter")]
    return write_model(plan, output, options, arguments, stopwatch)


@dataclass(frozen=True)
class ConvertedModel:
    """
    A model in this package's format, complete.

    Args:
        source (`SourceFolder`): Where it is.
        weights (`TensorFiles`): Its tensors, whose keys and shapes are those of its configuration.
        shapes (`dict[str, tuple[int, ...]]`): Their shapes, in the model's order.
        config (`LlavaSPConfig`): Its configuration.
        generation_config (`GenerationConfig`): How it generates.
        processor (`LlavaSPProcessor`): Its processor.
    """

    source: SourceFolder
    weights: TensorFiles
    shapes: dict[str, tuple[int, ...]]
    config: LlavaSPConfig
    generation_config: GenerationConfig
    processor: LlavaSPProcessor

    @classmethod
    def open(cls, source: SourceFolder, advice: str) -> "ConvertedModel":
        """
        Open a folder.

        Args:
            source ([`SourceFolder`]): The folder.
            advice (`str`): A sentence for the error message where it is something else.

        Raises:
            ConversionError: If it is something else, or not complete.
        """
        folder = source.folder
        check_layout(folder, source.role, [Layout.CONVERTED], advice)
        weights = TensorFiles.from_folder(folder, MODEL_WEIGHTS)
        try:
            config = LlavaSPConfig.from_pretrained(folder)
            generation_config = GenerationConfig.from_pretrained(folder)
            processor = LlavaSPProcessor.from_pretrained(folder)
        except CONFIG_ERRORS as error:
            raise ConversionError(f"{folder} is not a complete LLaVA-SP model: {error}") from error
        shapes = model_shapes(config)
        if difference := sorted(shapes.keys() ^ set(weights)):
            raise ConversionError(
                f"The weights in {folder} do not fit its config.json, missing or unexpected: {join_keys(difference)}."
            )
        for key, shape in shapes.items():
            weights.check(key, shape)
        return cls(source, weights, shapes, config, generation_config, processor)


def open_adapter(
    adapter_name: str | Path, base_model: str | Path | None
) -> tuple[SourceFolder, LoraAdapter, ConvertedModel]:
    """
    Find adapter and model, and check that they belong together.

    Args:
        adapter_name (`str` or `Path`): The adapter, a folder or a Hub id.
        base_model (`str` or `Path`, *optional*): The model, likewise. Defaults to the one that the adapter names.

    Returns:
        `tuple(SourceFolder, LoraAdapter, ConvertedModel)`: Where the adapter is, the adapter, and the model.

    Raises:
        ConversionError: If one of them is something else, or they do not belong together.
    """
    source = resolve_source(adapter_name, "adapter")
    # An adapter of the head alone cannot be told from a language model's; its keys are checked against the model's
    if identify_layout(source.folder) is not Layout.ADAPTER:
        check_layout(source.folder, "adapter", [Layout.OUR_ADAPTER], "Convert the authors' with `llava-sp convert`.")
    adapter = LoraAdapter(source.folder, replacements=True)
    if base_model is None and adapter.base_model is None:
        raise ConversionError(f"{adapter.config_file} names no base model: pass it with --base-model.")
    named = str(adapter.base_model)
    if adapter.base_revision and not Path(named).is_dir():
        named = f"{named}@{adapter.base_revision}"
    base = resolve_source(
        base_model or named,
        "LLaVA-SP model",
        advice="" if base_model is not None else f"{adapter.config_file} names it; pass yours with --base-model.",
    )
    model = ConvertedModel.open(base, "Pass the model that the adapter was trained on.")
    adapter.check_targets(model.weights)
    return source, adapter, model


def plan_merge(adapter_name: str | Path, base_model: str | Path | None, dtype: str) -> ConversionPlan:
    """
    Plan what is written.

    Args:
        adapter_name (`str` or `Path`): The adapter, a folder or a Hub id.
        base_model (`str` or `Path`, *optional*): The model, likewise.
        dtype (`str`): A key of `DTYPES` or `"auto"`.

    Returns:
        [`ConversionPlan`]: What to write.

    Raises:
        ConversionError: If adapter and model cannot be merged.
    """
    source, adapter, model = open_adapter(adapter_name, base_model)
    sources = {}
    for key, shape in model.shapes.items():
        if key in adapter.replaced:
            sources[key] = Source(adapter.tensors, adapter.replaced[key], shape, adapter, key)
        else:
            sources[key] = Source(model.weights, key, shape, adapter, key)
    base = model.source
    target_dtype = storage_dtype(base.folder, model.weights) if dtype == "auto" else DTYPES[dtype]
    set_dtype(model.config, target_dtype)
    opened = {str(file): file for files in (model.weights.files, adapter.tensors.files) for file in files.values()}
    return ConversionPlan(
        layout=Layout.OUR_ADAPTER,
        config=model.config,
        generation_config=model.generation_config,
        processor=model.processor,
        dtype=target_dtype,
        sources=sources,
        input_files={source: source.files(opened), base: base.files(opened)},
    )
