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
"""Fine-tuning: conversations with images, batches of them in which only the answers are learned, and the trainer"""

from typing import TYPE_CHECKING, Any

from .collator import LlavaSPDataCollator
from .data import (
    ConversationDataset,
    RecordError,
    StreamedConversationDataset,
    TrainingDataError,
    drop_long_records,
    load_conversations,
    to_example,
)
from .parts import prepare_full, prepare_lora, prepare_projector


if TYPE_CHECKING:
    from .trainer import LlavaSPTrainer, LlavaSPTrainingArguments


__all__ = [
    "ConversationDataset",
    "LlavaSPDataCollator",
    "LlavaSPTrainer",
    "LlavaSPTrainingArguments",
    "RecordError",
    "StreamedConversationDataset",
    "TrainingDataError",
    "drop_long_records",
    "load_conversations",
    "prepare_full",
    "prepare_lora",
    "prepare_projector",
    "to_example",
]


def __getattr__(name: str) -> Any:
    # Trainer needs packages that data and collator do without
    if name in ("LlavaSPTrainer", "LlavaSPTrainingArguments"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
