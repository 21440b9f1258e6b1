"""
Saved folders work where this package is not installed: `trust_remote_code=True` loads configuration, models, projector
and processor from the modules in the folder, gives bit-equal results, and saves a folder that does so again.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MINI_GOLDEN, tiny_config
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import transformers_llava_sp
from transformers_llava_sp import configuration_llava_sp
from transformers_llava_sp.configuration_llava_sp import HUB_MODULES


MODEL_AUTO_MAP = {
    "AutoConfig": "configuration_llava_sp.LlavaSPConfig",
    "AutoModel": "modeling_llava_sp.LlavaSPModel",
    "AutoModelForImageTextToText": "modeling_llava_sp.LlavaSPForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_llava_sp.LlavaSPForConditionalGeneration",
}
PROJECTOR_AUTO_MAP = {
    "AutoConfig": "configuration_llava_sp.LlavaSPProjectorConfig",
    "AutoModel": "modeling_llava_sp.LlavaSPProjector",
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_llava_sp.LlavaSPProcessor"}
CLASSES = {
    "AutoConfig": "LlavaSPConfig",
    "AutoModel": "LlavaSPModel",
    "AutoModelForImageTextToText": "LlavaSPForConditionalGeneration",
    "AutoModelForMultimodalLM": "LlavaSPForConditionalGeneration",
    "AutoProcessor": "LlavaSPProcessor",
    "projector AutoConfig": "LlavaSPProjectorConfig",
    "projector AutoModel": "LlavaSPProjector",
}


def forbid_the_package() -> None:
    """Make the package impossible to import, wherever it is installed."""
    import importlib.abc
    import sys

    class Forbid(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "transformers_llava_sp":
                raise ModuleNotFoundError(f"{name} is not installed here")

    sys.meta_path.insert(0, Forbid())


def answer(job: dict, **trust) -> None:
    """
    Load everything in the folder `job["model"]` and the projector in `job["projector"]`, answer a question about
    `job["image"]`, write what was computed to `job["answers"]` and `job["report"]`, and save everything again to the
    folders `job["save"]` and `job["save_projector"]`.

    It runs in a process of its own too, from its source alone.
    """
    import json

    import torch
    from safetensors.torch import save_file
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
        pipeline,
    )

    torch.set_num_threads(job["num_threads"])
    loaded = {
        auto_class.__name__: auto_class.from_pretrained(job["model"], **trust)
        for auto_class in (
            AutoConfig,
            AutoModel,
            AutoModelForImageTextToText,
            AutoModelForMultimodalLM,
            AutoProcessor,
        )
    }
    loaded["projector AutoConfig"] = AutoConfig.from_pretrained(job["projector"], **trust)
    projector = loaded["projector AutoModel"] = AutoModel.from_pretrained(job["projector"], **trust)
    model, processor = loaded["AutoModelForImageTextToText"], loaded["AutoProcessor"]

    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": job["image"]},
                {"type": "text", "text": "What is shown in this image?"},
            ],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    num_patches = model.config.projector_config.grid_size**2
    with torch.no_grad():
        features = model.get_image_features(**images)
        patch_features = features.hidden_states[model.config.vision_feature_layer][:, -num_patches:]
        answers = {
            **inputs,
            # Of an image in tiles, one tensor in a list
            "image_features": features.pooler_output[0],
            "image_features of the base": loaded["AutoModel"].get_image_features(**images).pooler_output[0],
            "hidden states of the base": loaded["AutoModel"](**inputs).last_hidden_state,
            "projected": projector(patch_features).last_hidden_state,
            "logits": model(**inputs).logits,
            "logits of the multimodal LM": loaded["AutoModelForMultimodalLM"](**inputs).logits,
            "generated": model.generate(**inputs, max_new_tokens=16, do_sample=False),
        }
    save_file({name: tensor.contiguous().clone() for name, tensor in answers.items()}, job["answers"])
    [answer] = pipeline("image-text-to-text", model=job["model"], **trust)(
        messages, return_full_text=False, generate_kwargs={"max_new_tokens": 16, "do_sample": False}
    )
    with open(job["report"], "w") as file:
        classes = {name: [type(item).__module__, type(item).__name__] for name, item in loaded.items()}
        json.dump({"classes": classes, "pipeline": answer["generated_text"]}, file)
    model.save_pretrained(job["save"])
    processor.save_pretrained(job["save"])
    projector.save_pretrained(job["save_projector"])


def run_without_the_package(code: str, tmp_path: Path) -> subprocess.CompletedProcess:
    """Run `code` in a fresh process that cannot import the package, reach the Hub, or find modules cached before."""
    script = f"{inspect.getsource(forbid_the_package)}\nforbid_the_package()\n{code}"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HOME": str(tmp_path / "hf"),
    }
    return subprocess.run(
        [sys.executable, "-I", "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )


def new_job(folder: Path, model: Path, projector: Path, image: Path) -> dict:
    folder.mkdir()
    return {
        "model": str(model),
        "projector": str(projector),
        "image": str(image),
        "answers": str(folder / "answers.safetensors"),
        "report": str(folder / "report.json"),
        "save": str(folder / "model"),
        "save_projector": str(folder / "projector"),
        "num_threads": torch.get_num_threads(),
    }


def answer_in_a_fresh_process(job: dict, tmp_path: Path) -> None:
    code = f"{inspect.getsource(answer)}\nanswer({job!r}, trust_remote_code=True)"
    process = run_without_the_package(code, tmp_path)
    assert process.returncode == 0, process.stderr


@pytest.fixture(scope="module", params=[*MINI_GOLDEN, "siglip-cropping", "anyres-pooling"])
def case(request, golden):
    return golden(request.param)


@pytest.fixture(scope="module")
def jobs(case, tmp_path_factory) -> dict[str, dict]:
    """
    What was answered with the package ("local"), by remote code ("remote"), and by remote code from the folders that
    remote code saved ("again").
    """
    root = tmp_path_factory.mktemp("remote-code")
    model, _ = case.load()
    model.model.multi_modal_projector.save_pretrained(root / "projector")
    image = case.image_files["landscape"]
    jobs = {kind: new_job(root / kind, case.converted, root / "projector", image) for kind in ("local", "remote")}
    jobs["again"] = new_job(root / "again", jobs["remote"]["save"], jobs["remote"]["save_projector"], image)
    answer(jobs["local"])
    for kind in ("remote", "again"):
        process_folder = root / f"process-{kind}"
        process_folder.mkdir()
        answer_in_a_fresh_process(jobs[kind], process_folder)
    return jobs


@pytest.mark.parametrize("kind", ["remote", "again"])
def test_results_are_bit_equal(jobs, case, kind):
    local, remote = (load_file(jobs[which]["answers"]) for which in ("local", kind))
    assert local.keys() == remote.keys()
    for key, tensor in local.items():
        assert tensor.dtype == remote[key].dtype
        assert (tensor - remote[key]).abs().max() == 0, key
    generated = remote["generated"][0, remote["input_ids"].shape[1] :]
    assert generated.tolist() == case.samples["single"]["generated_ids"]
    text = json.loads(Path(jobs[kind]["report"]).read_text())["pipeline"]
    assert text.strip() == case.samples["single"]["generated_text"]


@pytest.mark.parametrize("kind", ["remote", "again"])
def test_classes_come_from_the_folder(jobs, kind):
    remote, local = (json.loads(Path(jobs[which]["report"]).read_text())["classes"] for which in (kind, "local"))
    assert {key: class_name for key, (_, class_name) in remote.items()} == CLASSES
    assert {module.partition(".")[0] for module, _ in remote.values()} == {"transformers_modules"}
    assert {module.partition(".")[0] for module, _ in local.values()} == {"transformers_llava_sp"}


@pytest.mark.parametrize("kind", ["local", "remote", "again"])
def test_saved_folders_are_complete(jobs, case, kind):
    saved, converted = Path(jobs[kind]["save"]), case.converted
    names = {path.name for path in saved.iterdir() if path.is_file()}
    assert names >= {*HUB_MODULES, "config.json", "generation_config.json", "model.safetensors"}
    assert names >= {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}

    config = json.loads((saved / "config.json").read_text())
    assert list(config["auto_map"]) == list(MODEL_AUTO_MAP)
    assert config["auto_map"] == MODEL_AUTO_MAP
    assert config["architectures"] == ["LlavaSPForConditionalGeneration"]
    assert config["model_type"] == "llava_sp"
    processor_config = json.loads((saved / "processor_config.json").read_text())
    # Transformers writes the map of a processor from remote code there, and in the tokenizer's file, as well
    processor_config["image_processor"].pop("auto_map", None)
    assert processor_config == json.loads((converted / "processor_config.json").read_text())
    assert processor_config["auto_map"] == PROCESSOR_AUTO_MAP
    generation_config = json.loads((saved / "generation_config.json").read_text())
    assert generation_config == json.loads((converted / "generation_config.json").read_text())

    projector = Path(jobs[kind]["save_projector"])
    projector_config = json.loads((projector / "config.json").read_text())
    assert list(projector_config["auto_map"]) == list(PROJECTOR_AUTO_MAP)
    assert projector_config["auto_map"] == PROJECTOR_AUTO_MAP
    assert projector_config["architectures"] == ["LlavaSPProjector"]
    assert {"configuration_llava_sp.py", "modeling_llava_sp.py"} <= {path.name for path in projector.iterdir()}


def test_the_modules_are_the_packages_own(jobs):
    package = Path(transformers_llava_sp.__file__).parent
    for kind in ("local", "remote", "again"):
        for folder in (jobs[kind]["save"], jobs[kind]["save_projector"]):
            for path in Path(folder).glob("*.py"):
                assert path.read_text() == (package / path.name).read_text()


def test_the_package_loads_what_remote_code_saved(jobs):
    job = jobs["again"]
    model, report = AutoModelForImageTextToText.from_pretrained(job["save"], output_loading_info=True)
    assert type(model) is transformers_llava_sp.LlavaSPForConditionalGeneration
    assert {key: len(value) for key, value in report.items() if value} == {}
    assert type(AutoProcessor.from_pretrained(job["save"])) is transformers_llava_sp.LlavaSPProcessor
    assert type(AutoModel.from_pretrained(job["save_projector"])) is transformers_llava_sp.LlavaSPProjector
    answers = load_file(jobs["local"]["answers"])
    names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
    inputs = {key: answers[key] for key in names if key in answers}
    with torch.no_grad():
        assert (model(**inputs).logits - answers["logits"]).abs().max() == 0


@pytest.mark.parametrize(
    "auto_class", [AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor]
)
def test_the_installed_package_comes_first(golden, auto_class):
    loaded = auto_class.from_pretrained(golden("mini-cropping").converted, trust_remote_code=True)
    assert type(loaded).__module__.partition(".")[0] == "transformers_llava_sp"


def test_the_folder_is_not_trusted_unasked(golden, tmp_path):
    code = f"""
