"""What Transformers' common tests ask of every model: initialisation, loading and saving, outputs, embeddings."""

import copy
import pickle

import pytest
import torch
from accelerate import infer_auto_device_map
from conftest import VARIANTS, tiny_config, tiny_inputs, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

import transformers_llava_sp
from transformers_llava_sp import (
    LlavaSPConfig,
    LlavaSPForConditionalGeneration,
    LlavaSPModel,
    LlavaSPProjector,
    configuration_llava_sp,
    modeling_llava_sp,
    processing_llava_sp,
)


PROJECTOR = "model.multi_modal_projector."


@pytest.fixture
def inputs(model) -> dict:
    """A left-padded batch of two samples, with one image and two."""
    return tiny_inputs(model, [[5, 6, 7, 8], [9, 10]], [1, 2])


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    state, expected_state = model.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    for key in state:
        assert torch.equal(state[key], expected_state[key]), key


# The public API


def test_public_names():
    assert sorted(transformers_llava_sp.__all__) == [
        "LlavaSPConfig",
        "LlavaSPForConditionalGeneration",
        "LlavaSPModel",
        "LlavaSPPreTrainedModel",
        "LlavaSPProcessor",
        "LlavaSPProjector",
        "LlavaSPProjectorConfig",
        "__version__",
        "tiny_model_path",
    ]
    modules = (configuration_llava_sp, modeling_llava_sp, processing_llava_sp)
    from_modules = [name for module in modules for name in module.__all__]
    assert sorted([*from_modules, "__version__", "tiny_model_path"]) == sorted(transformers_llava_sp.__all__)
    for name in transformers_llava_sp.__all__:
        assert hasattr(transformers_llava_sp, name), name


@pytest.mark.parametrize("model_class", [LlavaSPProjector, LlavaSPModel, LlavaSPForConditionalGeneration])
def test_capabilities(model_class):
    """Of the projector too: a model is refused what one of its parts lacks."""
    for flag in (
        "_supports_sdpa",
        "_supports_flash_attn",
        "_supports_flex_attn",
        "_supports_attention_backend",
        "_can_compile_fullgraph",
    ):
        assert getattr(model_class, flag) is True, flag
    assert "LlavaSPProjector" in model_class._no_split_modules


# Parameters


def expected_projector_keys(variant: str) -> set[str]:
    config = tiny_config(variant).projector_config
    keys = {f"spatial_feature_extractor.convolutions.{index}.weight" for index in range(config.num_spatial_tokens)}
    for index in range(config.num_patch_layers):
        keys |= {f"patch_mlp.layers.{index}.weight", f"patch_mlp.layers.{index}.bias"}
    if config.use_detail_integrator:
        keys.add("detail_feature_integrator.detail_convolution.weight")
        for role in ("query", "key", "value"):
            for layer in ("norm", "proj"):
                keys |= {f"detail_feature_integrator.{role}_{layer}.{name}" for name in ("weight", "bias")}
    keys.add("spatial_projection.weight")
    if config.spatial_projection_bias:
        keys.add("spatial_projection.bias")
    return {PROJECTOR + key for key in keys}


def test_state_dict_keys(variant, model):
    keys = set(model.state_dict())
    assert {key for key in keys if key.startswith(PROJECTOR)} == expected_projector_keys(variant)
    others = keys - expected_projector_keys(variant)
    assert {key.split(".")[1] for key in others if key.startswith("model.")} == {"vision_tower", "language_model"}
    assert {key for key in others if not key.startswith("model.")} == {"lm_head.weight"}


def linear(in_features: int, out_features: int, bias: bool = True) -> int:
    return in_features * out_features + (out_features if bias else 0)


def layer_norm(width: int) -> int:
    return 2 * width


