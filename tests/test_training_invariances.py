"""
Invariances of training, through the command: how a step is cut into batches and over processes changes neither loss
nor gradient; every record comes once in an epoch, in whatever order; and so it is with a stream, also a resumed one.

As a program, this file is one of several processes that train together, one run after the other.
"""

import json
import os
import shutil
import subprocess
import sys
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, RECORDS
from safetensors.torch import load_file
from test_training import options
from typer.testing import CliRunner

import transformers_llava_sp
from transformers_llava_sp.cli import app
from transformers_llava_sp.training import train as train_module
from transformers_llava_sp.training.trainer import LlavaSPTrainer


GOLDEN = FIXTURES / "mini-cropping" / "golden"
LONG = "It is a picture of which I can tell you much more than you want to know. "
# Neither a multiple of the batch nor of the processes
NUM_RECORDS = 17
STRATEGIES = ("group_by_length", "random", "sequential")
METHODS = {"lora": ["lora"], "projector": ["pretrain", "--stage", "finetune"]}
WEIGHTS = {"lora": "adapter_model.safetensors", "projector": "model.safetensors"}


class SeeingTrainer(LlavaSPTrainer):
    """Writes down which records each process trains on in each step."""

    def training_step(self, model, inputs, *args, **kwargs):
        seen = {"epoch": int(self.state.epoch or 0), "step": self.state.global_step, "ids": inputs["ids"]}
        with seen_file(self.args.output_dir, self.args.process_index).open("a") as file:
            print(json.dumps(seen), file=file)
        return super().training_step(model, inputs, *args, **kwargs)


def seen_file(output: str | Path, rank: int) -> Path:
    return Path(f"{output}-seen-{rank}.jsonl")


def train_one_after_the_other(runs: list[dict]) -> None:
    train_module.LlavaSPTrainer = SeeingTrainer
    for run in runs:
        if "checkpoint" in run:
            if os.environ["RANK"] == "0":
                shutil.copytree(*run["checkpoint"])
            torch.distributed.barrier()
        app(["train", *run["arguments"]], standalone_mode=False)


def make_records(number: int) -> list[dict]:
    """Texts and images, with answers of one word and of a hundred."""
    records = []
    for index, (image, question, answer) in zip(range(number), cycle(RECORDS), strict=False):
        answer = answer if index % 3 else f"{answer} {LONG * (1 + index % 5)}"
        turns = [
            {"from": "human", "value": f"<image>\n{question}" if image else question},
            {"from": "gpt", "value": answer},
        ]
        kind = {"image": image} if image else {}
        records.append({"id": f"{'image' if image else 'text'} {index}", "conversations": turns, **kind})
    return records


def ids(records: list[dict]) -> list[str]:
    return [record["id"] for record in records]


def seen_in_steps(output: Path, num_processes: int, epoch: int | None = None) -> list[list[list[str]]]:
    """The ids of each batch, for each step that is one batch of every process."""
    lines = [
        [json.loads(line) for line in seen_file(output, rank).read_text().splitlines()]
        for rank in range(num_processes)
    ]
    return [
        [seen["ids"] for seen in batches]
        for batches in zip(*lines, strict=True)
        if epoch in (None, batches[0]["epoch"])
    ]


def flat(steps: list[list[list[str]]]) -> list[str]:
    return [record for batches in steps for batch in batches for record in batch]


def logged(output: Path) -> list[list[float]]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [[entry["loss"], entry["grad_norm"]] for entry in history if "loss" in entry]


def assert_same_run(output: Path, other: Path) -> None:
    assert logged(output) == logged(other)
    expected, found = (load_file(folder / WEIGHTS["lora"]) for folder in (output, other))
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with what is trained on: three steps of eight records, and a number that fits no batch."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "steps.json").write_text(json.dumps(make_records(24)))
    records = make_records(NUM_RECORDS)
    (folder / "odd.json").write_text(json.dumps(records))
    (folder / "odd.jsonl").write_text("\n".join(map(json.dumps, records)))
    import datasets

    rows = [
        {
            "id": record["id"],
            "conversations": record["conversations"],
            "image": [str(GOLDEN / record["image"])] if "image" in record else [],
        }
        for record in records
    ]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.List(datasets.Image()))
    table.save_to_disk(folder / "table")
    return folder


