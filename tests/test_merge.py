"""
`llava-sp merge`: adapters that PEFT has saved are merged as PEFT itself merges them, the result is a complete folder,
and whatever is no plain LoRA of the given model is refused before anything is written.
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_cli import assert_fails, invoke
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaForCausalLM

from transformers_llava_sp.configuration_llava_sp import HUB_MODULES
from transformers_llava_sp.conversion import ConversionError, merge_adapter


MINIATURE = "mini-cropping"
LAYERS = r"model\.language_model\.layers\.\d+\."
LANGUAGE_MODEL = LAYERS + r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
QUERIES = LAYERS + r"self_attn\.q_proj"
PROJECTOR = r"model\.multi_modal_projector\."
SPATIAL = PROJECTOR + r"spatial_feature_extractor\.convolutions\.\d+"
DETAIL = PROJECTOR + r"detail_feature_integrator\.detail_convolution"
TOWER = r"model\.vision_tower\..+\.(q_proj|fc1)"
IN_FULL = ["multi_modal_projector"]

# Arguments of PEFT's LoraConfig, and a pattern of the keys whose weights the adapter changes
ADAPTERS = {
    "language-model": ({"target_modules": LANGUAGE_MODEL}, LANGUAGE_MODEL + r"\.weight"),
    "projector-in-full": (
        {"target_modules": LANGUAGE_MODEL, "modules_to_save": IN_FULL},
        rf"{LANGUAGE_MODEL}\.weight|{PROJECTOR}.+",
    ),
    "head-and-queries": ({"target_modules": rf"lm_head|{QUERIES}"}, rf"(lm_head|{QUERIES})\.weight"),
    "head": ({"target_modules": "lm_head"}, r"lm_head\.weight"),
    "spatial-convolutions": ({"target_modules": SPATIAL}, SPATIAL + r"\.weight"),
    "detail-convolution": ({"target_modules": DETAIL}, DETAIL + r"\.weight"),
    "both-convolutions": ({"target_modules": f"{SPATIAL}|{DETAIL}"}, rf"({SPATIAL}|{DETAIL})\.weight"),
    "vision-tower": ({"target_modules": f"{TOWER}|{QUERIES}"}, rf"({TOWER}|{QUERIES})\.weight"),
    "rslora": ({"target_modules": LANGUAGE_MODEL, "use_rslora": True}, LANGUAGE_MODEL + r"\.weight"),
    "embeddings-in-full": (
        {"target_modules": QUERIES, "modules_to_save": ["embed_tokens", "lm_head"]},
        rf"{QUERIES}\.weight|model\.language_model\.embed_tokens\.weight|lm_head\.weight",
    ),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small take longer to hand to threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(golden, tmp_path_factory) -> Path:
    """A converted model in float32, as `save_pretrained` of model and processor leaves it."""
    folder = tmp_path_factory.mktemp("models") / "spatial-base"
    model, processor = golden(MINIATURE).load(dtype=torch.float32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, **options: Any) -> PeftModel:
    """An adapter of `base`, as if it had been trained, saved to `folder` by PEFT, and the model with it in place."""
    model = AutoModelForImageTextToText.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LANGUAGE_MODEL, **options}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


@dataclass
class Inputs:
    """An adapter of the language model with the projector in full, and its base model, to be changed by a test."""

    folder: Path

    def __post_init__(self):
        self.adapter, self.base, self.output = (self.folder / name for name in ("counting", "base", "merged"))
        self.adapter_file = self.adapter / "adapter_model.safetensors"
        self.base_file = self.base / "model.safetensors"

    def merge(self, **options):
        return merge_adapter(self.adapter, self.output, **{"base_model": self.base, **options})

    def configure(self, **changes):
        """Change entries of adapter_config.json; `...` removes one."""
        file = self.adapter / "adapter_config.json"
        config = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    def change_adapter(self, change):
        """Apply a function to the adapter's tensors by key."""
        tensors = load_file(self.adapter_file)
        change(tensors)
        save_file(tensors, self.adapter_file)

    def change_base(self, change):
        """Apply a function to the base model's tensors by key."""
        tensors = load_file(self.base_file)
        change(tensors)
        save_file(tensors, self.base_file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def saved_adapter(base, tmp_path_factory) -> Path:
    """What `inputs` copies, saved once."""
    folder = tmp_path_factory.mktemp("adapters") / "counting"
    make_adapter(base, folder, modules_to_save=IN_FULL)
    return folder


@pytest.fixture
def inputs(base, saved_adapter, tmp_path) -> Inputs:
    inputs = Inputs(tmp_path)
    shutil.copytree(base, inputs.base)
    shutil.copytree(saved_adapter, inputs.adapter)
    return inputs


def merged_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# Weights


@pytest.mark.parametrize("name", ADAPTERS)
def test_weights_are_those_that_peft_merges(base, tmp_path, name):
    options, changed = ADAPTERS[name]
    peft_model = make_adapter(base, tmp_path / "adapter", **options)

    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    expected = peft_model.merge_and_unload().state_dict()
    merged, original = merged_tensors(tmp_path / "merged"), merged_tensors(base)
    assert merged.keys() == expected.keys() == original.keys()
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-6, msg=lambda text, key=key: key + text)
        # What the adapter does not touch comes through bit by bit
        assert torch.equal(tensor, original[key]) == (re.fullmatch(changed, key) is None), key
        if re.fullmatch(changed, key):
            assert (tensor - original[key]).abs().max() > 1e-3, key
    adapter_keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert report.num_merged_weights == sum(key.endswith(".lora_A.weight") for key in adapter_keys)


