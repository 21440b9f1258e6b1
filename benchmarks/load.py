"""
Memory and time that loading takes: LLaVA-SP against Transformers' LLaVA, in the same run.

    python benchmarks/load.py --output results   # 3.4 GB each, five loads of each checkpoint, a minute or two

Both models get random bfloat16 weights in the released 7B's widths, with fewer language model layers; they are written
to a temporary folder, as a single file and as shards, and removed afterwards. benchmarks/README.md says what is
measured and how. Exits with status 1 where a limit is not met.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _measure import (
    PAGE_SIZE,
    PeakMemory,
    Results,
    add_output_arguments,
    check_output_arguments,
    count_bytes,
    describe_machine,
    in_turn,
    median_and_range,
    plot_ratios,
    read_busy_seconds,
    read_into_page_cache,
    read_memory,
)
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionModel,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from transformers_llava_sp import LlavaSPConfig, LlavaSPForConditionalGeneration


MODELS = ("llava-sp", "llava")
SHARD_SIZES = {"single file": "50GB", "shards": "500MB"}
MIN_BYTES = 2 * 10**9

# Both are the acceptance limits: the weights' size plus 5 %, LLaVA's time per byte plus 5 %
MEMORY_LIMIT = 1.05
TIME_LIMIT = 1.05

SAMPLING_INTERVAL = 0.002  # seconds
# Other processes take a part of the time of the measured one: a load during which they used more than this share of a
# core is measured again, after a pause
MAX_DISTURBANCE = 0.15
PAUSE = 5  # seconds


def make_models(text_layers: int) -> dict[str, PreTrainedModel]:
    """
    The two models on the meta device, in bfloat16: LLaVA-SP in the released widths with `text_layers` layers in its
    language model, and LLaVA with the same tower and so many language model layers, of such a width, that it is as
    large.
    """
    config = LlavaSPConfig()
    config.text_config.num_hidden_layers = text_layers
    with torch.device("meta"):
        llava_sp = LlavaSPForConditionalGeneration(config).to(torch.bfloat16)
        projector = llava_sp.model.multi_modal_projector
        # The patch MLP is LLaVA's whole projector
        surplus = projector.num_parameters() - sum(parameter.numel() for parameter in projector.patch_mlp.parameters())
        hidden_size, mlp_size = config.text_config.hidden_size, config.text_config.intermediate_size
        layer = llava_sp.model.language_model.layers[0]
        attention = sum(parameter.numel() for parameter in layer.self_attn.parameters())
        llava_layers = text_layers + round(surplus / sum(parameter.numel() for parameter in layer.parameters()))
        mlp = (
            surplus + text_layers * 3 * hidden_size * mlp_size - (llava_layers - text_layers) * attention
        ) / llava_layers
        text_config = {
            **config.text_config.to_dict(),
            "num_hidden_layers": llava_layers,
            "intermediate_size": round(mlp / (3 * hidden_size) / 64) * 64,
        }
        llava_config = LlavaConfig(
            vision_config=config.vision_config, text_config=text_config, image_token_index=config.image_token_id
        )
        llava = LlavaForConditionalGeneration(llava_config).to(torch.bfloat16)
    return {"llava-sp": llava_sp, "llava": llava}


def write_checkpoint(model: PreTrainedModel, folder: Path, shard_size: str) -> None:
    """Save a model of the meta device, every tensor filled with the same block of random numbers, over and over."""
    block = torch.empty(2**24, dtype=model.dtype).uniform_(-0.02, 0.02, generator=torch.Generator().manual_seed(0))
    # The model itself stays on the meta device, for the next layout
    state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
    for tensor in state.values():
        for part in tensor.view(-1).split(block.numel()):
            part.copy_(block[: part.numel()])
    model.save_pretrained(folder, state_dict=state, max_shard_size=shard_size)


def load(folder: str, dtype: str) -> None:
    """
    The measured process: import everything, say so, wait for a line, load, and print how long it took in seconds.
    """
    torch.set_grad_enabled(False)
    # Transformers imports a model's code when it first asks for it: LLaVA's must not count as loading either
    assert all((AutoModelForImageTextToText, LlavaForConditionalGeneration, CLIPVisionModel, LlamaModel))
    print("ready", flush=True)
    sys.stdin.readline()

    start, cpu_start = time.perf_counter(), time.process_time()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    loaded = time.perf_counter()
    # Weights of the stored dtype are views of the mapped file: writing to every page makes them memory. By one thread,
    # since PyTorch would use more for large tensors only, and page faults of several threads wait for each other.
    torch.set_num_threads(1)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.view(-1)[:: PAGE_SIZE // tensor.element_size()].mul_(1)
    written, cpu_written = time.perf_counter(), time.process_time()

    result = {
        "load_s": loaded - start,
        "load_and_write_s": written - start,
        "cpu_s": cpu_written - cpu_start,
        "bytes": count_bytes(model.state_dict().values()),
    }
    print(json.dumps(result), flush=True)
    # Stay until the last sample is taken
    sys.stdin.readline()


def measure(folder: Path, dtype: str) -> dict[str, float]:
    """Load a checkpoint in a fresh process. Its memory is sampled from here, which costs the process no time."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--load", str(folder), "--dtype", dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    errors: list[str] = []
    # Progress bars and warnings: read all the time, or a full pipe would stop the process
    drain = threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)
    drain.start()
    try:
        ready = process.stdout.readline() == "ready\n"
        before = read_memory(process.pid)
        if not ready or before is None:
            process.wait()
            drain.join()
            raise RuntimeError(
                f"The process that loads {folder} did not start (status {process.returncode}):\n{''.join(errors)}"
            )
        with PeakMemory(process.pid, SAMPLING_INTERVAL) as peak:
            busy = read_busy_seconds()
            process.stdin.write("load\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            busy = read_busy_seconds() - busy
        if not answer:
            process.wait()
            drain.join()
            raise RuntimeError(
                f"The process that loads {folder} failed (status {process.returncode}):\n{''.join(errors)}"
            )
    finally:
        process.stdin.close()
        process.wait()
    result = json.loads(answer)
    result["peak_anonymous_bytes"] = peak.anonymous - before["RssAnon"]
    result["peak_mapped_bytes"] = peak.mapped - before["RssFile"]
    result["disturbance"] = (busy - result["cpu_s"]) / result["load_and_write_s"]
    return result


def measure_undisturbed(folder: Path, dtype: str, max_tries: int) -> dict[str, float]:
    """[`measure`], again where other processes came between; the least disturbed of all tries if they always do."""
    tries = []
    while not tries or (tries[-1]["disturbance"] > MAX_DISTURBANCE and len(tries) < max_tries):
        if tries:
            time.sleep(PAUSE)
        tries.append(measure(folder, dtype))
    return {**min(tries, key=lambda result: result["disturbance"]), "tries": len(tries)}


def summarise(runs: dict[str, list[dict[str, float]]]) -> dict[str, object]:
    """Per model: bytes, memory as a multiple of them, seconds per 10^9 bytes; and LLaVA-SP's time over LLaVA's."""
    summary: dict[str, object] = {}
    per_byte: dict[str, list[float]] = {}
    for name, results in runs.items():
        per_byte[name] = [result["load_and_write_s"] / result["bytes"] * 1e9 for result in results]
        summary[name] = {
            "bytes": results[0]["bytes"],
            "peak_anonymous_multiple": max(result["peak_anonymous_bytes"] / result["bytes"] for result in results),
            "peak_mapped_multiple": max(result["peak_mapped_bytes"] / result["bytes"] for result in results),
            "seconds": statistics.median(result["load_and_write_s"] for result in results),
            "seconds_before_writing": statistics.median(result["load_s"] for result in results),
            "seconds_per_gigabyte": statistics.median(per_byte[name]),
            "seconds_per_gigabyte_range": (min(per_byte[name]), max(per_byte[name])),
        }
    summary["worst_disturbance"] = max(result["disturbance"] for results in runs.values() for result in results)
    ratios = [ours / theirs for ours, theirs in zip(per_byte["llava-sp"], per_byte["llava"], strict=True)]
    summary["time_ratio"] = statistics.median(per_byte["llava-sp"]) / statistics.median(per_byte["llava"])
    summary["ratios"] = ratios
    return summary


def report(results: Results) -> tuple[str, list[str], int]:
    """The figures as Markdown, the limits that are not met, and of how many parts they were checked."""
    lines = [
        "| checkpoint | model | size | peak anonymous memory | mapped | load | with writing | s/GB, median (range) |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    notes, misses = [""], []
    for layout in SHARD_SIZES:
        summary = results[layout]["summary"]
        for name in MODELS:
            row = summary[name]
            low, high = row["seconds_per_gigabyte_range"]
            lines.append(
                f"| {layout} | {name} | {row['bytes'] / 1e9:.3f} GB | {row['peak_anonymous_multiple']:.3f} x | "
                f"{row['peak_mapped_multiple']:.3f} x | {row['seconds_before_writing']:.2f} s | "
                f"{row['seconds']:.2f} s | {row['seconds_per_gigabyte']:.3f} ({low:.3f} to {high:.3f}) |"
            )
        memory, ratio = summary["llava-sp"]["peak_anonymous_multiple"], summary["time_ratio"]
        for value, limit, text in (
            (memory, MEMORY_LIMIT, f"peak anonymous memory {memory:.3f} x the weights"),
            (
                ratio,
                TIME_LIMIT,
                f"time per byte {ratio:.3f} x LLaVA's, in pairs {median_and_range(summary['ratios'], 3)}",
            ),
        ):
            notes.append(f"{layout}: {text}, at most {limit}")
            if value > limit:
                misses.append(notes[-1])
        notes.append(
            f"{layout}: other processes used up to {summary['worst_disturbance']:.0%} of a core during a load"
        )
    return "\n".join(lines + notes), misses, len(SHARD_SIZES)


def measure_layout(
    models: dict[str, PreTrainedModel], layout: str, folder: str, dtype: str, repeats: int, max_tries: int
) -> dict[str, Any]:
    """
    Loads of both models, in turns.

    Args:
        models (`dict[str, PreTrainedModel]`): The models.
        layout (`str`): How their files are cut, one of `SHARD_SIZES`.
        folder (`str`): Where they are written, and removed afterwards.
        dtype (`str`): The number format to load in.
        repeats (`int`): Loads of each model, after one to warm up.
        max_tries (`int`): How often a disturbed load is measured at most.

    Returns:
        `dict[str, Any]`: The loads of each model, and what [`summarise`] makes of them.
    """
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in MODELS}
    with (
        tempfile.TemporaryDirectory(dir=folder) as temporary,
        tqdm(total=len(MODELS) * (repeats + 2), unit="step") as progress,
    ):
        folders = {name: Path(temporary, name) for name in MODELS}
        for name in MODELS:
            progress.set_description(f"writing {name}, {layout}")
            write_checkpoint(models[name], folders[name], SHARD_SIZES[layout])
            read_into_page_cache(folders[name].glob("*.safetensors"))
            progress.update()
        for repeat in range(repeats + 1):
            # Neither always comes first, so that nothing that drifts favours one
            for name in in_turn(MODELS, repeat):
                progress.set_description(f"loading {name}, {layout}")
                if repeat:
                    runs[name].append(measure_undisturbed(folders[name], dtype, max_tries))
                else:
                    measure(folders[name], dtype)  # to warm up
                progress.update()
    return {"summary": summarise(runs), "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--text-layers", type=int, default=1, help="language model layers of LLaVA-SP")
    parser.add_argument("--repeats", type=int, default=5, help="measured loads of each checkpoint, after one warm-up")
    parser.add_argument("--tries", type=int, default=20, help="how often a disturbed load is measured at most")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="number format to load in; the files hold bfloat16",
    )
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the temporary folder is made")
    add_output_arguments(parser, "load")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.load, arguments.dtype)
        return
    if arguments.repeats < 1 or arguments.text_layers < 1:
        parser.error("--repeats and --text-layers must be 1 or more")
    # Whoever ends this does not want to keep the checkpoints
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    check_output_arguments(parser, arguments)
    machine = {
        **describe_machine(),
        "device": "CPU",
        "dtype": arguments.dtype,
        "text_layers": arguments.text_layers,
        "repeats": arguments.repeats,
    }
    path = arguments.output / "load.json" if arguments.output else None
    results = Results(path, machine, ("dtype", "text_layers", "repeats"))
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    models = make_models(arguments.text_layers)
    sizes = {name: count_bytes(model.state_dict().values()) for name, model in models.items()}
    assert min(sizes.values()) >= MIN_BYTES, f"too small to say anything: {sizes}"
    for layout in SHARD_SIZES:
        results.add(
            layout,
            partial(
                measure_layout, models, layout, arguments.folder, arguments.dtype, arguments.repeats, arguments.tries
            ),
        )
    figures = report(results)
    if arguments.plot:
        rows = {layout: {"LLaVA-SP": results[layout]["summary"]["ratios"]} for layout in SHARD_SIZES}
        plot_ratios(arguments.output / "load.png", {"time per byte over LLaVA's": rows})
    results.finish(*figures)


if __name__ == "__main__":
    main()