def arguments_of(workspace: Path, data: Path, output: Path, method: str = "lora", **overrides) -> list[str]:
    common = {"train_data": data / "steps.json", "learning_rate": 1e-3, "use_cpu": True, "disable_tqdm": True}
    return [*METHODS[method], *options(workspace, output, **{**common, **overrides})]


def invariance(batch: int, accumulate: int) -> dict:
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "num_train_epochs": 1}


def odd(data: Path, name: str = "odd.json", **overrides) -> dict:
    """Two epochs with dropout, which makes the random states of processes differ."""
    return {
        "train_data": data / name,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "lora_dropout": 0.1,
        **overrides,
    }


def stream(data: Path, name: str = "odd.jsonl", workers: int = 0, **overrides) -> dict:
    return odd(data, name, streaming=True, max_steps=5, dataloader_num_workers=workers, **overrides)


def expected_stream(records: list[str], workers: int, batch: int, num_steps: int) -> list[str]:
    """What a stream gives that is shared by worker processes, each of which makes every so manieth batch."""
    streams = [cycle(records[worker :: max(workers, 1)]) for worker in range(max(workers, 1))]
    return [record for step in range(num_steps) for record in islice(streams[step % len(streams)], batch)]


def run_alone(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "LlavaSPTrainer", SeeingTrainer)
        result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def eight_at_once(workspace, data, tmp_path_factory):
    """For each method, the losses and gradient norms of three steps of one batch of eight."""
    folder = tmp_path_factory.mktemp("eight")
    for method in METHODS:
        run_alone(arguments_of(workspace, data, folder / method, method, **invariance(8, 1)))
    return {method: logged(folder / method) for method in METHODS}


def assert_invariant(found: list[list[float]], expected: list[list[float]]) -> None:
    assert len(expected) == 3
    # The steps differ, and so do their gradients: what agrees agrees in more than the start
    assert len({loss for loss, _ in expected}) == 3
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


# One process


