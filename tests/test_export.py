"""
`llava-sp export-original`: the authors' releases, taken apart into model and adapter, come out again tensor for
tensor; what is trained here and exported converts to what merging gives; what has no place in their layout is refused.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, randomize_
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_cli import assert_fails, invoke
from test_conversion import Inputs, write_json
from test_conversion_backbones import (
    anyres_cropping,
    anyres_siglip,
    mistral_anyres,
    mistral_base,
    other_width,
    siglip_pooling,
    siglip_pooling_without_details,
)
from test_training import options, run
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from transformers_llava_sp import LlavaSPConfig, LlavaSPProjector, LlavaSPProjectorConfig
from transformers_llava_sp.conversion import ConversionError, convert_checkpoint, export_original, merge_adapter
from transformers_llava_sp.conversion.checkpoint import TensorFiles
from transformers_llava_sp.conversion.export import find_variant
from transformers_llava_sp.conversion.original import (
    LANGUAGE_MODEL_KEYS,
    OUR_PROJECTOR_PREFIX,
    OriginalConfig,
    rename_key,
)
from transformers_llava_sp.conversion.parts import declared_fields
from transformers_llava_sp.conversion.projector import original_projector_keys, read_projector
from transformers_llava_sp.training.parts import prepare_lora


RELEASES = {
    "cropping": lambda inputs: None,
    "pooling": lambda inputs: None,
    "siglip-pooling": siglip_pooling,
    "siglip-pooling-without-details": siglip_pooling_without_details,
    "anyres-cropping": anyres_cropping,
    "anyres-siglip": anyres_siglip,
    "mistral": mistral_base,
    "mistral-anyres": mistral_anyres,
    "other-width": other_width,
}
# Of the release's config.json, what is about training or the language model's own code
LEFT_OUT = {"mm_projector_lr", "pretraining_tp", "tokenizer_model_max_length", "transformers_version"}


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small take longer to hand to threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Trained:
    """A release, and the same as training with this package leaves it: `start`, the model, and `adapter`."""

    inputs: Inputs

    def __post_init__(self):
        folder = self.inputs.folder
        self.start, self.adapter, self.output = (folder / name for name in ("start", "adapter", "exported"))
        self.adapter_file = self.adapter / "adapter_model.safetensors"

    @property
    def parts(self) -> dict[str, Path]:
        return {"language_model": self.inputs.base, "vision_tower": self.inputs.tower}

    def export(self, **kwargs):
        return export_original(self.adapter, self.output, **{**self.parts, **kwargs})

    def configure(self, folder: Path, name: str, **changes):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    def change_adapter(self, change):
        tensors = load_file(self.adapter_file)
        change(tensors)
        save_file(tensors, self.adapter_file)


@torch.no_grad()
def take_apart(inputs: Inputs) -> Trained:
    """The base model in ours with some other projector, and the release's adapter and projector as PEFT saves them."""
    trained = Trained(inputs)
    convert_checkpoint(
        inputs.release, trained.start, base_model=inputs.base, vision_tower=inputs.tower, dtype="float32"
    )
    model = AutoModelForImageTextToText.from_pretrained(trained.start)
    processor = AutoProcessor.from_pretrained(trained.start)
    projector = {key: tensor.clone() for key, tensor in model.model.multi_modal_projector.state_dict().items()}
    state = model.state_dict()
    for key, tensor in inputs.base_weights().items():
        if (target := rename_key(key, LANGUAGE_MODEL_KEYS)) is not None:
            state[target][: len(tensor)] = tensor
    randomize_(model.model.multi_modal_projector, seed=8)
    shutil.rmtree(trained.start)
    model.save_pretrained(trained.start)
    processor.save_pretrained(trained.start)

    stated = json.loads((inputs.release / "adapter_config.json").read_text())
    model = AutoModelForImageTextToText.from_pretrained(trained.start)
    peft_model = prepare_lora(model, r=stated["r"], lora_alpha=stated["lora_alpha"], lora_dropout=0.05)
    lora = {
        key.replace(".model.layers.", ".model.language_model.layers.").replace(".weight", ".default.weight"): tensor
        for key, tensor in inputs.adapter().items()
    }
    assert not peft_model.load_state_dict(lora, strict=False).unexpected_keys
    model.model.multi_modal_projector.modules_to_save["default"].load_state_dict(projector)
    peft_model.save_pretrained(trained.adapter)
    return trained


