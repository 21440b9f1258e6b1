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
        replacements (`bool`, *optional*, defaults to `False`): Whether it may also hold whole weights, which were
            trained in full (`modules_to_save` of PEFT).

    Raises:
        ConversionError: If something is missing, is no plain LoRA, or does not fit the rank in adapter_config.json.
    """

    def __init__(self, folder: Path, *, replacements: bool = False):
        self.config_file = folder / "adapter_config.json"
        config = read_json(self.config_file)
        for option, plain in PLAIN_LORA.items():
            if replacements and option == "modules_to_save":
                continue
            if option in config and config[option] not in plain:
                raise ConversionError(
                    f"{self.config_file}: {option} is {config[option]!r}, expected {plain[0]!r}: only plain LoRA "
                    "adapters can be merged."
                )
        rank: Any = config.get("r")
        alpha: Any = config.get("lora_alpha")
        if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
            raise ConversionError(
                f"{self.config_file}: expected numbers for r and lora_alpha, got {rank!r} and {alpha!r}."
            )
        self.rank = rank
        self.alpha = alpha
        self.scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        self.modules_to_save: list[str] = config.get("modules_to_save") or []
        base_model = config.get("base_model_name_or_path")
        self.base_model = base_model if isinstance(base_model, str) and base_model else None
        self.base_revision = config.get("revision")

        self.tensors = TensorFiles.from_folder(folder, ADAPTER_WEIGHTS)
        pairs: dict[str, dict[str, str]] = {}
        self.replaced: dict[str, str] = {}
        for key in self.tensors:
            match = ADAPTER_KEY.fullmatch(key)
            if key.startswith(LORA_PREFIX) and match is not None:
                pairs.setdefault(match["module"].removeprefix(LORA_PREFIX) + ".weight", {})[match["matrix"]] = key
            elif key.startswith(LORA_PREFIX) and replacements and ".lora_" not in key:
                # PEFT calls a weight so that it both adapts and saves whole, as it does with embeddings and heads
                self.replaced[key.removeprefix(LORA_PREFIX).replace(".base_layer.", ".")] = key
            else:
                raise ConversionError(
                    f"{self.tensors.file_of(key)}: unexpected {key!r}; a plain LoRA adapter has only keys of the form "
                    f"'{LORA_PREFIX}...lora_A.weight' and '...lora_B.weight'."
                )
        if not len(self.tensors):
            raise ConversionError(f"The adapter in {folder} has no tensors.")
        for pair in pairs.values():
            if len(pair) == 1:
                [(matrix, key)] = pair.items()
                raise ConversionError(
                    f"{self.tensors.file_of(key)}: {key!r} has no counterpart lora_{'B' if matrix == 'A' else 'A'}."
                )
        self.pairs = {target: (pair["A"], pair["B"]) for target, pair in pairs.items()}
        for key_a, key_b in self.pairs.values():
            self._check_rank(key_a, self.tensors[key_a].shape[:1])
            self._check_rank(key_b, self.tensors[key_b].shape[1:2])

    def _check_rank(self, key: str, rank: tuple[int, ...]) -> None:
        if tuple(rank) != (self.rank,):
            raise ConversionError(
                f"{self.tensors.file_of(key)}: {key!r} has shape {tuple(self.tensors[key].shape)}, but r is "
                f"{self.rank} in {self.config_file.name}."
            )

    def check_targets(self, weights: TensorFiles) -> None:
        """
        Check that every part of the adapter belongs to one of the weights it is to be merged into.

        Args:
            weights (`TensorFiles`): The weights, under the keys of the model that the adapter was trained on.

        Raises:
            ConversionError: If a weight is missing or of another shape than the adapter's matrices make.
        """
        absent = [target for target in [*self.pairs, *self.replaced] if target not in weights]
        if absent:
            file = next(iter(self.tensors.files.values()))
            raise ConversionError(
                f"{file} adapts weights that the base model does not have: {join_keys(absent)}. Pass the base model "
                "that it was trained on."
            )
        trained_in_full = re.compile(rf"(.+\.)?({'|'.join(map(re.escape, self.modules_to_save))})\..+")
        lacking = [key for key in weights if trained_in_full.fullmatch(key) and key not in self.replaced]
        if self.modules_to_save and lacking:
            raise ConversionError(
                f"{self.config_file}: modules_to_save is {self.modules_to_save}, but the adapter lacks weights of "
                f"them: {join_keys(lacking)}."
            )
        for target, key in self.replaced.items():
            self.tensors.check(key, tuple(weights[target].shape))
        for target, (key_a, key_b) in self.pairs.items():
            shape = tuple(weights[target].shape)
            if len(shape) not in (2, 4):
                raise ConversionError(
                    f"{self.tensors.file_of(key_a)} adapts {target!r}, which is no matrix in the base model: it has "
                    f"shape {shape}."
                )
            # Of a convolution, A is one with its kernel's size, and B one with kernels of a single position
            self.tensors.check(key_a, (self.rank, *shape[1:]))
            self.tensors.check(key_b, (shape[0], self.rank, *(1 for _ in shape[2:])))

    def factors(self, target: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """
        What is to be added to a weight, as two factors.

        Args:
            target (`str`): The weight's key.

        Returns:
            `tuple(torch.Tensor, torch.Tensor)`: B of shape `(out_features, rank)` and A of shape
            `(rank, in_features)`, in float32, or `None` if the adapter does not touch the weight. Their product times
            `scaling` is to be added.
        """
        if target not in self.pairs:
            return None
        lora_a, lora_b = (self.tensors[key].float().flatten(1) for key in self.pairs[target])
        return lora_b, lora_a
