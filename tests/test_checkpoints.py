"""
Checkpoints: at whichever moment a run is killed, its disk is full or its loss is no number, the newest checkpoint that
is there is whole, and resuming from it gives what an uninterrupted run gives.

As a program, this file trains and has every save of the second checkpoint go wrong, one after the other.
"""

import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from test_training import options, run

import transformers_llava_sp
from transformers_llava_sp.training import train as train_module
from transformers_llava_sp.training.checkpoints import STAGING_NAME, find_problem, newest_checkpoint, staged
from transformers_llava_sp.training.train import train
from transformers_llava_sp.training.trainer import LlavaSPTrainer


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "use_cpu": True, "lora_dropout": 0.1}
WEIGHTS = {"lora": "adapter_model.safetensors", "pretrain": "model.safetensors"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the other processes here have it: how a sum is cut over threads changes its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def environment() -> dict[str, str]:
    source = str(Path(transformers_llava_sp.__file__).parents[1])
    path = os.pathsep.join([source, str(Path(__file__).parent)])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}


def digest(folder: Path) -> dict[str, str]:
    """Of each file's content, by its name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same_tensors(file: Path, other: Path) -> None:
    expected, found = load_file(file), load_file(other)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def losses(folder: Path) -> list[list[float]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [[entry["step"], entry["loss"], entry["grad_norm"]] for entry in history if "loss" in entry]


# What goes wrong in processes of their own


class Accidents:
    """Kills this process at one of the moments at which it changes what is on the disk below a folder."""

    def __init__(self, folder: Path, moment: int, report: int):
        self.folder, self.moment, self.report = str(folder), moment, report
        self.count = 0
        self.moved = False
        sys.addaudithook(self.hook)
        # These write without Python's knowledge
        torch.save = self.cutting(torch.save)
        safetensors.torch.serialize_file = self.cutting(safetensors.torch.serialize_file)

    def hook(self, event: str, arguments: tuple) -> None:
        if event in ("os.remove", "os.rmdir"):
            # Before, it is what an earlier accident has left. Entries of a folder that is removed have relative paths.
            # The larger files stand for all.
            if self.moved and not str(arguments[0]).endswith((".json", ".py", ".md", "rng_state.pth")):
                self.happen(event, Path(self.folder, arguments[0]))
        elif event == "os.rename":
            self.happen(event, arguments[0])
            self.moved = True
        elif (event == "os.mkdir" and not os.path.exists(arguments[0])) or (
            event == "open" and arguments[2] & os.O_CREAT
        ):
            self.happen(event, arguments[0])

    def cutting(self, write):
        def wrapper(tensors, path, *args, **kwargs):
            result = write(tensors, path, *args, **kwargs)
            self.happen("half of", path, cut=True)
            return result

        return wrapper

    def happen(self, what: str, path: object, cut: bool = False) -> None:
        if not str(path).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.moment:
            if cut:
                os.truncate(path, os.path.getsize(path) // 2)
            os.write(self.report, f"{what} {path}".encode())
            os.kill(os.getpid(), signal.SIGKILL)


class UnluckyTrainer(LlavaSPTrainer):
    """
    In a process of its own each time, saves its second checkpoint and is killed, at every moment, or finds no room.
    Writes what became of it to a file beside its output, and is then killed itself, while saving.
    """

    def _save_checkpoint(self, model, trial):
        if self.state.global_step != 4:
            super()._save_checkpoint(model, trial)
            return
        self.output = Path(self.args.output_dir)
        first = self.output / "checkpoint-2"
        shutil.copytree(first, self.output / "copy")
        *_, weights, optimizer = sorted(path.stat().st_size for path in first.iterdir())
        # The end of the optimizer's file has no room, most of it, the end of the weights, the first file
        limits = [optimizer - 1, weights, weights - 1, 1]
        full = [self.happens(lambda _, limit=limit: self.save_with_limit(limit)) for limit in limits]
        killed = []
        # LoRA has the most files: at every moment. The other method's save has the same course.
        for moment in itertools.count(1, step=4 if self.trains_projector_alone else 1):

            def save(report, moment=moment):
                Accidents(self.output, moment, report)
                LlavaSPTrainer._save_checkpoint(self, model, trial)

            killed.append(self.happens(save))
            if killed[-1]["signal"] == 0:
                break
        report = {"first": digest(first), "full": full, "killed": killed}
        (self.output.parent / f"{self.output.name}.json").write_text(json.dumps(report))
        shutil.rmtree(self.output / "copy")
        Accidents(self.output, 9, sys.stderr.fileno())
        super()._save_checkpoint(model, trial)

    def save_with_limit(self, limit: int) -> None:
        """With files of at most `limit` bytes: a full disk as far as the writers can tell."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        super()._save_checkpoint(self.model, None)

    def happens(self, save) -> dict[str, object]:
        """What becomes of a save in a process of its own; then makes the output as it was."""
        read, write = os.pipe()
        state = random.getstate()
        child = os.fork()
        if child == 0:
            # Python draws a new one
            random.setstate(state)
            try:
                save(write)
            except Exception as error:
                os.write(write, f"{type(error).__name__}: {error}".encode())
            os._exit(0)
        os.close(write)
        status = os.waitpid(child, 0)[1]
        with os.fdopen(read) as file:
            said = file.read()
        newest = newest_checkpoint(self.output)
        result = {
            "signal": os.WTERMSIG(status),
            "said": said,
            "newest": newest and newest.name,
            "digest": newest and digest(newest),
            "names": sorted(path.name for path in self.output.iterdir() if path.name != "copy"),
        }
        # What is being written stays, for the next save to remove
        for path in self.output.glob("checkpoint-*"):
            shutil.rmtree(path)
        shutil.copytree(self.output / "copy", self.output / "checkpoint-2", copy_function=shutil.copy2)
        return result