from transformers import AutoConfig
try:
    import transformers_llava_sp
except ModuleNotFoundError as error:
    print("the package:", error)
try:
    AutoConfig.from_pretrained({str(golden("mini-cropping").converted)!r})
except ValueError as error:
    print("its folder:", error)
"""
    output = run_without_the_package(code, tmp_path).stdout
    assert "the package: transformers_llava_sp is not installed here" in output
    assert "its folder: " in output
    assert "trust_remote_code=True" in output


def test_modules_are_copied_from_where_they_lie(tmp_path, monkeypatch):
    """Remote code may lie beside only what its loading needed, and may be saved to the folder that it comes from."""
    (tmp_path / "cache").mkdir()
    module = tmp_path / "cache" / "configuration_llava_sp.py"
    module.write_text("the module")
    monkeypatch.setattr(configuration_llava_sp, "__file__", str(module))
    for folder in ("saved", "cache"):
        tiny_config("cropping-dfi").save_pretrained(tmp_path / folder)
        assert [path.name for path in (tmp_path / folder).glob("*.py")] == ["configuration_llava_sp.py"]
        assert (tmp_path / folder / "configuration_llava_sp.py").read_text() == "the module"
        assert (tmp_path / folder / "config.json").is_file()


@pytest.mark.parametrize("module", HUB_MODULES)
def test_imports_of_the_hub_modules(module):
    """What Transformers reads out of the files, docstrings included, before it runs them."""
    package = Path(transformers_llava_sp.__file__).parent
    allowed = {"torch", "transformers", "huggingface_hub", "PIL", *sys.stdlib_module_names}
    assert set(get_imports(package / module)) <= allowed
    assert {Path(path).name for path in get_relative_import_files(package / module)} <= set(HUB_MODULES)
