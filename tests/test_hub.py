"""
The Hub: folders, models, processors, configurations and projectors are pushed to a fake one, whole or not at all, and
load again by id, in fresh processes with and without this package.
"""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, tiny_config, tiny_model
from fake_hub import CUT, DEFAULT_OWNER, LOST_ANSWER, TOKEN, FakeHub
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file
from test_remote_code import forbid_the_package
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import transformers_llava_sp
from transformers_llava_sp.cli import app
from transformers_llava_sp.configuration_llava_sp import HUB_MODULES
from transformers_llava_sp.conversion.checkpoint import ConversionError
from transformers_llava_sp.conversion.push import check_repo_id, push_folder


REPO_ID = "lab/llava-sp"
CONVERTED = {
    "README.md": b"---\nlicense: other\n---\n# A model\n",
    "config.json": b'{"model_type": "llava_sp"}\n',
    "empty.txt": b"",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 99,
    "model-00002-of-00002.safetensors": b"\0\1\2\3",
    "model.safetensors.index.json": b"{}",
    "templates/other.jinja": "{{ 'ü' }}".encode(),
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "a converted model", CONVERTED)


def push_and_fail(folder: Path, **kwargs) -> str:
    """The message of a push that fails, on one line; what is on the disk must not change."""
    with pytest.raises(ConversionError) as caught:
        push_folder(folder, REPO_ID, commit_message="Convert", **kwargs)
    assert read(folder) == CONVERTED
    message = str(caught.value)
    assert f"The converted folder is complete at {folder}." in message
    return message


# Folders


@pytest.mark.parametrize("private", [True, False, None])
def test_a_folder_arrives_whole_in_one_commit(hub, folder, private):
    url = push_folder(folder, REPO_ID, private=private, commit_message="Convert the cropping checkpoint")
    repository = hub.repositories[REPO_ID]
    [commit] = repository.commits
    assert commit.message == "Convert the cropping checkpoint"
    assert commit.added == sorted(CONVERTED)
    assert commit.deleted == []
    assert {name: commit.files[name] for name in commit.added} == CONVERTED
    assert url == f"{hub.url}/{REPO_ID}/commit/{commit.oid}"
    assert list(repository.branches) == ["main"]
    [creation] = hub.requests_to("repos/create")
    assert creation.json.get("visibility") == {True: "private", False: "public", None: None}[private]
    assert {request.token for request in hub.requests_to("POST")} == {TOKEN}


@pytest.mark.parametrize("exists", [False, True], ids=["new-branch", "existing-branch"])
def test_a_folder_arrives_on_a_branch(hub, folder, exists):
    if exists:
        api = HfApi()
        api.create_repo(REPO_ID)
        api.create_branch(REPO_ID, branch="experiments/pooling")
    url = push_folder(folder, REPO_ID, revision="experiments/pooling", commit_message="Convert")
    repository = hub.repositories[REPO_ID]
    assert repository.commits == []
    commit = repository.branches["experiments/pooling"][-1]
    assert len(repository.branches["experiments/pooling"]) == 2
    assert {name: commit.files[name] for name in commit.added} == CONVERTED
    assert url.endswith(commit.oid)


def test_a_name_alone_is_a_repository_of_the_users(hub, folder):
    push_folder(folder, "llava-sp", commit_message="Convert")
    assert list(hub.repositories) == [f"{DEFAULT_OWNER}/llava-sp"]


