"""
Time of the spatial path, the Spatial Feature Extractor with the Detail Feature Integrator and its projection: as it
is, against plain convolutions, and against what the machine can do at most.

    python benchmarks/projector.py --output results                # the shapes of the released 7B
    python benchmarks/projector.py --size small --output results   # tiny shapes, in seconds

Finished cells are in the output folder and are not measured again by the next run. benchmarks/README.md says what is
measured and how. Exits with status 1 where a limit is not met.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from _measure import (
    Clock,
    Results,
    add_output_arguments,
    check_output_arguments,
    count_bytes,
    describe_device,
    describe_machine,
    in_turn,
    measure_matrix_products,
    median_and_range,
    plot_ratios,
    synchronize,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from transformers_llava_sp import LlavaSPProjector, LlavaSPProjectorConfig, modeling_llava_sp
from transformers_llava_sp.modeling_llava_sp import MatmulConv2d, SpatialFeatureExtractor


VARIANTS = ("cropping", "pooling")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {
    "7b": {"vision_hidden_size": 1024, "text_hidden_size": 4096, "grid_size": 24},
    "small": {"vision_hidden_size": 64, "text_hidden_size": 96, "grid_size": 12, "spatial_hidden_size": 24},
}
MATRIX_SIZES = {"7b": {"cuda": 8192, "cpu": 2048}, "small": {"cuda": 512, "cpu": 128}}
# The acceptance limits: times faster than convolutions at batch 1 on a CPU, and time over that of reading the weights
SPEEDUP_LIMITS = {"fp32": 8.0, "bf16": 12.0}
READING_LIMIT = 1.3

# The spatial path of patch features, in one of its forms
SpatialPath = Callable[[LlavaSPProjector, torch.Tensor], torch.Tensor]


class NoPatches(nn.Module):
    """In place of the projector's MLP for patches: none of them."""

    def __init__(self, text_hidden_size: int):
        super().__init__()
        self.text_hidden_size = text_hidden_size

    def forward(self, patch_features: torch.Tensor) -> torch.Tensor:
        return patch_features.new_empty(len(patch_features), 0, self.text_hidden_size)


def spatial_path(projector: LlavaSPProjector, patch_features: torch.Tensor) -> torch.Tensor:
    """
    The projector without its patches, as it is.

    Args:
        projector ([`LlavaSPProjector`]): The projector, of [`make_projector`].
        patch_features (`torch.Tensor` of shape `(images, patches, vision_hidden_size)`): What the tower gives.

    Returns:
        `torch.Tensor` of shape `(images, scales, text_hidden_size)`.
    """
    return projector(patch_features).last_hidden_state


def linear_path(projector: LlavaSPProjector, patch_features: torch.Tensor) -> torch.Tensor:
    """[`spatial_path`] with `F.linear` for each convolution, in place of the forms of products for a CPU."""
    with patch.object(modeling_llava_sp, "multiply_on_cpu", F.linear):
        return spatial_path(projector, patch_features)


def pool(extractor: SpatialFeatureExtractor, patch_grid: torch.Tensor) -> list[torch.Tensor]:
    """What `get_feature_maps` does on a GPU. The whole grid needs no pooling, whoever multiplies it."""
    return [
        patch_grid if size == patch_grid.shape[-1] else F.adaptive_avg_pool2d(patch_grid, size)
        for size in extractor.spatial_scales
    ]


def pooling_path(projector: LlavaSPProjector, patch_features: torch.Tensor) -> torch.Tensor:
    """[`spatial_path`] with PyTorch's pooling, in place of products for a CPU."""
    with patch.object(SpatialFeatureExtractor, "get_feature_maps", pool):
        return spatial_path(projector, patch_features)


def plain_path(projector: LlavaSPProjector, patch_features: torch.Tensor) -> torch.Tensor:
    """[`spatial_path`] with PyTorch's convolutions and its pooling, as the authors write it, on the same weights."""
    path = pooling_path if projector.config.spatial_variant == "pooling" else spatial_path
    with patch.object(MatmulConv2d, "forward", nn.Conv2d.forward):
        return path(projector, patch_features)


def read_weights(projector: LlavaSPProjector, patch_features: torch.Tensor) -> torch.Tensor:
    """Reads all weights once and does next to nothing with them: as fast as the memory is."""
    return torch.stack([weight.view(torch.float32).sum() for weight in projector.parameters()])


def paths_of(projector: LlavaSPProjector) -> dict[str, SpatialPath]:
    """What takes turns: beside the path, its plain form and reading, what it does otherwise on a CPU alone."""
    paths: dict[str, SpatialPath] = {"llava-sp": spatial_path, "conv2d": plain_path, "reading": read_weights}
    if projector.device.type == "cpu":
        paths["F.linear"] = linear_path
        if projector.config.spatial_variant == "pooling":
            paths["adaptive_avg_pool2d"] = pooling_path
    return paths


