"""
The output of a conversion is there whole or not at all, whatever happens: kills at random and at chosen moments, full
disks, interrupts, a second conversion, and folders of the user's own where it wants to write.

Conversions that are killed are children of this file, run as a program: it imports everything once and forks.
"""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from conftest import FIXTURES, golden_folder
from safetensors.torch import load_file, save_file

from transformers_llava_sp import LlavaSPConfig
from transformers_llava_sp.conversion import ConversionError, convert, convert_checkpoint, writer


# Five shards, so that there is something between the first and the last
SHARD_SIZE = "300KB"
FIRST_SHARD = "model-00001-of-00005.safetensors"
NUM_KILLS = 20
FULL_DISK = Path("/dev/full")
# What Python's audit hooks see of changes to folders, each just before it is made
FOLDER_EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")

# What is left of an earlier model need not be one that loads: a few files to recognise, as cheap as can be
EARLIER = {
    "README.md": b"# An earlier result\n",
    "config.json": b'{"model_type": "llava_sp", "earlier": true}\n',
    "model.safetensors": b"earlier weights",
}


# The program that forks a conversion for each line it reads


def serve() -> None:
    """Read orders as lines of JSON, carry out each in a child, and answer with a line on how it ended."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        read_end, write_end = os.pipe()
        child = os.fork()
        if not child:
            os.close(read_end)
            message = carry_out(**order)
            os.write(write_end, message.encode())
            os._exit(0)
        os.close(write_end)
        start = time.perf_counter()
        if order["kill_after"] is not None:
            time.sleep(order["kill_after"])
            # Not reaped yet, so its number cannot belong to another process
            os.kill(child, signal.SIGKILL)
        with open(read_end, encoding="utf-8") as pipe:
            message = pipe.read()
        _, status = os.waitpid(child, 0)
        answer = {"killed": os.WIFSIGNALED(status), "message": message, "seconds": time.perf_counter() - start}
        print(json.dumps(answer), flush=True)


def carry_out(
    folder: str, output: str, options: dict, kill_after: float | None, kill_at: str | None, kill_at_step: int | None
) -> str:
    """Convert in a child, which may die at a chosen moment. Returns the error's message, if there is one."""
    if kill_at is not None:
        KILL_POINTS[kill_at](output)
    if kill_at_step is not None:
        remove_in_the_worst_order()
        die_at_step(kill_at_step)
    try:
        convert_miniature(Path(folder), Path(output), **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def die(*args: object, **kwargs: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL was survived")


def die_after_the_first_shard(output: str) -> None:
    write_shard = writer.write_shard

    def write_one(*args):
        write_shard(*args)
        die()

    writer.write_shard = write_one


def die_in_verification(output: str) -> None:
    convert.verify = die


def die_before_the_model_card(output: str) -> None:
    convert.make_model_card = die


def die_before_it_appears(output: str) -> None:
    def hook(event: str, args: tuple) -> None:
        if event == "os.rename" and os.fspath(args[1]) == output:
            die()

    sys.addaudithook(hook)


def die_after_it_appeared(output: str) -> None:
    appearing = False

    def hook(event: str, args: tuple) -> None:
        nonlocal appearing
        if appearing and event in FOLDER_EVENTS:
            die()
        appearing = appearing or (event == "os.rename" and os.fspath(args[1]) == output)

    sys.addaudithook(hook)


KILL_POINTS = {
    "after-the-first-shard": die_after_the_first_shard,
    "in-verification": die_in_verification,
    "before-the-model-card": die_before_the_model_card,
    "before-it-appears": die_before_it_appears,
    "after-it-appeared": die_after_it_appeared,
}


def die_at_step(step: int) -> None:
    """Die before the given change to folders, counted from 0: one made, moved or removed, or a file removed."""
    steps = iter(range(step))

    def hook(event: str, args: tuple) -> None:
        if event not in FOLDER_EVENTS or (event == "os.mkdir" and os.path.isdir(args[0])):
            return
        if next(steps, None) is None:
            die()

    sys.addaudithook(hook)


def remove_in_the_worst_order() -> None:
    """Have folders removed with the lock first: the order is the file system's otherwise, and not the same on all."""
    scandir = os.scandir

    @contextmanager
    def sorted_scandir(path: str | int = ".") -> Iterator[Iterator[os.DirEntry]]:
        with scandir(path) as entries:
            yield iter(sorted(entries, key=lambda entry: (entry.name != "conversion.lock", entry.name)))

    os.scandir = sorted_scandir


# Helpers of the tests


def convert_miniature(folder: Path, output: Path, **options):
    """Convert the miniature release in `folder`, in several shards."""
    return convert_checkpoint(
        folder / "release",
        output,
        base_model=folder / "base",
        vision_tower=folder / "vision",
        max_shard_size=SHARD_SIZE,
        **options,
    )


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of everything in a folder, by its relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_earlier(output: Path) -> dict[str, str]:
    """Put the result of an earlier conversion at `output`. Returns its digests."""
    output.mkdir(parents=True)
    for name, content in EARLIER.items():
        (output / name).write_bytes(content)
    return digests(output)


def beside(output: Path) -> list[str]:
    """The names of what is in the folder of `output`."""
    return sorted(path.name for path in output.parent.iterdir())


def staging_folder(output: Path) -> Path:
    return output.parent / f".{output.name}.incomplete"


class Workshop:
    """Carries out conversions in children of a process of its own, which may be killed."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def convert(
        self,
        folder: Path,
        output: Path,
        kill_after: float | None = None,
        kill_at: str | None = None,
        kill_at_step: int | None = None,
        **options,
    ) -> dict:
        """Convert in a child. Returns whether it was killed, its error's message and the seconds it took."""
        order = {
            "folder": str(folder),
            "output": str(output),
            "options": options,
            "kill_after": kill_after,
            "kill_at": kill_at,
            "kill_at_step": kill_at_step,
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def workshop() -> Iterator[Workshop]:
    workshop = Workshop()
    yield workshop
    workshop.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, str]:
    """The digests of an undisturbed conversion."""
    output = tmp_path_factory.mktemp("undisturbed") / "model"
    convert_miniature(golden_folder("mini-cropping"), output)
    result = digests(output)
    assert FIRST_SHARD in result
    return result


@pytest.fixture
def inputs() -> Iterator[Path]:
    """The miniature checkpoint, which no test may change."""
    folder = golden_folder("mini-cropping")
    before = digests(folder)
    yield folder
    assert digests(folder) == before


@pytest.fixture
def output(tmp_path) -> Path:
    """Where to convert to. Nothing else is in its folder."""
    folder = tmp_path / "models"
    folder.mkdir()
    return folder / "model"


def convert_and_fail(folder: Path, output: Path, **options) -> str:
    """The message of a conversion that fails."""
    with pytest.raises(ConversionError) as caught:
        convert_miniature(folder, output, **options)
    return str(caught.value)


# Kills


def test_killed_at_random_moments(workshop, inputs, output, expected):
    undisturbed = workshop.convert(inputs, output)
    assert undisturbed["message"] == ""
    assert digests(output) == expected
    generator = random.Random(0)
    num_killed = num_leftovers = 0
    for kill in range(NUM_KILLS):
        shutil.rmtree(output)
        moment = undisturbed["seconds"] * (kill + generator.random()) / NUM_KILLS
        answer = workshop.convert(inputs, output, kill_after=moment)
        assert answer["message"] == ""
        num_killed += answer["killed"]
        if output.exists():
            assert digests(output) == expected
            options = {"overwrite": True}
        else:
            options = {}
        staging = staging_folder(output)
        num_leftovers += staging.exists()
        assert set(beside(output)) <= {output.name, staging.name}

        convert_miniature(inputs, output, **options)
        assert digests(output) == expected
        assert beside(output) == [output.name]
    # Else the moments were none of a conversion at work
    assert num_killed >= NUM_KILLS // 2
    assert num_leftovers > 0


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("point", KILL_POINTS)
def test_killed_at_a_chosen_moment(workshop, inputs, output, expected, point, overwrite):
    earlier = make_earlier(output) if overwrite else None
    answer = workshop.convert(inputs, output, kill_at=point, overwrite=overwrite)
    assert answer["killed"]
    staging = staging_folder(output)
    assert staging.is_dir()
    if point == "after-the-first-shard":
        assert [path.name for path in staging.rglob("*.safetensors") if "replaced" not in path.parts] == [FIRST_SHARD]
    if point == "after-it-appeared":
        assert digests(output) == expected
    elif point == "before-it-appears":
        assert not output.exists()
    else:
        assert (digests(output) if overwrite else output.exists()) == (earlier or False)

    convert_miniature(inputs, output, overwrite=overwrite or output.exists())
    assert digests(output) == expected
    assert beside(output) == [output.name]


def test_a_folder_put_aside_comes_back_with_the_next_conversion_even_if_that_fails(workshop, inputs, output):
    earlier = make_earlier(output)
    assert workshop.convert(inputs, output, kill_at="before-it-appears", overwrite=True)["killed"]
    assert not output.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "verify", fail_with(ConversionError("The test fails it.")))
        assert convert_and_fail(inputs, output, overwrite=True) == "The test fails it."
    assert digests(output) == earlier
    assert beside(output) == [output.name]


def test_a_folder_put_aside_is_not_replaced_without_overwrite(workshop, inputs, output):
    """The killed conversion was allowed to replace it, the one that follows is not."""
    earlier = make_earlier(output)
    assert workshop.convert(inputs, output, kill_at="before-it-appears", overwrite=True)["killed"]
    message = convert_and_fail(inputs, output)
    assert f"The output {output} exists already" in message
    assert "--overwrite" in message
    assert digests(output) == earlier
    assert beside(output) == [output.name]


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_killed_at_every_change_to_folders(workshop, inputs, output, expected, overwrite):
    """The earlier result and the new one are both whole, wherever they are, and one of them can always be had."""
    found = []
    for step in range(100):
        shutil.rmtree(output, ignore_errors=True)
        earlier = make_earlier(output) if overwrite else None
        answer = workshop.convert(inputs, output, kill_at_step=step, verify=False, overwrite=overwrite)
        assert answer["message"] == ""
        if not answer["killed"]:
            break
        # What would be put back, if the output were not there
        aside = staging_folder(output) / "replaced"
        if aside.exists():
            assert digests(aside) == earlier, f"killed at step {step}"
        found.append(digests(output) if output.exists() else digests(aside) if aside.exists() else None)
        assert found[-1] in (earlier, expected), f"killed at step {step}"

        convert_miniature(inputs, output, verify=False, overwrite=overwrite or output.exists())
        assert digests(output) == expected
        assert beside(output) == [output.name]
    assert not answer["killed"]
    # Once the new folder is there, it stays
    num_new = found.count(expected)
    assert found == [earlier] * (len(found) - num_new) + [expected] * num_new
    assert 0 < num_new < len(found)


# Failures


def fail_with(error: BaseException):
    """A function that takes anything and raises."""

    def fail(*args: object, **kwargs: object) -> NoReturn:
        raise error

    return fail


FAILURES = {
    "error": ConversionError("The test fails it."),
    "bug": RuntimeError("The test fails it."),
    "interrupt": KeyboardInterrupt("The test fails it."),
}
MOMENTS = {"writing": "write_weights", "verifying": "verify", "describing": "make_model_card"}


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("error", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("function", MOMENTS.values(), ids=MOMENTS)
def test_a_failure_leaves_what_was_there(inputs, output, monkeypatch, function, error, overwrite):
    earlier = make_earlier(output) if overwrite else None
    monkeypatch.setattr(convert, function, fail_with(error))
    with pytest.raises(type(error), match=r"The test fails it\."):
        convert_miniature(inputs, output, overwrite=overwrite)
    assert beside(output) == ([output.name] if overwrite else [])
    if overwrite:
        assert digests(output) == earlier


def test_a_damaged_tensor_leaves_what_was_there(output, tmp_path):
    folder = tmp_path / "inputs"
    shutil.copytree(FIXTURES / "mini-cropping", folder)
    file = folder / "release" / "adapter_model.safetensors"
    tensors = load_file(file)
    # The last one, so that much is written before it is met
    key = max(tensors)
    tensors[key].view(-1)[-1] = float("nan")
    save_file(tensors, file)
    earlier = make_earlier(output)
    message = convert_and_fail(folder, output, overwrite=True)
    assert key.split(".lora_")[0].split("layers.")[1] in message
    assert "NaN" in message
    assert digests(output) == earlier
    assert beside(output) == [output.name]


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["disk", "interrupt"]
)
def test_a_folder_that_cannot_be_moved_to_its_place_leaves_what_was_there(
    inputs, output, monkeypatch, error, overwrite
):
    earlier = make_earlier(output) if overwrite else None
    rename = Path.rename
    failed = []

    def fail_once(path: Path, target: Path) -> Path:
        if target == output and not failed:
            failed.append(path)
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises((ConversionError, KeyboardInterrupt)) as caught:
        convert_miniature(inputs, output, overwrite=overwrite)
    assert failed
    if isinstance(error, OSError):
        assert "Input/output error" in str(caught.value)
    assert beside(output) == ([output.name] if overwrite else [])
    if overwrite:
        assert digests(output) == earlier


# Full disks and folders that may not be written

# Code files are left out: they are copied with their permissions, which must not become the device's
WRITTEN_FILES = [
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    FIRST_SHARD,
    "model-00005-of-00005.safetensors",
    "model.safetensors.index.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def test_every_file_but_the_code_meets_a_full_disk(expected):
    missing = set(expected) - set(WRITTEN_FILES)
    assert {name for name in missing if not name.endswith(".py") and not name.startswith("model-")} == set()
    assert set(WRITTEN_FILES) <= set(expected)


@pytest.mark.parametrize("name", WRITTEN_FILES)
def test_a_full_disk(inputs, output, monkeypatch, name):
    """The file is a link to a device that the kernel takes for a full disk, so every writer meets the real error."""
    if not FULL_DISK.is_char_device():
        pytest.skip(f"{FULL_DISK}, which stands for a full disk, is no device of this system")
    save_pretrained = LlavaSPConfig.save_pretrained

    def save_beside_the_link(config, folder, *args, **kwargs):
        # The configuration is the first thing that is written
        (Path(folder) / name).symlink_to(FULL_DISK)
        save_pretrained(config, folder, *args, **kwargs)

    monkeypatch.setattr(LlavaSPConfig, "save_pretrained", save_beside_the_link)
    message = convert_and_fail(inputs, output)
    assert f"Writing {output} failed: No space left on device" in message
    assert beside(output) == []


def report_free_space(monkeypatch, free) -> None:
    """Have disks say that `free()` bytes are free on them."""
    usage = shutil.disk_usage

    def disk_usage(path):
        return usage(path)._replace(free=free())

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)


def test_too_little_space_is_seen_before_anything_is_written(inputs, output, monkeypatch):
    monkeypatch.setattr(convert, "write_weights", fail_with(AssertionError("something was written")))
    report_free_space(monkeypatch, lambda: 10**6)
    message = convert_and_fail(inputs, output)
    assert f"The output {output} needs 0.0 GB, but 0.0 GB are free there" in message
    assert "another disk" in message
    assert beside(output) == []


def test_the_space_of_what_is_left_over_counts_as_free(workshop, inputs, output, expected, monkeypatch):
    """A disk that has room for one model must be enough for a second try."""
    assert workshop.convert(inputs, output, kill_at="before-the-model-card")["killed"]
    staging = staging_folder(output)
    report_free_space(monkeypatch, lambda: 10**6 if list(staging.glob("*/*.safetensors")) else 10**12)
    convert_miniature(inputs, output)
    assert digests(output) == expected
    assert beside(output) == [output.name]


@pytest.mark.parametrize("forbidden", ["parent", "staging", "folder"])
def test_a_folder_that_may_not_be_made(inputs, tmp_path, monkeypatch, forbidden):
    output = tmp_path / "models" / "new" / "model"
    folders = {
        "parent": output.parent,
        "staging": staging_folder(output),
        "folder": staging_folder(output) / output.name,
    }
    mkdir = os.mkdir

    def forbid(path, *args, **kwargs):
        if Path(path) == folders[forbidden]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", forbid)
    message = convert_and_fail(inputs, output)
    assert f"Writing {output} failed: Permission denied" in message
    assert not output.exists()
    assert not staging_folder(output).exists()


# Other conversions, and folders of the user's own


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_two_conversions_to_one_output(workshop, inputs, output, expected, monkeypatch, overwrite):
    if overwrite:
        make_earlier(output)
    verify = convert.verify
    answers = []

    def verify_meanwhile(*args):
        answers.append(workshop.convert(inputs, output, overwrite=overwrite))
        return verify(*args)

    monkeypatch.setattr(convert, "verify", verify_meanwhile)
    convert_miniature(inputs, output, overwrite=overwrite)
    [answer] = answers
    assert answer["message"].startswith(f"ConversionError: Another conversion is writing to {output}")
    assert digests(output) == expected
    assert beside(output) == [output.name]


def test_two_conversions_to_two_outputs(workshop, inputs, output, expected, monkeypatch):
    verify = convert.verify
    other = output.with_name("other")

    def verify_meanwhile(*args):
        assert workshop.convert(inputs, other)["message"] == ""
        return verify(*args)

    monkeypatch.setattr(convert, "verify", verify_meanwhile)
    convert_miniature(inputs, output)
    assert digests(output) == digests(other) == expected
    assert beside(output) == [output.name, other.name]


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_an_output_that_appears_meanwhile(inputs, output, expected, monkeypatch, overwrite):
    """It is replaced only where that was asked for."""
    verify = convert.verify

    def verify_meanwhile(*args):
        make_earlier(output)
        return verify(*args)

    monkeypatch.setattr(convert, "verify", verify_meanwhile)
    if overwrite:
        convert_miniature(inputs, output, overwrite=True)
        assert digests(output) == expected
    else:
        assert f"The output {output} exists already" in convert_and_fail(inputs, output)
        assert {name: (output / name).read_bytes() for name in EARLIER} == EARLIER
    assert beside(output) == [output.name]


def test_the_users_file_that_appears_in_an_output_meanwhile(inputs, output, monkeypatch):
    make_earlier(output)
    verify = convert.verify

    def verify_meanwhile(*args):
        (output / "thesis.txt").write_text("Years of work")
        return verify(*args)

    monkeypatch.setattr(convert, "verify", verify_meanwhile)
    assert "thesis.txt" in convert_and_fail(inputs, output, overwrite=True)
    assert (output / "thesis.txt").read_text() == "Years of work"
    assert {name: (output / name).read_bytes() for name in EARLIER} == EARLIER
    assert beside(output) == [output.name]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_the_users_own_beside_the_output_is_left_alone(inputs, output, tmp_path, kind):
    own = staging_folder(output)
    folder = tmp_path / "elsewhere" if kind == "link" else own
    if kind == "file":
        own.write_text("Years of work")
    else:
        folder.mkdir()
        (folder / "thesis.txt").write_text("Years of work")
    if kind == "link":
        own.symlink_to(folder, target_is_directory=True)
    message = convert_and_fail(inputs, output)
    assert str(own) in message
    assert "elsewhere" in message
    assert (own if kind == "file" else own / "thesis.txt").read_text() == "Years of work"
    assert own.is_symlink() == (kind == "link")
    assert beside(output) == [own.name]


def test_an_empty_folder_left_by_a_kill_before_the_lock_is_used(inputs, output, expected):
    staging_folder(output).mkdir()
    convert_miniature(inputs, output)
    assert digests(output) == expected
    assert beside(output) == [output.name]


@pytest.mark.parametrize("name", ["conversion.lock", "replaced", "a model (second try)"])
def test_outputs_of_any_name(workshop, inputs, output, expected, name):
    output = output.with_name(name)
    for point in ("in-verification", "before-it-appears"):
        assert workshop.convert(inputs, output, kill_at=point, overwrite=True)["killed"]
    convert_miniature(inputs, output, overwrite=True)
    assert digests(output) == expected
    convert_miniature(inputs, output, overwrite=True)
    assert digests(output) == expected
    assert beside(output) == [name]


# Overwriting


def test_overwriting_replaces_an_earlier_result(inputs, output, expected):
    make_earlier(output)
    convert_miniature(inputs, output, overwrite=True)
    assert digests(output) == expected
    convert_miniature(inputs, output, overwrite=True)
    assert digests(output) == expected
    assert beside(output) == [output.name]


def test_overwriting_an_empty_or_absent_folder(inputs, output, expected):
    output.mkdir()
    convert_miniature(inputs, output, overwrite=True)
    shutil.rmtree(output)
    convert_miniature(inputs, output, overwrite=True)
    assert digests(output) == expected


@pytest.mark.parametrize("kind", ["model", "empty-folder", "file", "link", "dangling-link"])
def test_nothing_is_replaced_unless_asked_for(inputs, output, tmp_path, kind):
    if kind == "model":
        make_earlier(output)
    elif kind == "empty-folder":
        output.mkdir()
    elif kind == "file":
        output.write_text("Years of work")
    else:
        target = tmp_path / "elsewhere"
        output.symlink_to(target, target_is_directory=True)
        if kind == "link":
            make_earlier(target)
    before = os.lstat(output)
    message = convert_and_fail(inputs, output)
    assert f"The output {output} exists already" in message
    assert "--overwrite" in message
    after = os.lstat(output)
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert beside(output) == [output.name]


@pytest.mark.parametrize("kind", ["file", "link", "dangling-link"])
def test_only_folders_are_replaced(inputs, output, tmp_path, kind):
    target = tmp_path / "elsewhere"
    if kind == "file":
        output.write_text("Years of work")
    else:
        output.symlink_to(target, target_is_directory=True)
        if kind == "link":
            earlier = make_earlier(target)
    message = convert_and_fail(inputs, output, overwrite=True)
    assert f"The output {output} is no folder" in message
    assert output.is_symlink() == (kind != "file")
    if kind == "file":
        assert output.read_text() == "Years of work"
    assert (digests(target) == earlier) if kind == "link" else not target.exists()
    assert beside(output) == [output.name]


OTHER_FOLDERS = {
    "no-configuration": {"model.safetensors": "weights"},
    "another-model": {"config.json": '{"model_type": "llava"}', "model.safetensors": "weights"},
    "no-model-type": {"config.json": "{}"},
    "the-users-files": {"thesis.txt": "Years of work"},
}


@pytest.mark.parametrize("files", OTHER_FOLDERS.values(), ids=OTHER_FOLDERS)
def test_only_converted_models_are_replaced(inputs, output, files):
    output.mkdir()
    for name, content in files.items():
        (output / name).write_text(content)
    assert f"The output {output} is no converted LLaVA-SP model" in convert_and_fail(inputs, output, overwrite=True)
    assert {path.name: path.read_text() for path in output.iterdir()} == files
    assert beside(output) == [output.name]


@pytest.mark.parametrize("name", ["thesis.txt", ".git", "README.md.orig", "model.bin", "runs", "my_model.safetensors"])
def test_a_model_with_files_of_the_users_is_not_replaced(inputs, output, name):
    make_earlier(output)
    if "." in name[1:]:
        (output / name).write_text("Years of work")
    else:
        (output / name).mkdir()
        (output / name / "file").write_text("Years of work")
    before = digests(output)
    message = convert_and_fail(inputs, output, overwrite=True)
    assert f"'{name}'" in message
    assert "'config.json'" not in message
    assert digests(output) == before
    assert beside(output) == [output.name]


@pytest.mark.parametrize("part", ["release", "base", "vision"])
def test_an_output_that_holds_an_input_is_not_replaced(tmp_path, part):
    """Not even if the input has the name of a file that conversions write."""
    folder = tmp_path / "inputs"
    shutil.copytree(FIXTURES / "mini-cropping", folder)
    output = tmp_path / "model"
    make_earlier(output)
    held = (folder / part).rename(output / "tokenizer.json")
    (folder / part).symlink_to(held, target_is_directory=True)
    before = digests(output)
    message = convert_and_fail(folder, output, overwrite=True)
    assert f"The output {output} holds" in message
    assert held.name in message or f"{folder / part}" in message
    assert digests(output) == before
    assert not staging_folder(output).exists()


@pytest.mark.parametrize("part", ["release", "base", "vision"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_an_output_inside_an_input_is_refused(inputs, tmp_path, part, overwrite):
    folder = tmp_path / "inputs"
    shutil.copytree(inputs, folder)
    before = digests(folder)
    output = folder / part / "model"
    message = convert_and_fail(folder, output, overwrite=overwrite)
    assert f"The output {output} lies inside {folder / part}, which is an input" in message
    assert digests(folder) == before
    assert not output.exists()
    assert not staging_folder(output).exists()


@pytest.mark.parametrize("part", ["release", "base", "vision"])
def test_an_input_is_not_its_own_output(tmp_path, part):
    folder = tmp_path / "inputs"
    shutil.copytree(FIXTURES / "mini-cropping", folder)
    before = digests(folder)
    assert str(folder / part) in convert_and_fail(folder, folder / part, overwrite=True)
    assert digests(folder) == before


if __name__ == "__main__":
    serve()
