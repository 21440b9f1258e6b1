"""The tiny models that come with the package, and the stages by which they are made, each on a few scenes."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel
from typer.testing import CliRunner

import transformers_llava_sp
from transformers_llava_sp import tiny_model_path
from transformers_llava_sp.cli import app
from transformers_llava_sp.conversion import inspect_checkpoint
from transformers_llava_sp.conversion.checkpoint import require_llava_sp
from transformers_llava_sp.tiny_models import TINY_MODELS, resolve_model_name


EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = EXAMPLES / "tiny"
VARIANTS = ("cropping", "pooling")
MILLION = 10**6
# Of examples/shapes.png
CIRCLE = "orange"
FROM_LEFT_TO_RIGHT = "From left to right: a black triangle, an orange circle, a cyan cross and a blue square."


@pytest.fixture
def scripts(monkeypatch):
    """Runs a script of the folder with arguments."""
    monkeypatch.syspath_prepend(str(TINY))
    import make_model
    import train_tower

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        {"make_model": make_model, "train_tower": train_tower}[name].main()

    return run


def test_tower_and_model_are_made(scripts, tmp_path, monkeypatch):
    import train_tower

    monkeypatch.setattr(train_tower, "VALIDATION_SCENES", 16)
    scripts("train_tower", tmp_path / "tower", "--scenes", 128, "--epochs", 2, "--workers", 0)
    log = json.loads((tmp_path / "tower" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    tower = CLIPVisionModel.from_pretrained(tmp_path / "tower")

    scripts("make_model", tmp_path / "tower", tmp_path / "model", "--spatial-variant", "pooling")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    projector = model.config.projector_config
    # The paper's geometry at half scale
    assert (projector.spatial_variant, projector.grid_size) == ("pooling", 12)
    assert list(projector.spatial_scales) == [2, 4, 6, 8, 10, 12]
    assert (projector.detail_kernel_size, projector.detail_stride) == (8, 2)
    for name, weight in tower.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], weight)
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    text = processor.apply_chat_template([{"role": "user", "content": "Is there a red circle?"}])
    assert len(processor.tokenizer(text)["input_ids"]) < 12


# What comes with the package


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="no tiny model 'medium': expected one of cropping, pooling"):
        tiny_model_path("medium")


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_model_is_whole_and_small(variant):
    folder = Path(tiny_model_path(variant))
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    assert model.config.projector_config.spatial_variant == variant
    assert model.config.projector_config.use_detail_integrator
    for page in ("README.md", "docs/tiny.md"):
        assert f"{model.num_parameters() / MILLION:.2f} million parameters" in (EXAMPLES.parent / page).read_text()
    assert model.dtype == torch.float32
    # The package is the code
    assert not [*folder.glob("*.py")]
    assert not any("auto_map" in json.loads(file.read_text()) for file in folder.glob("*.json"))
    assert {"README.md", "training_log.json", "results.json"} <= {file.name for file in folder.iterdir()}


def test_tiny_models_add_little_to_the_package():
    sizes = [file.stat().st_size for name in TINY_MODELS for file in Path(resolve_model_name(name)).iterdir()]
    assert sum(sizes) <= 12 * MILLION


@pytest.mark.parametrize("variant", VARIANTS)
def test_card_has_the_results(variant):
    folder = Path(tiny_model_path(variant))
    results = json.loads((folder / "results.json").read_text())
    card = (folder / "README.md").read_text()
    for scores in results.values():
        for kind, score in scores.items():
            row = f"| {kind} | {score['number']} | {score['blind']:.1%} | {score['exact_match']:.1%} |"
            assert row in card


@pytest.mark.parametrize("split", ["test", "held_out"])
def test_document_has_the_results(split):
    page = (EXAMPLES.parent / "docs" / "tiny.md").read_text()
    cropping, pooling = (
        json.loads((Path(tiny_model_path(variant)) / "results.json").read_text())[split] for variant in VARIANTS
    )
    assert cropping.keys() == pooling.keys()
    rows = [
        f"| {kind} | {score['number']} | {score['blind']:.1%} | {score['exact_match']:.1%} | "
        f"{pooling[kind]['exact_match']:.1%} |\n"
        for kind, score in cropping.items()
    ]
    assert "".join(rows) in page


def test_evaluation_says_what_is_no_model(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(TINY))
    for name, message in (("tiny-crop", "there are tiny-cropping and tiny-pooling"), (tmp_path, str(tmp_path))):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(name)])
        with pytest.raises(SystemExit):
            runpy.run_path(str(TINY / "evaluate.py"), run_name="__main__")
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_answer_as_the_results_say(variant, monkeypatch):
    monkeypatch.syspath_prepend(str(TINY))
    from evaluate import BlindBaseline, average, evaluate, load, training_questions

    reported = json.loads((Path(tiny_model_path(variant)) / "results.json").read_text())
    loaded = load(f"tiny-{variant}")
    for split in ("test", "held_out"):
        scores, _ = evaluate(*loaded, split=split, scenes=60, baseline=BlindBaseline(training_questions(10)))
        # A few of the scenes, so not quite the same: within four standard deviations
        kinds = {each.kind: each.number for each in scores if each.kind != "caption"}
        shares = {kind: reported[split][kind]["exact_match"] for kind in kinds}
        variance = sum(share * (1 - share) / kinds[kind] for kind, share in shares.items()) / len(kinds) ** 2
        expected = sum(shares.values()) / len(shares)
        assert average(scores).exact_match == pytest.approx(expected, abs=4 * variance**0.5)


def test_name_of_no_tiny_model():
    with pytest.raises(OSError, match="no tiny model of that name: there are tiny-cropping and tiny-pooling"):
        require_llava_sp("tiny-medium")


def test_folder_of_a_tiny_models_name_comes_first(tmp_path, monkeypatch):
    assert Path(resolve_model_name("tiny-pooling")) == Path(tiny_model_path("pooling"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-pooling").mkdir()
    assert resolve_model_name("tiny-pooling") == "tiny-pooling"
    assert resolve_model_name("somebody/tiny-pooling") == "somebody/tiny-pooling"


@pytest.mark.parametrize("variant", VARIANTS)
def test_commands_take_its_name(variant):
    arguments = ["ask", f"tiny-{variant}", "What colour is the circle?", "--image", str(EXAMPLES / "shapes.png")]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout.strip()) == (0, CIRCLE)
    assert inspect_checkpoint(f"tiny-{variant}").variant == variant


def test_adapter_of_a_tiny_model_merges(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TINY))
    from scenes import write_llava

    data = write_llava(tmp_path / "scenes", "train", 4)
    arguments = {
        "model_name_or_path": "tiny-pooling",
        "train_data": data,
        "image_folder": data.parent,
        "output_dir": tmp_path / "adapter",
        "lora_r": 4,
        "max_length": 512,
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 0,
    }
    options = [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
    for command in (
        ["train", "lora", *options],
        ["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert merged.config.projector_config.spatial_variant == "pooling"


# The examples, with what comes with the package


def start(script: str, *arguments: str, cwd: Path | None = None) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(transformers_llava_sp.__file__).parents[1])},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_quickstart():
    assert start("quickstart.py").strip() == FROM_LEFT_TO_RIGHT


def test_batch():
    lines = start("batch.py").splitlines()
    assert lines == [
        f"What colour is the circle? {CIRCLE}",
        "How many objects are there? 4",
        "Where is the blue square? top right",
        "Is there a purple cross? no",
    ]


def test_chat():
    lines = start("chat.py").splitlines()
    assert lines == [
        "How many objects are there? 4",
        "Where is the circle? centre",
        f"Describe the image. {FROM_LEFT_TO_RIGHT}",
    ]


@pytest.mark.parametrize(("answer", "encoded"), [(None, 1), ("many", 3)])
def test_chat_encodes_the_picture_again_only_where_an_answer_changed(answer, encoded, monkeypatch, capsys):
    model_class, calls = transformers_llava_sp.LlavaSPModel, []
    get_image_features = model_class.get_image_features

    def count(*arguments, **keywords):
        calls.append(arguments)
        return get_image_features(*arguments, **keywords)

    monkeypatch.setattr(model_class, "get_image_features", count)
    if answer:
        monkeypatch.setattr(transformers_llava_sp.LlavaSPProcessor, "decode", lambda *_, **keywords: answer)
    monkeypatch.setattr(sys, "argv", ["chat.py"])
    runpy.run_path(str(EXAMPLES / "chat.py"), run_name="__main__")
    assert len(calls) == encoded
    assert capsys.readouterr().out.startswith(f"How many objects are there? {answer or 4}\n")


def test_streaming():
    assert start("streaming.py").strip() == FROM_LEFT_TO_RIGHT


# The demo


def test_demo_shows_picture_and_answers(tmp_path):
    output = start("tiny/demo.py", "--seed", "3", cwd=tmp_path)
    assert output.count("(right)") + output.count("(wrong: ") == 3
    with Image.open(tmp_path / "build" / "demo" / "scene.png") as scene:
        assert scene.size == (96, 96)
    with Image.open(tmp_path / "build" / "demo" / "attention.png") as attention:
        assert attention.width > 1000


@pytest.mark.parametrize("variant", VARIANTS)
def test_demo_is_mostly_right(variant, monkeypatch):
    monkeypatch.syspath_prepend(str(TINY))
    from demo import count_right

    assert count_right(variant, range(50)) >= 0.85


def test_demo_has_questions_for_every_seed(monkeypatch):
    monkeypatch.syspath_prepend(str(TINY))
    from demo import SEEDS, make_demo

    for seed in range(SEEDS):
        _, _, questions = make_demo(seed)
        assert len({question.kind for question in questions}) == 3


def test_demo_draws_in_the_terminal(monkeypatch):
    monkeypatch.syspath_prepend(str(TINY))
    from demo import to_terminal

    image = Image.new("RGB", (96, 96), (255, 0, 0))
    image.paste((0, 0, 255), (0, 48, 96, 96))
    rows = to_terminal(image, columns=4).splitlines()
    assert rows[0] == "\033[38;2;255;0;0;48;2;255;0;0m▀" * 4 + "\033[0m"
    assert rows[1] == "\033[38;2;0;0;255;48;2;0;0;255m▀" * 4 + "\033[0m"
    assert to_terminal(image, true_colour=False, columns=2) == "\033[38;5;196;48;5;21m▀" * 2 + "\033[0m"


# How they are made, in full


@pytest.mark.parametrize(
    ("resumable", "seed", "left"), [(True, 0, ["begun", "begun"]), (True, 1, ["begun"]), (False, 0, ["begun"])]
)
def test_what_a_killed_training_has_left_is_gone_on_with(resumable, seed, left, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TINY))
    from train_model import once

    def make(unfinished, finish):
        unfinished.mkdir(exist_ok=True)
        with open(unfinished / "log", "a") as log:
            log.write("begun\n")
        if not finish:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "trained", lambda unfinished: make(unfinished, False), resumable=resumable, seed=0)
    assert not (tmp_path / "trained").exists()
    made = once(tmp_path / "trained", lambda unfinished: make(unfinished, True), resumable=resumable, seed=seed)
    assert (made / "log").read_text().split() == left
    assert {file.name for file in tmp_path.iterdir()} == {"trained", "trained.options.json"}


def test_killed_training_resumes_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TINY))
    import train_model

    commands = []

    def train(command, **_):
        commands.append(command)
        (tmp_path / "_trained" / "checkpoint-1000").mkdir(parents=True, exist_ok=True)
        if len(commands) == 1:
            raise subprocess.CalledProcessError(-9, command)

    monkeypatch.setattr(train_model.subprocess, "run", train)
    arguments = (tmp_path / "trained", "train", "--output_dir", tmp_path / "trained")
    with pytest.raises(subprocess.CalledProcessError):
        train_model.run(*arguments, checkpoints=True, seed=3)
    train_model.run(*arguments, checkpoints=True, seed=3)
    first, second = (command[1:] for command in commands)
    expected = ["train", "--output_dir", str(tmp_path / "_trained"), "--seed", "3", *train_model.CHECKPOINTS]
    assert first == expected
    assert second == [*expected, "--resume_from_checkpoint", "true"]
    assert not [*(tmp_path / "trained").iterdir()]


@pytest.mark.slow
def test_model_is_trained_and_written_as_it_is_shipped(tmp_path):
    sizes = ["--tower-scenes", "128", "--tower-epochs", "1", "--scenes", "32", "--rounds", "2", "--test-scenes", "3"]
    arguments = ("tiny/train_model.py", "pooling", str(tmp_path), *sizes)
    card = start(*arguments)
    folder = tmp_path / "tiny-pooling"
    shipped = Path(tiny_model_path("pooling"))
    assert {file.name for file in folder.iterdir()} == {file.name for file in shipped.iterdir()}
    config, shipped_config = (json.loads((each / "config.json").read_text()) for each in (folder, shipped))
    config["transformers_version"] = shipped_config["transformers_version"]
    assert config == shipped_config
    assert f"--scenes {sizes[5]}" in card
    log = json.loads((folder / "training_log.json").read_text())
    assert log.keys() == {"tower", "trained", "trained-2"}
    results = json.loads((folder / "results.json").read_text())
    assert results.keys() == {"validation", "test", "held_out"}
    assert json.loads((shipped / "results.json").read_text()).keys() == results.keys()

    # What is finished is not done again, and what a killed run has left is
    made = [tmp_path / name for name in ("tower", "scenes", "pooling/start", "pooling/trained", "pooling/trained-2")]
    before = [each.stat().st_ino for each in made]
    shutil.rmtree(folder)
    (tmp_path / "_tiny-pooling").mkdir()
    assert start(*arguments) == card[card.index("---") :]
    assert [each.stat().st_ino for each in made] == before
    with pytest.raises(AssertionError, match=r"tower was made with .*: remove it, or take another folder"):
        start(*arguments, "--seed", "1")
    # Nor is anything kept that was made from something else
    for name in ("scenes", "scenes.options.json"):
        (tmp_path / name).rename(tmp_path / f"old-{name}")
    with pytest.raises(AssertionError, match=r"trained was made with .*: remove it, or take another folder"):
        start(*arguments, "--scenes", "40")
    for name in ("scenes", "scenes.options.json"):
        shutil.rmtree(tmp_path / name) if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
        (tmp_path / f"old-{name}").rename(tmp_path / name)

    compare = ("--seeds", "0", "--scenes", "16", "--test-scenes", "3", "--plot", str(tmp_path / "compare.svg"))
    tables = start("tiny/compare.py", str(tmp_path), *compare)
    assert "| test | blind | cropping | pooling | queries | patches | llava |" in tables
    results = [json.loads(file.read_text()) for file in (tmp_path / "compare").glob("*-0.json")]
    sizes = {result["name"]: result["projector_parameters"] for result in results}
    assert len(sizes) == 5
    assert sizes.pop("llava") < 0.1 * min(sizes.values())
    assert max(sizes.values()) <= 1.05 * min(sizes.values())
    assert (tmp_path / "compare.svg").stat().st_size > 0
