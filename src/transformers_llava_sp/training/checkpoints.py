# Copyright 2026 The transformers-llava-sp authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Checkpoints that appear at their place whole or not at all, and which of those that are there can be resumed from"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..conversion.staging import REPLACED_NAME, RUST_OS_ERROR, put_back


logger = logging.get_logger(__name__)

# Inside the output folder, so that moving from it is a renaming. Neither a checkpoint to Trainer, nor pushed to the
# Hub with the output: Trainer leaves out what begins with an underscore.
STAGING_NAME = "_incomplete"
WRITTEN_NAME = "written"

CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# What `torch.save` makes of a full disk: a RuntimeError that does not say so
TORCH_WRITE_ERROR = re.compile(r"inline_container|iostream error|Parent directory .* does not exist")


@contextmanager
def staged(output_dir: str | Path, name: str, should_save: bool, wait: Callable[[], None]) -> Iterator[Path]:
    """
    A folder to write to, in all processes. What is in it is moved to `output_dir` when all have written, and replaces
    what has its names there. What a killed run has left is removed first.

    Args:
        output_dir (`str` or `Path`): Where it is to appear.
        name (`str`): What is written, for the error.
        should_save (`bool`): Whether this process is the one that moves it.
        wait (`Callable[[], None]`): Returns when all processes have called it.

    Yields:
        `Path`: An empty folder, on the same file system.

    Raises:
        OSError: In the process whose writing has failed, as on a full disk. Nothing in `output_dir` has changed then.
            Other processes wait for this one, until what has started them sees it fail and ends them.
    """
    output_dir = Path(output_dir)
    folder = output_dir / STAGING_NAME / WRITTEN_NAME
    try:
        if should_save:
            clear_staging(output_dir)
        # Clearing would remove what another process writes already
        wait()
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        wait()
        if should_save:
            publish(folder, output_dir)
        wait()
    except Exception as error:
        reason = writing_failure(error)
        free = shutil.disk_usage(output_dir).free if output_dir.is_dir() else None
        if should_save:
            clear_staging(output_dir, ignore_errors=True)
        if reason is None:
            raise
        space = "" if free is None else f" ({free / 1e9:.2f} GB were free there)"
        newest = newest_checkpoint(output_dir)
        if newest is None:
            advice = "There is no earlier checkpoint."
        else:
            advice = (
                f"Earlier checkpoints are as they were. Once it can be written, --resume_from_checkpoint true goes on "
                f"from {newest}."
            )
        raise OSError(f"Writing {name} to {output_dir} failed: {reason}{space}. {advice}") from error


def publish(folder: Path, output_dir: Path) -> None:
    """Move all of `folder` to `output_dir`. What has the same names there is kept until its place is taken."""
    # Before anything older goes: some file systems report a full disk only now
    for parent, _, names in os.walk(folder):
        for name in names:
            flush(Path(parent, name))
        flush(Path(parent))
    replaced = folder.with_name(REPLACED_NAME)
    replaced.mkdir()
    for path in sorted(folder.iterdir()):
        target = output_dir / path.name
        # A file replaces another in one step, a folder cannot
        if path.is_dir() and os.path.lexists(target):
            target.rename(replaced / path.name)
        path.replace(target)
    flush(output_dir)
    clear_staging(output_dir)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        # Windows
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_staging(output_dir: str | Path, ignore_errors: bool = False) -> None:
    """Remove what a killed run was writing in `output_dir`, and put back what it was about to replace."""
    staging = Path(output_dir, STAGING_NAME)
    replaced = staging / REPLACED_NAME
    for path in replaced.iterdir() if replaced.is_dir() else ():
        put_back(path, Path(output_dir, path.name))
    if staging.is_dir():
        shutil.rmtree(staging, ignore_errors=ignore_errors)


def writing_failure(error: Exception) -> str | None:
    """Why writing has failed, or `None` if the error is of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if match := RUST_OS_ERROR.fullmatch(str(error)):
        return match[1]
    if isinstance(error, RuntimeError) and TORCH_WRITE_ERROR.search(str(error)):
        return f"torch.save could not write ({str(error).splitlines()[0]})"
    return None


def newest_checkpoint(output_dir: str | Path, save_only_model: bool = False) -> Path | None:
    """
    The newest checkpoint that can be resumed from. Warns of newer ones that cannot.

    Args:
        output_dir (`str` or `Path`): Where the checkpoints are.
        save_only_model (`bool`, *optional*, defaults to `False`): Whether they hold the model alone.

    Returns:
        `Path`, *optional*: The checkpoint's folder, if there is one.
    """
    output_dir = Path(output_dir)
    paths = output_dir.iterdir() if output_dir.is_dir() else iter(())
    steps = {int(match[1]): path for path in paths if (match := CHECKPOINT_NAME.fullmatch(path.name))}
    for _, path in sorted(steps.items(), reverse=True):
        problem = find_problem(path, save_only_model)
        if problem is None:
            return path
        logger.warning(f"{path} is passed over, it cannot be resumed from: {problem}.")
    return None


def find_problem(checkpoint: Path, save_only_model: bool = False) -> str | None:
    """
    Why a checkpoint cannot be resumed from, by the files that are missing or cut short: Trainer itself would start
    with a new optimizer where it finds none. Tensors are not read.

    Args:
        checkpoint (`Path`): The folder.
        save_only_model (`bool`, *optional*, defaults to `False`): Whether it may be without an optimizer.

    Returns:
        `str`, *optional*: What is wrong, `None` if nothing is.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    for path in sorted(checkpoint.rglob("*")):
        problem = find_damage(path)
        if problem is not None:
            return f"{path.relative_to(checkpoint)} {problem}"
    names = {path.name for path in checkpoint.iterdir()}
    required = {"trainer_state.json": ["trainer_state.json"]}
    if "latest" in names:
        # DeepSpeed's, with model and optimizer in the folder that it names
        tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
        required[f"{tag}, which its file 'latest' names"] = [tag]
    else:
        index = checkpoint / "model.safetensors.index.json"
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
            required |= {shard: [shard] for shard in sorted(set(shards))}
        required["adapter_model.safetensors or model.safetensors"] = [
            "adapter_model.safetensors",
            "model.safetensors",
            index.name,
            # FSDP's
            "pytorch_model_fsdp.bin",
            "pytorch_model_fsdp_0",
        ]
        if not save_only_model:
            # The last two are FSDP's
            required["optimizer.pt"] = ["optimizer.pt", "optimizer.bin", "optimizer_0"]
            required["scheduler.pt"] = ["scheduler.pt"]
    if not save_only_model:
        required["rng_state.pth"] = [name for name in names if re.fullmatch(r"rng_state(_\d+)?\.pth", name)]
    for description, alternatives in required.items():
        if names.isdisjoint(alternatives):
            return f"it has no {description}"
    return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a file or folder, as far as its name says what it is."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            # The end of what `torch.save` writes is the list of all of it
            return "is cut short, or not from torch.save"
        elif re.fullmatch(r"(pytorch_model_fsdp|optimizer)_\d+", path.name) and not (path / ".metadata").is_file():
            return "has no .metadata, which is written last"
    except (OSError, ValueError, SafetensorError) as error:
        return f"cannot be read ({' '.join(str(error).split())})"
    return None