def test_weights_trained_in_full_replace_those_of_the_base(inputs):
    inputs.merge()

    adapter, merged, base = (
        load_file(inputs.adapter_file),
        merged_tensors(inputs.output),
        merged_tensors(inputs.base),
    )
    keys = [key for key in merged if ".multi_modal_projector." in key]
    assert len(keys) > 10
    for key in keys:
        assert torch.equal(merged[key], adapter[f"base_model.model.{key}"]), key
        assert not torch.equal(merged[key], base[key]), key


@pytest.mark.parametrize("rslora, scaling", [(False, 6 / 4), (True, 6 / 4**0.5)], ids=["plain", "rslora"])
def test_merged_weight_is_the_formula(inputs, rslora, scaling):
    inputs.configure(use_rslora=rslora)
    inputs.merge()

    key = "model.language_model.layers.1.mlp.down_proj"
    adapter = load_file(inputs.adapter_file)
    lora_a, lora_b = (adapter[f"base_model.model.{key}.lora_{matrix}.weight"].double() for matrix in "AB")
    expected = merged_tensors(inputs.base)[f"{key}.weight"].double() + scaling * lora_b @ lora_a
    torch.testing.assert_close(merged_tensors(inputs.output)[f"{key}.weight"].double(), expected, rtol=0, atol=1e-6)