def make_projector(size: str, variant: str, dtype: torch.dtype, device: torch.device) -> LlavaSPProjector:
    """A projector with random weights, every page of them written, and without the MLP for patches."""
    torch.manual_seed(0)
    config = LlavaSPProjectorConfig(spatial_variant=variant, **SIZES[size])
    with device:
        projector = LlavaSPProjector._from_config(config, dtype=dtype)
    projector.patch_mlp = NoPatches(config.text_hidden_size)
    return projector


def make_features(projector: LlavaSPProjector, batch_size: int) -> torch.Tensor:
    """Random features of patches, as the vision tower gives them."""
    shape = batch_size, projector.config.grid_size**2, projector.config.vision_hidden_size
    return torch.randn(shape, device=projector.device, dtype=projector.dtype)


def count_operations(projector: LlavaSPProjector, patch_features: torch.Tensor) -> int:
    """Those of the matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        plain_path(projector, patch_features)
    return counter.get_total_flops()


@torch.inference_mode()
def measure_cell(
    projector: LlavaSPProjector, batch_size: int, repeats: int, seconds: float, label: str
) -> dict[str, Any]:
    """
    All forms of the path on the same features, in turns.

    Args:
        projector ([`LlavaSPProjector`]): The projector.
        batch_size (`int`): Images.
        repeats (`int`): How often at most.
        seconds (`float`): After how long no further turn is begun; there are three at least.
        label (`str`): What the progress bar says.

    Returns:
        `dict[str, Any]`: The milliseconds of each turn, the largest difference between the path and its form with
        convolutions over the largest value, bytes of weights and operations.
    """
    clock = Clock(projector.device)
    patch_features = make_features(projector, batch_size)
    paths = paths_of(projector)
    # To warm up
    outputs = {name: path(projector, patch_features).float() for name, path in paths.items()}
    difference = (outputs["llava-sp"] - outputs["conv2d"]).abs().max() / outputs["conv2d"].abs().max()
    times: dict[str, list[float]] = {name: [] for name in paths}
    with tqdm(total=repeats, desc=label, unit="turn") as progress:
        for turn in range(repeats):
            if turn >= 3 and sum(map(sum, times.values())) > seconds * 1e3:
                break
            for name in in_turn(paths, turn):
                synchronize(projector.device)
                start = clock.mark()
                paths[name](projector, patch_features)
                end = clock.mark()
                synchronize(projector.device)
                times[name].append(clock.milliseconds(start, end))
            progress.update()
    return {
        "milliseconds": times,
        "difference": difference.item(),
        "weight_bytes": count_bytes(projector.parameters()),
        "operations": count_operations(projector, patch_features),
    }


def summarise(cell: dict[str, Any], rate: float) -> dict[str, Any]:
    """The medians, and those of the ratios turn by turn: to convolutions, and to what the machine can do at most."""
    times = cell["milliseconds"]
    computing = cell["operations"] / rate * 1e3

    def over(name: str) -> list[float]:
        return [one / other for one, other in zip(times[name], times["llava-sp"], strict=True)]

    speedups, reading = over("conv2d"), over("reading")
    medians = {name: statistics.median(milliseconds) for name, milliseconds in times.items()}
    limits = [max(one, computing) for one in times["reading"]]
    over_limits = [ours / limit for ours, limit in zip(times["llava-sp"], limits, strict=True)]
    return {
        **medians,
        "speedup": statistics.median(speedups),
        "speedups": speedups,
        "gains": {name: over(name) for name in ("F.linear", "adaptive_avg_pool2d") if name in times},
        "computing": computing,
        "over_reading": 1 / statistics.median(reading),
        "over_limit": statistics.median(over_limits),
        "over_limits": over_limits,
    }


def find_misses(on_gpu: bool, dtype: str, batch_size: int, figures: dict[str, float]) -> list[str]:
    """The limits that a cell does not meet."""
    misses = []
    if figures["speedup"] < 1:
        misses.append("slower than convolutions")
    if batch_size == 1:
        limit = SPEEDUP_LIMITS.get(dtype)
        if not on_gpu and limit and figures["speedup"] < limit:
            misses.append(f"less than {limit:g} times as fast as convolutions")
        if figures["over_reading"] > READING_LIMIT:
            misses.append(f"more than {READING_LIMIT:g} times what reading the weights takes")
    return misses


def report(results: Results, cells: list[tuple[str, str, int]]) -> tuple[str, list[str], int]:
    """The figures as Markdown, the limits that are not met, and of how many cells they were checked."""
    lines = [
        "| variant | dtype | batch | LLaVA-SP, ms | conv2d, ms | x | F.linear, x | adaptive_avg_pool2d, x | "
        "reading weights, ms | over reading | computing, ms | over the larger | difference |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    misses, num_checked = [], 0
    machine = results.content["machine"]
    for variant, dtype, batch_size in cells:
        label = f"{variant}, {dtype}, batch {batch_size}"
        if label not in results:
            lines.append(f"| {variant} | {dtype} | {batch_size} | not measured yet |")
            continue
        cell = results[label]
        figures = cell["summary"] = summarise(cell, results[f"products, {dtype}"]["operations_per_second"])
        times = {name: median_and_range(values, digits=2) for name, values in cell["milliseconds"].items()}
        linear, pooling = (
            median_and_range(figures["gains"][name], digits=2) if name in figures["gains"] else "-"
            for name in ("F.linear", "adaptive_avg_pool2d")
        )
        lines.append(
            f"| {variant} | {dtype} | {batch_size} | {times['llava-sp']} | {times['conv2d']} | "
            f"{median_and_range(figures['speedups'])} | {linear} | {pooling} | {times['reading']} | "
            f"{figures['over_reading']:.2f} | {figures['computing']:.2f} | {figures['over_limit']:.2f} | "
            f"{cell['difference']:.1e} |"
        )
        if machine["size"] == "7b":
            num_checked += 1
            misses += [
                f"{label}: {miss}" for miss in find_misses(machine["device"] != "CPU", dtype, batch_size, figures)
            ]
    for dtype in dict.fromkeys(dtype for _, dtype, _ in cells):
        rate = results[f"products, {dtype}"]["operations_per_second"]
        lines += ["", f"{dtype}: square matrix products compute {rate / 1e12:.4g} TFLOP/s"]
    return "\n".join(lines), misses, num_checked


def plot(results: Results, cells: list[tuple[str, str, int]], file: Path) -> None:
    """Draw the time of convolutions over the path's, and the path's over what the machine can do at most."""
    speedups: dict[str, dict[str, list[float]]] = {}
    over_limits: dict[str, dict[str, list[float]]] = {}
    for variant, dtype, batch_size in cells:
        label = f"{variant}, {dtype}, batch {batch_size}"
        if label in results:
            row, figures = f"{dtype}, batch {batch_size}", results[label]["summary"]
            speedups.setdefault(row, {})[variant] = figures["speedups"]
            over_limits.setdefault(row, {})[variant] = figures["over_limits"]
    plot_ratios(
        file,
        {
            "convolutions' time over LLaVA-SP's (more is better)": speedups,
            "LLaVA-SP's time over the machine's limit (less is better)": over_limits,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="7b", help="of the projector (default: 7b)")
    add_output_arguments(parser, "projector")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="all on a GPU, fp32 and bf16 on a CPU")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=30, help="turns of each cell at most (default: 30)")
    parser.add_argument("--seconds", type=float, default=20, help="for each cell, about (default: 20)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further cell after so long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    if arguments.repeats < 1 or min(arguments.batch_sizes) < 1:
        parser.error("--repeats and --batch-sizes must be 1 or more")
    check_output_arguments(parser, arguments)
    device = torch.device(arguments.device)
    # Neither products nor convolutions in TF32, which PyTorch would use for the latter alone
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    dtypes = arguments.dtypes or (list(DTYPES) if device.type == "cuda" else ["fp32", "bf16"])
    settings = {"size": arguments.size, "repeats": arguments.repeats, "seconds": arguments.seconds}
    machine = {**describe_machine(), **describe_device(device), **settings}
    path = arguments.output / "projector.json" if arguments.output else None
    results = Results(path, machine, settings)
    print("\n".join(f"{key}: {value}" for key, value in machine.items()), flush=True)

    cells = list(product(arguments.variants, dtypes, arguments.batch_sizes))
    for dtype in dtypes:
        side = MATRIX_SIZES[arguments.size][device.type]
        results.add(f"products, {dtype}", partial(measure_matrix_products, side, device, DTYPES[dtype]))
    # The first batch size of all first: a run that is cut short has that of both variants
    projector: LlavaSPProjector | None = None
    made = None
    for batch_sizes in (arguments.batch_sizes[:1], arguments.batch_sizes[1:]):
        for variant, dtype, batch_size in product(arguments.variants, dtypes, batch_sizes):
            label = f"{variant}, {dtype}, batch {batch_size}"
            if label in results or time.perf_counter() - begun > 60 * arguments.minutes:
                continue
            if projector is None or made != (variant, dtype):
                # One at a time
                projector = None
                projector = make_projector(arguments.size, variant, DTYPES[dtype], device)
                made = variant, dtype
            results.add(
                label, partial(measure_cell, projector, batch_size, arguments.repeats, arguments.seconds, label)
            )

    figures = report(results, cells)
    if arguments.plot:
        plot(results, cells, arguments.output / "projector.png")
    results.finish(*figures)


if __name__ == "__main__":
    main()
