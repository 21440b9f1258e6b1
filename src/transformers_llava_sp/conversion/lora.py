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
"""LoRA adapters in PEFT's format, merged into the weights they were trained on"""

import math
import re
from pathlib import Path
from typing import Any

import torch

from .checkpoint import ConversionError, TensorFiles, join_keys, read_json
from .original import ADAPTER_WEIGHTS, LORA_PREFIX


# Options that change what an adapter computes, or what it was trained on top of, and the values that do not. An option
# that adapter_config.json leaves out has its plain value.
PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    # Others, such as PiSSA, change the base model's weights before training
    "init_lora_weights": (True, False, None, "gaussian"),
}

ADAPTER_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")


class LoraAdapter:
    """
    A plain LoRA adapter: for each adapted weight W two matrices, which make it W + B A * scaling.

    Args:
        folder (`Path`): A folder with adapter_config.json and the adapter's weights, as PEFT saves them.

    Raises:
        ConversionError: If something is missing, is no plain LoRA, or does not fit the rank in adapter_config.json.
    """

    def __init__(self, folder: Path):
        config_file = folder / "adapter_config.json"
        config = read_json(config_file)
        for option, plain in PLAIN_LORA.items():
            if option in config and config[option] not in plain:
                raise ConversionError(
                    f"{config_file}: {option} is {config[option]!r}, expected {plain[0]!r}: only plain LoRA adapters "
                    "can be merged."
                )
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
            raise ConversionError(f"{config_file}: expected numbers for r and lora_alpha, got {rank!r} and {alpha!r}.")
        self.rank = rank
        self.scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

        self.tensors = TensorFiles.from_folder(folder, ADAPTER_WEIGHTS)
        pairs: dict[str, dict[str, str]] = {}
        for key in self.tensors:
            match = ADAPTER_KEY.fullmatch(key)
            if match is None or not key.startswith(LORA_PREFIX):
                raise ConversionError(
                    f"{self.tensors.file_of(key)}: unexpected {key!r}; a plain LoRA adapter has only keys of the form "
                    f"'{LORA_PREFIX}...lora_A.weight' and '...lora_B.weight'."
                )
            pairs.setdefault(match["module"].removeprefix(LORA_PREFIX) + ".weight", {})[match["matrix"]] = key
        if not pairs:
            raise ConversionError(f"The adapter in {folder} has no tensors.")
        for pair in pairs.values():
            if len(pair) == 1:
                [(matrix, key)] = pair.items()
                raise ConversionError(
                    f"{self.tensors.file_of(key)}: {key!r} has no counterpart lora_{'B' if matrix == 'A' else 'A'}."
                )
        self.pairs = {target: (pair["A"], pair["B"]) for target, pair in pairs.items()}

    def check_targets(self, weights: TensorFiles) -> None:
        """
        Check that every part of the adapter belongs to one of the weights it is to be merged into.

        Args:
            weights (`TensorFiles`): The weights, under the keys of the model that the adapter was trained on.

        Raises:
            ConversionError: If a weight is missing or of another shape than the adapter's matrices make.
        """
        absent = [target for target in self.pairs if target not in weights]
        if absent:
            file = self.tensors.file_of(self.pairs[absent[0]][0])
            raise ConversionError(
                f"{file} adapts weights that the base model does not have: {join_keys(absent)}. Pass the base model "
                "that it was trained on."
            )
        for target, (key_a, key_b) in self.pairs.items():
            weight_shape = tuple(weights[target].shape)
            file = self.tensors.file_of(key_a)
            if len(weight_shape) != 2:
                raise ConversionError(
                    f"{file} adapts {target!r}, which is no matrix in the base model: it has shape {weight_shape}."
                )
            if self.tensors[key_a].shape[0] != self.rank:
                raise ConversionError(
                    f"{file}: {key_a!r} has shape {tuple(self.tensors[key_a].shape)}, but r is {self.rank} in "
                    "adapter_config.json."
                )
            self.tensors.check(key_a, (self.rank, weight_shape[1]))
            self.tensors.check(key_b, (weight_shape[0], self.rank))

    def merge(self, target: str, weight: torch.Tensor) -> torch.Tensor:
        """
        Merge the adapter into a weight.

        Args:
            target (`str`): The weight's key.
            weight (`torch.Tensor` of shape `(out_features, in_features)`): The weight.

        Returns:
            `torch.Tensor` of shape `(out_features, in_features)`: The merged weight in float32, or `weight` itself if
            the adapter does not touch it.
        """
        if target not in self.pairs:
            return weight
        lora_a, lora_b = (self.tensors[key].float() for key in self.pairs[target])
        return weight.float() + (lora_b @ lora_a) * self.scaling