def expected_parameter_counts(config: LlavaSPConfig) -> dict[str, int]:
    """The parameters of each part, by the arithmetic of its architecture: CLIP's, the paper's, LLaVA's and Llama's."""
    vision, text, projector = config.vision_config, config.text_config, config.projector_config

    width = vision.hidden_size
    num_positions = (vision.image_size // vision.patch_size) ** 2 + 1
    vision_layer = (
        4 * linear(width, width)
        + linear(width, vision.intermediate_size)
        + linear(vision.intermediate_size, width)
        + 2 * layer_norm(width)
    )
    vision_embeddings = width + vision.num_channels * vision.patch_size**2 * width + num_positions * width

    spatial_width, text_width = projector.spatial_hidden_size, projector.text_hidden_size
    detail_feature_integrator = (
        projector.detail_kernel_size**2 * width * spatial_width
        + 3 * (layer_norm(spatial_width) + linear(spatial_width, spatial_width))
        if projector.use_detail_integrator
        else 0
    )

    head_width = text_width // text.num_attention_heads
    text_layer = (
        2 * linear(text_width, text_width, bias=False)
        + 2 * linear(text_width, head_width * text.num_key_value_heads, bias=False)
        + 3 * linear(text_width, text.intermediate_size, bias=False)
        + 2 * text_width
    )
    return {
        "model.vision_tower": vision_embeddings + vision.num_hidden_layers * vision_layer + 2 * layer_norm(width),
        f"{PROJECTOR}spatial_feature_extractor": sum(s**2 for s in projector.spatial_scales) * width * spatial_width,
        f"{PROJECTOR}detail_feature_integrator": detail_feature_integrator,
        f"{PROJECTOR}spatial_projection": linear(
            spatial_width * (2 if projector.use_detail_integrator else 1),
            text_width,
            bias=projector.spatial_projection_bias,
        ),
        f"{PROJECTOR}patch_mlp": linear(width, text_width) + linear(text_width, text_width),
        "model.language_model": text.vocab_size * text_width + text.num_hidden_layers * text_layer + text_width,
        "lm_head": linear(text_width, text.vocab_size, bias=False),
    }


def parameter_counts(model: LlavaSPForConditionalGeneration) -> dict[str, int]:
    return {
        part: sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith(f"{part}."))
        for part in expected_parameter_counts(model.config)
    }


@pytest.fixture(scope="module")
def released_model() -> LlavaSPForConditionalGeneration:
    """The released Cropping 7B, without memory."""
    with torch.device("meta"):
        return LlavaSPForConditionalGeneration(LlavaSPConfig())


def test_parameter_counts(model):
    assert parameter_counts(model) == expected_parameter_counts(model.config)
    assert model.num_parameters() == sum(parameter_counts(model).values())
    model.model.vision_tower.requires_grad_(False)
    frozen = parameter_counts(model)["model.vision_tower"]
    assert model.num_parameters(only_trainable=True) == model.num_parameters() - frozen


def test_parameter_counts_of_the_released_model(released_model):
    counts = parameter_counts(released_model)
    assert counts == expected_parameter_counts(released_model.config)
    assert counts == {
        "model.vision_tower": 303_507_456,
        f"{PROJECTOR}spatial_feature_extractor": 1456 * 1024 * 512,
        f"{PROJECTOR}detail_feature_integrator": 135_008_768,
        f"{PROJECTOR}spatial_projection": 4_198_400,
        f"{PROJECTOR}patch_mlp": 20_979_712,
        "model.language_model": 6_607_605_760,
        "lm_head": 131_334_144,
    }
    assert sum(counts.values()) == released_model.num_parameters()


def test_device_map_keeps_the_projector_whole(released_model):
    """Whatever the first device holds: a projector with its scales on two devices would move the grid to and fro."""

    def infer(gigabytes: float, no_split_modules: set[str]) -> dict:
        max_memory = {0: int(gigabytes * 1e9), 1: int(5e9), "cpu": int(1e12)}
        return infer_auto_device_map(
            released_model,
            max_memory=max_memory,
            no_split_module_classes=list(no_split_modules),
            dtype=torch.float32,
        )

    def is_split(device_map: dict) -> bool:
        return any(name.startswith(PROJECTOR) for name in device_map)

    no_split_modules = set(released_model._no_split_modules)
    assert {"LlavaSPProjector", "CLIPEncoderLayer", "LlamaDecoderLayer"} <= no_split_modules
    for gigabytes in (1, 2, 3, 4, 5, 6):
        assert not is_split(infer(gigabytes, no_split_modules)), gigabytes
    assert is_split(infer(3, no_split_modules - {"LlavaSPProjector"}))


# Initialisation


def fan_in_bound(weight: torch.Tensor) -> float:
    return weight[0].numel() ** -0.5


def assert_initialised_by_fan_in(weight: torch.Tensor, name: str) -> None:
    """Uniform within 1 / sqrt(fan_in), as PyTorch initialises linear layers and convolutions."""
    bound = fan_in_bound(weight)
    assert weight.abs().max() <= bound, name
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name