def make_inputs(folder: Path, name: str) -> Inputs:
    for part in ("release", "base", "vision"):
        shutil.copytree(FIXTURES / ("mini-pooling" if name == "pooling" else "mini-cropping") / part, folder / part)
    inputs = Inputs(folder)
    RELEASES[name](inputs)
    return inputs


@pytest.fixture(params=list(RELEASES))
def each(request, tmp_path) -> Trained:
    return take_apart(make_inputs(tmp_path, request.param))


@pytest.fixture(scope="module")
def taken_apart(tmp_path_factory) -> Path:
    """What `trained` copies, made once."""
    return take_apart(make_inputs(tmp_path_factory.mktemp("trained"), "cropping")).inputs.folder


@pytest.fixture
def trained(taken_apart, tmp_path) -> Trained:
    trained = Trained(Inputs(shutil.copytree(taken_apart, tmp_path / "copy")))
    trained.configure(trained.adapter, "adapter_config.json", base_model_name_or_path=str(trained.start))
    return trained


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def assert_same_model(found: Path, expected: Path):
    assert_same(load_file(found / "model.safetensors"), load_file(expected / "model.safetensors"))
    for name in ("config.json", "generation_config.json", "processor_config.json", "chat_template.jinja"):
        assert (found / name).read_text() == (expected / name).read_text(), name


# The authors' releases come out again


def test_release_comes_out_again(each):
    report = each.export()
    release, output = each.inputs.release, each.output
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "non_lora_trainables.bin",
    ]
    projector = torch.load(output / "non_lora_trainables.bin", weights_only=True)
    assert_same(projector, each.inputs.projector())
    assert_same(load_file(output / "adapter_model.safetensors"), each.inputs.adapter())
    assert report.num_projector_parameters == sum(tensor.numel() for tensor in projector.values())

    found, expected = (json.loads((folder / "adapter_config.json").read_text()) for folder in (output, release))
    for config in (found, expected):
        config["target_modules"] = sorted(config["target_modules"])
    assert found == {**expected, "base_model_name_or_path": str(each.inputs.base)}

    found, expected = (json.loads((folder / "config.json").read_text()) for folder in (output, release))
    assert found.pop("exported_by") == "transformers-llava-sp"
    # The names that are passed, and the dtype that the model of this test is stored in
    passed = {"_name_or_path": str(each.inputs.base), "mm_vision_tower": str(each.inputs.tower)}
    expected = {**expected, **passed, "torch_dtype": "float32"}
    if found["model_type"] == "llava_mistral":
        # The fixture's is that of the Llama that was replaced
        expected["architectures"] = ["MistralForCausalLM"]
    for key in found.keys() & expected.keys():
        assert found[key] == expected[key], key
    if found["model_type"] == "llava_llama":
        assert found.keys() < expected.keys()
        assert expected.keys() - found.keys() == LEFT_OUT


def test_export_converts_to_what_merging_gives(each):
    each.export()
    merge_adapter(each.adapter, each.inputs.folder / "merged", dtype="float32")
    convert_checkpoint(
        each.output,
        each.inputs.output,
        base_model=each.inputs.base,
        vision_tower=each.inputs.tower,
        dtype="float32",
    )
    assert_same_model(each.inputs.output, each.inputs.folder / "merged")


# What is trained here


