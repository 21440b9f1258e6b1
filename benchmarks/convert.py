"""
Memory and time that conversion takes, on synthetic checkpoints with the shapes of the released 7B.

    python benchmarks/convert.py memory                             # 4 and 8 layers, without and with --verify
    python benchmarks/convert.py memory --layers 32                 # the whole model: 17 GB in, 16 GB out
    python benchmarks/convert.py time --check-determinism           # 8 layers, against a plain copy

A LoRA release, its base model and its vision tower are written to a temporary folder, converted by the `llava-sp`
command in a process of its own, and removed afterwards. benchmarks/README.md says what is measured and how. Exits with
status 1 where a limit is not met.
"""

import argparse
import hashlib
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _measure import (
    BLOCK_SIZE,
    PeakMemory,
    describe_machine,
    read_busy_seconds,
    read_into_page_cache,
    read_memory,
)
from _synthetic import ADAPTED_LAYERS, LORA_RANK, Inputs, estimate_input_bytes, list_files, write_json
from tqdm import tqdm


# The acceptance limits: bytes above the bare imports, bytes for each further layer, multiple of a plain copy's time
MEMORY_LIMIT = 2.5e9
GROWTH_LIMIT = 10e6
COPY_MULTIPLE = 3

# One further option of the command is decided by what is measured: --verify or --no-verify
CONVERT_COMMAND = [sys.executable, "-m", "transformers_llava_sp.cli", "convert"]
# The command's report ends with, for example, `  seconds: planning 1.2, writing 12.3, verifying 4.5, hashing 6.7`
SECONDS_LINE = re.compile(r"^ *seconds: (?P<phases>.+)$", re.MULTILINE)
PHASE = re.compile(r"(?P<name>[a-z]+) (?P<seconds>[\d.]+)")
COUNTED_PHASES = ("planning", "writing")

SAMPLING_INTERVAL = 0.005  # seconds
# Everything the command imports, some of which it, or Transformers, imports only when it is first needed
BARE_IMPORTS = """
import importlib, pkgutil, sys
import transformers_llava_sp.cli
from transformers import CLIPVisionModel, LlamaModel
from transformers_llava_sp import conversion
for module in pkgutil.iter_modules(conversion.__path__, "transformers_llava_sp.conversion."):
    importlib.import_module(module.name)
print("ready", flush=True)
sys.stdin.readline()
"""

# The disk needs room for the inputs and for one output, or one copy, which is never larger than the inputs; and for
# what the file system keeps for itself
DISK_MARGIN = 1.03


def count_file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in list_files(folder))


def kept_folder(arguments: argparse.Namespace, layers: int) -> Path:
    """Where a run with --keep leaves inputs."""
    return arguments.folder / f"llava-sp-synthetic-{layers}-layers-{arguments.format}"


def check_disk(arguments: argparse.Namespace) -> None:
    """Stop with a message if the disk has not enough room for everything that is going to be there at once."""
    sizes = {layers: estimate_input_bytes(layers) for layers in arguments.layers}
    to_make = {layers: 0 if kept_folder(arguments, layers).is_dir() else size for layers, size in sizes.items()}
    if arguments.keep:
        needed = sum(to_make.values()) + max(sizes.values())
    else:
        needed = max(to_make[layers] + size for layers, size in sizes.items())
    needed = round(needed * DISK_MARGIN)
    free = shutil.disk_usage(arguments.folder).free
    if free < needed:
        sys.exit(
            f"{needed / 1e9:.1f} GB are needed in {arguments.folder} for the inputs and one output, or one copy, and "
            f"{free / 1e9:.1f} GB are free there: make room, choose another --folder, or take fewer --layers."
        )


@contextmanager
def temporary_inputs(arguments: argparse.Namespace, layers: int) -> Iterator[Inputs]:
    """The inputs with a number of layers, made if a run with --keep has not left them, and removed without --keep."""
    kept = kept_folder(arguments, layers)
    if kept.is_dir():
        yield Inputs(kept, layers)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="llava-sp-synthetic-") as temporary:
        inputs = Inputs(Path(temporary, "inputs"), layers)
        inputs.folder.mkdir()
        inputs.write(arguments.format)
        if arguments.keep:
            # Under this name only when complete
            inputs = Inputs(inputs.folder.rename(kept), layers)
        yield inputs