@torch.no_grad()
def test_initialisation(variant):
    torch.manual_seed(0)
    model = LlavaSPForConditionalGeneration(tiny_config(variant))
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
    for name, module in model.model.multi_modal_projector.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert_initialised_by_fan_in(module.weight, name)
            if module.bias is not None:
                assert 0 < module.bias.abs().max() <= fan_in_bound(module.weight), name

    # The towers and the head are initialised as their own classes do, not as the projector
    deviation = model.config.text_config.initializer_range
    language_model = model.model.language_model
    for weight in (
        language_model.embed_tokens.weight,
        language_model.layers[0].mlp.up_proj.weight,
        model.lm_head.weight,
    ):
        assert weight.std().item() == pytest.approx(deviation, rel=0.1)
    attention = model.model.vision_tower.encoder.layers[0].self_attn
    assert (attention.q_proj.bias == 0).all()


def test_initialisation_is_seeded(variant):
    def build(seed: int) -> LlavaSPForConditionalGeneration:
        torch.manual_seed(seed)
        return LlavaSPForConditionalGeneration(tiny_config(variant))

    assert_same_weights(build(0), build(0))
    first, second = build(0).state_dict(), build(1).state_dict()
    assert all(not torch.equal(first[key], second[key]) for key in first if key.endswith("proj.weight"))


@torch.no_grad()
def test_scales_start_with_features_of_one_magnitude(variant):
    """
    A convolution adds up 4 to 144 positions here (16 to 576 in the released models): only weights that shrink with
    the square root of that keep the largest map from drowning the others.
    """
    torch.manual_seed(0)
    projector = LlavaSPProjector(tiny_config(variant).projector_config)
    for size, convolution in zip(
        projector.config.spatial_scales, projector.spatial_feature_extractor.convolutions, strict=True
    ):
        feature_map = torch.randn(256, projector.config.vision_hidden_size, size, size)
        assert convolution(feature_map).std().item() == pytest.approx(3**-0.5, rel=0.1), size


@pytest.mark.parametrize("model_class", [LlavaSPModel, LlavaSPForConditionalGeneration])
def test_missing_keys_are_reported_and_initialised(variant, model, tmp_path, model_class):
    model.save_pretrained(tmp_path)
    missing = {
        "spatial_feature_extractor.convolutions.2.weight",
        "patch_mlp.layers.1.weight",
        "patch_mlp.layers.1.bias",
    }
    if model.config.projector_config.use_detail_integrator:
        missing |= {f"detail_feature_integrator.value_{name}" for name in ("norm.weight", "norm.bias", "proj.weight")}
    stored = load_file(tmp_path / "model.safetensors")
    kept = {key: tensor for key, tensor in stored.items() if key.removeprefix(PROJECTOR) not in missing}
    assert len(kept) == len(stored) - len(missing)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    projector = loaded.base_model.multi_modal_projector
    prefix = PROJECTOR if model_class is LlavaSPForConditionalGeneration else PROJECTOR.removeprefix("model.")
    assert report["missing_keys"] == {prefix + key for key in missing}
    assert not report["mismatched_keys"]

    expected = model.model.multi_modal_projector.state_dict()
    for name, tensor in projector.state_dict().items():
        if name not in missing:
            assert torch.equal(tensor, expected[name]), name
        elif name.endswith("norm.weight"):
            assert (tensor == 1).all()
        elif name.endswith("norm.bias"):
            assert (tensor == 0).all()
        elif name.endswith("bias"):
            assert 0 < tensor.abs().max() <= fan_in_bound(projector.state_dict()[name.replace("bias", "weight")])
        else:
            assert_initialised_by_fan_in(tensor, name)


# Loading and saving


