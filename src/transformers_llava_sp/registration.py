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
Transformers' tables when those are imported, which `import transformers` does not do by itself.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


# In what module of Transformers, and in which of its tables, a type of model has which class
NAMES = {
    "transformers.models.auto.auto_mappings": {
        "CONFIG_MAPPING_NAMES": {"llava_sp": "LlavaSPConfig", "llava_sp_projector": "LlavaSPProjectorConfig"},
        "PROCESSOR_MAPPING_NAMES": {"llava_sp": "LlavaSPProcessor"},
    },
    "transformers.models.auto.modeling_auto": {
        "MODEL_MAPPING_NAMES": {"llava_sp": "LlavaSPModel", "llava_sp_projector": "LlavaSPProjector"},
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": {"llava_sp": "LlavaSPForConditionalGeneration"},
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": {"llava_sp": "LlavaSPForConditionalGeneration"},
    },
}
# Where Transformers looks for the classes of these types
HOMES = ("transformers.models.llava_sp", "transformers.models.llava_sp_projector")


class NameAdder(MetaPathFinder):
    """Finds the modules of `NAMES` as Python does, and adds the names as soon as such a module has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own specification, with a loader that adds the names; `None` for all other modules."""
        if fullname not in NAMES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_add(module: ModuleType) -> None:
                execute(module)
                add_names(module)

            spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


def add_names(module: ModuleType) -> None:
    """Add the names to the tables of one of Transformers' modules."""
    for table, names in NAMES[module.__name__].items():
        getattr(module, table).update(names)


def register_classes() -> None:
    """Register the classes themselves, for tables that have been read already."""
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
    Make the Auto classes know LLaVA-SP, whether they have been imported or not. Doing it again changes nothing.

    Args:
        package (`ModuleType`): What has the classes as attributes.
    """
    if NAMES.keys() & sys.modules.keys():
        register_classes()
        return
    sys.modules.update(dict.fromkeys(HOMES, package))
    if not any(isinstance(finder, NameAdder) for finder in sys.meta_path):
        sys.meta_path.insert(0, NameAdder())
