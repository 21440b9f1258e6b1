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
"""Publishing a converted folder on the Hub, whole or not at all"""

import re
import shlex
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from .checkpoint import ConversionError


# The names under which Transformers looks for a model's weights, the whole file before the index of shards
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")

REASONS = {
    401: "there is no login, or none that the Hub accepts",
    403: "the Hub does not allow it",
    404: "the Hub has no such repository or branch",
    429: "the Hub wants to be asked less often",
}
CHECK_TIMEOUT = 60.0  # seconds


def check_repo_id(repo_id: str) -> None:
    """
    Check that a repository on the Hub can have this id, before any work is done for it.

    Args:
        repo_id (`str`): `owner/name`, or the name alone for a repository of the user who is logged in.

    Raises:
        ConversionError: If the Hub would refuse it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConversionError(
            f"{repo_id!r} cannot be the id of a Hub repository. Expected 'owner/name', or 'name' for one of your own, "
            "each at most 96 letters, digits, '-', '_' and '.', without '--' or '..', neither starting nor ending "
            "with '-' or '.', nor ending with '.git'."
        ) from error


def push_folder(
    folder: Path, repo_id: str, *, private: bool | None = None, revision: str | None = None, commit_message: str
) -> str:
    """
    Publish a folder on the Hub in one commit: readers of the repository see all of it or nothing. Repository and
    branch are created if they do not exist. Weights that the branch has under names that the folder does not use are
    deleted in the same commit, since Transformers may prefer them to the new ones.

    Args:
        folder (`Path`): The folder, of which everything is uploaded.
        repo_id (`str`): The repository: `owner/name`, or the name alone for one of the user who is logged in.
        private (`bool`, *optional*): Whether only its owners may see the repository, if it is created. Defaults to
            the owner's own setting.
        revision (`str`, *optional*): The branch. Defaults to `main`; a new one starts from there.
        commit_message (`str`): First line of the commit.

    Returns:
        `str`: The URL of the commit. If the branch has all the files already, that of its last commit.

    Raises:
        ConversionError: If anything goes wrong, the user interrupts it, or it should be private and the repository
            exists and is not. The message says what, whether anything was published, and how to push again.
    """
    check_repo_id(repo_id)
    folder = folder.resolve()
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if not files:
        raise ConversionError(f"{folder} holds no files that could be pushed to {repo_id}.")
    api = HfApi()
    head = None
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # Creating a repository that exists leaves a public one public, without a word
        if private and not api.model_info(repo_id).private:
            raise ConversionError(
                f"{repo_id} at {api.endpoint} exists and is public, so the files would not be private. No file was "
                f"published. The converted folder is complete at {folder}. Make the repository private at "
                f"{api.endpoint}/{repo_id}/settings or choose another one, then push it again by "
                f"`{push_command(folder, repo_id, private, revision)}`."
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision)
        head = before.sha
        published = [sibling.rfilename for sibling in before.siblings or []]
        # Not `upload_folder`, which makes several commits of large folders and repeats those whose answer was lost
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in published if WEIGHTS.fullmatch(name) and name not in files),
                *(CommitOperationAdd(name, path) for name, path in files.items()),
            ],
            commit_message=commit_message,
            revision=revision,
        ).commit_url
    except ConversionError:
        raise
    # The Hub's refusals, whatever networks, proxies and hf_xet raise, and a user who wants to know what was published
    except (Exception, KeyboardInterrupt) as error:
        raise ConversionError(
            f"Pushing to {repo_id} at {api.endpoint} failed: {describe(error)}. "
            f"{describe_outcome(api, repo_id, revision, head, error)} The converted folder is complete at {folder}. "
            f"{advise(error, repo_id)} `{push_command(folder, repo_id, private, revision)}`."
        ) from error


def push_command(folder: Path, repo_id: str, private: bool | None, revision: str | None) -> str:
    """The command line by which a user pushes a folder; the arguments are those of [`push_folder`]."""
    command = ["hf", "upload", repo_id, str(folder)]
    if private:
        command.append("--private")
    if revision is not None:
        command += ["--revision", revision]
    return shlex.join(command)


def describe(error: BaseException) -> str:
    """What went wrong, in plain words."""
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    if isinstance(error, OfflineModeIsEnabled):
        return "the environment variable HF_HUB_OFFLINE forbids any connection"
    if not isinstance(error, HfHubHTTPError):
        return f"it broke off ({type(error).__name__}: {error})"
    status = error.response.status_code
    reason = REASONS.get(status, "the Hub itself failed" if status >= 500 else "the Hub refused it")
    return f"{reason} ({status}: {error.server_message or error.response.reason_phrase})"


def describe_outcome(api: HfApi, repo_id: str, revision: str | None, head: str | None, error: BaseException) -> str:
    """
    What a failed push left on the Hub.

    Args:
        api (`HfApi`): The Hub.
        repo_id (`str`): The repository.
        revision (`str`, *optional*): The branch. Defaults to `main`.
        head (`str`, *optional*): The branch's last commit before the push, `None` if it was not reached.
        error (`BaseException`): Why it failed.

    Returns:
        `str`: A sentence.
    """
    refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
    if head is None or refused:
        return "No file was published."
    # The Hub may have carried out a commit whose answer did not arrive
    commits = f"{api.endpoint}/{repo_id}/commits/{revision or 'main'}"
    try:
        now = api.model_info(repo_id, revision=revision, timeout=CHECK_TIMEOUT).sha
    except Exception:  # most likely for the same reason as the push
        return f"Whether the files were published could not be found out: {commits} shows it."
    if now != head:
        return f"The branch has a new commit, {now}, so the files may all have been published: {commits} shows it."
    return "No file was published."


def advise(error: BaseException, repo_id: str) -> str:
    """What to do about it, up to the command that pushes again."""
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"Log in by `hf auth login` with a token that may write to {repo_id}, then push it again by"
    return "Push it again by"