def test_no_token_is_needed_to_try(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    push_folder(folder, REPO_ID, commit_message="Convert")
    assert {request.token for request in hub.requests_to("POST")} == {None}
    assert len(hub.repositories[REPO_ID].commits) == 1


def test_pushing_again_adds_no_commit(hub, folder):
    urls = {push_folder(folder, REPO_ID, commit_message="Convert") for _ in range(2)}
    [commit] = hub.repositories[REPO_ID].commits
    assert urls == {f"{hub.url}/{REPO_ID}/commit/{commit.oid}"}


def test_weights_of_an_earlier_push_are_replaced(hub, folder, tmp_path):
    """Transformers would load an unsharded file that was left beside new shards."""
    kept = {
        "LICENSE": b"a licence",
        "adapter_model.safetensors": b"an adapter",
        "old/model.safetensors": b"another model",
    }
    stale = {
        "model.safetensors": b"old",
        "model-00001-of-00003.safetensors": b"older",
        "model-00002-of-00002.safetensors": b"oldest",
    }
    earlier = write(tmp_path / "earlier", {**kept, **stale})
    push_folder(earlier, REPO_ID, commit_message="Convert")
    push_folder(folder, REPO_ID, commit_message="Convert into shards")
    files = dict(hub.repositories[REPO_ID].files)
    files.pop(".gitattributes")
    assert files == {**kept, **CONVERTED}
    _, commit = hub.repositories[REPO_ID].commits
    assert sorted(commit.deleted) == ["model-00001-of-00003.safetensors", "model.safetensors"]


def test_private_files_do_not_go_to_a_public_repository(hub, folder):
    HfApi().create_repo(REPO_ID, private=False)
    message = push_and_fail(folder, private=True, revision="pooling")
    assert f"{REPO_ID} at {hub.url} exists and is public" in message
    assert "No file was published." in message
    assert list(hub.repositories[REPO_ID].branches) == ["main"]
    assert hub.repositories[REPO_ID].commits == []


def test_an_empty_folder_is_refused(hub, tmp_path):
    with pytest.raises(ConversionError, match="holds no files that could be pushed"):
        push_folder(tmp_path / "absent", REPO_ID, commit_message="Convert")
    assert hub.requests == []


LOGIN = f"Log in by `hf auth login` with a token that may write to {REPO_ID}"
REFUSALS = {
    "create-401": ("repos/create", 401, "(401: The test answers 401)", True),
    "create-403": ("repos/create", 403, "the Hub does not allow it (403: The test answers 403)", True),
    "create-500": ("repos/create", 500, "the Hub itself failed (500: The test answers 500)", False),
    "create-cut": ("repos/create", CUT, "it broke off (RemoteProtocolError: Server disconnected", False),
    "branch-403": ("/branch/", 403, "the Hub does not allow it (403: The test answers 403)", True),
    "branch-400": ("/branch/", 400, "the Hub refused it (400: The test answers 400)", False),
    "model-card-500": ("validate-yaml", 500, "the Hub itself failed (500: The test answers 500)", False),
    "upload-404": ("/preupload/", 404, "no such repository or branch (404: The test answers 404)", False),
    "commit-401": (
        "/commit/",
        401,
        "there is no login, or none that the Hub accepts (401: The test answers 401)",
        True,
    ),
    "commit-403": ("/commit/", 403, "the Hub does not allow it (403: The test answers 403)", True),
    "commit-413": ("/commit/", 413, "the Hub refused it (413: The test answers 413)", False),
    "commit-429": ("/commit/", 429, "the Hub wants to be asked less often (429: The test answers 429)", False),
    "commit-500": ("/commit/", 500, "the Hub itself failed (500: The test answers 500)", False),
    "commit-cut": ("/commit/", CUT, "it broke off (", False),
}


@pytest.mark.parametrize(("route", "failure", "reason", "login"), REFUSALS.values(), ids=REFUSALS)
def test_a_refused_push_publishes_nothing(hub, folder, route, failure, reason, login):
    hub.failures[f"POST .*{route}"] = failure
    message = push_and_fail(folder, revision="pooling")
    assert message.startswith(f"Pushing to {REPO_ID} at {hub.url} failed: ")
    assert reason in message
    assert "No file was published." in message
    assert (LOGIN in message) == login
    assert len(hub.requests_to(route)) == 1  # not repeated: a commit might be made twice
    for repository in hub.repositories.values():
        assert {len(commits) for commits in repository.branches.values()} == {1}

    hub.failures.clear()
    push_folder(folder, REPO_ID, revision="pooling", commit_message="Convert")
    assert hub.repositories[REPO_ID].branches["pooling"][-1].added == sorted(CONVERTED)


def test_a_hub_that_is_not_there(hub, folder):
    hub.close()
    message = push_and_fail(folder)
    assert "it broke off (ConnectError: " in message
    assert "No file was published." in message


def test_an_interrupted_push_publishes_nothing(hub, folder, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "preupload_lfs_files", interrupt)
    message = push_and_fail(folder)
    assert "failed: it was interrupted. No file was published." in message
    assert hub.repositories[REPO_ID].commits == []


def test_offline_mode(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = push_and_fail(folder)
    assert "HF_HUB_OFFLINE forbids any connection. No file was published." in message
    assert hub.requests == []


def test_a_commit_whose_answer_is_lost_is_not_denied(hub, folder):
    hub.failures["/commit/"] = LOST_ANSWER
    message = push_and_fail(folder)
    [commit] = hub.repositories[REPO_ID].commits
    assert f"The branch has a new commit, {commit.oid}, so the files may all have been published" in message
    assert f"{hub.url}/{REPO_ID}/commits/main shows it." in message
    assert "No file was published" not in message


def test_a_hub_that_disappears_leaves_the_outcome_open(hub, folder, monkeypatch):
    create_commit = HfApi.create_commit

    def disappear(*args, **kwargs):
        hub.failures["/commit/|GET /api/models"] = CUT
        return create_commit(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", disappear)
    message = push_and_fail(folder, revision="pooling")
    expected = (
        f"Whether the files were published could not be found out: {hub.url}/{REPO_ID}/commits/pooling shows it."
    )
    assert expected in message
    assert "No file was published" not in message


def test_the_command_of_the_message_pushes(hub, folder):
    hub.failures["repos/create"] = 403
    message = push_and_fail(folder, private=True, revision="pooling")
    command, *arguments = shlex.split(re.search(r"then push it again by `([^`]+)`\.$", message)[1])
    assert command == "hf"
    hub.failures.clear()
    process = subprocess.run(
        [Path(sys.executable).with_name(command), *arguments],
        env={**os.environ, **hub.environment, "HF_HOME": str(folder.parent / "hf")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    repository = hub.repositories[REPO_ID]
    assert repository.private
    assert repository.commits == []
    assert repository.branches["pooling"][-1].added == sorted(CONVERTED)


@pytest.mark.parametrize("repo_id", ["llava-sp", "lab/llava-sp-7b_v1.5", "a" * 96, "l/m"])
def test_ids_that_the_hub_takes(repo_id):
    check_repo_id(repo_id)


@pytest.mark.parametrize(
    "repo_id",
    [
        "",
        "/",
        "lab/",
        "/model",
        "./model",
        "lab/models/model",
        "https://huggingface.co/lab/model",
        "lab/a model",
        "lab/modèle",
        "lab/-model",
        "lab/model.",
        "lab/mo--del",
        "lab/mo..del",
        "lab/model.git",
        "lab/" + "m" * 97,
        "lab/model\n",
    ],
)
def test_ids_that_the_hub_refuses(hub, folder, repo_id):
    expected = re.escape(f"{repo_id!r} cannot be the id of a Hub repository. Expected 'owner/name'")
    with pytest.raises(ConversionError, match=expected):
        check_repo_id(repo_id)
    with pytest.raises(ConversionError, match=expected):
        push_folder(folder, repo_id, commit_message="Convert")
    assert hub.requests == []


# Objects

CONFIG_FILES = {"config.json", *HUB_MODULES}
MODEL_FILES = {*CONFIG_FILES, "generation_config.json", "model.safetensors"}
PROCESSOR_FILES = {"processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
PUSHED = {
    "model": MODEL_FILES,
    "sharded-model": {
        *MODEL_FILES - {"model.safetensors"},
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    },
    "processor": {*HUB_MODULES, *PROCESSOR_FILES},
    "config": CONFIG_FILES,
    "projector": {*CONFIG_FILES, "model.safetensors"},
    "projector-config": CONFIG_FILES,
}


def make(kind: str, golden):
    if kind == "processor":
        return AutoProcessor.from_pretrained(golden("mini-cropping").converted)
    if kind.endswith("config"):
        config = tiny_config("pooling-dfi")
        return config.projector_config if kind == "projector-config" else config
    model = tiny_model("pooling-dfi")
    return model.model.multi_modal_projector if kind == "projector" else model


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
@pytest.mark.parametrize("kind", PUSHED)
def test_a_push_from_user_code_is_complete(hub, golden, tmp_path, kind, way):
    thing = make(kind, golden)
    size = {"max_shard_size": "1MB"} if kind == "sharded-model" else {}
    thing.save_pretrained(tmp_path / "local", **size)
    if way == "push_to_hub":
        thing.push_to_hub(REPO_ID, private=True, **size)
    else:
        thing.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id=REPO_ID, private=True, **size)
        assert read(tmp_path / "saved").keys() >= read(tmp_path / "local").keys()
    repository = hub.repositories[REPO_ID]
    [commit] = repository.commits
    assert set(commit.added) == {*PUSHED[kind], "README.md"}
    assert repository.private
    assert {name: commit.files[name] for name in PUSHED[kind]} == read(tmp_path / "local")


@pytest.mark.parametrize("kind", ["model", "processor", "config", "projector"])
def test_a_refused_push_from_user_code_publishes_nothing(hub, golden, kind):
    hub.failures["/commit/"] = 403
    with pytest.raises(OSError, match="403"):
        make(kind, golden).push_to_hub(REPO_ID)
    assert hub.repositories[REPO_ID].commits == []


# Loading by id

# What is loaded by remote code is pushed to other repositories, and loaded from there
REPOSITORIES = {
    "first": {"model": REPO_ID, "projector": "lab/projector"},
    "again": {"model": "lab/again", "projector": "lab/projector-again"},
}
LOADED = {"package": "first", "remote-code": "first", "remote-code-again": "again"}


def answer(job: dict, **trust) -> None:
    """
    Load model and processor from one repository and a projector from another, write what they compute to
    `job["answers"]` and their classes to `job["report"]`, and push them to `job["push_model"]` and
    `job["push_projector"]`, if given. It runs in a process of its own, from its source alone.
    """
    import json

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(job["num_threads"])
    processor = AutoProcessor.from_pretrained(job["model"], **trust)
    model, loading = AutoModelForImageTextToText.from_pretrained(job["model"], output_loading_info=True, **trust)
    projector = AutoModel.from_pretrained(job["projector"], **trust)
    content = [{"type": "image", "path": job["image"]}, {"type": "text", "text": "What is shown in this image?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    grid = torch.rand(
        1,
        projector.config.grid_size**2,
        projector.config.vision_hidden_size,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        answers = {
            **inputs,
            "logits": model(**inputs).logits,
            "generated": model.generate(**inputs, max_new_tokens=8),
            "projected": projector(grid).last_hidden_state,
        }
    save_file({name: tensor.contiguous().clone() for name, tensor in answers.items()}, job["answers"])
    with open(job["report"], "w") as file:
        classes = [[type(item).__module__, type(item).__name__] for item in (model, processor, projector)]
        json.dump({"classes": classes, "loading": {key: list(value) for key, value in loading.items()}}, file)
    if "push_model" in job:
        model.push_to_hub(job["push_model"])
        processor.push_to_hub(job["push_model"])
        projector.push_to_hub(job["push_projector"])


@dataclass
class ById:
    """What was pushed, and the folders of what was answered by the local objects ("local") and each of `LOADED`."""

    hub: FakeHub
    folders: dict[str, Path]


def answer_in_a_fresh_process(hub: FakeHub, job: dict, folder: Path, with_package: bool) -> None:
    script = f"{inspect.getsource(answer)}\nanswer({job!r}, trust_remote_code={not with_package})"
    environment = {**os.environ, **hub.environment, "HF_HOME": str(folder / "hf")}
    for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE"):  # they would come before HF_HOME
        environment.pop(name, None)
    if with_package:
        environment["PYTHONPATH"] = str(Path(transformers_llava_sp.__file__).parents[1])
        command = [sys.executable, "-c", f"import transformers_llava_sp\n{script}"]
    else:
        forbid = f"{inspect.getsource(forbid_the_package)}\nforbid_the_package()"
        command = [sys.executable, "-I", "-c", f"{forbid}\n{script}"]
    process = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr


@pytest.fixture(scope="module")
def by_id(golden, tmp_path_factory) -> Iterator[ById]:
    root = tmp_path_factory.mktemp("hub")
    case = golden("mini-cropping")
    model = AutoModelForImageTextToText.from_pretrained(case.converted)
    projector = model.model.multi_modal_projector
    projector.save_pretrained(root / "projector")
    jobs = {}
    for kind in ("local", *LOADED):
        (root / kind).mkdir()
        jobs[kind] = {
            "image": str(case.image_files["landscape"]),
            "answers": str(root / kind / "answers.safetensors"),
            "report": str(root / kind / "report.json"),
            "num_threads": torch.get_num_threads(),
        }
    answer({**jobs["local"], "model": str(case.converted), "projector": str(root / "projector")})
    with FakeHub() as hub:
        with pytest.MonkeyPatch.context() as monkeypatch:
            hub.connect(monkeypatch, root / "home")
            model.push_to_hub(REPOSITORIES["first"]["model"])
            AutoProcessor.from_pretrained(case.converted).push_to_hub(REPOSITORIES["first"]["model"])
            projector.push_to_hub(REPOSITORIES["first"]["projector"])
        for kind, repositories in LOADED.items():
            job = {**jobs[kind], **REPOSITORIES[repositories]}
            if kind == "remote-code":
                job |= {f"push_{name}": repo_id for name, repo_id in REPOSITORIES["again"].items()}
            answer_in_a_fresh_process(hub, job, root / kind, with_package=kind == "package")
        yield ById(hub, {kind: root / kind for kind in jobs})


@pytest.mark.parametrize("kind", LOADED)
def test_pushed_objects_answer_the_same_by_id(by_id, kind):
    local, loaded = (load_file(by_id.folders[which] / "answers.safetensors") for which in ("local", kind))
    assert local.keys() == loaded.keys()
    for name, tensor in local.items():
        assert tensor.dtype == loaded[name].dtype
        assert (tensor - loaded[name]).abs().max() == 0, name


@pytest.mark.parametrize("kind", LOADED)
def test_what_is_loaded_by_id(by_id, kind):
    report = json.loads((by_id.folders[kind] / "report.json").read_text())
    assert [name for _, name in report["classes"]] == [
        "LlavaSPForConditionalGeneration",
        "LlavaSPProcessor",
        "LlavaSPProjector",
    ]
    package = "transformers_llava_sp" if kind == "package" else "transformers_modules"
    assert {module.partition(".")[0] for module, _ in report["classes"]} == {package}
    assert {key: value for key, value in report["loading"].items() if value} == {}


@pytest.mark.parametrize("repositories", REPOSITORIES)
def test_pushed_repositories_are_complete_in_themselves(by_id, repositories):
    """Two commits for model and processor, one for a projector, and no code that another repository would have."""
    model, projector = (by_id.hub.repositories[repo_id] for repo_id in REPOSITORIES[repositories].values())
    assert len(model.commits) == 2
    assert len(projector.commits) == 1
    extra = {".gitattributes", "README.md"}
    assert model.files.keys() == {*MODEL_FILES, *PROCESSOR_FILES, *extra}
    # Remote code lies beside what its loading needed, which for a projector is not the processor
    unneeded = {"processing_llava_sp.py"} if repositories == "again" else set()
    assert projector.files.keys() == {*PUSHED["projector"], *extra} - unneeded
    package = Path(transformers_llava_sp.__file__).parent
    for repository in (model, projector):
        for name, content in repository.files.items():
            if name in HUB_MODULES:
                assert content == (package / name).read_bytes(), name
            if name.endswith(".json"):
                # Loading by id writes this in front of a module's name
                assert "lab/llava-sp--" not in content.decode(), name
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert model.files[name] == by_id.hub.repositories[REPO_ID].files[name], name


# Conversion from the Hub and to it


MINI = FIXTURES / "mini-cropping"


def convert(output: Path, *options: str, release: str = str(MINI / "release")):
    parts = ["--base-model", str(MINI / "base"), "--vision-tower", str(MINI / "vision")]
    return CliRunner().invoke(app, ["convert", release, str(output), *parts, *options])


@pytest.mark.parametrize("branch", [None, "half-precision"])
def test_conversion_is_pushed_in_one_commit(hub, tmp_path, branch):
    options = ["--revision", branch] if branch else []
    result = convert(tmp_path / "converted", "--push-to-hub", REPO_ID, "--private", *options)

    assert result.exit_code == 0, result.output
    repository = hub.repositories[REPO_ID]
    assert repository.private
    [commit] = repository.branches[branch or "main"][1:]
    assert {name: commit.files[name] for name in commit.added} == read(tmp_path / "converted")
    assert f"pushed: {hub.url}/{REPO_ID}/commit/" in result.stdout
    card = commit.files["README.md"].decode()
    assert card.count(f'"{REPO_ID}"') >= 2
    assert "## Use" in card


def test_conversion_that_fails_pushes_nothing(hub, tmp_path):
    result = convert(tmp_path / "converted", "--push-to-hub", REPO_ID, release=str(MINI / "base"))
    assert result.exit_code == 1
    assert not hub.requests
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("failure", [401, 403, 500, CUT])
def test_conversion_whose_push_fails_is_kept(hub, tmp_path, failure):
    hub.failures["/commit/"] = failure
    result = convert(tmp_path / "converted", "--push-to-hub", REPO_ID)
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"llava-sp: error: Pushing to {REPO_ID} at ")
    assert "No file was published. The converted folder is complete at" in line
    assert not hub.repositories[REPO_ID].commits
    AutoModelForImageTextToText.from_pretrained(tmp_path / "converted")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--push-to-hub", "no/such/id"], "'no/such/id' cannot be the id of a Hub repository"),
        (["--private"], "pass --push-to-hub as well"),
        (["--revision", "main"], "pass --push-to-hub as well"),
        (["--max-shard-size", "large"], "'large' is no size of a file, expected one such as '5GB'"),
    ],
    ids=["id", "private", "revision", "shard-size"],
)
def test_wrong_options_are_seen_before_anything_is_done(hub, tmp_path, options, message):
    result = convert(tmp_path / "converted", *options, release=str(tmp_path / "nowhere"))
    assert result.exit_code == 1
    assert message in result.stderr
    assert not hub.requests
    assert not list(tmp_path.glob("*converted*"))


def test_conversion_of_repositories_is_that_of_folders(hub, tmp_path):
    """All three parts by id, the checkpoint at a branch; what only the Hub knows is in the card."""
    HfApi().create_repo("authors/release")
    push_folder(MINI / "release", "authors/release", revision="v1", commit_message="Release")
    for name, folder in (("base", "base"), ("tower", "vision")):
        push_folder(MINI / folder, f"authors/{name}", commit_message="Release")
    push_folder(MINI / "base", "authors/release", commit_message="Mistake")
    parts = ["--base-model", "authors/base", "--vision-tower", "authors/tower"]
    result = CliRunner().invoke(app, ["convert", "authors/release@v1", str(tmp_path / "by-id"), *parts])
    assert result.exit_code == 0, result.output
    assert convert(tmp_path / "from-folders").exit_code == 0
    by_id, from_folders = read(tmp_path / "by-id"), read(tmp_path / "from-folders")
    card = by_id.pop("README.md").decode()
    del from_folders["README.md"]
    assert by_id == from_folders
    for name in ("release", "base", "tower"):
        head = hub.repositories[f"authors/{name}"].find("v1" if name == "release" else "main").oid
        assert f"[authors/{name}](https://huggingface.co/authors/{name}) at revision `{head}`" in card
    assert "base_model:\n- authors/release\n- authors/base\n- authors/tower\n" in card