def have_accidents(runs: list[list[str]]) -> None:
    train_module.LlavaSPTrainer = UnluckyTrainer
    torch.set_num_threads(1)
    for arguments in runs:
        child = os.fork()
        if child == 0:
            train(arguments[0], arguments[1:])
            os._exit(0)
        if os.WTERMSIG(os.waitpid(child, 0)[1]) != signal.SIGKILL:
            sys.exit(1)


@pytest.fixture(scope="module")
def runs(workspace, tmp_path_factory):
    """For each method, the options of a run, the folder of it uninterrupted, and of it after its accidents."""
    folder = tmp_path_factory.mktemp("runs")
    captions = [record for record in json.loads((workspace / "data.json").read_text()) if "image" in record]
    (folder / "captions.json").write_text(json.dumps(captions))
    data = {"lora": workspace / "data.json", "pretrain": folder / "captions.json"}

    def arguments(method, output, **overrides):
        return options(workspace, folder / output, **{**SAVING, "train_data": data[method], **overrides})

    unlucky = [[method, *arguments(method, f"{method}-killed", save_total_limit=1)] for method in data]
    process = subprocess.run(
        [sys.executable, __file__, json.dumps(unlucky)], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr[-3000:]
    for method in data:
        train(method, arguments(method, f"{method}-whole"))
    return folder, arguments


@pytest.mark.parametrize("method", ["lora", "pretrain"])
def test_killed_at_any_moment(runs, method):
    folder, arguments = runs
    report = json.loads((folder / f"{method}-killed.json").read_text())
    *killed, last = report["killed"]
    assert (last["newest"], last["names"], last["said"]) == ("checkpoint-4", ["checkpoint-4"], "")
    for accident in killed:
        assert accident["signal"] == signal.SIGKILL
        expected = report["first"] if accident["newest"] == "checkpoint-2" else last["digest"]
        assert accident["digest"] == expected, accident["said"]
    if method == "lora":
        # All files but the one that the tokenizer writes on its own
        moments = {Path(accident["said"]).name for accident in killed}
        names = {path.name for path in (folder / "lora-whole" / "checkpoint-4").iterdir()}
        assert names - moments == {"tokenizer.json"}
    # The first checkpoint goes only when the second is there
    assert [accident["newest"] for accident in killed] == sorted(accident["newest"] for accident in killed)
    assert {accident["newest"] for accident in killed} == {"checkpoint-2", "checkpoint-4"}

    output, whole = folder / f"{method}-killed", folder / f"{method}-whole"
    assert sorted(path.name for path in output.iterdir()) == [STAGING_NAME, "checkpoint-2"]
    result = run(method, *arguments(method, output.name, resume_from_checkpoint=True))
    assert result.exit_code == 0, result.output
    assert not (output / STAGING_NAME).exists()
    assert losses(output) == losses(whole)
    for path in ("", "checkpoint-4"):
        assert_same_tensors(whole / path / WEIGHTS[method], output / path / WEIGHTS[method])


@pytest.mark.parametrize("method", ["lora", "pretrain"])
def test_full_disk(runs, method):
    folder, _ = runs
    report = json.loads((folder / f"{method}-killed.json").read_text())
    output = folder / f"{method}-killed"
    assert len(report["full"]) == 4
    for accident in report["full"]:
        assert accident["names"] == ["checkpoint-2"]
        assert accident["digest"] == report["first"]
        assert accident["said"].startswith(f"OSError: Writing checkpoint-4 to {output} failed: ")
        assert f"--resume_from_checkpoint true goes on from {output / 'checkpoint-2'}." in accident["said"]
    reasons = ("torch.save could not", "torch.save could not", "I/O error: File too large", "failed: File too large")
    for accident, reason in zip(report["full"], reasons, strict=True):
        assert reason in accident["said"]


def test_full_disk_is_one_line_of_the_command(runs, workspace, tmp_path, monkeypatch):
    folder, arguments = runs
    shutil.copytree(folder / "lora-whole" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")

    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    result = run("lora", *arguments("lora", tmp_path / "out", resume_from_checkpoint=True))
    assert result.exit_code == 1
    [line] = [line for line in result.output.splitlines() if "error" in line]
    assert f"llava-sp: error: Writing checkpoint-4 to {tmp_path / 'out'} failed: No space left on device (" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]


def test_mistakes_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="a mistake"), staged(tmp_path, "x", True, lambda: None) as folder:
        (folder / "file").write_text("")
        raise RuntimeError("a mistake")
    assert not list(tmp_path.iterdir())


