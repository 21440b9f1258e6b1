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
"""LLaVA-SP for Hugging Face Transformers. Importing the package registers its classes with the Auto classes."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register
from .tiny_models import tiny_model_path


if TYPE_CHECKING:
    from .configuration_llava_sp import LlavaSPConfig, LlavaSPProjectorConfig
    from .modeling_llava_sp import (
        LlavaSPForConditionalGeneration,
        LlavaSPModel,
        LlavaSPPreTrainedModel,
        LlavaSPProjector,
    )
    from .processing_llava_sp import LlavaSPProcessor


__version__ = "0.1.0"

__all__ = [
    "LlavaSPConfig",
    "LlavaSPForConditionalGeneration",
    "LlavaSPModel",
    "LlavaSPPreTrainedModel",
    "LlavaSPProcessor",
    "LlavaSPProjector",
    "LlavaSPProjectorConfig",
    "__version__",
    "tiny_model_path",
]

# Imported when they are asked for: they need PyTorch and much of Transformers, seconds before anything can be done
_MODULES = {
    "configuration_llava_sp": ("LlavaSPConfig", "LlavaSPProjectorConfig"),
    "modeling_llava_sp": (
        "LlavaSPForConditionalGeneration",
        "LlavaSPModel",
        "LlavaSPPreTrainedModel",
        "LlavaSPProjector",
    ),
    "processing_llava_sp": ("LlavaSPProcessor",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_HOMES})


register(sys.modules[__name__])
