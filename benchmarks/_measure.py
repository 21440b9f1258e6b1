"""What the benchmarks share: time and memory, what the machine is and what else it does, and results in a file."""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from transformers_llava_sp import __version__
from transformers_llava_sp.visualization import require_matplotlib, save_figure


PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
BLOCK_SIZE = 2**24  # bytes read at once
# What results must share if they are to be compared, and where it is the CPU that is measured
SAME = ("device", "torch", "transformers", "transformers_llava_sp")
SAME_CPU = ("cpu", "cores")

# Package, and whether Transformers can use it
FLASH_PACKAGES: dict[str, tuple[str, Callable[[], bool]]] = {
    "flash_attention_2": ("flash-attn", is_flash_attn_2_available),
    "flash_attention_3": ("flash-attn-3", is_flash_attn_3_available),
    "flash_attention_4": ("flash-attn-4", is_flash_attn_4_available),
}


def read_memory(pid: int) -> dict[str, int] | None:
    """
    Resident memory of a process: anonymous (`RssAnon`), and that of mapped files (`RssFile`).

    Args:
        pid (`int`): The process.

    Returns:
        `dict[str, int]`: Both in bytes, or `None` if the process has ended.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    # A process that has ended, but that nobody has waited for yet, has a status without memory
    if "RssAnon" not in fields:
        return None
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


class PeakMemory:
    """
    Samples the memory of another process inside a `with` block, from outside, which does not slow the process down.

    Args:
        pid (`int`): The process.
        interval (`float`): Seconds between two samples.

    Attributes:
        anonymous (`int`): The highest `RssAnon` so far, in bytes.
        mapped (`int`): The highest `RssFile` so far, in bytes.
        reached_after (`float`): When `anonymous` was reached, in seconds since sampling began.
        num_samples (`int`): How often the memory was read.
    """

    def __init__(self, pid: int, interval: float):
        self.pid = pid
        self.interval = interval
        self.anonymous = 0
        self.mapped = 0
        self.reached_after = 0.0
        self.num_samples = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        start = time.perf_counter()
        while not self._done.is_set():
            memory = read_memory(self.pid)
            if memory is None:
                return
            if memory["RssAnon"] > self.anonymous:
                self.anonymous, self.reached_after = memory["RssAnon"], time.perf_counter() - start
            self.mapped = max(self.mapped, memory["RssFile"])
            self.num_samples += 1
            time.sleep(self.interval)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()


def read_busy_seconds() -> float:
    """Seconds of CPU that the whole machine has used since it was started."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = Path("/proc/stat").read_text().split()[1:9]
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")


def read_into_page_cache(files: Iterable[Path]) -> None:
    """Read files once, so that the disk's speed and what the system has cached are not measured."""
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.read(BLOCK_SIZE):
                pass


