"""
What training makes, published: its card says what it is and nothing of this machine, the Hub gets it whole, at the end
and on the way, and it loads from there.
"""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import TOKEN, FakeHub
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from test_remote_code import forbid_the_package
from test_training import MINI, options
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

import transformers_llava_sp
from transformers_llava_sp import LlavaSPForConditionalGeneration, LlavaSPProjector
from transformers_llava_sp.conversion import merge_adapter
from transformers_llava_sp.training.card import MAX_ROWS, loss_table, mean_loss
from transformers_llava_sp.training.train import read_recipe, train


BASE_ID, REPO_ID = "lab/llava-sp-base", "lab/trained"
RECIPES = {"pretrain": "projector", "lora": "adapter", "full": "model"}
SHORT = {"max_steps": 2, "use_cpu": True}
IN_PROGRESS = [f"Training in progress, step {step}" for step in (1, 2)]


@pytest.fixture(scope="module")
def workspace(workspace, tmp_path_factory) -> Path:
    """The one of all modules with captions and a licence."""
    folder = tmp_path_factory.mktemp("licensed") / "workspace"
    shutil.copytree(workspace, folder)
    (folder / "model" / "README.md").write_text("---\nlicense: llama2\n---\n# A model\n")
    records = json.loads((folder / "data.json").read_text())
    (folder / "captions.json").write_text(json.dumps([record for record in records if "image" in record]))
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture
def base(hub, workspace) -> str:
    """The model's id on the Hub, where it is published."""
    HfApi().create_repo(BASE_ID)
    HfApi().upload_folder(repo_id=BASE_ID, folder_path=workspace / "model")
    return BASE_ID


@pytest.fixture
def warnings(monkeypatch):
    """Those of this package and Transformers, which do not go to pytest's own handler."""
    found = []
    monkeypatch.setattr(
        logging.get_logger("transformers_llava_sp.training.push"), "warning", lambda text, *_: found.append(text)
    )
    return found


def run(workspace, output, recipe="lora", **overrides):
    data = "captions.json" if recipe == "pretrain" else "data.json"
    return train(recipe, options(workspace, output, **{"train_data": workspace / data, **SHORT, **overrides}))


def blocks(card: ModelCard, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card.text, flags=re.DOTALL)


def start(code: str, hub: FakeHub, folder: Path, **environment: str) -> str:
    """Run code in a process of its own, in a folder, and return what it prints."""
    own = {"HF_HOME": str(folder / "other home"), "HF_MODULES_CACHE": str(folder / "modules"), **environment}
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **hub.environment, **own},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def projector_of(model) -> dict[str, torch.Tensor]:
    return {name.replace("modules_to_save.default.", ""): tensor for name, tensor in model.named_parameters()}


# What the card says


@pytest.mark.parametrize("recipe", RECIPES)
def test_card(workspace, tmp_path, recipe):
    output = tmp_path / "secret place" / "result"
    trainer = run(
        workspace,
        output,
        recipe,
        eval_data=workspace / "captions.json",
        eval_strategy="steps",
        eval_steps=1,
        gradient_accumulation_steps=2,
    )
    card = ModelCard.load(output / "README.md")
    text = " ".join(card.text.split())
    assert card.data.library_name == ("peft" if recipe == "lora" else "transformers")
    assert card.data.pipeline_tag == (None if recipe == "pretrain" else "image-text-to-text")
    assert card.data.license == "llama2"
    # Neither is on the Hub
    assert card.data.base_model is None
    assert card.data.get("datasets") is None
    assert "llava-sp" in card.data.tags
    assert ("lora" in card.data.tags) == (recipe == "lora")
    assert "[Llama 2 Community License]" in text
    assert "a local folder named `model`, whose config.json has the SHA-256" in text
    records = 6 if recipe == "pretrain" else 8
    assert f"`{'captions' if recipe == 'pretrain' else 'data'}.json`, {records} of {records} records, 6 of" in text
    assert "**evaluation data**: `captions.json`, 6 of 6 records, 6 of them with images. 0 bad" in text
    for row in ("examples in a step | 4 |", "in a batch | 2 |", "batches in a step | 2 in each process |"):
        assert f"| {row}" in text
    counts = {
        part: int(count.replace(",", "")) for part, count in re.findall(r"trained parameters: (.+?) \| ([\d,]+)", text)
    }
    assert (
        counts.keys()
        == {
            "pretrain": {"projector"},
            "lora": {"projector", "LoRA"},
            "full": {"projector", "other weights"},
        }[recipe]
    )
    assert sum(counts.values()) == sum(
        parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad
    )
    for entry in trainer.state.log_history:
        if "loss" in entry:
            assert f"| {entry['step']} | {entry['epoch']:.4g} | {entry['loss']:.4g} |" in card.text
        if "eval_loss" in entry:
            assert f"| {entry['step']} | {entry['epoch']:.4g} | {entry['eval_loss']:.4g} |" in card.text
        if "train_loss" in entry:
            assert f"The mean over all steps up to the last of these is {entry['train_loss']:.4f}." in card.text
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 2
    assert f"transformers-llava-sp {transformers_llava_sp.__version__}, transformers " in text
    # Nothing of this machine
    for part in (str(tmp_path), str(workspace), "secret", str(Path.home()), os.uname().nodename):
        assert part not in str(card)


