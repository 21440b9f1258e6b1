"""
Time and memory of answers: LLaVA-SP against Transformers' LLaVA, Qwen2-VL and Qwen2.5-VL, in the same run.

    python benchmarks/generate.py --output results                   # the shapes of the released 7B, on a GPU
    python benchmarks/generate.py --size scaled --output results     # all widths an eighth, on a CPU
    python benchmarks/generate.py --minutes 7 --output results       # as much as can be done in 7 minutes

Finished cells are in the output folder and are not measured again by the next run. benchmarks/README.md says what is
measured and how. Exits with status 1 where a limit is not met.
"""

import argparse
import copy
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _measure import (
    Clock,
    Results,
    add_output_arguments,
    attention_kernel,
    attention_kinds,
    check_output_arguments,
    count_bytes,
    describe_device,
    describe_machine,
    in_turn,
    measure_reading,
    median_and_range,
    plot_ratios,
    synchronize,
    without_record,
)
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    CompileConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SuppressTokensLogitsProcessor,
)

from transformers_llava_sp import LlavaSPConfig, LlavaSPForConditionalGeneration
from transformers_llava_sp.modeling_llava_sp import CACHE, MaskTokensLogitsProcessor


# What is compared with the first of its group, in turns
GROUPS = {"llava": ("llava", "cropping", "pooling"), "qwen": ("llava", "qwen2-vl", "qwen2.5-vl")}
SPATIAL = ("cropping", "pooling")
# The acceptance limits, by batch size: time to the first token and tokens per second, both over LLaVA's
GPU_TTFT_LIMITS = {1: 1.04, 8: 1.02}
GPU_RATE_LIMIT = 0.995
CPU_TIME_LIMIT = 1.03
# Of what reading the language model once for each token takes, with a static cache and compiled, at batch 1
COMPILED_SHARE = 0.6
# Peak memory over LLaVA's and the spatial weights
MEMORY_LIMIT = 1.02
# The paper's tokens per second over LLaVA-1.5's
PAPER = {"cropping": 0.988, "pooling": 0.977}

# The same picture for all, of 640 x 480 pixels: LLaVA pads it to a square, Qwen keeps its shape
QWEN_GRID = (1, 34, 46)  # patches
# With 64, LLaVA's prompt would be five times 128, for which GPUs multiply matrices best, and LLaVA-SP's a little more
TEXT_TOKENS = 70
SECOND_QUESTION_TOKENS = 16


@dataclass(frozen=True)
class Size:
    """
    How large models are.

    Args:
        shrink (`int`): By what all widths of the 7B models are divided.
        thin (`int`): By what their numbers of layers are divided.
        new_tokens (`int`): How many tokens follow the first one.
        turns (`int`): How often that is measured. A multiple of the models of a group, so that each is first as often.
        first_turns (`int`): How often the first token is measured.
        reading_bytes (`int`): How much is read to measure how fast memory is read.
    """

    shrink: int
    thin: int
    new_tokens: int
    turns: int
    first_turns: int
    reading_bytes: int


SIZES = {
    "7b": Size(shrink=1, thin=1, new_tokens=32, turns=12, first_turns=30, reading_bytes=2**32),
    "scaled": Size(shrink=8, thin=1, new_tokens=16, turns=60, first_turns=60, reading_bytes=2**30),
    "small": Size(shrink=16, thin=8, new_tokens=4, turns=3, first_turns=3, reading_bytes=2**22),
}


@dataclass(frozen=True)
class Cell:
    """
    One measurement of all models of a group.

    Args:
        group (`str`): One of `GROUPS`.
        attention (`str`): The kind of attention.
        compiled (`bool`): Whether with a static cache and compiled, as `generate` does by itself where there is one.
        batch_size (`int`): How many answers at a time.
    """

    group: str
    attention: str
    compiled: bool
    batch_size: int

    def __str__(self) -> str:
        mode = "static cache, compiled" if self.compiled else "eager"
        return f"{self.group}: {self.attention}, {mode}, batch {self.batch_size}"