def test_base_in_bfloat16_is_merged_in_float32(inputs):
    inputs.change_base(lambda tensors: tensors.update({key: value.bfloat16() for key, value in tensors.items()}))

    report = inputs.merge()

    assert report.dtype == torch.bfloat16
    adapter, base, merged = (
        load_file(inputs.adapter_file),
        merged_tensors(inputs.base),
        merged_tensors(inputs.output),
    )
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    num_equal = num_values = 0
    for key, tensor in merged.items():
        if re.fullmatch(LANGUAGE_MODEL + r"\.weight", key):
            name = f"base_model.model.{key.removesuffix('.weight')}"
            update = adapter[f"{name}.lora_B.weight"].double() @ adapter[f"{name}.lora_A.weight"].double() * 1.5
            exact = (base[key].double() + update).bfloat16()
            num_equal += (tensor == exact).sum().item()
            num_values += tensor.numel()
        else:
            source = adapter.get(f"base_model.model.{key}", base[key])
            assert torch.equal(tensor, source.bfloat16()), key
    # Sums in float32 and float64 round to different neighbours next to never; products in bfloat16 would very often
    assert num_values > 10_000
    assert num_equal > 0.999 * num_values
    loaded = AutoModelForImageTextToText.from_pretrained(inputs.output)
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(inputs, dtype):
    result = invoke(
        "merge", inputs.adapter, inputs.output, "--base-model", inputs.base, "--dtype", dtype, "--no-verify"
    )

    assert result.exit_code == 0, result.output
    assert {tensor.dtype for tensor in merged_tensors(inputs.output).values()} == {getattr(torch, dtype)}
    assert json.loads((inputs.output / "config.json").read_text())["dtype"] == dtype
    assert f"--dtype {dtype}" in (inputs.output / "README.md").read_text()


def test_adapter_as_a_pytorch_file(inputs):
    inputs.merge()
    expected = merged_tensors(inputs.output)
    shutil.rmtree(inputs.output)
    torch.save(load_file(inputs.adapter_file), inputs.adapter / "adapter_model.bin")
    inputs.adapter_file.unlink()

    inputs.merge()

    merged = merged_tensors(inputs.output)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], tensor) for key, tensor in expected.items())


def test_shards(inputs):
    inputs.merge()
    expected = merged_tensors(inputs.output)
    shutil.rmtree(inputs.output)

    inputs.merge(max_shard_size="200KB")

    shards = sorted(inputs.output.glob("model-*.safetensors"))
    assert len(shards) > 1
    merged = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], tensor) for key, tensor in expected.items())


# The folder


def test_loaded_model_answers_as_the_adapter_does(base, golden, tmp_path):
    adapted = make_adapter(
        base,
        tmp_path / "adapter",
        target_modules=f"{LANGUAGE_MODEL}|{TOWER}|lm_head",
        modules_to_save=IN_FULL,
    )
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    content = [
        {"type": "image", "image": str(golden(MINIATURE).image_files["landscape"])},
        {"type": "text", "text": "What is shown in this image?"},
    ]
    arguments = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **arguments)

    with torch.no_grad():
        expected = adapted(**inputs).logits
        with adapted.disable_adapter():
            unadapted = adapted(**inputs).logits
        logits = merged(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - unadapted).abs().max() > 0.1


