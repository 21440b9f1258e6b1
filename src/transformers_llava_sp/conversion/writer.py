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
"""Writing weights as safetensors shards, one block of one tensor in memory at a time"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.serialization import StateDictSplit
from transformers.utils.logging import tqdm

from .checkpoint import ConversionError
from .plan import Source


# As the safetensors format calls them
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
HEADER_ALIGNMENT = 8


def plan_shards(sources: Mapping[str, Source], dtype: torch.dtype, max_shard_size: str) -> StateDictSplit:
    """
    Which file each tensor goes to, as `save_pretrained` decides it.

    Args:
        sources (`Mapping[str, Source]`): Where each tensor comes from, by its key.
        dtype (`torch.dtype`): That all tensors get.
        max_shard_size (`str`): Size of the largest file, such as `"5GB"` (1 GB is 10⁹ bytes). A tensor larger than
            that has a file of its own.

    Raises:
        ConversionError: If `max_shard_size` is no size.
    """
    placeholders = {key: torch.empty(source.shape, dtype=dtype, device="meta") for key, source in sources.items()}
    try:
        return split_torch_state_dict_into_shards(
            placeholders, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ConversionError(f"{max_shard_size!r} is no size of a file, expected one such as '5GB'.") from error


def write_weights(folder: Path, sources: Mapping[str, Source], dtype: torch.dtype, shards: StateDictSplit) -> None:
    """
    Convert all tensors and write them.

    Args:
        folder (`Path`): The folder to write to.
        sources (`Mapping[str, Source]`): Where each tensor comes from, by its key.
        dtype (`torch.dtype`): That all tensors get.
        shards (`StateDictSplit`): Which file each goes to.

    Raises:
        ConversionError: If a tensor holds NaN or infinite values.
    """
    num_bytes = {key: torch.Size(source.shape).numel() * dtype.itemsize for key, source in sources.items()}
    with tqdm(total=sum(num_bytes.values()), desc="Converting", unit="B", unit_scale=True) as progress:
        for name, keys in shards.filename_to_tensors.items():
            # Sorted as the library sorts: how a tensor lies in memory decides the last bit of matrix products
            write_shard(folder / name, {key: sources[key] for key in sorted(keys)}, dtype, progress)
    if shards.is_sharded:
        index = {
            "metadata": {"total_parameters": sum(num_bytes.values()) // dtype.itemsize, **shards.metadata},
            "weight_map": dict(sorted(shards.tensor_to_filename.items())),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_shard(path: Path, sources: Mapping[str, Source], dtype: torch.dtype, progress: tqdm) -> None:
    """
    Write one file. The safetensors library wants all tensors of a file in memory, so the file is made here: the
    header's length in 8 bytes, the header as JSON with every tensor's place, and the tensors one after the other.

    Args:
        path (`Path`): The file.
        sources (`Mapping[str, Source]`): Where each tensor comes from, by its key.
        dtype (`torch.dtype`): That all tensors get.
        progress (`tqdm`): Counts the bytes of the tensors.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, source in sources.items():
        start, end = end, end + torch.Size(source.shape).numel() * dtype.itemsize
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(source.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for source in sources.values():
            for block in source.convert(dtype):
                file.write(block.view(-1).view(torch.uint8).numpy().data)
                progress.update(block.nbytes)
