"""What the documentation says is what happens: its code runs, its commands exist, its links lead somewhere."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from test_creation import llava, save_with_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from typer.main import get_command
from typer.testing import CliRunner

from transformers_llava_sp import cli, tiny_model_path
from transformers_llava_sp.cli import app
from transformers_llava_sp.training.train import read_recipe


REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
FIXTURES = Path(__file__).parent / "fixtures"


def save_siglip(folder: Path) -> None:
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=84, patch_size=7
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 84, "width": 84}).save_pretrained(folder)


def save_llava(folder: Path) -> None:
    model = llava(LlavaConfig, LlavaForConditionalGeneration)
    save_with_tokenizer(model, folder, 84)


# What the documents' names stand for: the bundled miniatures and photos
FOLDERS = {
    "Levideus/llava-sp-cropping-lora": FIXTURES / "mini-cropping" / "release",
    "Levideus/llava-sp-pooling-lora": FIXTURES / "mini-pooling" / "release",
    "lmsys/vicuna-7b-v1.5": FIXTURES / "mini-cropping" / "base",
    "Qwen/Qwen2.5-7B-Instruct": FIXTURES / "mini-pooling" / "base",
    "openai/clip-vit-large-patch14-336": FIXTURES / "mini-cropping" / "vision",
}
# And tiny models of the kind
MODELS = {"google/siglip2-large-patch16-384": save_siglip, "llava-hf/llava-1.5-7b-hf": save_llava}
CONVERSATIONS = [
    {
        "id": name,
        "image": name,
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A photo."}],
    }
    for name in ("landscape.png", "portrait.png")
]
PHOTOS = {"photo.jpg": "landscape.png", "other.jpg": "portrait.png"}


@dataclass
class Block:
    """A block of code in a document."""

    document: str
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.document}:{self.line}"


def blocks(language: str) -> list[Block]:
    return [
        Block(
            str(path.relative_to(REPOSITORY)), text.count("\n", 0, match.start()) + 1, match["language"], match["code"]
        )
        for path in DOCUMENTS
        for text in [path.read_text(encoding="utf-8")]
        for match in re.finditer(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if match["language"] == language
    ]


def shell_commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.text.splitlines()]
    # What several processes are started with
    lines = [re.sub(rf"^(torchrun|accelerate launch) .*-m {cli.__name__} ", "llava-sp ", line) for line in lines]
    return [command for line in lines if (command := shlex.split(line, comments=True))]


COMMANDS = shell_commands()


def commands_starting_with(*words: str) -> list[list[str]]:
    return [command for command in COMMANDS if command[: len(words)] == list(words)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder in which the names of the documents exist, the models made by the README's own commands."""
    folder = tmp_path_factory.mktemp("workspace")
    for name, target in FOLDERS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(target)
    for name, photo in PHOTOS.items():
        (folder / name).symlink_to(FIXTURES / "mini-cropping" / "golden" / photo)
    (folder / "images").symlink_to(FIXTURES / "mini-cropping" / "golden")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    (folder / "conversations.json").write_text(json.dumps(CONVERSATIONS))
    for name, save in MODELS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands_starting_with("llava-sp", "convert"):
            result = CliRunner().invoke(app, command[1:])
            assert result.exit_code == 0, result.output
    return folder


PYTHON_BLOCKS = blocks("python")
HUB_CODE_BLOCKS = [block for block in PYTHON_BLOCKS if "trust_remote_code" in block.text]


