"""
How long it takes to import the package, over how long it takes to import Transformers.

    python benchmarks/imports.py --output results

benchmarks/README.md says what is measured and how. Exits with status 1 where the limit is not met.
"""

import argparse
import statistics
import subprocess
import sys
from functools import partial
from typing import Any

from _measure import (
    Results,
    add_output_arguments,
    check_output_arguments,
    describe_machine,
    in_turn,
    median_and_range,
    plot_ratios,
)
from tqdm import tqdm


# What the limit is about, measured more often
COMPARED = {
    "transformers": "import transformers",
    "both": "import transformers, transformers_llava_sp",
}
OTHERS = {
    "package": "import transformers_llava_sp",
    # What a user waits for before anything can be loaded
    "classes": "from transformers import AutoModelForImageTextToText, AutoProcessor",
    "package, classes": (
        "import transformers_llava_sp; from transformers import AutoModelForImageTextToText, AutoProcessor"
    ),
    "classes, package": (
        "from transformers import AutoModelForImageTextToText, AutoProcessor; import transformers_llava_sp"
    ),
    "model": "from transformers_llava_sp import LlavaSPForConditionalGeneration",
}
# The acceptance limit: both over Transformers alone
TIME_LIMIT = 1.05

TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def measure(statement: str) -> float:
    """Seconds that a statement takes in a fresh process, without the time of starting it."""
    process = subprocess.run([sys.executable, "-c", TIMED.format(statement)], stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(f"`{statement}` failed.")
    return float(process.stdout)


def measure_all(turns: int) -> dict[str, Any]:
    """
    The statements that are compared in turns, and then the others.

    Args:
        turns (`int`): How many for those that are compared, after one that brings the files into memory; an eighth for
            the others.

    Returns:
        `dict[str, Any]`: The seconds of each turn for each statement.
    """
    times: dict[str, list[float]] = {}
    for statements, number in ((COMPARED, turns), (OTHERS, max(turns // 8, 1))):
        times |= {name: [] for name in statements}
        for turn in tqdm(range(number + 1), desc=f"importing {', '.join(statements)}", unit="turn"):
            for name in in_turn(statements, turn):
                seconds = measure(statements[name])
                if turn:
                    times[name].append(seconds)
    return {"times": times}


def report(part: dict[str, Any]) -> tuple[str, list[str], int]:
    """The figures as Markdown, the limit if it is not met, and of how many parts it was checked."""
    times = part["times"]
    part["ratios"] = [ours / theirs for ours, theirs in zip(times["both"], times["transformers"], strict=True)]
    lines = ["| statement | seconds |", "|---|---:|"]
    statements = {**COMPARED, **OTHERS}
    lines += [f"| `{statements[name]}` | {median_and_range(seconds, 3)} |" for name, seconds in times.items()]
    text = f"both over Transformers alone {median_and_range(part['ratios'], 3)}, at most {TIME_LIMIT}"
    misses = [text] if statistics.median(part["ratios"]) > TIME_LIMIT else []
    return "\n".join([*lines, "", text]), misses, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_arguments(parser, "imports")
    parser.add_argument(
        "--turns", type=int, default=40, help="how often those that are compared are imported (default: 40)"
    )
    arguments = parser.parse_args()
    if arguments.turns < 1:
        parser.error("--turns must be 1 or more")
    check_output_arguments(parser, arguments)
    machine = {**describe_machine(), "device": "CPU", "turns": arguments.turns}
    path = arguments.output / "imports.json" if arguments.output else None
    results = Results(path, machine, ("turns",))
    print("\n".join(f"{key}: {value}" for key, value in machine.items()), flush=True)
    results.add("imports", partial(measure_all, arguments.turns))
    figures = report(results["imports"])
    if arguments.plot:
        rows = {"importing both": {"LLaVA-SP": results["imports"]["ratios"]}}
        plot_ratios(arguments.output / "imports.png", {"time over that of importing Transformers": rows})
    results.finish(*figures)


if __name__ == "__main__":
    main()