def list_cells(kinds: Iterable[str]) -> list[Cell]:
    """What is measured, the most important first."""
    flash = [kind for kind in kinds if "flash" in kind]
    # These compile by themselves, for long
    others = [kind for kind in kinds if kind not in ("sdpa", *flash)]
    return [
        Cell("llava", "sdpa", False, 1),
        Cell("llava", "sdpa", False, 8),
        *(Cell("llava", kind, False, 1) for kind in flash),
        Cell("llava", "sdpa", True, 1),
        Cell("llava", "sdpa", True, 8),
        Cell("llava", "sdpa", False, 32),
        Cell("llava", "sdpa", True, 32),
        *(Cell("llava", kind, False, 8) for kind in flash),
        Cell("qwen", "sdpa", False, 1),
        Cell("qwen", "sdpa", False, 8),
        Cell("qwen", "sdpa", True, 1),
        *(Cell("llava", kind, False, 1) for kind in others),
    ]


# A label, the models' group, and what measures them
Task = tuple[str, str, Callable[[dict[str, PreTrainedModel]], dict[str, Any]]]


# Models


def llava_config(size: Size) -> LlavaConfig:
    """LLaVA-1.5-7B's. Heads stay as wide as they are, where widths allow."""
    vocab_size = 32064 // size.shrink
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024 // size.shrink,
            intermediate_size=4096 // size.shrink,
            num_attention_heads=16 // size.shrink,
            num_hidden_layers=24 // size.thin,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=4096 // size.shrink,
            intermediate_size=11008 // size.shrink,
            num_attention_heads=32 // size.shrink,
            num_hidden_layers=32 // size.thin,
            max_position_embeddings=4096,
            pad_token_id=0,
        ),
        image_token_index=vocab_size - 1,
    )


def llava_sp_config(size: Size, variant: str) -> LlavaSPConfig:
    """The released models'."""
    config = llava_config(size)
    return LlavaSPConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        projector_config={"spatial_variant": variant, "spatial_hidden_size": 512 // size.shrink},
        image_token_id=config.image_token_index,
    )