# What replaces what


class Killed(BaseException):
    """Leaves everything on the disk as it is, as a signal does."""


def write(folder: Path, content: str) -> None:
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "file").write_text(content)


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_checkpoint_that_is_replaced_is_never_lost(tmp_path, monkeypatch, moment):
    file = tmp_path / "checkpoint-1" / "file"
    with staged(tmp_path, "x", True, lambda: None) as folder:
        write(folder, "old")
    moves = []

    def killing(move):
        def wrapper(*args, **kwargs):
            moves.append(args)
            if len(moves) == moment:
                raise Killed
            return move(*args)

        return wrapper

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(Path, name, killing(getattr(Path, name)))
        with pytest.raises(Killed), staged(tmp_path, "x", True, lambda: None) as folder:
            patch.setattr(shutil, "rmtree", killing(lambda *args: None))
            write(folder, "new")
    # The next save, which fails: what is there is what was there before it
    with pytest.raises(ZeroDivisionError), staged(tmp_path, "x", True, lambda: None):
        assert file.read_text() == ("new" if moment == 3 else "old")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_earlier_result_stays_until_the_next_is_written(runs, workspace, tmp_path, monkeypatch):
    folder, arguments = runs
    output = tmp_path / "out"
    shutil.copytree(folder / "lora-whole", output, ignore=shutil.ignore_patterns("checkpoint-*"))
    (output / "README.md").write_text((output / "README.md").read_text() + "\nmine\n")
    before = digest(output)

    def save(*args, **kwargs):
        raise OSError(28, "No space left on device")

    trainer = train("lora", arguments("lora", output, max_steps=1, save_strategy="no"))
    (output / "trainer_state.json").write_bytes((folder / "lora-whole" / "trainer_state.json").read_bytes())
    assert "mine" in (output / "README.md").read_text()
    assert digest(output) != before
    before = digest(output)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"Writing the model to {output} failed: No sp"):
        patch.setattr(torch, "save", save)
        trainer.save_model()
    assert digest(output) == before


def test_checkpoints_of_another_run_are_not_taken_for_those_of_a_new_one(runs, tmp_path):
    folder, arguments = runs
    output = tmp_path / "out"
    shutil.copytree(folder / "lora-whole", output)
    before = digest(output)
    with pytest.raises(
        ValueError, match=r"has checkpoints of another run: 'checkpoint-\d.*resume_from_checkpoint true"
    ):
        train("lora", arguments("lora", output, max_steps=1))
    assert digest(output) == before