@pytest.mark.parametrize("block", [block for block in PYTHON_BLOCKS if block not in HUB_CODE_BLOCKS], ids=str)
def test_python_blocks_run(block, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
    if "print(" in block.text:
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("block", HUB_CODE_BLOCKS, ids=str)
def test_hub_code_blocks_run_without_the_package(block, workspace, tmp_path):
    assert "transformers_llava_sp" not in block.text
    code = f"""
import sys

sys.modules["transformers_llava_sp"] = None  # as if it were not installed
{block.text}
print(type(model).__module__, type(processor).__module__)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=workspace,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert all(module.startswith("transformers_modules.") for module in result.stdout.split())


@pytest.mark.parametrize("command", commands_starting_with("llava-sp", "ask"), ids=shlex.join)
def test_ask_commands_run(command, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    result = CliRunner().invoke(app, command[1:])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()


@pytest.mark.parametrize("command", commands_starting_with("llava-sp", "explain"), ids=shlex.join)
def test_explain_commands_run(command, workspace, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extras demo and dev)")
    monkeypatch.chdir(workspace)
    output = tmp_path / command[command.index("--output") + 1]
    result = CliRunner().invoke(app, [*command[1:], "--output", str(output), "--max-new-tokens", "8"])
    assert result.exit_code == 0, result.output
    assert output.stat().st_size > 10_000


@pytest.mark.parametrize("command", commands_starting_with("llava-sp", "inspect"), ids=shlex.join)
def test_inspect_commands_run(command, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    result = CliRunner().invoke(app, command[1:])
    assert result.exit_code == 0, result.output
    assert "a LLaVA-SP LoRA release" in result.stdout


@pytest.mark.parametrize("command", commands_starting_with("llava-sp", "create"), ids=shlex.join)
def test_create_commands_run(command, workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(workspace)
    output = tmp_path / "model"
    result = CliRunner().invoke(app, ["create", str(output), *command[3:]])
    assert result.exit_code == 0, result.output
    AutoModelForImageTextToText.from_pretrained(output)


@pytest.mark.parametrize("command", commands_starting_with("llava-sp", "train"), ids=shlex.join)
def test_train_commands_are_understood(command, tmp_path):
    model, data, training = read_recipe(command[2], [*command[3:], "--bf16", "False"])
    assert model.model_name_or_path
    assert Path(data.train_data).suffix == ".json"
    assert training.output_dir


TESTED = ("convert", "ask", "explain", "inspect", "create", "train", "merge", "export-original")


def test_every_command_is_known():
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    extras = re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    for command in COMMANDS:
        if command[0] == "make":
            assert set(command[1:]) <= set(targets)
        elif command[:2] == ["pip", "install"]:
            assert all(extra in extras for extra in re.findall(r"\[(\w+)\]", " ".join(command)))
        elif command[:2] != ["hf", "upload"]:
            assert command[0] == "llava-sp", f"no test runs {command}"
            assert command[1] in TESTED, f"no test runs {command}"


def test_the_readme_has_what_it_must():
    assert len(commands_starting_with("llava-sp", "convert")) == 2
    assert len(commands_starting_with("llava-sp", "ask")) >= 1
    assert ["make", "demo"] in COMMANDS
    assert ["make", "test"] in COMMANDS
    # Ten lines are enough
    assert len(next(block for block in blocks("python") if block.document == "README.md").text.splitlines()) <= 10


def test_extras_in_the_readme_exist():
    mentioned = set(re.findall(r'"\.\[(\w+)\]"', README))
    extras = (REPOSITORY / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert mentioned
    assert mentioned <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))


def test_options_in_the_readme_exist():
    ours = [row.split("|")[2] for row in README.splitlines() if row.startswith("| `--")]
    named = {option for cell in ours for option in re.findall(r"--[\w-]+", cell)}
    commands = get_command(app).commands.values()
    exist = {option for command in commands for parameter in command.params for option in parameter.opts}
    assert {"--temperature", "--image"} <= named <= exist


def test_sizes_in_the_readme_are_what_the_script_prints(monkeypatch):
    printed = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["model_size.py"])
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(REPOSITORY / "examples" / "model_size.py"))
    parts, sizes = printed.getvalue().strip().split("\n\n")
    assert "| **together** | **7,965,997,568** |" in parts
    assert sizes in README


def test_sizes_of_a_model_with_tied_embeddings(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model_size.py", tiny_model_path()])
    runpy.run_path(str(REPOSITORY / "examples" / "model_size.py"))
    assert "| **together** | **1,354,648** |" in capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, f"{document.name} has no heading for {target}"
        elif not target.startswith("https://"):
            assert (document.parent / target.split("#")[0]).exists(), f"{document.name} links to {target}"


def test_the_citation_is_the_readmes():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    bibtex = blocks("bibtex")[0].text.replace("{", "").replace("}", "")
    assert paper["title"] in bibtex
    assert " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]) in bibtex
    assert f"{paper['start']}--{paper['end']}" in bibtex
