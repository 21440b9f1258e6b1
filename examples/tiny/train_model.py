"""
A tiny model from nothing, as it comes with the package:

    python examples/tiny/train_model.py cropping work/tiny

draws scenes, trains a vision tower, makes a model around it, trains that by `llava-sp train` with the recipe beside
this file, asks it about three splits, and writes it to `work/tiny/tiny-cropping` with a card, the log of its training
and its results. What an earlier run has finished is not done again, and a training that was killed goes on from its
newest checkpoint; both variants share tower and scenes.

    python examples/tiny/train_model.py pooling work/trial --scenes 2000 --tower-scenes 2000

does the same with little of everything. Both need the extra `train`.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from evaluate import BlindBaseline, average, evaluate, load, to_markdown, training_questions
from huggingface_hub import ModelCard


HERE = Path(__file__).parent
SPLITS = ("validation", "test", "held_out")
# Left out of what is shipped: the model's code, which the package is itself, and what else a training leaves
UNSHIPPED = ("*.py", "*.bin", "trainer_state.json", "README.md")
# Of configurations: where the code is, that the cache was off in training, and where the tokenizer came from
UNSHIPPED_SETTINGS = ("auto_map", "use_cache", "is_local", "local_files_only")
# Of what Trainer logs, what tells how the training went
LOGGED = ("step", "epoch", "loss", "grad_norm", "learning_rate")
# A training that is killed goes on from the newest
CHECKPOINTS = ("--save_strategy", "steps", "--save_steps", "1000", "--save_total_limit", "1")

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
language: en
tags: [llava-sp]
---

# {{ name }}

A LLaVA-SP of {{ parameters }} parameters, to try things on: for tests, examples and a first look. Its spatial tokens
are made by {{ variant }}. It has been trained from nothing on pictures of 96 x 96 pixels with one to four coloured
shapes, and answers questions about them: colours, shapes, numbers and places. It knows nothing else. Other pictures
are resized to that size, and what it says about them means nothing.

```python
from transformers import pipeline
from transformers_llava_sp import tiny_model_path

pipe = pipeline("image-text-to-text", model=tiny_model_path("{{ variant }}"))
```

## What it can do

Exact match of greedy answers, each to a question by itself. *Blind baseline*: the most frequent answer to that very
question in the training scenes, or to its kind of question where there is none. *held_out*: scenes and questions about
what training has never shown, four pairs of a colour and a shape, three triangles and three purple objects.
{% for split, scores in tables.items() %}
### {{ split }}, {{ test_scenes }} scenes

{{ scores }}
{% endfor %}
`results.json` has these numbers; `python examples/tiny/evaluate.py {{ name }} --split test` gives them again.

## How it was made

    {{ command }}

with seed {{ seed }}: at first a CLIP vision tower, on {{ tower_scenes }} scenes {{ tower_epochs }} times, to tell what
lies where patch by patch, the heads for which were dropped; then, around it, projector and language model, on
{{ scenes }} scenes with about eight questions each{{ rounds }}. Transformers {{ transformers }}, PyTorch {{ torch }},
{{ device }}. `training_log.json` has the course of it.
"""


def note_of(output: Path) -> Path:
    """The file that says what a file or folder depends on."""
    return output.with_name(f"{output.name}.options.json")


def once(
    output: Path,
    make: Callable[[Path], None],
    sources: Sequence[Path] = (),
    resumable: bool = False,
    **options: Any,
) -> Path:
    """
    Make a file or a folder, unless an earlier run has finished it. It gets its name when it is whole.

    Args:
        output (`Path`): The file or folder.
        make (`Callable`): Makes it, where it is told to.
        sources (`Sequence[Path]`, *optional*): What it is made from: other such files and folders, or a recipe.
        resumable (`bool`, *optional*, defaults to `False`): Whether `make` goes on with what it has left unfinished.
        options (*optional*): What it depends on. Noted beside it, and what its sources depend on; one that was made
            with others is refused.
    """
    made_from = {
        source.name: sha256(source.read_bytes()).hexdigest()[:16]
        if source.is_file()
        else json.loads(note_of(source).read_text())
        for source in sources
    }
    options = {**options, "sources": made_from} if made_from else options
    note = note_of(output)
    if output.exists():
        before = json.loads(note.read_text())
        if before != options:
            raise SystemExit(
                f"{output} was made with {before}, and now it is {options}: remove it, or take another folder."
            )
        return output
    unfinished = output.with_name(f"_{output.name}")
    begun = note_of(unfinished)
    if not (resumable and begun.exists() and json.loads(begun.read_text()) == options):
        shutil.rmtree(unfinished, ignore_errors=True)
    begun.write_text(json.dumps(options) + "\n")
    make(unfinished)
    begun.rename(note)
    unfinished.rename(output)
    return output