def test_trained_adapter_converts_to_what_merging_gives(workspace, tmp_path):
    adapter, output, base = tmp_path / "adapter", tmp_path / "exported", FIXTURES / "mini-cropping" / "base"
    result = run("lora", *options(workspace, adapter, learning_rate=1e-2, projector_learning_rate=1e-2))
    assert result.exit_code == 0, result.output
    parts = ["--vision-tower", workspace / "tower"]
    result = invoke("export-original", adapter, output, "--language-model", base, *parts)
    assert result.exit_code == 0, result.output
    assert "adapted weights: 14" in result.stdout
    assert "no variant with cropping of scales [2, 4, 6, 8, 10, 12]" in result.stdout

    convert_checkpoint(output, tmp_path / "converted", dtype="float32")
    merge_adapter(adapter, tmp_path / "merged", dtype="float32")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("converted", "merged"))
    # Rows without a token, which are means: in a created model, added up in another order
    for key in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(found[key][1000:], expected[key][1000:])
        found[key], expected[key] = found[key][:1000], expected[key][:1000]
    assert_same(found, expected)
    start = load_file(workspace / "model" / "model.safetensors")
    changed = {key for key in found if not torch.equal(found[key], start[key][: len(found[key])])}
    assert changed == {key for key in found if "_proj.weight" in key and ".layers." in key and ".language" in key} | {
        key for key in found if key.startswith(OUR_PROJECTOR_PREFIX)
    }
    converted, merged = (LlavaSPConfig.from_pretrained(tmp_path / name) for name in ("converted", "merged"))
    for name in LlavaSPConfig.sub_configs:
        assert declared_fields(getattr(converted, name)) == declared_fields(getattr(merged, name))
    for name in ("image_token_id", "vision_feature_layer", "vision_feature_select_strategy", "image_grid_pinpoints"):
        assert getattr(converted, name) == getattr(merged, name)


def test_projector_of_the_first_stage_is_a_pretraining_output(trained, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(trained.start)
    projector = randomize_(model.model.multi_modal_projector, seed=9)
    projector.save_pretrained(tmp_path / "projector")
    arguments = ["--language-model", trained.inputs.base, "--vision-tower", trained.inputs.tower]

    assert_fails(invoke("export-original", tmp_path / "projector", trained.output), "pass that with --base-model")
    result = invoke(
        "export-original", tmp_path / "projector", trained.output, "--base-model", trained.start, *arguments
    )
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in trained.output.iterdir()) == ["config.json", "mm_projector.bin"]
    stored = torch.load(trained.output / "mm_projector.bin", weights_only=True)
    expected = {key.removeprefix("base_model.model.") for key in trained.inputs.projector()}
    assert stored.keys() == expected
    convert_checkpoint(trained.output, trained.inputs.output, dtype="float32")
    found = load_file(trained.inputs.output / "model.safetensors")
    assert_same(found, model.state_dict())


def test_projector_of_another_model(trained, tmp_path):
    config = LlavaSPProjectorConfig.from_pretrained(trained.start, spatial_hidden_size=7)
    LlavaSPProjector(config).save_pretrained(tmp_path / "projector")
    with pytest.raises(ConversionError, match=r"differ in .*'spatial_hidden_size'"):
        export_original(tmp_path / "projector", trained.output, base_model=trained.start)


# Adapters of other kinds


def test_adapter_without_the_projector_takes_the_models(trained):
    def drop(tensors):
        for key in [key for key in tensors if "multi_modal_projector" in key]:
            del tensors[key]

    trained.change_adapter(drop)
    with pytest.raises(ConversionError, match="but the adapter lacks weights of them"):
        trained.export()
    trained.configure(trained.adapter, "adapter_config.json", modules_to_save=None)
    report = trained.export()
    assert any("no projector, so the one written is that of the model" in note for note in report.notes)
    state = load_file(trained.start / "model.safetensors")
    stored = torch.load(trained.output / "non_lora_trainables.bin", weights_only=True)
    key = OUR_PROJECTOR_PREFIX + "spatial_projection.bias"
    assert torch.equal(stored["base_model.model.model.conv_linear.1.bias"], state[key])