def test_checkpoint_of_another_method_is_refused(runs, tmp_path):
    folder, arguments = runs
    checkpoint = newest_checkpoint(folder / "lora-whole")
    with pytest.raises(ValueError, match=r"checkpoint-\d+ is not a checkpoint of method 'projector'"):
        train("pretrain", arguments("pretrain", tmp_path / "out", resume_from_checkpoint=checkpoint))


def test_the_best_checkpoint_is_loaded(runs, tmp_path):
    """Here that of the highest loss: the first. For the projector alone, Trainer itself would load nothing."""
    folder, arguments = runs
    overrides = {
        "eval_data": folder / "captions.json",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "greater_is_better": True,
        "metric_for_best_model": "loss",
    }
    train("pretrain", arguments("pretrain", tmp_path, **overrides))
    best, last = tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"
    for checkpoint in (best, last):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(best)
    assert_same_tensors(best / "model.safetensors", tmp_path / "model.safetensors")
    assert digest(best)["model.safetensors"] != digest(last)["model.safetensors"]


# What is resumed from


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("trainer_state.json", remove, "it has no trainer_state.json"),
        ("trainer_state.json", cut, "trainer_state.json cannot be read (Unterminated|Expecting"),
        ("adapter_model.safetensors", remove, "it has no adapter_model.safetensors"),
        ("adapter_model.safetensors", cut, "adapter_model.safetensors cannot be read ("),
        ("adapter_model.safetensors", empty, "adapter_model.safetensors cannot be read ("),
        ("optimizer.pt", remove, "it has no optimizer.pt"),
        ("optimizer.pt", cut, "optimizer.pt is cut short"),
        ("scheduler.pt", remove, "it has no scheduler.pt"),
        ("scheduler.pt", empty, "scheduler.pt is cut short"),
        ("rng_state.pth", remove, "it has no rng_state.pth"),
        ("rng_state.pth", cut, "rng_state.pth is cut short"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value).split("(")[0].split(" ")[0]),
)
def test_damaged_checkpoints_are_passed_over(runs, tmp_path, caplog, name, damage, message):
    folder, arguments = runs
    for step in (2, 4):
        shutil.copytree(folder / "lora-whole" / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    damaged = tmp_path / "checkpoint-4"
    assert newest_checkpoint(tmp_path) == damaged
    damage(damaged / name)
    message = message.split("(Unterminated")[0]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert f"{damaged} is passed over, it cannot be resumed from: {message}" in caplog.text
    # Named, before any model is loaded
    result = run("lora", *arguments("lora", tmp_path, model_name_or_path="none", resume_from_checkpoint=damaged))
    assert result.exit_code == 1
    assert f"llava-sp: error: {damaged} cannot be resumed from: {message}" in " ".join(result.output.split())


def test_without_a_whole_checkpoint_nothing_is_resumed(runs, tmp_path):
    _, arguments = runs
    (tmp_path / "checkpoint-4").mkdir()
    for asked, message in (
        (True, f"There is no whole checkpoint to resume from in {tmp_path}."),
        (tmp_path / "checkpoint-8", f"{tmp_path / 'checkpoint-8'} cannot be resumed from: there is no such folder."),
    ):
        result = run("lora", *arguments("lora", tmp_path, resume_from_checkpoint=asked))
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())


def test_checkpoints_of_the_model_alone_are_taken_where_they_are_asked_for(runs, tmp_path):
    folder, _ = runs
    checkpoint = shutil.copytree(folder / "lora-whole" / "checkpoint-4", tmp_path / "checkpoint-4")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).unlink()
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path, save_only_model=True) == checkpoint


