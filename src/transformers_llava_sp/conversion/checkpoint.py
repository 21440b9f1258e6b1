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
"""Reading checkpoint folders: where they are, their JSON files, and their tensors without loading them"""

import json
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open


# Everything but the weights, which a repository may hold in two formats. The projector of a LoRA release has one only.
HUB_FILES = ["*.json", "*.model", "*.jinja", "non_lora_trainables.bin", "mm_projector.bin", "model.bin"]
# Intermediate checkpoints and other formats lie in subfolders
HUB_IGNORED_FILES = ["*/*"]


class ConversionError(ValueError):
    """A checkpoint, a base model or a vision tower that cannot be converted; the message says why and what to do."""


def resolve_folder(source: str | Path, what: str) -> Path:
    """
    The local folder of a checkpoint, downloaded first if it is named by its Hub id.

    Args:
        source (`str` or `Path`): A local folder or a Hub id.
        what (`str`): What the folder holds, for error messages.

    Returns:
        `Path`: The folder.

    Raises:
        ConversionError: If there is no such folder, or the download fails.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConversionError(f"The {what} {source} is a file: pass the folder that holds it.")
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        raise ConversionError(f"The {what} {source} does not exist: expected a local folder or a Hub id.") from None
    try:
        for weights in ("*.safetensors", "*.bin"):
            folder = Path(
                snapshot_download(str(source), allow_patterns=[*HUB_FILES, weights], ignore_patterns=HUB_IGNORED_FILES)
            )
            if any(folder.glob(weights)):
                break
    except Exception as error:  # anything from a refused connection to a gated repository
        raise ConversionError(
            f"The {what} {source} is neither a local folder nor a Hub repository that can be downloaded: {error}"
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """
    Read a JSON file that holds an object.

    Args:
        path (`Path`): The file.

    Returns:
        `dict[str, Any]`: Its content.

    Raises:
        ConversionError: If the file is missing, unreadable or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing.") from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a JSON {type(content).__name__}, expected an object.")
    return content


def open_tensors(path: Path) -> dict[str, torch.Tensor]:
    """
    Open a file of tensors, mapped into memory: nothing is read before a tensor's values are used, and no code that a
    pickle may hold is run.

    Args:
        path (`Path`): A safetensors file, or a PyTorch file holding a dict of tensors.

    Returns:
        `dict[str, torch.Tensor]`: The tensors.

    Raises:
        ConversionError: If the file is missing, damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise ConversionError(f"{path} is missing.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConversionError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the unpickler raises anything on a damaged file
        raise ConversionError(
            f"{path} is not a readable PyTorch file of tensors ({type(error).__name__}): it is damaged, or holds "
            "something else, which is not loaded because that could run code."
        ) from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds an object of type {type(content).__name__}, expected a dict of tensors.")
    for key, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise ConversionError(
                f"{path} holds an object of type {type(value).__name__} at {key!r}, expected tensors only."
            )
    return content


class TensorFiles(Mapping[str, torch.Tensor]):
    """
    The tensors of one file, or of several as shards of one checkpoint, mapped into memory.

    Args:
        files (`list[Path]`): The files. A key that two files hold is taken from the first.

    Raises:
        ConversionError: If a file cannot be read.
    """

    def __init__(self, files: list[Path]):
        self._tensors: dict[str, torch.Tensor] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            for key, tensor in open_tensors(file).items():
                self._tensors.setdefault(key, tensor)
                self._files.setdefault(key, file)

    @classmethod
    def from_folder(cls, folder: Path, names: tuple[str, ...]) -> "TensorFiles":
        """
        Open the weights of a folder, whole or sharded.

        Args:
            folder (`Path`): The folder.
            names (`tuple[str, ...]`): File names of unsharded weights, the preferred one first.

        Raises:
            ConversionError: If the folder has none of them, or the index of the shards does not fit them.
        """
        for name in names:
            index = folder / f"{name}.index.json"
            if (folder / name).exists():
                return cls([folder / name])
            if index.exists():
                return cls.from_index(index)
        raise ConversionError(f"{folder} has no weights: expected {' or '.join(names)}, whole or sharded.")

    @classmethod
    def from_index(cls, index: Path) -> "TensorFiles":
        """
        Open the shards that an index lists.

        Args:
            index (`Path`): The index, a JSON file whose `weight_map` gives the file of each key.

        Raises:
            ConversionError: If the index is malformed, names a file outside its folder, or a key that its file lacks.
        """
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ConversionError(f"{index} has no `weight_map` that gives the file name of each key.")
        for key, name in weight_map.items():
            if Path(name).name != name:
                raise ConversionError(f"{index} names {name!r} for {key!r}, which is not a file of its own folder.")
        tensors = cls([index.parent / name for name in sorted(set(weight_map.values()))])
        lacking = defaultdict(list)
        for key, name in weight_map.items():
            if key not in tensors or tensors.file_of(key).name != name:
                lacking[name].append(key)
        for name, keys in lacking.items():
            raise ConversionError(f"{index.parent / name} lacks tensors that {index.name} lists: {join_keys(keys)}.")
        return tensors

    def file_of(self, key: str) -> Path:
        """The file that holds a key."""
        return self._files[key]

    def check(self, key: str, shape: tuple[int, ...]) -> None:
        """
        Check a tensor of weights.

        Args:
            key (`str`): Its key.
            shape (`tuple[int, ...]`): The shape it must have.

        Raises:
            ConversionError: If the shape differs, or the tensor does not hold floating point numbers.
        """
        tensor = self[key]
        if tuple(tensor.shape) != shape:
            raise ConversionError(f"{self.file_of(key)}: {key!r} has shape {tuple(tensor.shape)}, expected {shape}.")
        if not tensor.is_floating_point():
            raise ConversionError(f"{self.file_of(key)}: {key!r} is {tensor.dtype}, expected floating point numbers.")

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def join_keys(keys: list[str], limit: int = 40) -> str:
    """Keys as a list for a message, cut off after `limit` of them."""
    shown = ", ".join(repr(key) for key in keys[:limit])
    return shown if len(keys) <= limit else f"{shown} and {len(keys) - limit} more"
