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
Makes the Auto classes know LLaVA-SP.

`AutoModel.register` and its like need the classes, so PyTorch and most of Transformers, which take seconds to import:
too long for a command's help, or for a server that looks through its plug-ins. Therefore the models are registered as
Transformers registers its own, by name; the classes are imported when something asks for them. The names go into
Transformers' tables as soon as those are imported, which `import transformers` does not do by itself. Where they have
been imported before this package, the classes themselves are registered, at once.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


# The module of `transformers.models` in which Transformers then looks for the classes
HOME = "transformers_llava_sp"
# What is added to Transformers' tables, by the module that they are in: for each type of model the name of its class
NAMES = {
    "transformers.models.auto.auto_mappings": {
        "CONFIG_MAPPING_NAMES": {"llava_sp": "LlavaSPConfig", "llava_sp_projector": "LlavaSPProjectorConfig"},
        "PROCESSOR_MAPPING_NAMES": {"llava_sp": "LlavaSPProcessor"},
        "SPECIAL_MODEL_TYPE_TO_MODULE_NAME": {"llava_sp": HOME, "llava_sp_projector": HOME},
    },
    "transformers.models.auto.modeling_auto": {
        "MODEL_MAPPING_NAMES": {"llava_sp": "LlavaSPModel", "llava_sp_projector": "LlavaSPProjector"},
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": {"llava_sp": "LlavaSPForConditionalGeneration"},
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": {"llava_sp": "LlavaSPForConditionalGeneration"},
    },
}


class Home(ModuleType):
    """
    The module in which Transformers looks for the classes. Not the package itself, whose modules could then be
    imported a second time, under Transformers' name.

    Args:
        package (`ModuleType`): What has the classes as attributes.
    """

    def __init__(self, package: ModuleType):
        super().__init__(f"transformers.models.{HOME}", package.__doc__)
        self._package = package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._package, name)


class NameAdder(MetaPathFinder):
    """Finds the modules of `NAMES` as all other finders would, and adds the names when such a module is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own specification, with a loader that adds the names; `None` for all other modules."""
        if fullname not in NAMES:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, NameAdder))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_add(module: ModuleType) -> None:
                execute(module)
                if module.__name__ in NAMES:
                    add_names(module)

            spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


def add_names(module: ModuleType) -> None:
    """
    Add the names to the tables of one of Transformers' modules.

    Args:
        module (`ModuleType`): One of `NAMES`.

    Raises:
        ImportError: If it does not have the tables of the releases that this package knows.
    """
    for table, names in NAMES[module.__name__].items():
        if not hasattr(module, table):
            raise ImportError(
                f"{module.__name__} has no {table}, where LLaVA-SP registers itself: this Transformers is newer than "
                "this transformers-llava-sp knows. Upgrade transformers-llava-sp, or take an older Transformers."
            )
        getattr(module, table).update(names)


def register_classes() -> None:
    """Register the classes themselves, for mappings that have been made of the tables already."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from .configuration_llava_sp import LlavaSPConfig, LlavaSPProjectorConfig
    from .modeling_llava_sp import LlavaSPForConditionalGeneration, LlavaSPModel, LlavaSPProjector
    from .processing_llava_sp import LlavaSPProcessor

    AutoConfig.register(LlavaSPConfig.model_type, LlavaSPConfig, exist_ok=True)
    AutoConfig.register(LlavaSPProjectorConfig.model_type, LlavaSPProjectorConfig, exist_ok=True)
    AutoModel.register(LlavaSPConfig, LlavaSPModel, exist_ok=True)
    AutoModel.register(LlavaSPProjectorConfig, LlavaSPProjector, exist_ok=True)
    AutoModelForImageTextToText.register(LlavaSPConfig, LlavaSPForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(LlavaSPConfig, LlavaSPForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LlavaSPConfig, LlavaSPProcessor, exist_ok=True)


def register(package: ModuleType) -> None:
    """
    Make the Auto classes know LLaVA-SP, whether they have been imported or not.

    Args:
        package (`ModuleType`): What has the classes as attributes.
    """
    sys.modules[f"transformers.models.{HOME}"] = Home(package)
    if not any(isinstance(finder, NameAdder) for finder in sys.meta_path):
        sys.meta_path.insert(0, NameAdder())
    if imported := [sys.modules[name] for name in NAMES if name in sys.modules]:
        for module in imported:
            add_names(module)
        register_classes()