@pytest.mark.parametrize("method", METHODS)
def test_eight_accumulated_batches_equal_one(eight_at_once, workspace, data, tmp_path, method):
    run_alone(arguments_of(workspace, data, tmp_path / "out", method, **invariance(1, 8)))
    assert [len(batch) for batches in seen_in_steps(tmp_path / "out", 1) for batch in batches] == [1] * 24
    assert_invariant(logged(tmp_path / "out"), eight_at_once[method])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_record_once_in_each_epoch_also_resumed(workspace, data, tmp_path, strategy):
    overrides = odd(data, train_sampling_strategy=strategy, save_strategy="steps", save_steps=7)
    run_alone(arguments_of(workspace, data, tmp_path / "whole", **overrides))
    first, second = (flat(seen_in_steps(tmp_path / "whole", 1, epoch)) for epoch in (0, 1))
    expected = ids(make_records(NUM_RECORDS))
    assert sorted(first) == sorted(second) == sorted(expected)
    assert (first == second) == (strategy == "sequential")
    assert (first == expected) == (strategy == "sequential")
    # Within the second epoch, of five steps each
    shutil.copytree(tmp_path / "whole" / "checkpoint-7", tmp_path / "resumed" / "checkpoint-7")
    run_alone(arguments_of(workspace, data, tmp_path / "resumed", resume_from_checkpoint=True, **overrides))
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize("workers", [0, 2], ids=["no workers", "two workers"])
def test_stream_begins_anew_at_its_end_and_resumes_there(workspace, data, tmp_path, workers):
    overrides = stream(data, workers=workers, save_strategy="steps", save_steps=4, per_device_train_batch_size=8)
    run_alone(arguments_of(workspace, data, tmp_path / "whole", **overrides))
    expected = expected_stream(ids(make_records(NUM_RECORDS)), workers, 8, 5)
    assert flat(seen_in_steps(tmp_path / "whole", 1)) == expected
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    run_alone(arguments_of(workspace, data, tmp_path / "resumed", resume_from_checkpoint=True, **overrides))
    assert flat(seen_in_steps(tmp_path / "resumed", 1)) == expected[4 * 8 :]
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_stream_of_nothing_but_bad_records_is_an_error(workspace, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n')
    overrides = {"train_data": tmp_path / "bad.jsonl", "streaming": True, "max_steps": 1}
    result = CliRunner().invoke(
        app, ["train", "lora", *options(workspace, tmp_path / "out", **overrides), "--skip-bad-records"]
    )
    assert result.exit_code == 1
    assert f"llava-sp: error: {tmp_path / 'bad.jsonl'} has no record to train on." in result.output


def test_stream_needs_a_number_of_steps(workspace, tmp_path):
    result = CliRunner().invoke(app, ["train", "lora", *options(workspace, tmp_path / "out"), "--streaming"])
    assert result.exit_code == 1
    assert "llava-sp: error: `streaming` needs `max_steps`" in result.output


# Two processes


@pytest.fixture(scope="module")
def together(workspace, data, tmp_path_factory) -> Path:
    """The folder of all that two processes have trained together, by the names below."""
    folder = tmp_path_factory.mktemp("together")
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}
    runs: dict[str, dict] = {}
    for method in METHODS:
        runs[f"{method}-4"] = {"method": method, **invariance(4, 1)}
        runs[f"{method}-2-accumulated"] = {"method": method, **invariance(2, 2)}
    for strategy in STRATEGIES:
        runs[strategy] = odd(data, train_sampling_strategy=strategy, **saving)
    runs["stream"] = stream(data, **saving)
    runs["stream-workers"] = stream(data, workers=2)
    runs["table"] = stream(data, "table")
    runs["table-workers"] = stream(data, "table", workers=2)
    plan: list[dict] = [
        {"arguments": arguments_of(workspace, data, folder / name, **overrides)} for name, overrides in runs.items()
    ]
    for name in ("group_by_length", "stream"):
        resumed = arguments_of(workspace, data, folder / f"{name}-resumed", resume_from_checkpoint=True, **runs[name])
        paths = [str(folder / path / "checkpoint-4") for path in (name, f"{name}-resumed")]
        plan.append({"arguments": resumed, "checkpoint": paths})
    (folder / "plan.json").write_text(json.dumps(plan))
    source = str(Path(transformers_llava_sp.__file__).parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", __file__]
    result = subprocess.run(
        [*command, str(folder / "plan.json")],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([source, str(Path(__file__).parent)]),
            "TOKENIZERS_PARALLELISM": "false",
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["4", "2-accumulated"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(together, eight_at_once, method, cut):
    assert_invariant(logged(together / f"{method}-{cut}"), eight_at_once[method])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_record_over_two_processes(together, strategy):
    """The last step is filled up with the first records of the epoch, so that both processes have a whole batch."""
    expected = ids(make_records(NUM_RECORDS))
    orders = [flat(seen_in_steps(together / strategy, 2, epoch)) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order[:NUM_RECORDS]) == sorted(expected)
        assert order[NUM_RECORDS:] == order[: 24 - NUM_RECORDS]
    assert (orders[0] == orders[1]) == (strategy == "sequential")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers"),
    [("stream", 0), ("stream-workers", 2), ("table", 0), ("table-workers", 1)],
    ids=["JSON", "JSON, two workers", "table", "table of one shard, two workers"],
)
def test_processes_share_a_stream(together, name, workers):
    steps = seen_in_steps(together / name, 2)
    assert flat(steps) == expected_stream(ids(make_records(NUM_RECORDS)), workers, 8, 5)
    assert len(set(flat(steps[:2]))) == 16


@pytest.mark.slow
def test_processes_with_different_numbers_of_images_share_a_stream(together):
    """As one process would hand out stacked batches to all, they would need as many images."""
    steps = seen_in_steps(together / "stream", 2)
    num_images = [[sum(record.startswith("image") for record in batch) for batch in step] for step in steps]
    assert any(one != other for one, other in num_images)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["group_by_length", "stream"])
def test_two_processes_resume(together, name):
    """Within the second epoch, of three steps each, and within the second pass over the stream."""
    assert_same_run(together / name, together / f"{name}-resumed")


if __name__ == "__main__":
    train_one_after_the_other(json.loads(Path(sys.argv[1]).read_text()))
