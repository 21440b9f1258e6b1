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

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints

from ..modeling_llava_sp import LlavaSPForConditionalGeneration
from .card import CARD_NAME, Origins, find_origins, make_training_card, make_way, save_card, summarize_data
from .checkpoints import staged
from .data import ConversationDataset
from .parts import PROJECTOR
from .push import close_pushes, push_checkpoint, push_output, warn_about_base


SHARDING = Path(__file__).with_name("sharding")
SHARDINGS = ("zero2", "zero3", "fsdp2")


@dataclass
class LlavaSPTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`], and what they lack.

    Args:
        projector_learning_rate (`float`, *optional*): The learning rate of the projector. Defaults to `learning_rate`.
        sharding (`str`, *optional*): How what is trained is divided over GPUs: `"fsdp2"` for weights, gradients and
            optimizer by PyTorch, `"zero3"` for the same by DeepSpeed, `"zero2"` for gradients and optimizer by
            DeepSpeed. Stands for `fsdp` and `fsdp_config`, or `deepspeed`, with a file of this package. Without it,
            each GPU holds all.
    """

    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "The learning rate of the projector. That of all else if not given."}
    )
    sharding: str | None = field(
        default=None, metadata={"help": f"How to divide over GPUs what is trained: {', '.join(SHARDINGS)}."}
    )
    # The collator makes the model's inputs; the examples have none of them
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be false: the collator needs the rest."}
    )

    def __post_init__(self) -> None:
        if self.sharding is not None:
            self.apply_sharding(self.sharding)
        super().__post_init__()
        if self.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` must be 0: the loss is that of the authors, without it.")
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False: the collator needs what it would remove.")

    def apply_sharding(self, sharding: str) -> None:
        """Set the arguments of [`~transformers.TrainingArguments`] that `sharding` stands for."""
        if sharding not in SHARDINGS:
            raise ValueError(f"Unknown sharding {sharding!r}: expected one of {', '.join(SHARDINGS)}.")
        arguments: Any = self
        if arguments.deepspeed or arguments.fsdp:
            raise ValueError(f"`sharding` {sharding!r} stands for `deepspeed` or `fsdp`: pass one of the three.")
        file = str(SHARDING / f"{sharding}.json")
        if sharding == "fsdp2":
            arguments.fsdp, arguments.fsdp_config = True, file
        else:
            arguments.deepspeed = file


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


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """
    [`~transformers.trainer_pt_utils.LengthGroupedSampler`] whose order depends on nothing but a seed and the epoch.
    Drawn from the global random state, it would be another one in each process as soon as dropout has drawn from that,
    so that some records came twice and others never; and another one in an epoch that is resumed.

    Args:
        batch_size (`int`): Of how many examples, times 50, each is grouped.
        lengths (`list[int]`): The examples' lengths in tokens, negative for those without images.
        seed (`int`): The seed.
        epoch (`Callable[[], int]`): Gives the number of the epoch that begins.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # Accelerate's `set_epoch` does not reach a sampler in all processes of a run that is resumed
        self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


class LlavaSPTrainer(Trainer):
    """
    [`~transformers.Trainer`] for LLaVA-SP: a learning rate for the projector; batches of one modality and about one
    length; a loss on the tokenizer's own vocabulary, as the authors'; a stop at a loss or gradient that is no number;
    checkpoints that hold only what was trained, and are there whole or not at all.

    Args:
        args, kwargs: Those of [`~transformers.Trainer`]: the model from [`prepare_projector`], [`prepare_lora`] or
            [`prepare_full`], [`LlavaSPTrainingArguments`], a [`LlavaSPDataCollator`] that returns ids, and data sets
            from [`load_conversations`].

    Raises:
        TypeError: If the arguments are plain [`~transformers.TrainingArguments`], or the model has an adapter that
            Transformers has loaded.
        FloatingPointError: While training, if the loss or the gradient is NaN or infinite, in every process; it names
            the step and the records.
        OSError: While training, if a checkpoint cannot be written; it names the newest that can be resumed from.
    """

    args: LlavaSPTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("compute_loss_func", self.compute_vocabulary_loss)
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, LlavaSPTrainingArguments):
            raise TypeError(f"args are {type(self.args).__name__}, expected LlavaSPTrainingArguments.")
        if self.lora_config is None and hasattr(self.unwrapped_model, "peft_config"):
            raise TypeError(
                "The model has an adapter that Transformers has loaded, which would not be saved: load the model "
                "without it, and then the adapter by PeftModel.from_pretrained(model, adapter, is_trainable=True)."
            )
        self.throughput = ThroughputCallback()
        self.add_callback(self.throughput)
        if self.args.push_to_hub and self.is_world_process_zero():
            # While it can still be changed
            warn_about_base(self)
        self.num_labels = count_labels(self.unwrapped_model)
        # Of the optimizer step that is being made: the loss and the records of each batch of this process
        self._step_losses: list[tuple[torch.Tensor, list[str]]] = []
        # Where a checkpoint or model is being written to, until it is whole
        self._staging: Path | None = None

    @property
    def unwrapped_model(self) -> LlavaSPForConditionalGeneration:
        """[`LlavaSPForConditionalGeneration`]: The model without the adapter's wrapper."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def lora_config(self) -> Any:
        """[`~peft.LoraConfig`], *optional*: That of the adapter."""
        model = self.accelerator.unwrap_model(self.model)
        return model.peft_config[model.active_adapter] if hasattr(model, "get_base_model") else None

    @property
    def method(self) -> str:
        """`str`: What is trained: `"lora"`, `"projector"` alone, or `"full"`."""
        return "lora" if self.lora_config is not None else "projector" if self.trains_projector_alone else "full"

    @cached_property
    def origins(self) -> Origins:
        """[`Origins`]: What the card says that the training starts from. Can be set before training."""
        data = {"training": self.train_dataset, "evaluation": self.eval_dataset}
        summaries = {use: summarize_data(dataset) for use, dataset in data.items() if dataset is not None}
        return find_origins(self.unwrapped_model, summaries)

    @property
    def trains_projector_alone(self) -> bool:
        """`bool`: Whether nothing else is trained."""
        return all(
            f"{PROJECTOR}." in name for name, parameter in self.model.named_parameters() if parameter.requires_grad
        )

    @property
    def trains_vision_tower(self) -> bool:
        """`bool`: Whether the vision tower is trained."""
        return any(parameter.requires_grad for parameter in self.unwrapped_model.model.vision_tower.parameters())

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
            return EpochLengthGroupedSampler(
                self.args.train_batch_size * self.args.gradient_accumulation_steps,
                lengths=dataset.modality_lengths,
                seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
                epoch=lambda: int(self.state.epoch or 0),
            )
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(eval_dataset, ConversationDataset):
            generator = torch.Generator().manual_seed(self.args.seed)
            lengths = eval_dataset.modality_lengths
            return LengthGroupedSampler(self.args.eval_batch_size, lengths=lengths, generator=generator)
        return super()._get_eval_sampler(eval_dataset)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer's, keeping which records have which loss."""
        self.throughput.count(inputs)
        ids = inputs.get("ids", [])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_losses.append((loss.detach(), ids))
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # What Trainer does last before the optimizer's step, with what it may log
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.check_finite(grad_norm)
        return grad_norm

    def check_finite(self, grad_norm: torch.Tensor | float | None) -> None:
        """
        Check the losses and the gradient of an optimizer step before it is made. All processes check together, so that
        none waits for one that has stopped.

        Args:
            grad_norm (`torch.Tensor` or `float`, *optional*): The gradient's norm.

        Raises:
            FloatingPointError: If one is NaN or infinite in any process. A gradient in float16 may be: loss scaling
                leaves out such a step.
        """
        losses, self._step_losses = self._step_losses, []
        bad = [(loss.item(), ids) for loss, ids in losses if not torch.isfinite(loss)]
        norm = 0.0 if grad_norm is None or self.args.fp16 else float(grad_norm)
        found = torch.tensor(float(bool(bad) or not math.isfinite(norm)), device=self.args.device)
        if not self.accelerator.reduce(found, reduction="sum"):
            return
        from accelerate.utils import gather_object

        bad = gather_object(bad)
        step = self.state.global_step + 1
        if bad:
            what = f"The loss of step {step} is {bad[0][0]}"
            ids = [record for _, ids in bad for record in ids]
        else:
            # The gradient is of all records together
            what = f"The gradient norm of step {step} is {norm}, with finite losses"
            ids = gather_object([record for _, ids in losses for record in ids])
        raise FloatingPointError(
            f"{what}, on the records {', '.join(map(repr, ids)) or '(the collator returns no ids)'}. The checkpoints "
            f"in {self.args.output_dir} are from before. Train in float32 or bfloat16, lower the learning rate, or "
            "look at the records."
        )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs({name: value for name, value in inputs.items() if name != "ids"})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the throughput of training."""
        if "loss" in logs:
            logs.update(self.throughput.figures(self.args.world_size))
        super().log(logs, start_time)

    @contextmanager
    def _staged(self, output_dir: str, name: str) -> Iterator[Path]:
        """[`staged`], with `_get_output_dir` changed to it."""
        with staged(output_dir, name, self.args.should_save, self.accelerator.wait_for_everyone) as folder:
            self._staging = folder
            try:
                yield folder
            finally:
                self._staging = None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        output_dir = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        checkpoint = os.path.join(output_dir, name)
        with self._staged(output_dir, name) as folder:
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(folder / name):
                self.state.best_model_checkpoint = checkpoint
                if self.args.should_save:
                    self.state.save_to_json(str(folder / name / TRAINER_STATE_NAME))
        # What Trainer does last, and must not do to a checkpoint that is about to be moved
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Not as Trainer does it, which would push paths of this machine and another card
        if self._staging is None and self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            push_checkpoint(self, checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        if self.hub_model_id is not None and self.is_world_process_zero():
            close_pushes(self)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Write the card to the output folder, as saving the model does. Where README.md there is somebody's own, it is
        left as it is, and the card is in TRAINING.md.

        Args:
            language, license (`str`, *optional*): For the metadata.
            tags (`str` or `list[str]`, *optional*): More tags for the metadata.
            finetuned_from (`str`, *optional*): The base model for the metadata, by its Hub id.
            dataset_tags (`str` or `list[str]`, *optional*): More data sets for the metadata, by their Hub ids.
            model_name, tasks, dataset, dataset_args (*optional*): Have no place in this card.
        """
        if not self.is_world_process_zero():
            return
        several = {"tags": tags, "datasets": dataset_tags}
        metadata: dict[str, Any] = {"language": language, "license": license, "base_model": finetuned_from}
        metadata |= {key: [value] if isinstance(value, str) else value for key, value in several.items()}
        card = make_training_card(self, **{key: value for key, value in metadata.items() if value is not None})
        save_card(card, self.args.output_dir)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Save the model with its card to the output folder, and push what is there, but for checkpoints and what is of
        this machine alone. All processes have to call it.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): First line of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Whether to wait until it is done.
            token (`str`, *optional*): The token for the Hub. Defaults to `hub_token`.
            revision (`str`, *optional*): The branch. Defaults to `hub_revision`.
            private (`bool`, *optional*): Whether the repository is private, if it is created. Defaults to
                `hub_private_repo`.
            kwargs (`dict[str, Any]`, *optional*): Arguments of [`~LlavaSPTrainer.create_model_card`].

        Returns:
            [`~huggingface_hub.CommitInfo`], a `Future` of it if `blocking` is false, and `None` in other processes
            than the first.

        Raises:
            OSError: If it fails. The message says how to push again what is complete in the output folder.
        """
        self.save_model(_internal_call=True)
        return self._push_output(commit_message, blocking, token, revision, private, **kwargs)

    def _push_output(
        self,
        commit_message: str | None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push what is in the output folder, from the first process."""
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        revision = self.args.hub_revision if revision is None else revision
        if self.hub_model_id is None:
            if private is not None:
                # Older versions of Transformers have no other way
                self.args.hub_private_repo = private
            self.init_hf_repo(token=token)
            warn_about_base(self)
        # Now that it is known where to
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return push_output(self, commit_message, blocking, token, revision)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's. Files of an earlier model are replaced when all of this one is written."""
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if self._staging is not None:
            super().save_model(output_dir, _internal_call=True)
            if self.args.should_save:
                # PEFT has written another
                Path(output_dir, CARD_NAME).unlink(missing_ok=True)
                save_card(make_training_card(self), output_dir)
            return
        with self._staged(output_dir, "the model") as folder:
            self.save_model(str(folder), _internal_call=True)
            if self.args.should_save:
                make_way(folder, output_dir)
        if self.args.push_to_hub and not _internal_call:
            if Path(output_dir).resolve() != Path(self.args.output_dir).resolve():
                # What is pushed is what is there
                self.save_model(_internal_call=True)
            self._push_output("Model save")

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
        state: dict[str, Any] = {}
        for file in files:
            state.update(load_file(file))
        # Under FSDP, each process takes its part
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(target.model.multi_modal_projector, state, options=options)

    def _load_best_model(self) -> None:
        if self.trains_projector_alone and isinstance(self.model, LlavaSPForConditionalGeneration):
            # Trainer would find none of the projector's names in the model, and only warn
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


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