def test_rank_stabilised_scale_and_dtypes_are_kept(trained):
    trained.configure(trained.adapter, "adapter_config.json", use_rslora=True)
    trained.change_adapter(lambda tensors: tensors.update({key: value.bfloat16() for key, value in tensors.items()}))
    trained.export()
    assert json.loads((trained.output / "adapter_config.json").read_text())["use_rslora"] is True
    tensors = [
        *torch.load(trained.output / "non_lora_trainables.bin", weights_only=True).values(),
        *load_file(trained.output / "adapter_model.safetensors").values(),
    ]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    merge_adapter(trained.adapter, trained.inputs.folder / "merged", dtype="float32")
    convert_checkpoint(trained.output, trained.inputs.output, dtype="float32")
    assert_same_model(trained.inputs.output, trained.inputs.folder / "merged")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"r": 3}, "but r is 3"),
    ],
)
def test_other_kinds_of_adapters_are_refused(trained, changes, message):
    trained.configure(trained.adapter, "adapter_config.json", **changes)
    with pytest.raises(ConversionError, match=message):
        trained.export()
    assert not trained.output.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": r".*\.vision_tower\..*\.q_proj"}, r"adapts 'model\.vision_tower\..* blocks alone"),
        ({"target_modules": "lm_head"}, "trained in full, 'lm_head.weight'"),
        ({"target_modules": r".*\.spatial_projection"}, "adapts .*spatial_projection"),
        (
            {"target_modules": r".*\.language_model\..*\.q_proj", "modules_to_save": ["lm_head"]},
            "trained in full, 'lm_head.weight'",
        ),
        ({"target_modules": r".*nothing", "modules_to_save": ["multi_modal_projector"]}, "holds no LoRA matrices"),
    ],
    ids=["tower", "head", "projector", "head-in-full", "projector-in-full-alone"],
)
def test_adapters_of_other_modules_are_refused(trained, settings, message):
    model = AutoModelForImageTextToText.from_pretrained(trained.start)
    alone = "nothing" in settings["target_modules"]
    settings = {**settings, **({"target_modules": r".*\.language_model\..*\.q_proj"} if alone else {})}
    shutil.rmtree(trained.adapter)
    get_peft_model(model, LoraConfig(r=2, **settings)).save_pretrained(trained.adapter)
    if alone:
        trained.change_adapter(lambda tensors: [tensors.pop(key) for key in list(tensors) if ".lora_" in key])
    with pytest.raises(ConversionError, match=message):
        trained.export()


@pytest.mark.parametrize("key", ["lora_A", "multi_modal_projector"])
def test_values_that_are_no_numbers_are_refused(trained, key):
    def spoil(tensors):
        next(tensor for name, tensor in tensors.items() if key in name).view(-1)[0] = float("nan")

    trained.change_adapter(spoil)
    with pytest.raises(ConversionError, match=rf"{key}.* has values that are NaN or infinite"):
        trained.export()


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("release", "is a LLaVA-SP LoRA release, expected"),
        ("start", "is an already converted LLaVA-SP model, expected .*trained as a whole"),
        ("base", "is a text-only language model, expected"),
    ],
)
def test_other_inputs_are_named(trained, folder, message):
    with pytest.raises(ConversionError, match=message):
        export_original(trained.inputs.folder / folder, trained.output)


# What the authors' layout can express

PROJECTORS = {
    "released-cropping": ({}, "conv336_cropping_sfe_dfi"),
    "released-pooling": (
        {"spatial_variant": "pooling", "spatial_projection_bias": False},
        "conv336_adptive_pooling_fuse_49",
    ),
    "cropping": ({"use_detail_integrator": False, "spatial_projection_bias": False}, "conv336"),
    "pooling": (
        {"spatial_variant": "pooling", "use_detail_integrator": False, "spatial_projection_bias": False},
        "conv336_pooling_sfe",
    ),
    "pooling-with-bias": ({"spatial_variant": "pooling"}, None),
    "three-scales": ({"spatial_scales": [8, 16, 24]}, None),
    "twelve-scales": ({"spatial_scales": list(range(2, 25, 2)), "spatial_variant": "pooling"}, None),
    "one-scale": ({"spatial_scales": [24]}, None),
    "224-pixels": ({"grid_size": 16, "spatial_scales": list(range(2, 17, 2)), "detail_kernel_size": 10}, None),
    "grid-of-12": ({"grid_size": 12}, None),
    "one-patch-layer": ({"num_patch_layers": 1}, "conv336_cropping_sfe_dfi"),
    "three-patch-layers": ({"num_patch_layers": 3}, "conv336_cropping_sfe_dfi"),
}