def test_folder_is_complete(inputs):
    inputs.merge()

    names = {path.name for path in inputs.output.iterdir()}
    assert names == {path.name for path in inputs.base.iterdir()} | {"README.md"}
    assert {
        *("config.json", "generation_config.json", "processor_config.json", "chat_template.jinja"),
        *("tokenizer_config.json", "model.safetensors", *HUB_MODULES),
    } <= names
    for name in names - {"README.md", "model.safetensors"}:
        assert (inputs.output / name).read_bytes() == (inputs.base / name).read_bytes(), name
    config = json.loads((inputs.output / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"].endswith(".LlavaSPForConditionalGeneration")


def test_generation_settings_of_the_base_are_kept(inputs):
    file = inputs.base / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_new_tokens": 77}))

    inputs.merge()

    assert json.loads((inputs.output / "generation_config.json").read_text())["max_new_tokens"] == 77


def test_card_tells_where_the_model_comes_from(inputs):
    shutil.rmtree(inputs.adapter / "README.md", ignore_errors=True)
    (inputs.base / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Base\n")

    inputs.merge(dtype="float16")

    card = (inputs.output / "README.md").read_text()
    assert "llava-sp merge counting --base-model base --dtype float16\n" in card
    for role, folder in (("adapter", inputs.adapter), ("LLaVA-SP model", inputs.base)):
        assert f"**{role}**: a local folder named `{folder.name}`. SHA-256 of each file read:" in card
        for name, digest in digests(folder).items():
            assert (f"{digest}  {name}\n" in card) == name.endswith((".json", ".safetensors", ".jinja")), name
    assert "license: cc-by-nc-4.0" in card
    assert "- **adapter** (counting): not stated by its source." in card
    assert "- **LLaVA-SP model** (base): [CC BY-NC 4.0]" in card
    assert "The weights of the language model and the vision tower came inside one of these." in card
    assert str(inputs.folder) not in card
    assert "/tmp" not in card
    # The paper's numbers are about the models that its authors trained
    assert "the paper's" not in card.lower().replace("the paper describes", "")
    assert "MM-Vet" not in card


def test_card_says_what_was_merged_into_what(inputs):
    inputs.merge()

    card = " ".join((inputs.output / "README.md").read_text().split())
    # The model was converted, not the adapter
    assert "converted for Hugging Face Transformers from an adapter" not in card
    assert re.search(r"adapter[^.]* merged into", card)


def test_no_absolute_path_is_written(inputs):
    inputs.configure(base_model_name_or_path=str(inputs.base))
    merge_adapter(inputs.adapter, inputs.output)

    for path in inputs.output.iterdir():
        assert str(inputs.folder).encode() not in path.read_bytes(), path.name


def test_two_runs_write_the_same_bytes(inputs):
    inputs.merge()
    first = digests(inputs.output)
    inputs.merge(overwrite=True)

    assert digests(inputs.output) == first


def test_inputs_are_left_alone(inputs):
    before = digests(inputs.folder)
    inputs.merge()
    shutil.rmtree(inputs.output)

    assert digests(inputs.folder) == before


def test_the_result_is_a_base_for_the_next_adapter(inputs):
    inputs.merge()
    peft_model = make_adapter(inputs.output, inputs.folder / "second", target_modules=QUERIES)
    merge_adapter(inputs.folder / "second", inputs.folder / "twice")

    expected = peft_model.merge_and_unload().state_dict()
    for key, tensor in merged_tensors(inputs.folder / "twice").items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-6)


# The command


def test_command_finds_the_base_model_and_prints_the_report(inputs, base):
    result = invoke("merge", inputs.adapter, inputs.output)

    assert result.exit_code == 0, result.output
    assert json.loads((inputs.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    num_merged = 2 * 7
    num_tensors = len(merged_tensors(base))
    assert str(inputs.output) in result.stdout
    assert f"weights merged with the LoRA adapter: {num_merged}\n" in result.stdout
    assert (
        f"verified: {num_tensors} tensors, {num_tensors - num_merged} bit by bit their source after the cast\n"
        in result.stdout
    )
    assert "Traceback" not in result.stderr


def test_given_base_model_goes_before_the_one_that_the_adapter_names(inputs):
    inputs.change_base(lambda tensors: tensors["model.language_model.norm.weight"].fill_(7))

    result = invoke("merge", inputs.adapter, inputs.output, "--base-model", inputs.base)

    assert result.exit_code == 0, result.output
    assert (merged_tensors(inputs.output)["model.language_model.norm.weight"] == 7).all()


@pytest.mark.parametrize("named", [..., None, "", "/nowhere/the base"], ids=["absent", "null", "empty", "elsewhere"])
def test_base_model_that_the_adapter_does_not_tell_is_asked_for(inputs, named):
    inputs.configure(base_model_name_or_path=named)

    result = invoke("merge", inputs.adapter, inputs.output)

    assert_fails(result, "adapter_config.json", "--base-model", *([named] if named not in (..., None) else []))
    assert not inputs.output.exists()
    assert invoke("merge", inputs.adapter, inputs.output, "--base-model", inputs.base).exit_code == 0


def test_existing_output_is_replaced_only_on_request(inputs):
    arguments = ["merge", inputs.adapter, inputs.output, "--base-model", inputs.base]
    assert invoke(*arguments).exit_code == 0
    (inputs.output / "chat_template.jinja").write_text("changed")
    before = digests(inputs.output)

    assert_fails(invoke(*arguments), str(inputs.output), "--overwrite")
    assert digests(inputs.output) == before

    assert invoke(*arguments, "--overwrite").exit_code == 0
    assert digests(inputs.output).items() - before.items() == {
        ("chat_template.jinja", digests(inputs.base)["chat_template.jinja"])
    }


@pytest.mark.parametrize("part", ["adapter", "base"])
def test_output_that_is_an_input_is_refused(inputs, part):
    before = digests(inputs.folder)
    for output in (getattr(inputs, part), getattr(inputs, part) / "merged"):
        result = invoke("merge", inputs.adapter, output, "--base-model", inputs.base, "--overwrite")
        assert_fails(result, str(output))

    assert digests(inputs.folder) == before


# What is refused. Each function damages the inputs, and its messages name what is wrong.


def option(**changes):
    """A case: adapter_config.json with other values."""
    return lambda inputs: inputs.configure(**changes)


def key_of(matrix: str, layer: int = 0) -> str:
    return f"base_model.model.model.language_model.layers.{layer}.self_attn.q_proj.lora_{matrix}.weight"


PROJECTION = "model.multi_modal_projector.spatial_projection.weight"
EMBEDDINGS = "base_model.model.model.language_model.embed_tokens"


def adapter_with(**tensors):
    """A case: other tensors at keys of the adapter, removed where `None`; called with the old tensor."""

    def change(inputs):
        def apply(stored):
            for key, make in tensors.items():
                value = make(stored.pop(key, None))
                if value is not None:
                    stored[key] = value

        inputs.change_adapter(apply)

    return change


def with_value(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


def removed(tensor):
    return None


def without_weights(inputs):
    inputs.adapter_file.unlink()


def without_config(inputs):
    (inputs.adapter / "adapter_config.json").unlink()


def truncated(inputs):
    inputs.adapter_file.write_bytes(inputs.adapter_file.read_bytes()[:-100])


def without_tensors(inputs):
    inputs.change_adapter(dict.clear)


def other_layers(inputs):
    def move(tensors):
        for key in [key for key in tensors if ".layers.1." in key]:
            tensors[key.replace(".layers.1.", ".layers.7.")] = tensors.pop(key)

    inputs.change_adapter(move)


def the_authors_release(inputs):
    shutil.rmtree(inputs.adapter)
    shutil.copytree(FIXTURES / MINIATURE / "release", inputs.adapter)


def plain_language_adapter(inputs):
    inputs.change_adapter(
        lambda tensors: [
            tensors.update({key.replace(".language_model.", "."): tensor})
            for key in list(tensors)
            for tensor in [tensors.pop(key)]
            if ".language_model." in key
        ]
    )


def replace_base(inputs, tensors, **config):
    save_file(tensors, inputs.base_file)
    file = inputs.base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


def language_model_as_base(inputs):
    model = AutoModelForImageTextToText.from_pretrained(inputs.base)
    shutil.rmtree(inputs.base)
    LlamaForCausalLM(model.config.text_config).save_pretrained(inputs.base)


def plain_llava_as_base(inputs):
    tensors = {
        key: tensor for key, tensor in load_file(inputs.base_file).items() if ".multi_modal_projector." not in key
    }
    projector = {f"model.multi_modal_projector.linear_{n}.weight": torch.ones(32, 32) for n in (1, 2)}
    replace_base(inputs, {**tensors, **projector}, model_type="llava")


def base_is_the_authors_release(inputs):
    shutil.rmtree(inputs.base)
    shutil.copytree(FIXTURES / MINIATURE / "release", inputs.base)


def base_is_missing(inputs):
    shutil.rmtree(inputs.base)


def base_without(key):
    return lambda inputs: inputs.change_base(lambda tensors: tensors.pop(key))


def base_with_nan(inputs):
    inputs.change_base(lambda tensors: tensors["lm_head.weight"].view(-1)[-1:].fill_(float("nan")))


def base_with_more(inputs):
    inputs.change_base(lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}))


def base_without_processor(inputs):
    (inputs.base / "processor_config.json").unlink()


def base_without_config(inputs):
    (inputs.base / "config.json").unlink()


def base_with_broken_config(inputs):
    (inputs.base / "config.json").write_text("{")


def base_with_integers(inputs):
    inputs.change_base(lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)}))


