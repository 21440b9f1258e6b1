"""What the benchmarks share: the memory of another process, what else the machine does, and what the machine is."""

import os
import platform
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch
import transformers

from transformers_llava_sp import __version__


PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
BLOCK_SIZE = 2**24  # bytes read at once


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