def test_mean_loss_counts_what_was_before_a_run_was_resumed():
    assert mean_loss([{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}, {"step": 25, "loss": 1.0}]) == 2.2
    assert mean_loss([]) is None


def test_recipe_of_the_card_is_the_one_that_was_trained(workspace, tmp_path):
    changes = {"learning_rate": 3e-4, "lr_scheduler_type": "linear", "warmup_steps": 0.25, "lora_dropout": 0.1}
    trainer = run(workspace, tmp_path / "output", **changes, seed=7, max_length=1024, chat_template="vicuna_v1")
    [recipe] = blocks(ModelCard.load(tmp_path / "output" / "README.md"), "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    required = ["--model_name_or_path", "model", "--train_data", "data.json", "--output_dir", str(tmp_path)]
    model, data, training = read_recipe(tmp_path / "recipe.yaml", required)
    assert (model.method, model.lora_r, model.lora_alpha, model.lora_dropout) == ("lora", 4, 8, 0.1)
    assert (data.stage, data.max_length, data.chat_template) == ("finetune", 1024, "vicuna_v1")
    for key in yaml.safe_load(recipe):
        if hasattr(training, key):
            assert getattr(training, key) == getattr(trainer.args, key), key
    assert {*changes, "seed", "max_steps", "projector_learning_rate"} <= yaml.safe_load(recipe).keys()


def test_records_that_were_left_out_are_counted(workspace, tmp_path):
    records = json.loads((workspace / "data.json").read_text())
    records[0]["image"] = "not there.png"
    records[1]["conversations"][1]["value"] = "long " * 2000
    records[2]["conversations"][1]["value"] = ""
    (tmp_path / "other.json").write_text(json.dumps(records))
    run(workspace, tmp_path / "output", train_data=tmp_path / "other.json", skip_bad_records=True)
    text = (tmp_path / "output" / "README.md").read_text()
    assert (
        "`other.json`, 5 of 8 records, 4 of them with images. 2 bad ones were skipped, 1 too long ones dropped."
        in text
    )


def test_data_set_and_model_of_the_hub_are_named_by_their_ids(workspace, base, tmp_path, monkeypatch):
    import datasets

    records = json.loads((workspace / "data.json").read_text())
    rows = [record for record in records if "image" not in record]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(rows))
    run(workspace, tmp_path / "output", train_data="lab/questions", model_name_or_path=base, max_steps=1)
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert card.data.datasets == ["lab/questions"]
    assert card.data.base_model == base
    assert card.data.get("base_model_relation") == "adapter"
    assert card.data.license == "llama2"
    revision = HfApi().model_info(base).sha
    assert f"[{base}](https://huggingface.co/{base}) at revision `{revision}`" in card.text
    assert (
        "[lab/questions](https://huggingface.co/datasets/lab/questions), 2 of 2 records, 0 of them with" in card.text
    )


def test_projector_that_it_started_from(workspace, tmp_path):
    run(workspace, tmp_path / "stage one", "pretrain")
    run(workspace, tmp_path / "adapter", projector=tmp_path / "stage one")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "**projector**: it started from a local folder named `stage one`, whose config.json has" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("num_entries", [1, MAX_ROWS, 1000])
def test_loss_table_has_the_first_and_the_last_entry(num_entries):
    entries = [{"step": step, "epoch": step / 10, "loss": 1 / step} for step in range(1, num_entries + 1)]
    rows = loss_table(entries, ["loss", "grad_norm"]).splitlines()
    assert rows[:2] == ["| step | epoch | loss | grad norm |", "|---:|---:|---:|---:|"]
    assert rows[2] == "| 1 | 0.1 | 1 | - |"
    assert rows[-1].startswith(f"| {num_entries} | ")
    assert len(rows) == 2 + min(num_entries, MAX_ROWS)
    assert len(set(rows)) == len(rows)


# Somebody's own README.md