def head_of_a_tied_base(inputs):
    model = AutoModelForImageTextToText.from_pretrained(inputs.base)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(inputs.base)
    assert "lm_head.weight" not in load_file(inputs.base_file)
    inputs.change_adapter(
        lambda tensors: tensors.update(
            {
                "base_model.model.lm_head.lora_A.weight": torch.ones(4, 32),
                "base_model.model.lm_head.lora_B.weight": torch.ones(model.config.text_config.vocab_size, 4),
            }
        )
    )


REFUSED = {
    "dora": (option(use_dora=True), ["adapter_config.json", "use_dora is True", "plain LoRA"]),
    "rank-pattern": (option(rank_pattern={"q_proj": 8}), ["adapter_config.json", "rank_pattern"]),
    "alpha-pattern": (option(alpha_pattern={"q_proj": 8}), ["adapter_config.json", "alpha_pattern"]),
    "bias": (option(bias="lora_only"), ["adapter_config.json", "bias is 'lora_only'", "'none'"]),
    "lora-bias": (option(lora_bias=True), ["adapter_config.json", "lora_bias"]),
    "pissa": (option(init_lora_weights="pissa"), ["adapter_config.json", "init_lora_weights is 'pissa'"]),
    "other-method": (option(peft_type="IA3"), ["adapter_config.json", "peft_type is 'IA3'", "'LORA'"]),
    "target-parameters": (option(target_parameters=["q_proj.weight"]), ["target_parameters"]),
    "trained-tokens": (option(trainable_token_indices=[3]), ["trainable_token_indices"]),
    "replicated-layers": (option(layer_replication=[[0, 2]]), ["layer_replication"]),
    "no-rank": (option(r=...), ["adapter_config.json", "expected numbers for r and lora_alpha"]),
    "alpha-is-text": (option(lora_alpha="6"), ["adapter_config.json", "expected numbers for r and lora_alpha", "'6'"]),
    "other-rank": (option(r=8), ["lora_A", "r is 8"]),
    "no-adapter-config": (without_config, ["adapter_config.json is missing"]),
    "no-adapter-weights": (without_weights, ["counting", "adapter_model.safetensors"]),
    "truncated-adapter": (truncated, ["adapter_model.safetensors", "not a readable safetensors file"]),
    "no-tensors": (without_tensors, ["counting"]),
    "half-a-pair": (adapter_with(**{key_of("B"): removed}), [key_of("A"), "no counterpart lora_B"]),
    "other-layers": (other_layers, ["adapter_model.safetensors", "layers.7.", "base model"]),
    "other-input-width": (
        adapter_with(**{key_of("A"): lambda tensor: torch.ones(4, 33)}),
        [key_of("A"), "(4, 33)", "(4, 32)"],
    ),
    "other-output-width": (
        adapter_with(**{key_of("B"): lambda tensor: torch.ones(16, 4)}),
        [key_of("B"), "(16, 4)", "(32, 4)"],
    ),
    "other-projector-width": (
        adapter_with(**{f"base_model.model.{PROJECTION}": lambda tensor: torch.ones(33, 7)}),
        [PROJECTION, "(33, 7)"],
    ),
    "projector-not-whole": (
        adapter_with(**{f"base_model.model.{PROJECTION}": removed}),
        [PROJECTION, "multi_modal_projector"],
    ),
    "integers": (
        adapter_with(**{key_of("A"): lambda tensor: tensor.to(torch.int8)}),
        [key_of("A"), "expected floating point numbers"],
    ),
    "nan-in-lora": (
        adapter_with(**{key_of("B", 1): with_value(float("nan"))}),
        ["layers.1.self_attn.q_proj.weight", "merged with the LoRA adapter", "NaN"],
    ),
    "infinity-in-the-projector": (
        adapter_with(**{f"base_model.model.{PROJECTION}": with_value(float("inf"))}),
        ["adapter_model.safetensors", PROJECTION, "NaN or infinite"],
    ),
    "embedding-lora": (
        adapter_with(
            **{
                f"{EMBEDDINGS}.lora_embedding_A": lambda tensor: torch.ones(4, 1024),
                f"{EMBEDDINGS}.lora_embedding_B": lambda tensor: torch.ones(32, 4),
            }
        ),
        ["adapter_model.safetensors", "lora_embedding_A", "plain LoRA"],
    ),
    "magnitude-vector": (
        adapter_with(**{key_of("magnitude_vector"): lambda tensor: torch.ones(32)}),
        ["lora_magnitude_vector", "plain LoRA"],
    ),
    "the-authors-release": (the_authors_release, ["counting", "a LLaVA-SP LoRA release", "`llava-sp convert`"]),
    "adapter-of-a-language-model": (plain_language_adapter, ["counting"]),
    "language-model-as-base": (language_model_as_base, ["base", "a text-only language model"]),
    "plain-llava-as-base": (plain_llava_as_base, ["base", "plain LLaVA", "no spatial tokens"]),
    "release-as-base": (base_is_the_authors_release, ["base", "a LLaVA-SP LoRA release"]),
    "no-base": (base_is_missing, ["base", "LLaVA-SP model"]),
    "base-without-a-tensor": (base_without(PROJECTION), ["base", "config.json", "missing", PROJECTION]),
    "base-without-an-adapted-tensor": (
        base_without("model.language_model.layers.1.mlp.up_proj.weight"),
        ["layers.1.mlp.up_proj.weight"],
    ),
    "base-with-another-tensor": (base_with_more, ["base", "unexpected", "model.extra.weight"]),
    "base-with-nan": (base_with_nan, ["model.safetensors", "lm_head.weight", "NaN"]),
    "base-with-integers": (base_with_integers, ["lm_head.weight", "int8"]),
    "base-without-processor": (base_without_processor, ["base"]),
    "base-without-config": (base_without_config, ["base"]),
    "base-with-broken-config": (base_with_broken_config, ["base"]),
    "head-of-a-tied-base": (head_of_a_tied_base, ["lm_head.weight", "base model does not have"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(inputs, case):
    damage, parts = REFUSED[case]
    damage(inputs)
    before = digests(inputs.folder)

    result = invoke("merge", inputs.adapter, inputs.output, "--base-model", inputs.base)

    assert_fails(result, *parts)
    assert digests(inputs.folder) == before
    assert {path.name for path in inputs.folder.iterdir()} <= {"counting", "base"}


def test_layers_of_a_tied_base_are_merged(inputs):
    model = AutoModelForImageTextToText.from_pretrained(inputs.base)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(inputs.base)
    peft_model = make_adapter(inputs.base, inputs.folder / "tied", target_modules=QUERIES)

    merge_adapter(inputs.folder / "tied", inputs.output)

    merged = merged_tensors(inputs.output)
    expected = peft_model.merge_and_unload().state_dict()
    assert expected.keys() - merged.keys() == {"lm_head.weight"}
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-6)


def test_values_outside_the_range_of_the_dtype_are_refused(inputs):
    inputs.change_base(lambda tensors: tensors["model.language_model.norm.weight"].fill_(1e6))

    with pytest.raises(ConversionError, match=r"norm\.weight.* outside the range of torch\.float16"):
        inputs.merge(dtype="float16")
    assert not inputs.output.exists()
