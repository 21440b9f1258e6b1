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
"""
What is trained: the projector alone, LoRA and the projector, or everything

What is trained gets the dtype float32: the authors' learning rates change a weight by less than a 16-bit format can
tell apart. Computation stays in 16 bits under autocast, as [`~transformers.TrainingArguments`] with `bf16=True` does
it.
"""

import re
from typing import Any, NoReturn

import torch
from torch import nn

from ..modeling_llava_sp import LlavaSPForConditionalGeneration


# The linear layers of the language model's blocks. Anchored, since the vision tower has layers of the same names.
LORA_TARGETS = r".*\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
PROJECTOR = "multi_modal_projector"
IMAGE_NEWLINE = "image_newline"

METHODS = ("projector", "lora", "full")


def prepare_projector(model: LlavaSPForConditionalGeneration) -> LlavaSPForConditionalGeneration:
    """
    Make the projector the only part of a model that is trained, as the authors' first stage does.

    Args:
        model ([`LlavaSPForConditionalGeneration`]): The model, which is changed.

    Returns:
        [`LlavaSPForConditionalGeneration`]: The same model.
    """
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True).float()
    return model


def prepare_full(
    model: LlavaSPForConditionalGeneration, *, train_vision_tower: bool = False
) -> LlavaSPForConditionalGeneration:
    """
    Make all of a model trained, or all but the vision tower.

    Args:
        model ([`LlavaSPForConditionalGeneration`]): The model, which is changed.
        train_vision_tower (`bool`, *optional*, defaults to `False`): Whether the vision tower is trained, too, as far
            as its features are made of it: not what comes behind the layer that they are taken from.

    Returns:
        [`LlavaSPForConditionalGeneration`]: The same model.
    """
    tower = model.model.vision_tower
    dtype = tower.dtype
    model.requires_grad_(True).float()
    if not train_vision_tower:
        tower.requires_grad_(False).to(dtype)
        return model
    # Several processes wait for a gradient of whatever is trained. Found with a tower without weights, since those of
    # the model may be in pieces.
    size = model.config.tile_size
    with torch.device("meta"):
        outline = type(tower)(tower.config)
        features = outline(torch.empty(1, 3, size, size), output_hidden_states=True).hidden_states
    parameters = dict(outline.named_parameters())
    used = features[model.config.vision_feature_layer].sum()
    gradients = torch.autograd.grad(used, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        tower.get_parameter(name).requires_grad_(gradient is not None)
    return model


def prepare_lora(
    model: LlavaSPForConditionalGeneration,
    *,
    r: int = 128,
    lora_alpha: int = 256,
    lora_dropout: float = 0.05,
    **kwargs: Any,
) -> Any:
    """
    Put LoRA on the language model's linear layers and train the projector in full beside it, as the authors' second
    stage does, with the separator of image tiles where the model has one. What PEFT saves of the result holds all.

    PEFT copies what is trained in full, to be able to switch the adapter off. The projector is close to a billion
    parameters, so its copy is dropped: `disable_adapter` cannot be used on the result.

    Args:
        model ([`LlavaSPForConditionalGeneration`]): The model, which is changed.
        r (`int`, *optional*, defaults to 128): Rank of the matrices.
        lora_alpha (`int`, *optional*, defaults to 256): Their product is scaled by `lora_alpha / r`.
        lora_dropout (`float`, *optional*, defaults to 0.05): Dropout in front of them.
        kwargs (`dict[str, Any]`, *optional*): Other arguments of [`~peft.LoraConfig`].

    Returns:
        [`~peft.PeftModel`]: The model with the adapter.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If no layer of the language model has one of the usual names, or the model has an adapter.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs PEFT: pip install 'transformers-llava-sp[train]'.") from error
    if hasattr(model, "peft_config"):
        raise ValueError(
            "The model has an adapter already, which a new one would replace: merge it with `llava-sp merge` and load "
            "the result, or train it further by PeftModel.from_pretrained(model, adapter, is_trainable=True)."
        )
    if not any(re.fullmatch(LORA_TARGETS, name) for name, _ in model.named_modules()):
        names = sorted(
            {
                name.rpartition(".")[2]
                for name, module in model.model.language_model.named_modules()
                if isinstance(module, nn.Linear)
            }
        )
        raise ValueError(
            f"{type(model.model.language_model).__name__} has no layers that {LORA_TARGETS!r} matches, but {names}: "
            "make the adapter with PEFT itself."
        )
    trained_in_full = [PROJECTOR, *([IMAGE_NEWLINE] if hasattr(model.model, IMAGE_NEWLINE) else [])]
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=LORA_TARGETS,
        modules_to_save=trained_in_full,
        **kwargs,
    )
    peft_model = get_peft_model(model, config)
    drop_copies(peft_model)
    # LoRA's own weights are in float32 already
    for name in trained_in_full:
        peft_model.get_submodule(f"base_model.model.model.{name}").float()
    return peft_model


def drop_copies(model: nn.Module) -> None:
    """Drop the untrained copies that PEFT keeps of modules that are trained in full."""
    from peft.utils.other import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module = DroppedCopy()


class DroppedCopy(nn.Module):
    """Stands where PEFT's untrained copy of a module was."""

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            "While an adapter is trained, there is no untrained projector to go back to: save the adapter, and load "
            "it by PeftModel.from_pretrained to switch it off or to put another beside it."
        )