@pytest.mark.parametrize(
    ("files", "folders", "missing"),
    [
        (["model.safetensors.index.json"], [], "model-2.safetensors"),
        (["scheduler.pt"], ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"], "optimizer_0/.metadata"),
        (["latest"], ["global_step4/mp_rank_00_model_states.pt"], "global_step4/mp_rank_00_model_states.pt"),
    ],
    ids=["sharded", "fsdp", "deepspeed"],
)
def test_other_layouts(tmp_path, files, folders, missing):
    """Of models in several files, and of FSDP and DeepSpeed, which keep what each process has in folders."""
    names = [*files, *folders, "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"]
    if "model.safetensors.index.json" in files:
        names += ["model-1.safetensors", "model-2.safetensors", "optimizer.pt", "scheduler.pt"]
    for path in (tmp_path / name for name in names):
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".safetensors":
            safetensors.torch.save_file({"a": torch.zeros(1)}, path)
        elif path.suffix in (".pt", ".pth"):
            torch.save({}, path)
        elif path.name == "latest":
            path.write_text("global_step4")
        else:
            path.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert find_problem(tmp_path) is None
    (tmp_path / missing).unlink()
    if "latest" in files:
        (tmp_path / missing).parent.rmdir()
    assert missing.split("/")[0] in find_problem(tmp_path)


# What is no number


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("loss", "The loss of step 3 is nan, on the records 'record 2'. "),
        (
            "gradient",
            "The gradient norm of step 3 is nan, with finite losses, on the records 'record 2', 'record 3'. ",
        ),
    ],
)
def test_what_is_no_number_stops_before_the_step(workspace, tmp_path, monkeypatch, broken, message):
    class Trainer(LlavaSPTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if self.state.global_step == 2 and not self._step_losses:
                if broken == "loss":
                    return loss * float("nan")
                loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss

    monkeypatch.setattr(train_module, "LlavaSPTrainer", Trainer)
    records = json.loads((workspace / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps([records[index] for index in (0, 1, 4, 5, 2, 3)]))
    overrides = {**SAVING, "save_steps": 1, "save_total_limit": 1, "train_data": tmp_path / "data.json"}
    overrides |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3}
    output = tmp_path / "out"
    result = run("lora", *options(workspace, output, **overrides))
    assert result.exit_code == 1
    assert f"llava-sp: error: {message}The checkpoints in {output} are from before." in result.output
    assert [path.name for path in output.iterdir()] == ["checkpoint-2"]
    assert find_problem(output / "checkpoint-2") is None
    state = load_file(output / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


# Two processes

PROGRAM = """
import os, sys, time
from transformers_llava_sp.cli import app
from transformers_llava_sp.training import train
from transformers_llava_sp.training.trainer import LlavaSPTrainer

mode = os.environ["MODE"]
second = os.environ["RANK"] == "1"


class Trainer(LlavaSPTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if mode == "nan" and second and self.state.global_step == 2 else loss

    def _save_rng_state(self, output_dir):
        if second:
            # The first process must not have moved the folder by then
            time.sleep(1)
            if mode == "full" and self.state.global_step == 4:
                raise OSError(28, "No space left on device")
        super()._save_rng_state(output_dir)


train.LlavaSPTrainer = Trainer
app(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes(workspace, tmp_path):
    (tmp_path / "run.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "run.py"]

    def run_two(mode, output, **overrides):
        values = {**SAVING, "ddp_find_unused_parameters": False, "per_device_train_batch_size": 1, **overrides}
        return subprocess.run(
            [*command, "train", "lora", *options(workspace, tmp_path / output, **values)],
            cwd=tmp_path,
            env={**environment(), "MODE": mode},
            capture_output=True,
            text=True,
            timeout=120,
        )

    whole = run_two("", "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    for step in (2, 4):
        names = {path.name for path in (tmp_path / "whole" / f"checkpoint-{step}").iterdir()}
        assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} < names

    full = run_two("full", "out")
    assert full.returncode != 0
    assert f"Writing checkpoint-4 to {tmp_path / 'out'} failed: No space left on device" in full.stderr
    assert newest_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"
    assert not (tmp_path / "out" / "checkpoint-4").exists()

    resumed = run_two("", "out", resume_from_checkpoint=True)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    name = WEIGHTS["lora"]
    assert_same_tensors(tmp_path / "whole" / name, tmp_path / "out" / name)

    nan = run_two("nan", "nan")
    assert nan.returncode != 0
    message = "llava-sp: error: The loss of step 3 is nan, on the records 'record 5'. "
    # Of both: none is left waiting
    assert nan.stderr.count(message) == 2, nan.stderr[-3000:]
    assert newest_checkpoint(tmp_path / "nan") == tmp_path / "nan" / "checkpoint-2"
    assert not (tmp_path / "nan" / "checkpoint-4").exists()


if __name__ == "__main__":
    have_accidents(json.loads(sys.argv[1]))
