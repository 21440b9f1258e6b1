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
"""Publishing on the Hub what training makes, at its end and on the way, without what is of this machine alone"""

import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..conversion.push import describe, push_command
from .card import CARD_NAME, cached_snapshot, make_way


if TYPE_CHECKING:
    from .trainer import LlavaSPTrainer


logger = logging.get_logger(__name__)

# Inside the output folder, so that files need not be copied. Never pushed with the rest, as it begins with `_`.
PUSHED_NAME = "_pushed"

# Of this machine: arguments with its paths and its token for the Hub, paths of checkpoints, TensorBoard's files, which
# have its name
PRIVATE_FILES = ["training_args.bin", "trainer_state.json", "runs/*"]
# Of the output folder: these, checkpoints, and what is being written
UNPUBLISHED = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", *PRIVATE_FILES]
# What resuming needs of a checkpoint, and nobody else
TRAINING_STATE = [
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "pytorch_model_fsdp*"),
    # DeepSpeed's
    *("global_step*", "latest", "zero_to_fp32.py"),
]


def push_output(
    trainer: "LlavaSPTrainer", commit_message: str | None, blocking: bool, token: str | None, revision: str | None
) -> CommitInfo | Future:
    """
    Push a trainer's output folder, as it is, but for checkpoints and [`PRIVATE_FILES`].

    Args:
        trainer ([`LlavaSPTrainer`]): The trainer.
        commit_message (`str`, *optional*): The first line of the commit.
        blocking (`bool`): Whether to wait until it is done.
        token (`str`, *optional*): The token for the Hub.
        revision (`str`, *optional*): The branch.

    Returns:
        [`~huggingface_hub.CommitInfo`], or a `Future` of it.

    Raises:
        OSError: If it fails. The output folder is complete, and the message says how to push it again.
    """
    output_dir = trainer.args.output_dir
    upload: dict[str, Any] = {"repo_id": trainer.hub_model_id, "folder_path": output_dir, "token": token}
    upload |= {"revision": revision, "run_as_future": not blocking, "ignore_patterns": UNPUBLISHED}
    try:
        return HfApi().upload_folder(**upload, commit_message=commit_message)
    except Exception as error:  # the Hub's refusals, and whatever networks, proxies and hf_xet raise
        raise OSError(
            f"Pushing to {trainer.hub_model_id} failed: {describe(error)}. The result is complete in {output_dir}. "
            f"Push it again by `{upload_command(trainer, revision)}`."
        ) from error


def upload_command(trainer: "LlavaSPTrainer", revision: str | None) -> str:
    """The command line by which a user pushes the same."""
    command = push_command(Path(trainer.args.output_dir), trainer.hub_model_id, None, revision)
    excluded = " ".join(f"--exclude '{name}'" for name in UNPUBLISHED)
    return f"{command} {excluded}"


def push_checkpoint(trainer: "LlavaSPTrainer", checkpoint: str) -> None:
    """
    Push the model of a checkpoint in the background, as `hub_strategy` says, and the checkpoint with its optimizer
    beside it where that is asked for. While an earlier push goes on, nothing is pushed, unless `hub_always_push`.

    Args:
        trainer ([`LlavaSPTrainer`]): The trainer, of the first process.
        checkpoint (`str`): The checkpoint's folder.
    """
    arguments, state = trainer.args, trainer.state
    pushed = Path(arguments.output_dir, PUSHED_NAME)
    if trainer.push_in_progress is None or trainer.push_in_progress.is_done():
        warn_about_failures(trainer)
        # Whatever a killed run has left
        shutil.rmtree(pushed, ignore_errors=True)
    elif not arguments.hub_always_push:
        return
    trainer.callback_handler.on_push_begin(arguments, state, trainer.control)
    # Its own folder, which neither a later save nor the removal of old checkpoints changes
    folder = pushed / Path(checkpoint).name
    shutil.copytree(checkpoint, folder, copy_function=link_or_copy, ignore=shutil.ignore_patterns("training_args.bin"))
    if make_way(folder, arguments.output_dir):
        shutil.copy(Path(arguments.output_dir, CARD_NAME), folder)
    message = f"Training in progress, step {state.global_step}"
    if arguments.save_strategy == SaveStrategy.EPOCH:
        message = f"Training in progress, epoch {int(state.epoch)}"
    upload: dict[str, Any] = {"repo_id": trainer.hub_model_id, "folder_path": folder, "token": arguments.hub_token}
    upload |= {"revision": arguments.hub_revision, "run_as_future": True}
    api = HfApi()
    jobs = [api.upload_folder(**upload, commit_message=message, ignore_patterns=[*TRAINING_STATE, *PRIVATE_FILES])]
    if arguments.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        name = "last-checkpoint" if arguments.hub_strategy == HubStrategy.CHECKPOINT else folder.name
        jobs.append(api.upload_folder(**upload, commit_message=f"{message}, checkpoint", path_in_repo=name))
    # They are done one after the other
    jobs[-1].add_done_callback(lambda _: shutil.rmtree(folder, ignore_errors=True))
    if trainer.push_in_progress is None or trainer.push_in_progress.is_done():
        trainer.push_in_progress = PushInProgress(jobs)
    else:
        trainer.push_in_progress.jobs.extend(jobs)


def close_pushes(trainer: "LlavaSPTrainer") -> None:
    """Say which pushes in the background have failed, and remove what they needed, when none goes on any more."""
    warn_about_failures(trainer)
    shutil.rmtree(Path(trainer.args.output_dir, PUSHED_NAME), ignore_errors=True)


def warn_about_failures(trainer: "LlavaSPTrainer") -> None:
    """Say which of the pushes in the background have failed, of which nobody would hear otherwise."""
    progress = trainer.push_in_progress
    for job in [] if progress is None else progress.jobs:
        if job.done() and not job.cancelled() and (error := job.exception()) is not None:
            logger.warning(
                f"A checkpoint was not pushed to {trainer.hub_model_id}: {describe(error)}. Training goes on."
            )


def warn_about_base(trainer: "LlavaSPTrainer") -> None:
    """Say what to do where nobody else could load what is pushed, since it names a folder of this machine."""
    lora = trainer.lora_config
    if lora is not None and lora.base_model_name_or_path and cached_snapshot(lora.base_model_name_or_path) is None:
        base = lora.base_model_name_or_path
        logger.warning(
            f"The adapter was made for {base}, a folder on this machine. adapter_config.json names it by this path, "
            "which is pushed as it is, and with which nobody else can load the adapter. Push the model as well (`hf "
            f"upload OWNER/MODEL {base}`) and train on OWNER/MODEL, or put that into adapter_config.json as "
            "base_model_name_or_path; or push the merged model alone (`llava-sp merge ADAPTER OUTPUT --push-to-hub "
            "OWNER/MODEL`)."
        )


def link_or_copy(source: str, target: str) -> None:
    """Give a file a second name, or where the file system has no such thing, copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
