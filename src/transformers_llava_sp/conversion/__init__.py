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
"""The authors' checkpoints -> this package's format, and back"""

from .checkpoint import ConversionError
from .convert import ConversionReport, convert_checkpoint
from .create import CreationReport, create_model
from .export import ExportReport, export_original
from .inspection import Inspection, inspect_checkpoint
from .merge import merge_adapter


__all__ = [
    "ConversionError",
    "ConversionReport",
    "CreationReport",
    "ExportReport",
    "Inspection",
    "convert_checkpoint",
    "create_model",
    "export_original",
    "inspect_checkpoint",
    "merge_adapter",
]