def describe_machine() -> dict[str, str | int | float]:
    """The machine, what it was doing, the versions, and the date."""
    cpu = next(
        (line.split(": ", 1)[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "memory_bytes": PAGE_SIZE * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "transformers_llava_sp": __version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def attention_kinds(device: torch.device, flex: bool = False) -> tuple[dict[str, str], dict[str, str]]:
    """
    What attention can be measured.

    Args:
        device (`torch.device`): Where.
        flex (`bool`, *optional*, defaults to `False`): Whether FlexAttention is wanted, which compiles first.

    Returns:
        `tuple(dict[str, str], dict[str, str])`: What Transformers calls each kind, and the reason why others cannot.
    """
    kinds, missing = {"sdpa": "sdpa"}, {}
    # PyTorch's own, where it would otherwise choose among several kernels
    candidates = {"sdpa-flash": ("sdpa", True, "")}
    for name, (package, is_available) in FLASH_PACKAGES.items():
        candidates[name] = (name, is_available(), f"Transformers finds no package {package} that it can use")
    if flex:
        candidates["flex_attention"] = ("flex_attention", True, "")
    for name, (implementation, available, reason) in candidates.items():
        if device.type != "cuda":
            missing[name] = "needs a CUDA device"
        elif available:
            kinds[name] = implementation
        else:
            missing[name] = reason
    return kinds, missing


def attention_kernel(kind: str) -> AbstractContextManager:
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if kind == "sdpa-flash" else nullcontext()


def describe_device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": "CPU", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "device_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def add_output_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Where results and their picture are written."""
    parser.add_argument("--output", type=Path, help=f"a folder for {name}.json and {name}.md")
    parser.add_argument("--plot", action="store_true", help=f"draw {name}.png there, too (needs matplotlib)")


def check_output_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Say before anything is measured that nothing can be written or drawn."""
    if arguments.output and arguments.output.exists() and not arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is a file: name a folder")
    if arguments.plot:
        require_matplotlib()
        if arguments.output is None:
            parser.error("--plot needs --output, the folder to draw in")


class Clock:
    """
    Marks points of time on a device's own timeline, or on the CPU's.

    Args:
        device (`torch.device`): The device.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two marks, once the device has reached the second one."""
        return start.elapsed_time(end) if self.on_gpu else (end - start) * 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_matrix_products(
    side: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, repeats: int = 20
) -> dict[str, Any]:
    """The rate of products of square matrices: operations per second, a multiplication and an addition being two."""
    clock = Clock(device)
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(one)
    times = []
    for _ in range(3 + repeats):
        start = clock.mark()
        torch.mm(one, other, out=product)
        end = clock.mark()
        synchronize(device)
        times.append(clock.milliseconds(start, end))
    milliseconds = statistics.median(times[3:])
    return {
        "matrix_size": side,
        "milliseconds": milliseconds,
        "operations_per_second": 2 * side**3 / milliseconds * 1e3,
    }


def measure_reading(num_bytes: int, device: torch.device, repeats: int = 20) -> dict[str, Any]:
    """How fast memory is read: the sum of random float32 numbers, more than caches hold, in bytes per second."""
    clock = Clock(device)
    # Written, so that every page is there
    numbers = torch.randn(num_bytes // 4, device=device)
    times = []
    for _ in range(3 + repeats):
        start = clock.mark()
        numbers.sum()
        end = clock.mark()
        synchronize(device)
        times.append(clock.milliseconds(start, end))
    milliseconds = statistics.median(times[3:])
    return {
        "bytes": numbers.nbytes,
        "milliseconds": milliseconds,
        "bytes_per_second": numbers.nbytes / milliseconds * 1e3,
    }


class Results:
    """
    The parts of a run that are finished, in a file that is complete after each.

    Args:
        path (`Path`, *optional*): The file, which may have parts from before. Without it nothing is written.
        machine (`dict[str, Any]`): What ran where.
        same (`Iterable[str]`, *optional*): What of it must be the same for parts from before, beside the device and
            the versions.
    """

    def __init__(self, path: Path | None, machine: dict[str, Any], same: Iterable[str] = ()):
        self.path = path
        self.content: dict[str, Any] = {"machine": machine, "parts": {}}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            try:
                self.content = json.loads(self.path.read_text())
            except ValueError as error:
                sys.exit(f"{self.path} is not JSON ({error}): remove it, or name another folder as --output.")
            before = self.content["machine"]
            for key in (*SAME, *(SAME_CPU if machine["device"] == "CPU" else ()), *same):
                if before.get(key) != machine.get(key):
                    sys.exit(
                        f"{self.path} has results with {key} {before.get(key)!r}, and this run has "
                        f"{machine.get(key)!r}: name another folder as --output."
                    )

    def __getitem__(self, part: str) -> Any:
        return self.content["parts"][part]

    def __contains__(self, part: str) -> bool:
        return part in self.content["parts"]

    def has_measured(self, part: str) -> bool:
        """Whether a part is there and has not failed."""
        return part in self and "error" not in self[part]

    def add(self, part: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a part that is not there yet."""
        if self.has_measured(part):
            print(f"{part}: there already")
            return
        start = time.perf_counter()
        figures = measure()
        self.content["parts"][part] = {
            **figures,
            "seconds": time.perf_counter() - start,
            "date": time.strftime("%Y-%m-%d"),
            "load_average_after": os.getloadavg()[0],
        }
        print(f"{part}: {self[part]['seconds']:.1f} s", flush=True)
        self.write()

    def write(self) -> None:
        if self.path:
            # Whole or not at all
            temporary = self.path.with_suffix(".part")
            text = json.dumps(self.content, indent=2)
            # A list of numbers, of which some have thousands, on one line
            text = re.sub(r"\[\n([-+.,\de\s]+)\n *\]", lambda match: f"[{' '.join(match[1].split())}]", text)
            temporary.write_text(text + "\n")
            os.replace(temporary, self.path)

    def finish(self, text: str, misses: list[str], num_checked: int) -> None:
        """
        Print a report and write it beside the file, as Markdown, with the machine on top.

        Args:
            text (`str`): The report.
            misses (`list[str]`): The limits that are not met. If there are any, the process ends with status 1.
            num_checked (`int`): Of how many parts limits were checked.
        """
        verdict = f"The limits of {num_checked} parts are met." if num_checked else "No limits were checked."
        text += "\n\n" + ("\n".join(f"NOT MET: {miss}" for miss in misses) or verdict)
        print(f"\n{text}")
        self.write()
        if self.path:
            described = "\n".join(f"- {key}: {value}" for key, value in self.content["machine"].items())
            self.path.with_suffix(".md").write_text(f"{described}\n\n{text}\n")
        if misses:
            sys.exit(1)


def without_record(part: dict[str, Any]) -> dict[str, Any]:
    """A part's figures alone, without when it was measured and how long that took."""
    return {key: value for key, value in part.items() if key not in ("seconds", "date", "load_average_after")}


def in_turn(names: Iterable[str], turn: int) -> list[str]:
    """The names, each of them first, second and so on equally often, so that nothing that drifts favours one."""
    names = list(names)
    start = turn % len(names)
    return names[start:] + names[:start]


def median_and_range(values: Iterable[float], digits: int = 1) -> str:
    values = list(values)
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def plot_ratios(
    file: Path,
    panels: dict[str, dict[str, dict[str, list[float]]]],
    marks: dict[str, dict[str, tuple[str, float]]] | None = None,
) -> None:
    """
    Draw ratios, the panels beside each other: a dot for a median, a line from the lowest to the highest.

    Args:
        file (`Path`): The file to write. None is, where nothing has been measured.
        panels (`dict[str, dict[str, dict[str, list[float]]]]`): For each panel's title, for each row's label, for each
            series' name the ratios turn by turn. All panels have the same rows.
        marks (`dict[str, dict[str, tuple[str, float]]]`, *optional*): For a panel's title, for a series' name what to
            compare it with, by name and value.
    """
    from matplotlib.figure import Figure

    if not any(panels.values()):
        return
    rows = list(next(iter(panels.values())))
    names = list(dict.fromkeys(name for panel in panels.values() for series in panel.values() for name in series))
    figure = Figure(figsize=(4 + 4 * len(panels), 1.5 + 0.5 * len(rows)), layout="constrained")
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, panel) in zip(columns, panels.items(), strict=True):
        for number, name in enumerate(names):
            for row, label in enumerate(rows):
                ratios = panel[label].get(name)
                if ratios:
                    place = row + 0.15 * (number - (len(names) - 1) / 2)
                    axes.plot([min(ratios), max(ratios)], [place, place], color=f"C{number}", linewidth=1)
                    axes.plot(statistics.median(ratios), place, "o", color=f"C{number}")
            axes.plot([], [], "o-", color=f"C{number}", label=name)
        for name, (mark, value) in (marks or {}).get(title, {}).items():
            if name in names:
                axes.axvline(value, color=f"C{names.index(name)}", linestyle=":", label=f"{name}, {mark}")
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set(title=title, yticks=range(len(rows)), yticklabels=rows)
        axes.grid(axis="x", alpha=0.3)
        axes.legend()
    # From the top
    columns[0].set_ylim(len(rows) - 0.5, -0.5)
    save_figure(figure, file)