@pytest.mark.parametrize("change", ["own", "edited"])
def test_own_readme_is_kept(workspace, tmp_path, hub, change):
    output = tmp_path / "output"
    run(workspace, output)
    first = (output / "README.md").read_text()
    own = "# Mine\n" if change == "own" else first + "\nmine\n"
    (output / "README.md").write_text(own)
    pushing = {"push_to_hub": True, "hub_model_id": REPO_ID, "hub_strategy": "every_save"}
    run(workspace, output, **pushing, save_strategy="steps", save_steps=1)
    assert (output / "README.md").read_text() == own
    assert "## Losses, as measured" in (output / "TRAINING.md").read_text()
    for commit in hub.repositories[REPO_ID].commits:
        assert commit.files["README.md"].decode() == own
        assert b"## Losses, as measured" in commit.files["TRAINING.md"]


def test_card_of_an_earlier_training_is_replaced(workspace, tmp_path):
    run(workspace, tmp_path, max_steps=1)
    first = (tmp_path / "README.md").read_text()
    run(workspace, tmp_path, seed=5)
    assert "| optimizer steps | 1," in first
    assert "| optimizer steps | 2," in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "TRAINING.md").exists()


# Pushing


def assert_nothing_of_this_machine(files: dict[str, bytes], *names: str) -> None:
    for file, content in files.items():
        for name in (*names, str(Path.home()), TOKEN):
            assert name.encode() not in content, (file, name)


def test_pushed_adapter_loads_from_the_hub(workspace, base, hub, tmp_path, warnings):
    output = tmp_path / "output"
    trainer = run(workspace, output, model_name_or_path=base, push_to_hub=True, hub_model_id=REPO_ID)
    [commit] = hub.repositories[REPO_ID].commits
    assert commit.message == "Model save"
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "processor_config.json"} <= {
        *commit.added
    }
    assert {"tokenizer.json", "chat_template.jinja", "modeling_llava_sp.py", "processing_llava_sp.py"} <= {
        *commit.added
    }
    assert not {"training_args.bin", "trainer_state.json"} & {*commit.files}
    assert_nothing_of_this_machine(commit.files, str(tmp_path), str(workspace))
    assert commit.files["README.md"] == (output / "README.md").read_bytes()
    assert f'from_pretrained("{REPO_ID}", trust_remote_code=True)' in (output / "README.md").read_text()
    assert warnings == []

    untrained = AutoModelForImageTextToText.from_pretrained(base).state_dict()
    trained = {
        name: parameter
        for name, parameter in trainer.model.get_base_model().named_parameters()
        if parameter.requires_grad
    }
    loaded_models = {
        "auto": AutoModelForImageTextToText.from_pretrained(REPO_ID),
        "peft": PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), REPO_ID).get_base_model(),
    }
    for way, model in loaded_models.items():
        loaded = model.state_dict()
        for name, tensor in trained.items():
            assert torch.equal(loaded[name], tensor), (way, name)
    projector = {name: tensor for name, tensor in trained.items() if "multi_modal_projector" in name}
    assert len(projector) == len([name for name in untrained if "multi_modal_projector" in name])
    assert not any(
        torch.equal(untrained[name.replace("modules_to_save.default.", "")], tensor)
        for name, tensor in projector.items()
    )
    assert AutoProcessor.from_pretrained(REPO_ID).chat_template == trainer.processing_class.chat_template


def test_example_of_a_pushed_adapter_runs_without_the_package(workspace, base, hub, tmp_path):
    run(workspace, tmp_path / "output", model_name_or_path=base, push_to_hub=True, hub_model_id=REPO_ID)
    shutil.copy(MINI / "golden" / "landscape.png", tmp_path / "photo.jpg")
    [example] = blocks(ModelCard.load(tmp_path / "output" / "README.md"), "python")
    code = f"{inspect.getsource(forbid_the_package)}\nforbid_the_package()\n{example}"
    printed = start(f"{code}\nprint('from', type(model).__module__.partition('.')[0])", hub, tmp_path, PYTHONPATH="")
    assert printed.endswith("\nfrom transformers_modules\n")


