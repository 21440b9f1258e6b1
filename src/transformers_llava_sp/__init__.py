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

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_llava_sp import LlavaSPConfig, LlavaSPProjectorConfig
from .modeling_llava_sp import (
    LlavaSPForConditionalGeneration,
    LlavaSPModel,
    LlavaSPPreTrainedModel,
    LlavaSPProjector,
)
from .processing_llava_sp import LlavaSPProcessor
from .tiny_models import tiny_model_path


__version__ = "0.1.0"

AutoConfig.register(LlavaSPConfig.model_type, LlavaSPConfig, exist_ok=True)
AutoConfig.register(LlavaSPProjectorConfig.model_type, LlavaSPProjectorConfig, exist_ok=True)
AutoModel.register(LlavaSPConfig, LlavaSPModel, exist_ok=True)
AutoModel.register(LlavaSPProjectorConfig, LlavaSPProjector, exist_ok=True)
AutoModelForImageTextToText.register(LlavaSPConfig, LlavaSPForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(LlavaSPConfig, LlavaSPForConditionalGeneration, exist_ok=True)
AutoProcessor.register(LlavaSPConfig, LlavaSPProcessor, exist_ok=True)

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