def test_base_model_loads_the_checkpoint_of_the_head(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    base, report = LlavaSPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert report["unexpected_keys"] == {"lm_head.weight"}
    assert not report["missing_keys"] | report["mismatched_keys"]
    assert_same_weights(base, model.model)
    with torch.no_grad():
        hidden_state = base(**inputs).last_hidden_state
        assert torch.equal(model.lm_head(hidden_state), model(**inputs).logits)


def test_head_loads_the_checkpoint_of_the_base_model(model, tmp_path):
    model.model.save_pretrained(tmp_path)
    assert not any(key.startswith("model.") for key in load_file(tmp_path / "model.safetensors"))
    loaded, report = LlavaSPForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight"}
    assert not report["unexpected_keys"] | report["mismatched_keys"]
    assert_same_weights(loaded.model, model.model)
    assert loaded.lm_head.weight.isfinite().all()


def test_projector_saves_and_loads_alone(model, tmp_path):
    projector = model.model.multi_modal_projector
    projector.save_pretrained(tmp_path)
    loaded, report = LlavaSPProjector.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_weights(loaded, projector)
    config = projector.config
    patch_features = torch.randn(2, config.num_patch_tokens, config.vision_hidden_size)
    with torch.no_grad():
        assert torch.equal(loaded(patch_features).last_hidden_state, projector(patch_features).last_hidden_state)


def test_auto_classes_build_our_classes(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    model.model.multi_modal_projector.save_pretrained(tmp_path / "projector")
    assert type(AutoConfig.from_pretrained(tmp_path / "model")) is LlavaSPConfig
    assert type(AutoModel.from_pretrained(tmp_path / "model")) is LlavaSPModel
    assert type(AutoModel.from_pretrained(tmp_path / "projector")) is LlavaSPProjector
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        loaded = auto_class.from_pretrained(tmp_path / "model")
        assert type(loaded) is LlavaSPForConditionalGeneration
        assert_same_weights(loaded, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtype_on_loading(model, tmp_path, dtype):
    model.save_pretrained(tmp_path / "single")
    loaded = LlavaSPForConditionalGeneration.from_pretrained(tmp_path / "single", dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert_same_weights(loaded, copy.deepcopy(model).to(dtype))

    loaded.save_pretrained(tmp_path / "half")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {dtype}
    again = LlavaSPForConditionalGeneration.from_pretrained(tmp_path / "half", dtype="auto")
    assert_same_weights(again, loaded)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))], ids=["deepcopy", "pickle"]
)
def test_config_copies(variant, copied):
    config = tiny_config(variant)
    copy_of_config = copied(config)
    assert type(copy_of_config) is LlavaSPConfig
    assert copy_of_config.to_dict() == config.to_dict()
    copy_of_config.projector_config.layer_norm_eps = 1.0
    assert config.projector_config.layer_norm_eps != 1.0


# Outputs


@torch.no_grad()
def test_hidden_states_and_attentions(model, inputs):
    model.set_attn_implementation("eager")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    text_config = model.config.text_config
    batch_size, length = inputs["input_ids"].shape

    assert len(output.hidden_states) == text_config.num_hidden_layers + 1
    for hidden_state in output.hidden_states:
        assert hidden_state.shape == (batch_size, length, text_config.hidden_size)
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)

    assert len(output.attentions) == text_config.num_hidden_layers
    real = inputs["attention_mask"].bool()
    for attention in output.attentions:
        assert attention.shape == (batch_size, text_config.num_attention_heads, length, length)
        rows = attention.transpose(1, 2)[real]  # (real positions, heads, length)
        torch.testing.assert_close(rows.sum(dim=-1), torch.ones(rows.shape[:2]))
        assert (attention.triu(diagonal=1).transpose(1, 2)[real] == 0).all(), "attends to what comes later"
        for row, padding in enumerate(~real):
            assert (attention[row][:, ~padding][:, :, padding] == 0).all(), "attends to padding"

    plain = model(**inputs)
    assert plain.hidden_states is None
    assert plain.attentions is None


@torch.no_grad()
def test_first_hidden_state_holds_the_image_features(model, inputs):
    output = model(**inputs, output_hidden_states=True)
    image_positions = inputs["input_ids"] == model.config.image_token_id
    embeddings = output.hidden_states[0]
    assert torch.equal(embeddings[image_positions], output.image_hidden_states.flatten(0, 1))
    text_ids = inputs["input_ids"][~image_positions]
    assert torch.equal(embeddings[~image_positions], model.get_input_embeddings()(text_ids))


@pytest.mark.parametrize("part", ["base", "head", "projector"])
@torch.no_grad()
def test_tuple_equals_output(model, inputs, part):
    config = model.config.projector_config
    module, arguments = {
        "base": (model.model, inputs),
        "head": (model, {**inputs, "labels": inputs["input_ids"]}),
        "projector": (
            model.model.multi_modal_projector,
            {
                "patch_features": torch.randn(2, config.num_patch_tokens, config.vision_hidden_size),
                "output_attentions": True,
            },
        ),
    }[part]
    output, as_tuple = module(**arguments), module(**arguments, return_dict=False)
    assert type(as_tuple) is tuple
    tensors = [(first, second) for first, second in zip(output.to_tuple(), as_tuple, strict=True)]
    for first, second in tensors:
        assert type(first) is type(second)
        if isinstance(first, torch.Tensor):
            assert torch.equal(first, second)
    expected = {"base": 2, "head": 3, "projector": 1 + config.use_detail_integrator}[part]
    assert sum(isinstance(first, torch.Tensor) for first, _ in tensors) == expected


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@torch.no_grad()
def test_determinism(model, inputs, training):
    model.train(training)
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