def run(
    output: Path, *arguments: Any, sources: Sequence[Path] = (), checkpoints: bool = False, **options: Any
) -> None:
    """
    Run a script with this Python to make a folder, unless it exists, and print the command.

    Args:
        output (`Path`): The folder.
        arguments: The script and its arguments, among them the folder.
        sources (`Sequence[Path]`, *optional*): As of [`once`].
        checkpoints (`bool`, *optional*, defaults to `False`): Whether it is `llava-sp train`, which can be resumed.
        options (*optional*): As of [`once`]; they are passed on, too.
    """

    def make(unfinished: Path) -> None:
        command = [str(unfinished if argument == output else argument) for argument in arguments]
        command += [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        if checkpoints:
            command += CHECKPOINTS
            if any(unfinished.glob("checkpoint-*")):
                command += ["--resume_from_checkpoint", "true"]
        print("+ python", " ".join(command), flush=True)
        # Small matrices: more threads would only wait for each other
        subprocess.run([sys.executable, *command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        for checkpoint in unfinished.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    once(output, make, sources, checkpoints, **options)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """What a training has logged."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [
        {key: value for key, value in entry.items() if key in LOGGED or key.startswith("eval_")} for entry in history
    ]


def evaluate_splits(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The scores of a model on each split."""
    baseline = BlindBaseline(training_questions(arguments.scenes))
    loaded = load(model)
    return {
        split: evaluate(*loaded, split=split, scenes=arguments.test_scenes, baseline=baseline)[0] for split in SPLITS
    }


def write_release(output: Path, model: Path, logs: dict[str, Path], arguments: argparse.Namespace) -> None:
    """Write what is shipped: model and processor without code, the card, the log and the results."""
    results = evaluate_splits(model, arguments)
    shutil.copytree(model, output, ignore=shutil.ignore_patterns(*UNSHIPPED))
    # Saved for the owner alone
    (output / "model.safetensors").chmod(0o644)
    for file in output.glob("*config.json"):
        settings = json.loads(file.read_text())
        kept = {key: value for key, value in settings.items() if key not in UNSHIPPED_SETTINGS}
        if kept != settings:
            file.write_text(json.dumps(kept, indent=2) + "\n")
    log = {stage: read_log(folder) for stage, folder in logs.items()}
    (output / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    shares = {
        split: {
            score.kind: {"number": score.number, "blind": score.blind, "exact_match": score.exact_match}
            for score in (*scores, average(scores))
        }
        for split, scores in results.items()
    }
    (output / "results.json").write_text(json.dumps(shares, indent=1) + "\n")
    name = f"tiny-{arguments.variant}"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    card = ModelCard.from_template(
        card_data=ModelCard(CARD).data,
        template_str=CARD,
        name=name,
        variant=arguments.variant,
        parameters=f"{load(model)[0].num_parameters():,}",
        test_scenes=f"{arguments.test_scenes:,}",
        tables={split: to_markdown(scores) for split, scores in results.items()},
        command=(
            f"python examples/tiny/train_model.py {arguments.variant} work/tiny --seed {arguments.seed} "
            f"--tower-scenes {arguments.tower_scenes} --tower-epochs {arguments.tower_epochs} "
            f"--scenes {arguments.scenes} --rounds {arguments.rounds} --test-scenes {arguments.test_scenes}"
        ),
        seed=arguments.seed,
        tower_scenes=f"{arguments.tower_scenes:,}",
        tower_epochs=f"{arguments.tower_epochs:g}",
        scenes=f"{arguments.scenes:,}",
        rounds=f", {arguments.rounds} times with the learning rate's whole course" if arguments.rounds > 1 else "",
        transformers=transformers.__version__,
        torch=torch.__version__,
        device=accelerator.type if accelerator else f"one thread of a CPU ({platform.machine()})",
    )
    (output / "README.md").write_text(str(card).rstrip() + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=("cropping", "pooling"))
    parser.add_argument("output", type=Path, help="the folder to work in")
    parser.add_argument("--tower-scenes", type=int, default=30_000)
    parser.add_argument("--tower-epochs", type=float, default=6)
    parser.add_argument("--scenes", type=int, default=160_000, help="to train the model on")
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often, each time from where the last one ended (default: 1)"
    )
    parser.add_argument("--test-scenes", type=int, default=500, help="of each split")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    if min(arguments.tower_scenes, arguments.scenes, arguments.test_scenes, arguments.rounds) < 1:
        parser.error("at least one scene of each kind and one round are needed")
    work, seed = arguments.output, arguments.seed
    tower, own = work / "tower", work / arguments.variant
    own.mkdir(parents=True, exist_ok=True)
    size = {"scenes": arguments.tower_scenes, "epochs": arguments.tower_epochs}
    run(tower, HERE / "train_tower.py", tower, **size, seed=seed)
    model, data = own / "start", work / "scenes"
    start = {"spatial_variant": arguments.variant, "seed": seed}
    run(model, HERE / "make_model.py", tower, model, sources=[tower], **start)
    run(data, HERE / "scenes.py", data, split="train", scenes=arguments.scenes)
    recipe = HERE / "train.yaml"
    train = ("-m", "transformers_llava_sp.cli", "train", recipe)
    logs = {"tower": tower}
    for number in range(arguments.rounds):
        name = f"trained-{number + 1}" if number else "trained"
        trained = own / name
        source = ("--model_name_or_path", model, "--train_data", data / "train.json", "--image_folder", data)
        # In another order each time
        order = {"seed": seed + number}
        made_from = [model, data, recipe]
        run(trained, *train, *source, "--output_dir", trained, sources=made_from, checkpoints=True, **order)
        logs[name] = model = trained
    release = once(
        work / f"tiny-{arguments.variant}",
        lambda folder: write_release(folder, trained, logs, arguments),
        sources=[trained],
        test_scenes=arguments.test_scenes,
    )
    print((release / "README.md").read_text())


if __name__ == "__main__":
    main()
