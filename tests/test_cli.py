"""The `llava-sp` command: what it prints, where, when, and with which exit status."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook
from typer.testing import CliRunner

import transformers_llava_sp
from transformers_llava_sp import LlavaSPForConditionalGeneration
from transformers_llava_sp.cli import app


QUESTIONS = {
    "single": "What is shown in this image?",
    "text_only": "Name three primary colors and explain why the sky is blue.",
    "two_images": "What is different between these two pictures?",
}


@pytest.fixture
def mini(golden):
    return golden("mini-cropping")


@pytest.fixture
def photo(mini) -> str:
    return str(mini.image_files["landscape"])


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_fails(result, *parts: str, exit_code: int = 1):
    """One line on stderr that has all the `parts`, nothing on stdout, no traceback."""
    assert result.exit_code == exit_code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    # Progress bars and warnings of Transformers may stand above
    line = result.stderr.splitlines()[-1]
    assert line.startswith("llava-sp: error: ")
    for part in parts:
        assert part in line


def copy_of(folder: Path, target: Path, **config) -> Path:
    """A copy of a model folder, all its files linked but for a config.json with other values."""
    target.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file)
    values = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **config}))
    return target


@pytest.mark.parametrize("sample", QUESTIONS)
def test_ask_answers_as_the_authors_do(mini, sample):
    images = [part for name in mini.samples[sample]["images"] for part in ("--image", mini.image_files[name])]

    result = invoke("ask", mini.converted, QUESTIONS[sample], *images, "--max-new-tokens", 16, "--device", "cpu")

    assert result.exit_code == 0, result.output
    assert result.stdout == mini.samples[sample]["generated_text"] + "\n"


def test_ask_prints_while_it_generates(mini, photo):
    steps = 0
    printed_at = []

    def count_step(module, inputs):
        nonlocal steps
        if isinstance(module, LlavaSPForConditionalGeneration):
            if steps == 0:
                record_printing(sys.stdout)
            steps += 1

    def record_printing(stdout):
        write = stdout.write

        def recording_write(text):
            if text.strip():
                printed_at.append(steps)
            return write(text)

        stdout.write = recording_write

    hook = register_module_forward_pre_hook(count_step)
    try:
        result = invoke("ask", mini.converted, QUESTIONS["single"], "--image", photo, "--max-new-tokens", 16)
    finally:
        hook.remove()

    assert result.exit_code == 0, result.output
    assert steps == 16
    assert len(set(printed_at)) >= 5
    assert printed_at[0] <= 4


def test_ask_samples_with_a_temperature(mini, photo):
    def answer(seed, *temperature):
        torch.manual_seed(seed)
        result = invoke("ask", mini.converted, "What?", "--image", photo, "--max-new-tokens", 16, *temperature)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert answer(0, "--temperature", 2) == answer(0, "--temperature", 2)
    assert answer(0, "--temperature", 2) != answer(1, "--temperature", 2)
    assert answer(0, "--temperature", 0) == answer(1)


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_ask_loads_as_it_is_told(mini, monkeypatch, dtype, attention):
    loaded = []
    generate = LlavaSPForConditionalGeneration.generate

    def recording_generate(self, **kwargs):
        loaded.append((self.dtype, self.config._attn_implementation))
        return generate(self, **kwargs)

    monkeypatch.setattr(LlavaSPForConditionalGeneration, "generate", recording_generate)
    options = ["--dtype", dtype, "--attn-implementation", attention, "--max-new-tokens", 1, "--device", "cpu"]
    result = invoke("ask", mini.converted, "What?", *options)

    assert result.exit_code == 0, result.output
    stored = json.loads((mini.converted / "config.json").read_text())["dtype"]
    assert loaded == [(getattr(torch, stored if dtype == "auto" else dtype), attention)]


def test_convert_writes_a_model_and_a_summary(mini, tmp_path):
    output = tmp_path / "converted"

    result = invoke(
        *("convert", mini.folder / "release", output),
        *("--base-model", mini.folder / "base", "--vision-tower", mini.folder / "vision", "--dtype", "bfloat16"),
    )

    assert result.exit_code == 0, result.output
    assert str(output) in result.stdout
    assert "cropping" in result.stdout
    assert LlavaSPForConditionalGeneration.from_pretrained(output).dtype == torch.bfloat16


def test_convert_refuses_what_is_no_checkpoint(mini, tmp_path):
    parts = ["--base-model", mini.folder / "base", "--vision-tower", mini.folder / "vision"]

    missing = invoke("convert", tmp_path / "nowhere", tmp_path / "output", *parts)
    assert_fails(missing, str(tmp_path / "nowhere"))
    language_model = invoke("convert", mini.folder / "base", tmp_path / "output", *parts)
    assert_fails(language_model, str(mini.folder / "base"))

    assert not (tmp_path / "output").exists()


def test_ask_refuses_a_folder_that_is_not_there(tmp_path):
    assert_fails(invoke("ask", tmp_path / "nowhere", "What?"), f"There is no folder {str(tmp_path / 'nowhere')!r}")


def test_ask_refuses_an_empty_folder(tmp_path):
    assert_fails(invoke("ask", tmp_path, "What?"), str(tmp_path), "config.json")


def test_ask_refuses_the_authors_checkpoint(mini):
    release = mini.folder / "release"
    assert_fails(invoke("ask", release, "What?"), repr(str(release)), "'llava_llama'", "llava-sp convert")


def test_ask_refuses_another_model(mini, tmp_path):
    other = copy_of(mini.converted, tmp_path / "other", model_type="llava")
    assert_fails(invoke("ask", other, "What?"), repr(str(other)), "'llava'", "'llava_sp'")


def test_ask_refuses_to_make_up_weights(mini, tmp_path):
    folder = copy_of(mini.converted, tmp_path / "incomplete")
    weights = load_file(mini.converted / "model.safetensors")
    lost = "model.multi_modal_projector.spatial_projection.weight"
    del weights[lost]
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    assert_fails(invoke("ask", folder, "What?"), repr(str(folder)), lost)


def test_ask_refuses_damaged_weights(mini, tmp_path):
    folder = copy_of(mini.converted, tmp_path / "model")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()  # it may be a link to the original
    weights.write_bytes(content[:1000])
    assert_fails(invoke("ask", folder, "What?"), str(folder), "damaged")


def test_ask_refuses_weights_of_another_shape(mini, tmp_path):
    config = json.loads((mini.converted / "config.json").read_text())
    config["projector_config"]["spatial_hidden_size"] += 1
    folder = copy_of(mini.converted, tmp_path / "other-shape", projector_config=config["projector_config"])

    assert_fails(invoke("ask", folder, "What?"), repr(str(folder)), "spatial_projection.weight")


@pytest.mark.parametrize("damage", ["missing", "text", "empty", "cut"])
def test_ask_names_the_image_it_cannot_read(mini, photo, tmp_path, damage):
    image = tmp_path / "damaged.png"
    if damage == "cut":
        Image.effect_noise((300, 300), 50).save(image)
        image.write_bytes(image.read_bytes()[:20_000])
    elif damage != "missing":
        image.write_text("not an image" if damage == "text" else "")

    assert_fails(invoke("ask", mini.converted, "What?", "--image", photo, "--image", image), str(image))


def test_ask_refuses_an_image_slot_in_the_question(mini, photo):
    result = invoke("ask", mini.converted, "What does <image> mean?", "--image", photo)
    assert_fails(result, "2 <image> slots", "1 image")


def test_ask_refuses_a_question_that_does_not_fit(mini):
    assert_fails(invoke("ask", mini.converted, "why " * 5000), "4096")


def test_ask_refuses_images_that_do_not_fit(mini, photo):
    assert_fails(invoke("ask", mini.converted, "What?", *["--image", photo] * 8), "4096", "582")


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_ask_refuses_an_unknown_device(mini, device):
    assert_fails(invoke("ask", mini.converted, "What?", "--device", device), f"device {device!r} cannot be used")


def test_ask_refuses_an_unknown_attention(mini):
    assert_fails(invoke("ask", mini.converted, "What?", "--attn-implementation", "telepathy"), "telepathy")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        pytest.param(["ask"], "MODEL", id="no-model"),
        pytest.param(["ask", "model"], "QUESTION", id="no-question"),
        pytest.param(["ask", "model", "What?", "--dtype", "float8"], "float8", id="unknown-dtype"),
        pytest.param(["ask", "model", "What?", "--max-new-tokens", "0"], "max-new-tokens", id="no-tokens"),
        pytest.param(["ask", "model", "What?", "--temperature", "-1"], "temperature", id="negative-temperature"),
        pytest.param(["convert", "checkpoint"], "OUTPUT", id="no-output"),
        pytest.param(["merge", "adapter"], "OUTPUT", id="no-output-of-merge"),
        pytest.param(["inspect"], "CHECKPOINT", id="nothing-to-inspect"),
        pytest.param(["translate"], "translate", id="unknown-command"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, part):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    # Typer draws its message with colours, and writes arguments in small or capital letters by release
    assert part.lower() in re.sub(r"\x1b\[[0-9;]*m", "", result.stderr).lower()


def test_version_and_help():
    assert invoke("--version").stdout == f"transformers-llava-sp {transformers_llava_sp.__version__}\n"
    for command in ([], ["convert"], ["ask"]):
        assert invoke(*command, "--help").exit_code == 0


def test_an_error_of_the_program_keeps_its_traceback(mini, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(LlavaSPForConditionalGeneration, "generate", broken)
    result = invoke("ask", mini.converted, "What?")
    assert isinstance(result.exception, RuntimeError)


def test_ask_from_a_shell(mini, photo):
    source = Path(transformers_llava_sp.__file__).parent.parent
    command = ["ask", mini.converted, QUESTIONS["single"], "--image", photo, "--max-new-tokens", 16]
    result = subprocess.run(
        [sys.executable, "-m", "transformers_llava_sp.cli", *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == mini.samples["single"]["generated_text"] + "\n"
    assert "warning" not in result.stderr.lower()


def test_the_command_is_installed():
    try:
        scripts = distribution("transformers-llava-sp").entry_points.select(group="console_scripts")
    except PackageNotFoundError:
        pytest.skip("transformers-llava-sp is not installed here, its sources are on the path")
    assert [(script.name, script.value) for script in scripts] == [("llava-sp", "transformers_llava_sp.cli:main")]
    assert all(isinstance(script, EntryPoint) and callable(script.load()) for script in scripts)