# Embeddings


@torch.no_grad()
def test_input_and_output_embeddings(model, inputs):
    base = model.model
    assert model.get_input_embeddings() is base.get_input_embeddings() is base.language_model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert model.get_decoder() is base.language_model
    assert model.base_model is base

    logits = model(**inputs).logits
    doubled_head = copy.deepcopy(model.lm_head)
    doubled_head.weight.mul_(2)
    model.set_output_embeddings(doubled_head)
    assert model.get_output_embeddings() is doubled_head
    assert torch.equal(model(**inputs).logits, 2 * logits)

    other_embeddings = nn.Embedding.from_pretrained(model.get_input_embeddings().weight.flip(0))
    model.set_input_embeddings(other_embeddings)
    assert model.get_input_embeddings() is base.get_input_embeddings() is other_embeddings
    first_state = model(**inputs, output_hidden_states=True).hidden_states[0]
    text = inputs["input_ids"] != model.config.image_token_id
    assert torch.equal(first_state[text], other_embeddings(inputs["input_ids"][text]))


# Training


def parameters_without_gradient(model: LlavaSPForConditionalGeneration, num_images: int) -> set[str]:
    inputs = tiny_inputs(model, [[5, 6, 7, 8]], [num_images])
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


def test_parameters_without_gradient_in_an_image_batch(model):
    """What DistributedDataParallel calls unused: the tower behind `vision_feature_layer`, and nothing else."""
    last_layer = model.config.vision_config.num_hidden_layers - 1
    unused = ("model.vision_tower.post_layernorm.", f"model.vision_tower.encoder.layers.{last_layer}.")
    expected = {name for name, _ in model.named_parameters() if name.startswith(unused)}
    assert len(expected) == 18
    assert parameters_without_gradient(model, num_images=1) == expected


def test_parameters_without_gradient_in_a_text_batch(model):
    """Neither tower nor projector takes part, so a rank without images needs `find_unused_parameters`."""
    unused = ("model.vision_tower.", PROJECTOR)
    expected = {name for name, _ in model.named_parameters() if name.startswith(unused)}
    assert parameters_without_gradient(model, num_images=0) == expected


def test_frozen_towers_leave_the_projector_trainable(model):
    """The authors' first stage: every tensor of the projector learns, and no other."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    without = parameters_without_gradient(model, num_images=1)
    assert {name for name, _ in model.named_parameters()} - without == {
        name for name, _ in model.named_parameters() if name.startswith(PROJECTOR)
    }


def test_variants_are_four_different_models():
    """What makes running every test over the variants mean something."""
    models = {name: tiny_model(name) for name in VARIANTS}
    outputs = {}
    for name, model in models.items():
        inputs = tiny_inputs(model, [[9, 10]], [1])
        with torch.no_grad():
            outputs[name] = model(**inputs).image_hidden_states[:, : model.config.projector_config.num_spatial_tokens]
    names = list(outputs)
    for index, name in enumerate(names):
        for other in names[:index]:
            assert not torch.allclose(outputs[name], outputs[other], atol=0.1), (name, other)


@pytest.mark.parametrize("layer", [0, 2, -1])
def test_features_are_those_of_the_chosen_layer(variant, layer):
    model = tiny_model(variant)
    model.config.vision_feature_layer = layer
    pixel_values = tiny_inputs(model, [[5]], [1])["pixel_values"]
    with torch.no_grad():
        hidden_states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        expected = model.model.multi_modal_projector(hidden_states[layer][:, 1:]).last_hidden_state
        for asked in ({}, {"output_hidden_states": False}, {"output_hidden_states": True}):
            assert torch.equal(model.get_image_features(pixel_values, **asked).pooler_output, expected)


def test_lora_adapts_every_layer_of_the_projector(variant):
    """PEFT makes its own convolution of the class that it finds, so that has to keep Conv2d's arguments and shapes."""
    model = tiny_model(variant)
    inputs = tiny_inputs(model, [[5, 6]], [1])
    with torch.no_grad():
        before = model(**inputs).logits
    config = LoraConfig(r=2, target_modules=r".*multi_modal_projector.*(convolutions\.\d+|detail_convolution|_proj)")
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        torch.testing.assert_close(adapted(**inputs).logits, before, rtol=0, atol=0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        changed = adapted(**inputs).logits
        merged = adapted.merge_and_unload()(**inputs).logits
    assert (changed - before).abs().max() > 1e-3
    torch.testing.assert_close(merged, changed, rtol=0, atol=1e-4)
