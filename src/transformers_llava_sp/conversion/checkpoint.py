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
import os
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import find_adapter_config_file

from ..configuration_llava_sp import LlavaSPConfig
from ..tiny_models import TINY_MODELS, resolve_model_name


# Everything but the weights, which a repository may hold in two formats. The authors' projector has one only.
SMALL_FILES = ["*.json", "*.model", "*.jinja", "merges.txt"]
# The licence stands in it
CARD = "README.md"
PROJECTOR_FILES = ["non_lora_trainables.bin", "mm_projector.bin", "model.bin"]
# Intermediate checkpoints and other formats lie in subfolders
HUB_IGNORED_FILES = ["*/*"]


class ConversionError(ValueError):
    """A checkpoint, a base model or a vision tower that cannot be converted; the message says why and what to do."""


@dataclass(frozen=True)
class SourceFolder:
    """
    One of the folders that a conversion reads.

    Args:
        role (`str`): What it holds, for messages and the model card.
        name (`str`): Its Hub id, or the name of a local folder without the path to it.
        folder (`Path`): Where it is on this machine.
        revision (`str`, *optional*): The commit's hash, of a Hub repository.
    """

    role: str
    name: str
    folder: Path
    revision: str | None = None

    @property
    def published_role(self) -> str:
        """What the model card calls it."""
        return {"checkpoint": "LLaVA-SP checkpoint", "base model": "language model"}.get(self.role, self.role)

    def __str__(self) -> str:
        """As it is passed on the command line, without what is particular to this machine."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    def files(self, weights: Mapping[str, Path] | None = None) -> list[Path]:
        """
        The files of the folder that a conversion reads: the small ones, and of the weights those it has opened.

        Args:
            weights (`Mapping[str, Path]`, *optional*): The file of each tensor.
        """
        small = [path for pattern in SMALL_FILES for path in self.folder.glob(pattern) if path.is_file()]
        return sorted({*small, *(path for path in (weights or {}).values() if path.parent == self.folder)})


def require_llava_sp(name: str) -> None:
    """
    Raise a `ValueError` if a folder or Hub id is not a LLaVA-SP model in Transformers' format, an `OSError` if it
    cannot be found.
    """
    model_type = find_model_type(name)
    if model_type == LlavaSPConfig.model_type:
        return
    if model_type is None and find_adapter_config_file(name) is not None:
        raise ValueError(
            f"{name!r} is an adapter, not a LLaVA-SP model: merge it into its model with `llava-sp merge` first."
        )
    raise ValueError(
        f"{name!r} is not a LLaVA-SP model: its config.json has model_type {model_type!r}, not "
        f"{LlavaSPConfig.model_type!r}. Convert the authors' checkpoints with `llava-sp convert` first."
    )


def require_all_weights(name: str, loading: Mapping[str, Any]) -> None:
    """
    Raise a `ValueError` if a model was not loaded whole: what Transformers finds no value for, it draws at random.

    Args:
        name (`str`): The folder or Hub id.
        loading (`dict[str, Any]`): What `from_pretrained` gives for `output_loading_info=True`.
    """
    random_weights = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    if random_weights:
        raise ValueError(
            f"{name!r} has not all weights in the shapes that its config.json implies: "
            f"{join_keys(sorted(random_weights))}. Make or download it again."
        )


def find_model_type(name: str) -> str | None:
    """The `model_type` in the config.json of a folder or Hub id. Raises an `OSError` if that cannot be found."""
    if not Path(name).exists() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise OSError(f"There is no folder {name!r}.")
    if not Path(name).exists() and name.startswith("tiny-") and "/" not in name:
        raise OSError(
            f"There is no folder {name!r}, and no tiny model of that name: there are {' and '.join(TINY_MODELS)}."
        )
    try:
        return PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    except OSError as error:
        if isinstance(error.__cause__, HFValidationError):
            raise OSError(f"There is no folder {name!r}, and a Hub id has the form 'owner/name'.") from error
        raise


def resolve_source(source: str | Path, role: str, *, weights: bool = True, advice: str = "") -> SourceFolder:
    """
    The folder of a checkpoint, downloaded first if it is named by its Hub id.

    Args:
        source (`str` or `Path`): A local folder, the name of a tiny model, or a Hub id, which `@` and a branch, tag or
            commit may follow.
        role (`str`): What the folder holds, for error messages.
        weights (`bool`, *optional*, defaults to `True`): Whether the weights are needed as well.
        advice (`str`, *optional*): A sentence for error messages.

    Returns:
        [`SourceFolder`]: The folder.

    Raises:
        ConversionError: If there is no such folder, or the download fails.
    """
    advice = advice and f" {advice}"
    folder = Path(resolve_model_name(str(source))).expanduser()
    if folder.is_dir():
        return SourceFolder(role, Path(os.path.abspath(folder)).name, folder)
    if folder.exists():
        raise ConversionError(f"The {role} {source} is a file: pass the folder that holds it.")
    repo_id, _, revision = str(source).partition("@")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ConversionError(
            f"The {role} {source} does not exist on this machine, and is no Hub id either.{advice}"
        ) from None
    patterns = [[*SMALL_FILES, CARD]]
    if weights:
        # In one format only
        patterns = [[*SMALL_FILES, CARD, *PROJECTOR_FILES, kind] for kind in ("*.safetensors", "*.bin")]
    try:
        for allowed in patterns:
            folder = Path(
                snapshot_download(
                    repo_id, revision=revision or None, allow_patterns=allowed, ignore_patterns=HUB_IGNORED_FILES
                )
            )
            if any(folder.glob(allowed[-1])):
                break
    except Exception as error:  # anything from a refused connection to a gated repository
        raise ConversionError(
            f"The {role} {source} is neither a folder on this machine nor a Hub repository that can be downloaded: "
            f"{error}{advice}"
        ) from error
    # The cache keeps a snapshot in a folder that is called by its commit
    return SourceFolder(role, repo_id, folder, folder.name)


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
        tensors (`dict[str, torch.Tensor]`): The tensors.
        files (`dict[str, Path]`): The file of each.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], files: dict[str, Path]):
        self._tensors = tensors
        self.files = files

    @classmethod
    def open(cls, *files: Path) -> "TensorFiles":
        """
        Open files.

        Args:
            files (`Path`): The files. A key that two of them hold is taken from the first.

        Raises:
            ConversionError: If a file cannot be read.
        """
        tensors: dict[str, torch.Tensor] = {}
        origins: dict[str, Path] = {}
        for file in files:
            for key, tensor in open_tensors(file).items():
                tensors.setdefault(key, tensor)
                origins.setdefault(key, file)
        return cls(tensors, origins)

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
                return cls.open(folder / name)
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
        tensors = cls.open(*(index.parent / name for name in sorted(set(weight_map.values()))))
        lacking = defaultdict(list)
        for key, name in weight_map.items():
            if key not in tensors or tensors.file_of(key).name != name:
                lacking[name].append(key)
        for name, keys in lacking.items():
            raise ConversionError(f"{index.parent / name} lacks tensors that {index.name} lists: {join_keys(keys)}.")
        return tensors

    def select(self, wanted: Callable[[str], bool]) -> "TensorFiles":
        """The tensors whose keys are wanted."""
        keys = [key for key in self if wanted(key)]
        return TensorFiles({key: self[key] for key in keys}, {key: self.files[key] for key in keys})

    def file_of(self, key: str) -> Path:
        """The file that holds a key."""
        return self.files[key]

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
