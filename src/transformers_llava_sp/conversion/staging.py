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
"""The folder that a conversion writes to, which appears at its place whole or not at all"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ..configuration_llava_sp import HUB_MODULES, LlavaSPConfig
from .checkpoint import ConversionError, join_keys, read_json


LOCK_NAME = "conversion.lock"
# Where a folder that is being replaced waits until the new one is at its place
REPLACED_NAME = "replaced"
# What it is called then, so that a half removed folder is never put back
OBSOLETE_NAME = "obsolete"

# How the libraries written in Rust name an error of the operating system, some of them in a bare `Exception`
RUST_OS_ERROR = re.compile(r"(.*) \(os error \d+\)")

# What a converted repository consists of; a folder with anything else in it is not overwritten
CONVERTED_FILES = re.compile(
    r"README\.md|(config|generation_config|processor_config|preprocessor_config)\.json|chat_template\.\w+"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|tokenizer\.model|merges\.txt"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|" + "|".join(map(re.escape, HUB_MODULES))
)


@dataclass(frozen=True)
class Result:
    """
    A kind of folder that is written, and may be replaced by another of its kind.

    Args:
        name (`str`): What it is, for error messages.
        entry (`tuple[str, str]`): A key of its config.json, and the value that tells it from other folders.
        files (`re.Pattern[str]`): The names of all files that it can have.
    """

    name: str
    entry: tuple[str, str]
    files: re.Pattern[str]


CONVERTED = Result("converted LLaVA-SP model", ("model_type", LlavaSPConfig.model_type), CONVERTED_FILES)


def check_output(output: Path, inputs: list[Path], overwrite: bool, result: Result = CONVERTED) -> None:
    """
    Check that a folder can be written, before any work is done for it.

    Args:
        output (`Path`): The folder.
        inputs (`list[Path]`): Folders that are read, which it must not lie in or hold.
        overwrite (`bool`): Whether it may exist, as the result of an earlier conversion.
        result (`Result`, *optional*, defaults to `CONVERTED`): What is written.

    Raises:
        ConversionError: If it cannot.
    """
    check_replaceable(output, overwrite, result)
    for folder in inputs:
        if output.resolve().is_relative_to(folder.resolve()):
            raise ConversionError(f"The output {output} lies inside {folder}, which is an input: choose another.")
        if overwrite and folder.resolve().is_relative_to(output.resolve()):
            raise ConversionError(f"The output {output} holds {folder}, which is an input: choose another.")


def check_replaceable(output: Path, overwrite: bool, result: Result) -> None:
    """Raise a `ConversionError` if something is there, unless it may be replaced and is of the kind to be written."""
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ConversionError(
            f"The output {output} exists already: remove it, choose another, or pass --overwrite to replace the "
            "result of an earlier conversion."
        )
    if output.is_symlink() or not output.is_dir():
        raise ConversionError(f"The output {output} is no folder, so it is not overwritten: choose another.")
    names = sorted(path.name for path in output.iterdir())
    key, value = result.entry
    if names and ("config.json" not in names or read_json(output / "config.json").get(key) != value):
        raise ConversionError(f"The output {output} is no {result.name}, so it is not overwritten: choose another.")
    others = [name for name in names if not (result.files.fullmatch(name) and (output / name).is_file())]
    if others:
        raise ConversionError(
            f"The output {output} holds files that no conversion has written, so it is not overwritten: "
            f"{join_keys(others)}. Move them elsewhere or choose another output."
        )


@contextmanager
def staged(output: Path, overwrite: bool, result: Result = CONVERTED) -> Iterator[Path]:
    """
    A folder to write to, which is moved to `output` at the end, if nothing went wrong, and removed otherwise. What a
    killed conversion has left is removed first; a folder that it had put aside to replace it is put back.

    Args:
        output (`Path`): Where the folder is to appear.
        overwrite (`bool`): Whether the result of an earlier conversion that is there is replaced.
        result (`Result`, *optional*, defaults to `CONVERTED`): What is written.

    Yields:
        `Path`: An empty folder beside it, on the same file system.

    Raises:
        ConversionError: If another conversion is writing to `output`, there is something that may not be replaced, or
            writing fails, as on a full disk.
    """
    # Always the same name, so that what is left can be found
    staging = output.parent / f".{output.name}.incomplete"
    lock = FileLock(staging / LOCK_NAME, timeout=0)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(staging) and (
            staging.is_symlink()
            or not staging.is_dir()
            or (not (staging / LOCK_NAME).exists() and any(staging.iterdir()))
        ):
            raise ConversionError(
                f"{staging} is where {output} is written at first, but it exists and no conversion has made it: move "
                "it elsewhere."
            )
        staging.mkdir(exist_ok=True)
        with lock:
            replaced = staging / REPLACED_NAME
            put_back(replaced, output)
            try:
                clear(staging)
                check_replaceable(output, overwrite, result)
                folder = staging / output.name
                # A model may be called as the lock
                folder = folder if folder.name not in (LOCK_NAME, REPLACED_NAME, OBSOLETE_NAME) else staging / "folder"
                folder.mkdir()
                yield folder
                # It may have come since
                check_replaceable(output, overwrite, result)
                if os.path.lexists(output):
                    output.rename(replaced)
                folder.rename(output)
                if replaced.exists():
                    replaced.rename(staging / OBSOLETE_NAME)
            finally:
                put_back(replaced, output)
                # The lock goes last: what is left is recognised by it
                clear(staging, ignore_errors=True)
                shutil.rmtree(staging, ignore_errors=True)
    except Timeout:
        raise ConversionError(f"Another conversion is writing to {output}: wait for it or choose another.") from None
    except Exception as error:
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif match := RUST_OS_ERROR.fullmatch(str(error)):
            reason = match[1]
        else:
            raise
        raise ConversionError(
            f"Writing {output} failed: {reason}. Nothing of it is left; inputs are as they were."
        ) from error


def put_back(replaced: Path, output: Path) -> None:
    """Move a folder that was put aside to its place again, if nothing has taken it."""
    if replaced.exists() and not os.path.lexists(output):
        replaced.rename(output)


def clear(staging: Path, ignore_errors: bool = False) -> None:
    """Remove everything but the lock."""
    for path in staging.iterdir():
        if path.name != LOCK_NAME:
            shutil.rmtree(path, ignore_errors=ignore_errors)


def check_free_space(output: Path, needed: int) -> None:
    """Raise a `ConversionError` if the disk that `output` is to be on has less than `needed` bytes free."""
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConversionError(
            f"The output {output} needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there: choose a "
            "folder on another disk, or a smaller --dtype."
        )