def measure_bare_imports() -> int:
    """Anonymous memory, in bytes, of a process that has imported everything and done nothing."""
    with subprocess.Popen(
        [sys.executable, "-c", BARE_IMPORTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        # `communicate` lets it end, and waits for it, whatever comes before
        try:
            ready = process.stdout.readline() == "ready\n"
            memory = read_memory(process.pid)
        finally:
            process.communicate()
    if not ready or memory is None:
        raise RuntimeError(f"The process that only imports has failed with status {process.returncode}.")
    return memory["RssAnon"]


def convert(
    inputs: Inputs, output: Path, arguments: argparse.Namespace, *, verify: bool, sample: bool
) -> dict[str, Any]:
    """
    Convert in a process of its own.

    Args:
        inputs (`Inputs`): What to convert.
        output (`Path`): The folder to write.
        arguments (`argparse.Namespace`): The command line's.
        verify (`bool`): Whether the command is to verify what it has written.
        sample (`bool`): Whether to sample the memory of the process, which takes a small part of a core.

    Returns:
        `dict[str, Any]`: Seconds of each phase as the command reports them and of the whole process, seconds of CPU
        that other processes used meanwhile; with `sample`, the highest memory in bytes.
    """
    command = [
        *CONVERT_COMMAND,
        str(inputs.release),
        str(output),
        f"--base-model={inputs.base}",
        f"--vision-tower={inputs.tower}",
        f"--max-shard-size={arguments.max_shard_size}",
        "--verify" if verify else "--no-verify",
    ]
    # Everything is on this machine: nothing may depend on how fast a server answers
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    busy, start = read_busy_seconds(), time.perf_counter()
    cpu = read_children_cpu_seconds()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        memory = PeakMemory(process.pid, SAMPLING_INTERVAL)
        try:
            if sample:
                with memory:
                    report, errors = process.communicate()
            else:
                report, errors = process.communicate()
        except BaseException:
            process.kill()
            raise
    seconds = time.perf_counter() - start
    cpu = read_children_cpu_seconds() - cpu
    busy = read_busy_seconds() - busy
    line = SECONDS_LINE.search(report)
    if process.returncode or line is None:
        raise RuntimeError(
            f"{' '.join(command)} ended with status {process.returncode}, expected 0 and a report with a line of "
            f"seconds:\n{report}" + errors.rsplit("\r", 1)[-1]
            # Progress bars draw over themselves
        )
    phases = {match["name"]: float(match["seconds"]) for match in PHASE.finditer(line["phases"])}
    result = {
        "phases_s": phases,
        "counted_s": sum(phases[name] for name in COUNTED_PHASES),
        "process_s": seconds,
        "cpu_s": cpu,
        # At least what the kernel itself does for the process, such as writing its pages to the disk
        "other_cpu_s": max(busy - cpu, 0.0),
    }
    if sample:
        result["peak_anonymous_bytes"] = memory.anonymous
        result["peak_mapped_bytes"] = memory.mapped
        result["peak_reached_after_s"] = memory.reached_after
        result["num_samples"] = memory.num_samples
    return result


def read_children_cpu_seconds() -> float:
    """Seconds of CPU that all processes used that were started and waited for here."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def copy(inputs: Inputs, target: Path) -> float:
    """Seconds that a plain copy of all input files takes."""
    start = time.perf_counter()
    target.mkdir()
    for number, file in enumerate(inputs.files):
        shutil.copyfile(file, target / f"{number}{file.suffix}")
    return time.perf_counter() - start


def multiply_lora_matrices(layers: int) -> float:
    """
    Seconds that the bare products of all LoRA matrices take, B @ A in float32, in memory that is there already.
    PyTorch takes as many threads as in the converting process, which inherits the environment that says how many.
    """
    generator = torch.Generator().manual_seed(0)
    operands = {
        (out_features, in_features): (
            torch.randn(out_features, LORA_RANK, generator=generator),
            torch.randn(LORA_RANK, in_features, generator=generator),
            torch.zeros(out_features, in_features),
        )
        for out_features, in_features in ADAPTED_LAYERS.values()
    }
    for lora_b, lora_a, product in operands.values():
        torch.mm(lora_b, lora_a, out=product)  # to warm up
    start = time.perf_counter()
    for _ in range(layers):
        for shape in ADAPTED_LAYERS.values():
            lora_b, lora_a, product = operands[shape]
            torch.mm(lora_b, lora_a, out=product)
    return time.perf_counter() - start


def hash_files(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a folder."""
    hashes = {}
    for file in list_files(folder):
        digest = hashlib.sha256()
        with open(file, "rb", buffering=0) as stream:
            while block := stream.read(BLOCK_SIZE):
                digest.update(block)
        hashes[str(file.relative_to(folder))] = digest.hexdigest()
    return hashes


class Determinism:
    """Whether conversions of the same inputs with the same options write the same files."""

    def __init__(self) -> None:
        self.first: dict[str, str] | None = None
        self.num_runs = 0
        self.differing: set[str] = set()

    def add(self, output: Path) -> None:
        """Compare the files of one more conversion with those of the first."""
        hashes = hash_files(output)
        self.num_runs += 1
        if self.first is None:
            self.first = hashes
        self.differing |= {name for name, _ in hashes.items() ^ self.first.items()}

    def report(self) -> dict[str, Any]:
        return {"runs": self.num_runs, "sha256": self.first, "differing": sorted(self.differing)}


def report_limit(text: str, met: bool) -> bool:
    print(f"{text}: {'met' if met else 'NOT MET'}")
    return met


def report_determinism(what: str, determinism: Determinism) -> bool:
    if determinism.first is None:
        return True
    differing = ", ".join(sorted(determinism.differing))
    return report_limit(
        f"{what}: all {len(determinism.first)} files of {determinism.num_runs} conversions have the same sha256"
        + (f" but {differing}" if differing else ""),
        not differing,
    )


def describe_phases(phases: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())


def measure_memory(arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The memory of conversions with each number of layers; the figures, and whether the limits are met."""
    modes = [False, True] if arguments.verify is None else [arguments.verify]
    bare = measure_bare_imports()
    print(f"bare imports: {bare / 1e6:.0f} MB of anonymous memory")
    runs: list[dict[str, Any]] = []
    checks: dict[str, Determinism] = {}
    with tqdm(total=len(arguments.layers) * (1 + len(modes) * arguments.repeats), unit="step") as progress:
        for layers in arguments.layers:
            progress.set_description(f"making {layers} layers")
            with temporary_inputs(arguments, layers) as inputs:
                progress.update()
                for verify in modes:
                    option = "--verify" if verify else "--no-verify"
                    determinism = checks[f"{layers} layers, {option}"] = Determinism()
                    for repeat in range(arguments.repeats):
                        progress.set_description(f"converting {layers} layers, {option}")
                        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="llava-sp-output-") as folder:
                            output = Path(folder, f"output-{repeat}")
                            run = convert(inputs, output, arguments, verify=verify, sample=True)
                            run |= {
                                "layers": layers,
                                "verify": verify,
                                "peak_above_imports_bytes": run["peak_anonymous_bytes"] - bare,
                                "bytes_read": sum(file.stat().st_size for file in inputs.files),
                                "bytes_written": count_file_bytes(output),
                            }
                            runs.append(run)
                            if arguments.check_determinism:
                                determinism.add(output)
                        progress.update()

    print("\n| layers | options | in | out | peak anonymous above imports | reached after | mapped | seconds |")
    print("|---:|---|---:|---:|---:|---:|---:|---|")
    for run in runs:
        print(
            f"| {run['layers']} | {'--verify' if run['verify'] else '--no-verify'} | "
            f"{run['bytes_read'] / 1e9:.2f} GB | "
            f"{run['bytes_written'] / 1e9:.2f} GB | {run['peak_above_imports_bytes'] / 1e9:.3f} GB | "
            f"{run['peak_reached_after_s']:.1f} s | {run['peak_mapped_bytes'] / 1e9:.2f} GB | "
            f"{describe_phases(run['phases_s'])}; process {run['process_s']:.1f} |"
        )
    print()
    met = True
    growth = {}
    for verify in modes:
        option = "--verify" if verify else "--no-verify"
        peaks = {
            layers: [
                run["peak_above_imports_bytes"] for run in runs if (run["layers"], run["verify"]) == (layers, verify)
            ]
            for layers in arguments.layers
        }
        peak = max(map(max, peaks.values()))
        met &= report_limit(
            f"{option}: peak anonymous memory {peak / 1e9:.3f} GB above the bare imports, at most "
            f"{MEMORY_LIMIT / 1e9:.1f} GB",
            peak <= MEMORY_LIMIT,
        )
        if len(peaks) > 1:
            fewest, most = min(peaks), max(peaks)
            difference = statistics.median(peaks[most]) - statistics.median(peaks[fewest])
            growth[option] = difference / (most - fewest)
            met &= report_limit(
                f"{option}: {growth[option] / 1e6:.1f} MB more for each layer, from {fewest} to {most}, under "
                f"{GROWTH_LIMIT / 1e6:.0f} MB",
                growth[option] < GROWTH_LIMIT,
            )
    for what, determinism in checks.items():
        met &= report_determinism(what, determinism)
    results = {
        "bare_imports_bytes": bare,
        "growth_per_layer_bytes": growth,
        "runs": runs,
        "determinism": {what: determinism.report() for what, determinism in checks.items()},
    }
    return results, met


def measure_time(arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The time of conversions and of plain copies; the figures, and whether the limit is met."""
    [layers] = arguments.layers
    conversions: list[dict[str, Any]] = []
    copies: list[float] = []
    products: list[float] = []
    determinism = Determinism()

    def run_conversion(inputs: Inputs, output: Path) -> None:
        run = convert(inputs, output, arguments, verify=arguments.verify, sample=False)
        conversions.append({**run, "bytes_written": count_file_bytes(output)})
        if arguments.check_determinism:
            determinism.add(output)

    def run_copy(inputs: Inputs, output: Path) -> None:
        copies.append(copy(inputs, output))

    steps: dict[str, Callable[[Inputs, Path], None]] = {"copying": run_copy, "converting": run_conversion}
    with tqdm(total=1 + 2 * arguments.repeats, unit="step") as progress:
        progress.set_description(f"making {layers} layers")
        with temporary_inputs(arguments, layers) as inputs:
            bytes_read = sum(file.stat().st_size for file in inputs.files)
            progress.update()
            for repeat in range(arguments.repeats):
                products.append(multiply_lora_matrices(layers))
                # Neither always comes first, so that nothing that drifts favours one
                for name in steps if repeat % 2 else reversed(steps):
                    progress.set_description(f"{name} {layers} layers")
                    # What was written before should neither wait for the disk during this step, nor have displaced
                    # the inputs
                    os.sync()
                    read_into_page_cache(inputs.files)
                    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="llava-sp-output-") as folder:
                        steps[name](inputs, Path(folder, f"output-{repeat}"))
                    progress.update()

    copied, multiplied = statistics.median(copies), statistics.median(products)
    converted = statistics.median(run["counted_s"] for run in conversions)
    bytes_written = conversions[0]["bytes_written"]
    print("\n| run | copy | LoRA products | planning and writing | all phases | other processes |")
    print("|---:|---:|---:|---:|---|---:|")
    for number, (run, copy_seconds, product_seconds) in enumerate(zip(conversions, copies, products, strict=True)):
        print(
            f"| {number + 1} | {copy_seconds:.2f} s | {product_seconds:.2f} s | {run['counted_s']:.2f} s | "
            f"{describe_phases(run['phases_s'])}; process {run['process_s']:.1f} | "
            f"{run['other_cpu_s'] / run['process_s']:.0%} of a core |"
        )
    print(
        f"\n{layers} layers, {torch.get_num_threads()} threads: {bytes_read / 1e9:.2f} GB in, "
        f"{bytes_written / 1e9:.2f} GB out.\n"
        f"Copy: {bytes_read / copied / 1e9:.2f} GB/s, {copied:.2f} s; at that speed, writing the output alone takes "
        f"{bytes_written * copied / bytes_read:.2f} s.\n"
        f"LoRA products: {multiplied:.2f} s. Conversion: {bytes_written / converted / 1e9:.2f} GB/s written, "
        f"{(converted - multiplied) / copied:.2f} x the copy after the products."
    )
    if bytes_read + bytes_written > arguments.machine["memory_bytes"]:
        print("Inputs and output together are larger than the memory: the disk's speed is part of these figures.")
    limit = COPY_MULTIPLE * copied + multiplied
    met = report_limit(
        f"planning and writing {converted:.2f} s, at most {COPY_MULTIPLE} x copy + LoRA products = {limit:.2f} s",
        converted <= limit,
    )
    met &= report_determinism(f"{layers} layers", determinism)
    results = {
        "layers": layers,
        "threads": torch.get_num_threads(),
        "bytes_read": bytes_read,
        "bytes_written": bytes_written,
        "copy_s": copied,
        "lora_products_s": multiplied,
        "planning_and_writing_s": converted,
        "limit_s": limit,
        "runs": {"conversions": conversions, "copies_s": copies, "lora_products_s": products},
        "determinism": determinism.report(),
    }
    return results, met


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="what", required=True)
    memory = subparsers.add_parser(
        "memory",
        help="peak anonymous memory above the bare imports, and its growth per layer",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    memory.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=[4, 8],
        help="layers of the language model; with several numbers, growth is measured from the fewest to the most",
    )
    memory.add_argument("--repeats", type=int, default=1, help="conversions of each kind")
    memory.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, help="with or without verification only, instead of both"
    )
    memory.set_defaults(measure=measure_memory)
    timing = subparsers.add_parser(
        "time",
        help="time against a plain copy of the inputs",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    timing.add_argument("--layers", type=int, nargs=1, default=[8], help="layers of the language model")
    timing.add_argument("--repeats", type=int, default=3, help="conversions and copies, in turns")
    timing.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="verify too; its time is printed, and not counted",
    )
    timing.set_defaults(measure=measure_time)
    for subparser in (memory, timing):
        subparser.add_argument(
            "--format",
            choices=("bin", "safetensors"),
            default="bin",
            help="of base model and vision tower; the originals are bin",
        )
        subparser.add_argument("--max-shard-size", default="2GB", help="of the output")
        subparser.add_argument(
            "--check-determinism",
            action="store_true",
            help="compare the sha256 of every file of all conversions of a kind, of which there must be two",
        )
        subparser.add_argument(
            "--folder",
            type=Path,
            default=Path(tempfile.gettempdir()),
            help="where the temporary folders are made: twice the inputs' size",
        )
        subparser.add_argument(
            "--keep", action="store_true", help="keep the inputs in --folder, where later runs find and take them"
        )
        subparser.add_argument("--json", type=Path, help="a file to write the figures to")
    arguments = parser.parse_args()
    if min(arguments.layers) < 1 or arguments.repeats < 1:
        parser.error("--layers and --repeats must be 1 or more")
    if arguments.check_determinism and arguments.repeats < 2:
        parser.error("--check-determinism compares conversions with each other: give --repeats 2 or more")
    if not arguments.folder.is_dir():
        parser.error(f"--folder {arguments.folder} does not exist")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    # Whoever ends this does not want to keep the checkpoints
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    check_disk(arguments)
    arguments.machine = {**describe_machine(), "format": arguments.format, "max_shard_size": arguments.max_shard_size}
    print("\n".join(f"{key}: {value}" for key, value in arguments.machine.items()))
    results, met = arguments.measure(arguments)
    if arguments.json:
        write_json(arguments.json, {"machine": arguments.machine, arguments.what: results})
    if not met:
        sys.exit(1)


if __name__ == "__main__":
    main()