@pytest.mark.parametrize("name", PROJECTORS)
def test_keys_are_read_back(name):
    fields, variant = PROJECTORS[name]
    config = LlavaSPProjectorConfig(vision_hidden_size=3, text_hidden_size=5, spatial_hidden_size=2, **fields)
    keys = original_projector_keys(config)
    state = LlavaSPProjector(config).state_dict()
    assert keys.keys() == state.keys()
    assert find_variant(config) == variant
    if name == "224-pixels":
        assert {key for key in keys.values() if key[5:6].isdigit()} == {
            f"conv_{number}.weight" for number in range(1, 9)
        }
    tensors = {f"p.{key}": state[ours] for ours, key in keys.items()}
    layers = config.num_patch_layers if config.num_patch_layers > 1 else None
    original_config = OriginalConfig(None, None, 3, -2, layers, True, None)
    found, renamed = read_projector(TensorFiles(tensors, dict.fromkeys(tensors, Path("x"))), "p.", original_config)
    assert found.to_dict() == config.to_dict()
    assert renamed == {f"p.{key}": OUR_PROJECTOR_PREFIX + ours for ours, key in keys.items()}


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("projector_config", {"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06, .* expected 1e-05"),
        ("projector_config", {"hidden_act": "relu"}, "hidden_act is 'relu', .* expected 'gelu'"),
        ("projector_config", {"detail_stride": 4}, "detail_stride is 4, .* expected 2"),
        ("text_config", {"head_dim": 8, "mlp_bias": True}, "do not fit its config.json"),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            "rope_parameters",
        ),
    ],
    ids=["epsilon", "activation", "stride", "other-weights", "positions"],
)
def test_what_the_layout_cannot_express_is_refused(trained, part, changes, message):
    config = json.loads((trained.start / "config.json").read_text())
    write_json(trained.start / "config.json", **{part: {**config[part], **changes}})
    with pytest.raises(ConversionError, match=message):
        trained.export()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"spatial_scales": [4, 10, 24]}, r"spatial_scales is \[4, 10, 24\], .* multiples of one size"),
        ({"spatial_scales": [4, 8, 12]}, r"spatial_scales is \[4, 8, 12\], .* whole grid of 24"),
        ({"spatial_projection_bias": False}, "spatial_projection_bias is False, .* expected True"),
        ({"spatial_variant": "pooling", "spatial_scales": [24]}, "spatial_variant is 'pooling', .* 'cropping'"),
        ({"patch_downsample_factor": 2}, "patch_downsample_factor is 2, .* expected 1"),
        ({"patch_layer_norm": True}, "patch_layer_norm is True, .* expected False"),
    ],
    ids=["irregular-scales", "no-scale-of-the-grid", "cropping-without-bias", "one-pooled", "downsampled", "normed"],
)
def test_projectors_without_a_place_are_refused(trained, fields, message):
    model = AutoModelForImageTextToText.from_pretrained(trained.start)
    config = LlavaSPProjectorConfig(**{**model.config.projector_config.to_dict(), **fields})
    model.config.projector_config = config
    model.model.multi_modal_projector = LlavaSPProjector(config)
    shutil.rmtree(trained.adapter)
    processor = AutoProcessor.from_pretrained(trained.start)
    model.save_pretrained(trained.start)
    processor.save_pretrained(trained.start)
    prepare_lora(model, r=2).save_pretrained(trained.adapter)
    with pytest.raises(ConversionError, match=message):
        trained.export()
    assert not trained.output.exists()


# The parts