@pytest.mark.parametrize("recipe", RECIPES)
def test_examples_of_the_folder_run(workspace, tmp_path, monkeypatch, recipe):
    output = tmp_path / "output"
    run(workspace, output, recipe)
    (output / "model").symlink_to(workspace / "model")
    shutil.copy(MINI / "golden" / "landscape.png", output / "photo.jpg")
    [example] = blocks(ModelCard.load(output / "README.md"), "python")
    monkeypatch.chdir(output)
    names: dict = {}
    exec(example.replace(", trust_remote_code=True", ""), names)
    assert isinstance(names["model"], (LlavaSPForConditionalGeneration, PeftModel))
    if recipe == "lora":
        # As the card's command does it
        assert "llava-sp merge . ../merged --base-model model\n" in (output / "README.md").read_text()
        merge_adapter(".", "../merged", base_model="model")
        assert ModelCard.load(tmp_path / "merged" / "README.md").data.license == "llama2"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_strategies(workspace, hub, tmp_path, recipe, strategy):
    output = tmp_path / "output"
    run(
        workspace,
        output,
        recipe,
        push_to_hub=True,
        hub_model_id=REPO_ID,
        hub_strategy=strategy,
        hub_always_push=True,
        hub_token=TOKEN,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
    )
    *way, end = hub.repositories[REPO_ID].commits
    weights = "adapter_model.safetensors" if recipe == "lora" else "model.safetensors"
    assert end.message == "Model save"
    assert end.files[weights] == (output / weights).read_bytes()
    assert b"| optimizer steps | 2," in end.files["README.md"]
    messages = [commit.message for commit in way]
    if strategy == "end":
        assert messages == []
    elif strategy == "every_save":
        # The last has nothing that the end has not, but its card
        assert messages == IN_PROGRESS
        assert b"| optimizer steps | 1," in way[0].files["README.md"]
        assert way[0].files[weights] != end.files[weights]
    else:
        assert messages == [message for name in IN_PROGRESS for message in (name, f"{name}, checkpoint")]
        folder = "last-checkpoint" if strategy == "checkpoint" else "checkpoint-2"
        assert end.files[f"{folder}/{weights}"] == (output / "checkpoint-2" / weights).read_bytes()
        assert f"{folder}/optimizer.pt" in end.files
        assert f"{folder}/trainer_state.json" in end.files
    for commit in (*way, end):
        assert not {"optimizer.pt", "trainer_state.json", "training_args.bin", "rng_state.pth"} & {*commit.files}
        assert not [name for name in commit.files if name.startswith(("_", "runs")) or "training_args" in name]
        files = {name: content for name, content in commit.files.items() if not name.endswith("adapter_config.json")}
        assert_nothing_of_this_machine(files, str(tmp_path), str(workspace))
    assert sorted(path.name for path in output.glob("_*")) == []


def test_pushed_projector_loads_from_the_hub(workspace, hub, tmp_path):
    run(workspace, tmp_path / "output", "pretrain", push_to_hub=True, hub_model_id=REPO_ID)
    saved = load_file(tmp_path / "output" / "model.safetensors")
    loaded = LlavaSPProjector.from_pretrained(REPO_ID).state_dict()
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name
    trainer = run(workspace, tmp_path / "adapter", projector=REPO_ID, projector_learning_rate=0.0)
    started = projector_of(trainer.model.get_base_model().model.multi_modal_projector)
    for name, tensor in saved.items():
        assert torch.equal(started[name], tensor), name


def test_local_base_is_warned_about_before_training(workspace, hub, tmp_path, warnings):
    run(workspace, tmp_path / "output", push_to_hub=True, hub_model_id=REPO_ID)
    [warning] = warnings
    assert f"The adapter was made for {workspace / 'model'}, a folder on this machine." in warning
    assert "base_model_name_or_path" in warning
    # PEFT needs it there
    config = json.loads(hub.repositories[REPO_ID].files["adapter_config.json"])
    assert config["base_model_name_or_path"] == str(workspace / "model")


def test_push_by_hand(workspace, base, hub, tmp_path):
    trainer = run(workspace, tmp_path / "output", model_name_or_path=base)
    trainer.push_to_hub(
        "Here it is", private=True, license="mit", language="en", tags="vqa", dataset_tags=["lab/a", "lab/b"]
    )
    [commit] = hub.repositories["somebody/output"].commits
    assert hub.repositories["somebody/output"].private
    assert commit.message == "Here it is"
    card = ModelCard(commit.files["README.md"].decode())
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", ["lab/a", "lab/b"])
    assert {"vqa", "lora", "llava-sp"} <= {*card.data.tags}
    assert "training_args.bin" not in commit.files


def test_failed_push_says_what_is_complete(workspace, hub, tmp_path):
    hub.failures["POST .*/commit/"] = 403
    output = tmp_path / "output"
    with pytest.raises(OSError, match="the Hub does not allow it") as caught:
        run(workspace, output, push_to_hub=True, hub_model_id=REPO_ID)
    assert f"The result is complete in {output}. Push it again by `hf upload {REPO_ID} {output} --exclude" in str(
        caught.value
    )
    assert (output / "adapter_model.safetensors").is_file()


def test_failed_push_on_the_way_is_a_warning(workspace, base, hub, tmp_path, warnings):
    hub.failures["POST .*/commit/"] = 403
    pushing = {"push_to_hub": True, "hub_model_id": REPO_ID, "hub_strategy": "every_save"}
    with pytest.raises(OSError, match="The result is complete"):
        run(workspace, tmp_path, model_name_or_path=base, **pushing, save_strategy="steps", save_steps=1)
    assert warnings
    assert all("A checkpoint was not pushed to lab/trained: the Hub does not allow it" in text for text in warnings)
