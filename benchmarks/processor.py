"""
Images per second of LLaVA-SP's processor against Transformers' LLaVA's, in the same run.

    python benchmarks/processor.py --output results

benchmarks/README.md says what is measured and how. Exits with status 1 where a limit is not met.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from _measure import (
    Results,
    add_output_arguments,
    check_output_arguments,
    describe_machine,
    in_turn,
    median_and_range,
    plot_ratios,
)
from PIL import Image
from tqdm import tqdm
from transformers import AutoTokenizer, BatchFeature, LlavaImageProcessorPil, LlavaProcessor, ProcessorMixin
from transformers.utils import is_torchvision_available

from transformers_llava_sp import LlavaSPProcessor, tiny_model_path


MODELS = ("llava-sp", "llava")
# The acceptance limit: images per second over those of LLaVA's processor
RATE_LIMIT = 0.97
PROMPT = "USER: <image>\nWhat is in the picture, and where? ASSISTANT:"
SIDE = 336
GRID_SIZE = SIDE // 14


def image_processor_classes() -> dict[str, Any]:
    """The backends that there are."""
    classes: dict[str, Any] = {"pil": LlavaImageProcessorPil}
    if is_torchvision_available():
        from transformers import LlavaImageProcessor

        classes["torchvision"] = LlavaImageProcessor
    return classes


def make_processors(backend: str) -> dict[str, ProcessorMixin]:
    """Both processors, with pictures of the released models' size, padded to squares, and the same tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path(), model_max_length=4096)
    size, crop_size = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    image_processor = image_processor_classes()[backend](do_pad=True, size=size, crop_size=crop_size)
    return {
        "llava-sp": LlavaSPProcessor(image_processor, tokenizer, num_spatial_tokens=6, grid_size=GRID_SIZE),
        # CLIP's class token is counted and then left out
        "llava": LlavaProcessor(
            image_processor,
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ),
    }


def make_images(number: int) -> list[Image.Image]:
    """Random pictures in the sizes of COCO's: 640 pixels wide or high."""
    generator = np.random.default_rng(0)
    shapes = [(480, 640, 3), (640, 480, 3), (427, 640, 3), (640, 640, 3)]
    return [
        Image.fromarray(generator.integers(0, 256, shapes[index % len(shapes)], dtype=np.uint8))
        for index in range(number)
    ]


def process(processor: ProcessorMixin, images: list[Image.Image]) -> BatchFeature:
    return processor(images=images, text=[PROMPT] * len(images), return_tensors="pt", padding=True)


def measure_cell(backend: str, number: int, turns: int) -> dict[str, Any]:
    """
    Both processors in turns on the same pictures.

    Args:
        backend (`str`): What resizes them.
        number (`int`): How many pictures at a time.
        turns (`int`): How many turns, after one to warm up.

    Returns:
        `dict[str, Any]`: The seconds of each turn for each processor, and the tokens of a prompt.
    """
    processors, images = make_processors(backend), make_images(number)
    seconds: dict[str, list[float]] = {name: [] for name in MODELS}
    tokens = {}
    for turn in tqdm(range(turns + 1), desc=f"{backend}, {number} images", unit="turn"):
        for name in in_turn(MODELS, turn):
            start = time.perf_counter()
            output = process(processors[name], images)
            if turn:
                seconds[name].append(time.perf_counter() - start)
            tokens[name] = output["input_ids"].shape[1]
    if tokens["llava-sp"] - tokens["llava"] != 6:
        raise RuntimeError(f"LLaVA-SP's prompt should have 6 tokens more than LLaVA's: {tokens}")
    return {"times": seconds, "images": number, "tokens": tokens}


def report(results: Results, labels: list[str]) -> tuple[str, list[str], int]:
    """The figures as Markdown, the limits that are not met, and of how many parts they were checked."""
    lines = ["| images | LLaVA-SP, images/s | LLaVA, images/s | LLaVA-SP over LLaVA |", "|---|---:|---:|---:|"]
    misses = []
    for label in labels:
        cell = results[label]
        rates = {name: [cell["images"] / seconds for seconds in cell["times"][name]] for name in MODELS}
        ratios = [ours / theirs for ours, theirs in zip(*(rates[name] for name in MODELS), strict=True)]
        cell |= {"ratio": statistics.median(ratios), "ratios": ratios}
        lines.append(
            f"| {label} | {median_and_range(rates['llava-sp'])} | {median_and_range(rates['llava'])} | "
            f"{median_and_range(ratios, 3)} |"
        )
        if cell["ratio"] < RATE_LIMIT:
            misses.append(f"{label}: {cell['ratio']:.3f} x LLaVA's images/s, at least {RATE_LIMIT}")
    return "\n".join(lines), misses, len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_arguments(parser, "processor")
    parser.add_argument("--numbers", nargs="+", type=int, default=[1, 64], help="pictures at a time (default: 1 64)")
    parser.add_argument(
        "--turns", type=int, default=1600, help="for one picture; an eighth for 8 or more (default: 1600)"
    )
    arguments = parser.parse_args()
    if arguments.turns < 1 or min(arguments.numbers) < 1:
        parser.error("--turns and --numbers must be 1 or more")
    check_output_arguments(parser, arguments)
    machine = {**describe_machine(), "device": "CPU", "turns": arguments.turns}
    path = arguments.output / "processor.json" if arguments.output else None
    results = Results(path, machine, ("turns",))
    print("\n".join(f"{key}: {value}" for key, value in machine.items()), flush=True)
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    for backend in image_processor_classes():
        for number in arguments.numbers:
            turns = arguments.turns if number < 8 else max(arguments.turns // 8, 1)
            parts[f"{backend}, {number}"] = partial(measure_cell, backend, number, turns)
    for label, measure in parts.items():
        results.add(label, measure)
    if not is_torchvision_available():
        print("torchvision: not measured, it is not installed")

    figures = report(results, list(parts))
    if arguments.plot:
        rows = {label: {"LLaVA-SP": results[label]["ratios"]} for label in parts}
        plot_ratios(arguments.output / "processor.png", {"images per second over LLaVA's": rows})
    results.finish(*figures)


if __name__ == "__main__":
    main()
