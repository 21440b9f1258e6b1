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
"""Transformers' Trainer, with what training LLaVA-SP needs beside it"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..modeling_llava_sp import LlavaSPForConditionalGeneration
from .data import ConversationDataset
from .parts import PROJECTOR


@dataclass
class LlavaSPTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`], and what they lack.

    Args:
        projector_learning_rate (`float`, *optional*): The learning rate of the projector. Defaults to `learning_rate`.
    """

    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "The learning rate of the projector. That of all else if not given."}
    )
    # The collator makes the model's inputs; the examples have none of them
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be false: the collator needs the rest."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: the collator needs what it would remove.")


class ThroughputCallback(TrainerCallback):
    """Adds tokens and images per second, and the most memory that was in use, to what is logged."""

    def __init__(self) -> None:
        self.num_tokens = self.num_images = 0
        self.start = time.perf_counter()

    def count(self, batch: dict[str, Any]) -> None:
        """Count a batch that this process is going to train on."""
        self.num_tokens += int(batch["attention_mask"].sum())
        self.num_images += len(batch["pixel_values"]) if "pixel_values" in batch else 0

    def figures(self, num_processes: int) -> dict[str, float]:
        """What to log: since the last call, of all processes, taken to be alike."""
        seconds = time.perf_counter() - self.start
        figures = {
            "tokens_per_second": round(self.num_tokens * num_processes / seconds, 1),
            "images_per_second": round(self.num_images * num_processes / seconds, 2),
        }
        if torch.cuda.is_available():
            figures["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        self.num_tokens = self.num_images = 0
        self.start = time.perf_counter()
        return figures

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = time.perf_counter()


class LlavaSPTrainer(Trainer):
    """
    [`~transformers.Trainer`] for LLaVA-SP: a learning rate for the projector; batches of one modality and about one
    length; a loss on the tokenizer's own vocabulary, as the authors'; a stop at a loss that is no number; checkpoints
    that hold only what was trained.

    Args:
        args, kwargs: Those of [`~transformers.Trainer`]: the model from [`prepare_projector`], [`prepare_lora`] or
            [`prepare_full`], [`LlavaSPTrainingArguments`], a [`LlavaSPDataCollator`] that returns ids, and data sets
            from [`load_conversations`].

    Raises:
        FloatingPointError: While training, if the loss is NaN or infinite; it names the step and the records.
    """

    args: LlavaSPTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("compute_loss_func", self.compute_vocabulary_loss)
        super().__init__(*args, **kwargs)
        self.throughput = ThroughputCallback()
        self.add_callback(self.throughput)
        self.num_labels = count_labels(self.unwrapped_model)
        self._record_ids: list[str] = []

    @property
    def unwrapped_model(self) -> LlavaSPForConditionalGeneration:
        """[`LlavaSPForConditionalGeneration`]: The model without the adapter's wrapper."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def trains_projector_alone(self) -> bool:
        """`bool`: Whether nothing else is trained."""
        return all(
            f"{PROJECTOR}." in name for name, parameter in self.model.named_parameters() if parameter.requires_grad
        )

    def compute_vocabulary_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        The mean cross-entropy of the learned tokens of a whole step, over the tokens that the tokenizer has. Embedding
        rows that stand for none of them take no part.

        Args:
            outputs ([`~modeling_llava_sp.LlavaSPCausalLMOutputWithPast`]): The model's, with logits.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Ids, -100 where nothing is learned.
            num_items_in_batch (`torch.Tensor`, *optional*): How many tokens the whole step learns.

        Returns:
            `torch.Tensor` of shape `()`.
        """
        return self.unwrapped_model.loss_function(
            logits=outputs.logits[..., : self.num_labels],
            labels=labels,
            vocab_size=self.num_labels,
            num_items_in_batch=num_items_in_batch,
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's, with the projector in groups of its own where it has a learning rate of its own."""
        exists = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.projector_learning_rate
        if exists or rate is None:
            return optimizer
        model = args[0] if args else kwargs.get("model") or self.model
        projector = {parameter for name, parameter in model.named_parameters() if f"{PROJECTOR}." in name}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if parameter in projector]
            if own:
                group["params"] = [parameter for parameter in group["params"] if parameter not in projector]
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(dataset, ConversationDataset):
            # Trainer knows the lengths of no data set but those of `datasets`
            return LengthGroupedSampler(
                self.args.train_batch_size * self.args.gradient_accumulation_steps, lengths=dataset.modality_lengths
            )
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(eval_dataset, ConversationDataset):
            generator = torch.Generator().manual_seed(self.args.seed)
            lengths = eval_dataset.modality_lengths
            return LengthGroupedSampler(self.args.eval_batch_size, lengths=lengths, generator=generator)
        return super()._get_eval_sampler(eval_dataset)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer's. Raises a `FloatingPointError` if the loss is NaN or infinite."""
        ids = inputs.get("ids", [])
        self.throughput.count(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}, on the records "
                f"{', '.join(map(repr, ids)) or '(the collator returns no ids)'}. The checkpoints in "
                f"{self.args.output_dir} are from before. Train in float32 or bfloat16, lower the learning rate, or "
                "look at the records."
            )
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs({name: value for name, value in inputs.items() if name != "ids"})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the throughput of training."""
        if "loss" in logs:
            logs.update(self.throughput.figures(self.args.world_size))
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not (self.trains_projector_alone and isinstance(model, LlavaSPForConditionalGeneration)):
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        projector = model.model.multi_modal_projector
        prefix = f"model.{PROJECTOR}."
        state = projector.state_dict() if state_dict is None else state_dict
        state = {
            name.removeprefix(prefix): tensor for name, tensor in state.items() if state_dict is None or prefix in name
        }
        projector.save_pretrained(output_dir, state_dict=state)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        target = self.model if model is None else model
        if not (self.trains_projector_alone and isinstance(target, LlavaSPForConditionalGeneration)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        files = sorted(Path(resume_from_checkpoint).glob("model*.safetensors"))
        state: dict[str, torch.Tensor] = {}
        for file in files:
            state.update(load_file(file))
        target.model.multi_modal_projector.load_state_dict(state)


def count_labels(model: LlavaSPForConditionalGeneration) -> int:
    """
    How many of a model's scores are of tokens that a text can have: all but those at the end that are never generated,
    which are `<image>` and rows without a token.
    """
    text_config: Any = model.config.text_config
    vocab_size = text_config.vocab_size
    suppressed = set(model.generation_config.suppress_tokens or ())
    while vocab_size - 1 in suppressed:
        vocab_size -= 1
    return vocab_size
