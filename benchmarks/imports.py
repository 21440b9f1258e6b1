"""
How long it takes to import the package, over how long it takes to import Transformers.

    python benchmarks/imports.py --output results

benchmarks/README.md says what is measured and how. Exits with status 1 where the limit is not met.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from _measure import describe_machine, in_turn, median_and_range
from tqdm import tqdm


STATEMENTS = {
    "transformers": "import transformers",
    "both": "import transformers, transformers_llava_sp",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a folder for imports.json and imports.md")
    parser.add_argument("--turns", type=int, default=15, help="how often each is imported (default: 15)")
    arguments = parser.parse_args()
    if arguments.turns < 1:
        parser.error("--turns must be 1 or more")
    machine = describe_machine()
    described = "\n".join(f"- {key}: {value}" for key, value in machine.items())
    print(described, flush=True)
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for turn in tqdm(range(arguments.turns + 1), desc="importing", unit="turn"):
        for name in in_turn(STATEMENTS, turn):
            seconds = measure(STATEMENTS[name])
            # The first turn brings the files into memory
            if turn:
                times[name].append(seconds)

    ratios = [ours / theirs for ours, theirs in zip(times["both"], times["transformers"], strict=True)]
    lines = ["| statement | seconds |", "|---|---:|"]
    lines += [f"| `{STATEMENTS[name]}` | {median_and_range(seconds, 3)} |" for name, seconds in times.items()]
    met = statistics.median(ratios) <= TIME_LIMIT
    lines += [
        "",
        f"Both over Transformers alone: {median_and_range(ratios, 3)}, at most {TIME_LIMIT}: "
        f"{'met' if met else 'NOT MET'}",
    ]
    text = "\n".join(lines)
    print(f"\n{text}")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        figures = json.dumps({"machine": machine, "seconds": times, "ratios": ratios}, indent=2)
        (arguments.output / "imports.json").write_text(f"{figures}\n")
        (arguments.output / "imports.md").write_text(f"{described}\n\n{text}\n")
    if not met:
        sys.exit(1)


if __name__ == "__main__":
    main()