def qwen_config(config_class: type[Qwen2VLConfig] | type[Qwen2_5_VLConfig], size: Size) -> Any:
    """Qwen2-VL-7B's or Qwen2.5-VL-7B's."""
    vocab_size = 152064 // size.shrink
    width, heads = 3584 // size.shrink, max(28 // size.shrink, 7)
    sections = [part * width // heads // 128 for part in (16, 24, 24)]
    vision: dict[str, Any] = {"depth": 32 // size.thin, "num_heads": 16 // size.shrink}
    if config_class is Qwen2VLConfig:
        vision |= {"embed_dim": 1280 // size.shrink, "hidden_size": width}
    else:
        vision |= {
            "hidden_size": 1280 // size.shrink,
            "out_hidden_size": width,
            "intermediate_size": 3420 // size.shrink,
            "fullatt_block_indexes": [block // size.thin for block in (7, 15, 23, 31)],
        }
    return config_class(
        vision_config=vision,
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": 18944 // size.shrink,
            "num_hidden_layers": 28 // size.thin,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 7,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        image_token_id=vocab_size - 1,
        video_token_id=vocab_size - 2,
        vision_start_token_id=vocab_size - 3,
        vision_end_token_id=vocab_size - 4,
    )


def make_model(name: str, size: Size, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, made on the device, that never ends an answer by itself."""
    model_class, config = {
        "llava": lambda: (LlavaForConditionalGeneration, llava_config(size)),
        "cropping": lambda: (LlavaSPForConditionalGeneration, llava_sp_config(size, "cropping")),
        "pooling": lambda: (LlavaSPForConditionalGeneration, llava_sp_config(size, "pooling")),
        "qwen2-vl": lambda: (Qwen2VLForConditionalGeneration, qwen_config(Qwen2VLConfig, size)),
        "qwen2.5-vl": lambda: (Qwen2_5_VLForConditionalGeneration, qwen_config(Qwen2_5_VLConfig, size)),
    }[name]()
    torch.manual_seed(0)
    with device:
        model = model_class._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if name in SPATIAL:
        # As many as a converted model has: `<image>` and what makes the vocabulary a multiple of 64
        vocab_size = model.config.text_config.vocab_size
        model.generation_config.suppress_tokens = list(range(vocab_size - 64, vocab_size))
    return model


def make_inputs(name: str, model: PreTrainedModel, batch_size: int) -> dict[str, torch.Tensor]:
    """A random picture and question, on the model's device, the same number of tokens of text for each model."""
    config, device = model.config, model.device
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 1000, (batch_size, TEXT_TOKENS), generator=generator)
    inputs: dict[str, torch.Tensor] = {}
    if name.startswith("qwen"):
        vision = config.vision_config
        patches = batch_size * QWEN_GRID[0] * QWEN_GRID[1] * QWEN_GRID[2]
        channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        num_image_tokens = patches // batch_size // vision.spatial_merge_size**2
        inputs["pixel_values"] = torch.randn(patches, channels, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([QWEN_GRID] * batch_size)
        image_token_id = config.image_token_id
    else:
        side = config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(batch_size, 3, side, side, generator=generator)
        num_image_tokens = 576
        if name in SPATIAL:
            num_image_tokens = config.projector_config.num_image_tokens
        image_token_id = config.image_token_index
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    slots = torch.full((batch_size, num_image_tokens), image_token_id)
    inputs["input_ids"] = torch.cat([text[:, :32], slots, text[:, 32:]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if name.startswith("qwen"):
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_token_id).int()
    return {key: value.to(device) for key, value in inputs.items()}


def decoding_bytes(model: PreTrainedModel) -> int:
    """What must be read of the weights for each token: the language model's layers and the head."""
    return count_bytes([*model.model.language_model.layers.parameters(), *model.lm_head.parameters()])


def spatial_bytes(model: PreTrainedModel) -> int:
    """What LLaVA-SP's projector has and LLaVA's has not."""
    projector = getattr(model.model, "multi_modal_projector", None)
    if not isinstance(model, LlavaSPForConditionalGeneration):
        return 0
    return count_bytes(weight for name, weight in projector.named_parameters() if not name.startswith("patch_mlp"))


# Measurements


class Stopwatch(LogitsProcessor):
    """
    Marks when the scores of each token are there, without waiting for them.

    Args:
        clock ([`Clock`]): Marks points of time on the device's timeline.
    """

    def __init__(self, clock: Clock):
        self.clock = clock
        self.marks: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leaves `scores`, of shape `(batch_size, vocab_size)`, as they are."""
        self.marks.append(self.clock.mark())
        return scores


def answer(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], new_tokens: int, compiled: bool
) -> tuple[float, float]:
    """
    Generate greedily.

    Args:
        model ([`PreTrainedModel`]): The model.
        inputs (`dict[str, torch.Tensor]`): Its inputs.
        new_tokens (`int`): How many tokens follow the first one.
        compiled (`bool`): Whether with a static cache and compiled.

    Returns:
        `tuple(float, float)`: Seconds to the scores of the first token, and from those of one token to those of the
        next, their median, if there is one: a step that has to record its CUDA graph again does not count.
    """
    options: dict[str, Any] = {}
    if compiled:
        # Each cache's length compiled by itself: the second model's would else be compiled for any length
        compile_config = CompileConfig(
            dynamic=False, mode="reduce-overhead" if model.device.type == "cuda" else "default"
        )
        # Without it, generate compiles on a GPU alone
        compile_config._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": compile_config}
    watch = Stopwatch(Clock(model.device))
    synchronize(model.device)
    start = watch.clock.mark()
    model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=1 + new_tokens,
        logits_processor=LogitsProcessorList([watch]),
        **options,
    )
    synchronize(model.device)
    if len(watch.marks) != 1 + new_tokens:
        raise RuntimeError(f"{type(model).__name__} answered {len(watch.marks)} tokens, expected {1 + new_tokens}.")
    first = watch.clock.milliseconds(start, watch.marks[0])
    others = [watch.clock.milliseconds(one, other) for one, other in pairwise(watch.marks)]
    return first / 1e3, statistics.median(others) / 1e3 if others else float("nan")


def measure_cell(models: dict[str, PreTrainedModel], cell: Cell, size: Size) -> dict[str, Any]:
    """
    Answers of all models, in turns.

    Args:
        models (`dict[str, PreTrainedModel]`): Those of the cell's group.
        cell ([`Cell`]): What to measure.
        size ([`Size`]): How much of it.

    Returns:
        `dict[str, Any]`: For each model its tokens, the seconds to the first token and for each further one, turn by
        turn, and on a GPU the highest memory in bytes, without what the other models keep there.
    """
    device = models["llava"].device
    on_gpu = device.type == "cuda"
    implementation = attention_kinds(device, flex=True)[0][cell.attention]
    inputs = {name: make_inputs(name, model, cell.batch_size) for name, model in models.items()}
    results: dict[str, dict[str, Any]] = {
        name: {
            "prompt_tokens": inputs[name]["input_ids"].shape[1],
            "decoding_bytes": decoding_bytes(model),
            "spatial_bytes": spatial_bytes(model),
            "ttft_seconds": [],
            "token_seconds": [],
            "peak_bytes": [],
        }
        for name, model in models.items()
    }
    # Answers of several tokens, and then of one, which compiling does not touch
    first_turns = 0 if cell.compiled else size.first_turns
    with (
        attention_kernel(cell.attention),
        tqdm(total=(1 + size.turns + first_turns) * len(models), desc=str(cell), unit="answer") as progress,
    ):
        for turn in range(1 + size.turns + first_turns):
            # Not while something is timed
            gc.collect()
            for name in in_turn(models, turn):
                model = models[name]
                if turn == 0:
                    model.set_attn_implementation(implementation)
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                    kept = torch.cuda.memory_allocated() - count_bytes([*model.parameters(), *model.buffers()])
                new_tokens = size.new_tokens if turn <= size.turns else 0
                first, others = answer(model, inputs[name], new_tokens, cell.compiled)
                # The first turn warms up, and compiles
                if turn > size.turns or (turn and not first_turns):
                    results[name]["ttft_seconds"].append(first)
                if 0 < turn <= size.turns:
                    results[name]["token_seconds"].append(others)
                    if on_gpu:
                        results[name]["peak_bytes"].append(torch.cuda.max_memory_allocated() - kept)
                progress.update()
    return results


def try_cell(models: dict[str, PreTrainedModel], cell: Cell, size: Size) -> dict[str, Any]:
    """[`measure_cell`], or why it cannot be measured here, so that the others are measured all the same."""
    gc.collect()
    gc.disable()
    try:
        return measure_cell(models, cell, size)
    except torch.AcceleratorError:
        # The device can do nothing more in this process
        raise
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
    finally:
        gc.enable()
        # Compiled code, static caches and the memory of CUDA graphs belong to this cell
        for model in models.values():
            for attribute in ("_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
                model.__dict__.pop(attribute, None)
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@torch.inference_mode()
def measure_conversation(models: dict[str, PreTrainedModel], size: Size) -> dict[str, Any]:
    """
    A second question about a picture: with the cache of the first one kept, and with everything encoded again.

    Args:
        models (`dict[str, PreTrainedModel]`): Those to ask.
        size ([`Size`]): How often.

    Returns:
        `dict[str, Any]`: For each model the seconds to the first token of the second answer, both ways.
    """
    results: dict[str, Any] = {}
    for name, model in models.items():
        model.set_attn_implementation("sdpa")
        inputs = make_inputs(name, model, 1)
        first = model.generate(**inputs, do_sample=False, max_new_tokens=size.new_tokens, return_dict_in_generate=True)
        question = inputs["input_ids"][:, :SECOND_QUESTION_TOKENS]
        input_ids = torch.cat([first.sequences, question], dim=1)
        second = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        ways = {
            "kept": lambda second=second, first=first: {
                **second,
                CACHE: copy.deepcopy(first[CACHE]),
            },
            "again": lambda second=second, inputs=inputs: {**second, "pixel_values": inputs["pixel_values"]},
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(size.turns + 1):
            for way in in_turn(ways, turn):
                time_to_first, _ = answer(model, ways[way](), 1, compiled=False)
                if turn:
                    seconds[way].append(time_to_first)
        results[name] = seconds
    return results


@torch.inference_mode()
def measure_masking(device: torch.device, turns: int) -> dict[str, Any]:
    """
    What it takes to mask, for each token, those that a converted 7B has and never answers: as LLaVA-SP does it and by
    Transformers' own processor, which LLaVA-SP would have otherwise.

    Args:
        device (`torch.device`): Where the scores are.
        turns (`int`): How often.

    Returns:
        `dict[str, Any]`: The milliseconds of each turn for both.
    """
    vocab_size, clock = 32064, Clock(device)
    theirs = SuppressTokensLogitsProcessor(range(vocab_size - 64, vocab_size), device=str(device))
    processors = {"transformers": theirs, "llava-sp": MaskTokensLogitsProcessor(theirs.suppress_tokens)}
    scores = torch.randn(1, vocab_size, device=device)
    milliseconds: dict[str, list[float]] = {name: [] for name in processors}
    for turn in range(turns + 1):
        for name in in_turn(processors, turn):
            synchronize(device)
            start = clock.mark()
            processors[name](None, scores)
            end = clock.mark()
            synchronize(device)
            if turn:
                milliseconds[name].append(clock.milliseconds(start, end))
    return {"milliseconds": milliseconds, "tokens": 64, "vocab_size": vocab_size}


@torch.inference_mode()
def measure_agreement(models: dict[str, PreTrainedModel], kinds: dict[str, str]) -> dict[str, Any]:
    """
    The logits of a prompt with each kind of attention: the largest difference to those of `sdpa` over their largest
    value, and where the highest logit is the same, as a share of positions; or why there are none.
    """
    figures: dict[str, Any] = {}
    for name, model in models.items():
        inputs = make_inputs(name, model, 1)
        figures[name] = {}
        expected = None
        for kind in sorted(kinds, key=lambda kind: kind != "sdpa"):
            model.set_attn_implementation(kinds[kind])
            try:
                with attention_kernel(kind):
                    found = model(**inputs, use_cache=False).logits.float()
            except torch.AcceleratorError:
                raise
            except Exception as error:
                traceback.print_exc()
                figures[name][kind] = {"error": f"{type(error).__name__}"}
                continue
            expected = found if expected is None else expected
            figures[name][kind] = {
                "difference": ((found - expected).abs().max() / expected.abs().max()).item(),
                "same_choice": (found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
            }
    return figures


# Reports


def summarise(cell: Cell, figures: dict[str, Any], bandwidth: float) -> dict[str, dict[str, Any]]:
    """Medians of each model, and the medians of its ratios to LLaVA's turn by turn."""
    summary: dict[str, dict[str, Any]] = {}
    for name, own in figures.items():
        base = figures["llava"]
        ratios = {
            key: [ours / theirs for ours, theirs in zip(own[key], base[key], strict=True)]
            for key in ("ttft_seconds", "token_seconds")
        }
        token_seconds = statistics.median(own["token_seconds"])
        summary[name] = {
            "ttft_ratio": statistics.median(ratios["ttft_seconds"]),
            "ttft_ratios": ratios["ttft_seconds"],
            "token_ratio": statistics.median(ratios["token_seconds"]),
            "token_ratios": ratios["token_seconds"],
            "tokens_per_second": cell.batch_size / token_seconds,
            "share_of_limit": own["decoding_bytes"] / bandwidth / token_seconds,
        }
        if own["peak_bytes"]:
            allowed = max(base["peak_bytes"]) + own["spatial_bytes"]
            summary[name] |= {"peak_bytes": max(own["peak_bytes"]), "peak_ratio": max(own["peak_bytes"]) / allowed}
    return summary


def find_misses(cell: Cell, summary: dict[str, dict[str, Any]], on_gpu: bool) -> list[str]:
    """The limits that LLaVA-SP does not meet."""
    misses = []
    for name in set(SPATIAL) & summary.keys():
        figures = summary[name]
        ttft_limit = GPU_TTFT_LIMITS.get(cell.batch_size) if on_gpu else CPU_TIME_LIMIT
        token_limit = 1 / GPU_RATE_LIMIT if on_gpu else CPU_TIME_LIMIT
        # The first token is not compiled, but those before it leave memory that is asked for again
        if ttft_limit and not cell.compiled and figures["ttft_ratio"] > ttft_limit:
            misses.append(f"{name}: time to first token {figures['ttft_ratio']:.3f} x LLaVA's, at most {ttft_limit}")
        if figures["token_ratio"] > token_limit:
            misses.append(f"{name}: time per token {figures['token_ratio']:.3f} x LLaVA's, at most {token_limit:.3f}")
        if on_gpu and cell.compiled and cell.batch_size == 1 and figures["share_of_limit"] < COMPILED_SHARE:
            misses.append(f"{name}: {figures['share_of_limit']:.0%} of the limit, at least {COMPILED_SHARE:.0%}")
        if figures.get("peak_ratio", 0) > MEMORY_LIMIT:
            misses.append(
                f"{name}: peak memory {figures['peak_ratio']:.3f} x LLaVA's and the spatial weights, at most "
                f"{MEMORY_LIMIT}"
            )
    return [f"{cell}: {miss}" for miss in sorted(misses)]


def report(results: Results, cells: Iterable[Cell]) -> tuple[str, list[str], int]:
    """The figures as Markdown, the limits that are not met, and of how many cells they were checked."""
    on_gpu = results.content["machine"]["device"] != "CPU"
    bandwidth = results["reading"]["bytes_per_second"]
    lines, misses, num_checked = [f"Memory is read at {bandwidth / 1e9:.4g} GB/s."], [], 0
    for cell in cells:
        if str(cell) not in results:
            lines += ["", f"{cell}: not measured yet"]
            continue
        if "error" in results[str(cell)]:
            lines += ["", f"{cell}: failed, {results[str(cell)]['error']}"]
            misses += [f"{cell}: failed"]
            continue
        figures = {name: results[str(cell)][name] for name in GROUPS[cell.group]}
        summary = results[str(cell)]["summary"] = summarise(cell, figures, bandwidth)
        if results.content["machine"]["size"] != "small":
            num_checked += cell.group == "llava"
            misses += find_misses(cell, summary, on_gpu)
        lines += [
            "",
            f"{cell}",
            "",
            "| model | prompt | first token, ms | x LLaVA | per token, ms | x LLaVA | tokens/s | of the limit | "
            "peak memory |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for name, own in figures.items():
            row = summary[name]
            peak = f"{row['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in row else "-"
            lines.append(
                f"| {name} | {own['prompt_tokens']} | "
                f"{median_and_range((1e3 * seconds for seconds in own['ttft_seconds']), 2)} | "
                f"{median_and_range(row['ttft_ratios'], 3)} | "
                f"{median_and_range((1e3 * seconds for seconds in own['token_seconds']), 2)} | "
                f"{median_and_range(row['token_ratios'], 3)} | {row['tokens_per_second']:.2f} | "
                f"{row['share_of_limit']:.0%} | {peak} |"
            )
    if "masking" in results:
        masking = results["masking"]
        ours, theirs = (median_and_range(masking["milliseconds"][name], 3) for name in ("llava-sp", "transformers"))
        lines += [
            "",
            f"Masking {masking['tokens']} of {masking['vocab_size']} tokens takes, for each token that is answered, "
            f"{ours} ms; by Transformers' own processor {theirs} ms.",
        ]
    if "conversation" in results:
        lines += [
            "",
            "| model | second question, cache kept, ms | all again, ms | all again over kept |",
            "|---|---:|---:|---:|",
        ]
        for name, seconds in without_record(results["conversation"]).items():
            kept, again = seconds["kept"], seconds["again"]
            lines.append(
                f"| {name} | {median_and_range((1e3 * value for value in kept), 2)} | "
                f"{median_and_range((1e3 * value for value in again), 2)} | "
                f"{median_and_range((all_ / one for one, all_ in zip(kept, again, strict=True)), 1)} |"
            )
    if "agreement" in results:
        lines += [
            "",
            "| model | attention | logits differ from sdpa's at most by | same choice |",
            "|---|---|---:|---:|",
        ]
        for name, kinds in without_record(results["agreement"]).items():
            lines += [
                f"| {name} | {kind} | failed, {figure['error']} | - |"
                if "error" in figure
                else f"| {name} | {kind} | {figure['difference']:.1e} | {figure['same_choice']:.1%} |"
                for kind, figure in kinds.items()
            ]
    missing = results.content.get("missing", {})
    lines += ["", *(f"{name}: not measured, {reason}" for name, reason in missing.items())]
    return "\n".join(lines), misses, num_checked


def plot(results: Results, cells: Iterable[Cell], file: Path) -> None:
    """Draw time to the first token and time per token over LLaVA's, beside the paper's figure."""
    measured = [cell for cell in cells if str(cell) in results and "error" not in results[str(cell)]]

    def ratios(key: str) -> dict[str, dict[str, list[float]]]:
        return {
            str(cell): {
                name: figures[key] for name, figures in results[str(cell)]["summary"].items() if name != "llava"
            }
            for cell in measured
        }

    first, others = "time to the first token over LLaVA's", "time for each further token over LLaVA's (less is better)"
    panels = {first: ratios("ttft_ratios"), others: ratios("token_ratios")}
    plot_ratios(file, panels, {others: {name: ("the paper", 1 / ratio) for name, ratio in PAPER.items()}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="7b", help="of the models (default: 7b)")
    add_output_arguments(parser, "generate")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, choices=(1, 8, 32), help="these alone")
    parser.add_argument("--eager", action="store_true", help="nothing compiled")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further cell after so long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    device, size = torch.device(arguments.device), SIZES[arguments.size]
    check_output_arguments(parser, arguments)
    if arguments.size == "7b" and device.type != "cuda":
        sys.exit("The 7B shapes need a CUDA device: pass --device cuda where there is one, or --size scaled.")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    machine = {
        **describe_machine(),
        **describe_device(device),
        "size": arguments.size,
        "turns": size.turns,
        "new_tokens": size.new_tokens,
        "dtype": str(dtype),
    }
    path = arguments.output / "generate.json" if arguments.output else None
    results = Results(path, machine, ("size", "turns", "new_tokens", "dtype"))
    kinds, missing = attention_kinds(device, flex=True)
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    results.content["missing"] = missing
    cells = [
        cell
        for cell in list_cells(kinds)
        if cell.group in arguments.groups
        and (arguments.batch_sizes is None or cell.batch_size in arguments.batch_sizes)
        and not (arguments.eager and cell.compiled)
    ]

    results.add("reading", partial(measure_reading, size.reading_bytes, device))
    results.add("masking", partial(measure_masking, device, 100))
    tasks: list[Task] = [(str(cell), cell.group, partial(try_cell, cell=cell, size=size)) for cell in cells]
    if "llava" in arguments.groups:
        # Behind the most important cells
        place = next((i for i, cell in enumerate(cells) if cell.group != "llava" or cell.batch_size > 8), len(cells))
        tasks[place:place] = [
            ("conversation", "llava", partial(measure_conversation, size=size)),
            ("agreement", "llava", partial(measure_agreement, kinds=kinds)),
        ]
    models: dict[str, PreTrainedModel] = {}
    for label, group, measure in tasks:
        if results.has_measured(label):
            print(f"{label}: there already")
            continue
        if time.perf_counter() - begun > 60 * arguments.minutes:
            break
        names = GROUPS[group]
        for name in set(models) - set(names):
            del models[name]
        gc.collect()
        # In the group's order
        models = {name: models.get(name) or make_model(name, size, device, dtype) for name in names}
        results.add(label, partial(measure, models))

    figures = report(results, cells)
    if arguments.plot:
        plot(results, cells, arguments.output / "generate.png")
    results.finish(*figures)


if __name__ == "__main__":
    main()