def test_names_are_left_out_where_there_are_none(trained):
    report = trained.export(language_model=None, vision_tower=None)
    config = json.loads((trained.output / "config.json").read_text())
    assert config["vocab_size"] == 1000
    assert not {"_name_or_path", "mm_vision_tower"} & config.keys()
    assert json.loads((trained.output / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert any("names no vision tower" in note for note in report.notes)


def test_names_are_written_unseen_without_verification(trained):
    trained.export(language_model="lmsys/vicuna-7b-v1.5@main", vision_tower="openai/clip", verify=False)
    config = json.loads((trained.output / "config.json").read_text())
    assert (config["_name_or_path"], config["mm_vision_tower"]) == ("lmsys/vicuna-7b-v1.5", "openai/clip")
    assert config["vocab_size"] == 1000


def test_vocabulary_that_was_not_grown_is_whole(trained):
    state = load_file(trained.start / "model.safetensors")
    state["model.language_model.embed_tokens.weight"][-1, 0] += 1
    save_file(state, trained.start / "model.safetensors", metadata={"format": "pt"})
    trained.export(language_model=None)
    assert json.loads((trained.output / "config.json").read_text())["vocab_size"] == 1024


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_parts_of_another_model_are_refused(trained, part):
    key = {"language_model": "model.layers.1.mlp.up_proj.weight", "vision_tower": "vision_model.pre_layrnorm.weight"}
    if part == "language_model":
        weights = trained.inputs.base_weights()
        weights[key[part]][0, 0] += 1
        trained.inputs.write_base(weights)
    else:
        weights = trained.inputs.tower_weights()
        weights[key[part]][0] += 1
        trained.inputs.write_tower(weights)
    with pytest.raises(
        ConversionError, match=rf"The {part.replace('_', ' ')} .* is not that of the model .*1 tensors"
    ):
        trained.export()
    trained.export(verify=False)


def test_other_pixels_are_refused(trained):
    trained.configure(trained.inputs.tower, "preprocessor_config.json", image_mean=[0.5] * 3)
    with pytest.raises(ConversionError, match="makes other pixels of an image"):
        trained.export()


def test_model_with_an_adapter_merged_needs_its_own_language_model(trained, tmp_path):
    """As the page says: where training started from a converted release."""
    merge_adapter(trained.adapter, tmp_path / "merged")
    trained.configure(trained.adapter, "adapter_config.json", base_model_name_or_path=str(tmp_path / "merged"))
    with pytest.raises(ConversionError, match="If an earlier adapter was merged"):
        trained.export()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    language_model = AutoModelForCausalLM.from_config(model.config.text_config, dtype=model.dtype)
    language_model.model = model.model.language_model
    language_model.lm_head = model.lm_head
    language_model.save_pretrained(tmp_path / "language-model")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(trained.inputs.base / name, tmp_path / "language-model")
    trained.export(language_model=tmp_path / "language-model")
    convert_checkpoint(trained.output, trained.inputs.output)
    merge_adapter(trained.adapter, tmp_path / "twice")
    assert_same_model(trained.inputs.output, tmp_path / "twice")


# The output


def test_existing_output_is_replaced_only_on_request(trained):
    trained.export()
    assert_fails(invoke("export-original", trained.adapter, trained.output), "exists already")
    (trained.output / "config.json").write_text((trained.output / "config.json").read_text().replace("pad", "PAD"))
    result = invoke("export-original", trained.adapter, trained.output, "--overwrite")
    assert result.exit_code == 0, result.output
    assert "PAD" not in (trained.output / "config.json").read_text()
    (trained.output / "notes.txt").write_text("mine")
    assert_fails(invoke("export-original", trained.adapter, trained.output, "--overwrite"), "'notes.txt'")
    assert not list(trained.output.parent.glob(".*"))


@pytest.mark.parametrize("folder", ["release", "start", "adapter"])
def test_folders_of_another_kind_are_not_overwritten(trained, folder):
    before = sorted(path.name for path in (trained.inputs.folder / folder).iterdir())
    with pytest.raises(ConversionError, match=r"is no export to the authors' layout|is no converted"):
        export_original(trained.adapter, trained.inputs.folder / folder, overwrite=True)
    assert sorted(path.name for path in (trained.inputs.folder / folder).iterdir()) == before
    trained.export()
    with pytest.raises(ConversionError, match="is no converted LLaVA-SP model"):
        merge_adapter(trained.adapter, trained.output, overwrite=True)


def test_nothing_is_left_of_a_wrong_result(trained, monkeypatch):
    def save(tensors, path):
        torch.serialization.save({key: tensor + 1 for key, tensor in tensors.items()}, path)

    monkeypatch.setattr("transformers_llava_sp.conversion.export.torch.save", save)
    with pytest.raises(ConversionError, match=r"read again, are wrong: .*conv_"):
        trained.export()
    assert not trained.output.exists()
    assert not list(trained.output.parent.glob(".*"))
