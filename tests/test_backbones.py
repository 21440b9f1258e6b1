"""
Every tower with every language model: what must be equal, over {CLIP, SigLIP, InternVL} x {cropping, pooling} x {with
and without details} x {Llama, Qwen2, Mistral} and over images in tiles; and which patches other towers give.

Logits have a standard deviation of about 1 here. Measured on an x86 CPU with PyTorch 2.13, Transformers 5.19.0 and
5.23.0: a batch against each alone 8e-6, eager attention against sdpa 5e-6, no cache against the default 4e-6, tensor
parallel 2e-6, compiled decoding 1e-6; nothing at all saved against loaded, embeddings against ids, exported and
offloaded.
"""

import json
from collections.abc import Iterator
from functools import cached_property

import pytest
import test_deployment as deployment
import torch
import torch.multiprocessing as mp
from conftest import IMAGE_TOKEN_ID, VARIANTS, randomize_
from safetensors.torch import load_file, save_file
from test_modeling import (
    Answer,
    assert_logits_equal,
    assert_same_answer,
    greedy,
    logits_of,
    loss_and_gradients,
    question_and_answer_labels,
)
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Aimv2VisionConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    IJepaConfig,
    InternVLConfig,
    InternVLModel,
    InternVLVisionConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
    ViTConfig,
)

from transformers_llava_sp import LlavaSPConfig, LlavaSPForConditionalGeneration
from transformers_llava_sp.configuration_llava_sp import ImageLayout
from transformers_llava_sp.modeling_llava_sp import LlavaSPModel


LAYERS = {"intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
# Of each language model what the others do not have: biases and tied embeddings, and a window that slides within an
# image's 150 tokens
LANGUAGE_MODELS = {
    "llama": lambda: LlamaConfig(**TEXT),
    "qwen2": lambda: Qwen2Config(**TEXT, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**TEXT, sliding_window=128),
    "mistral-without-window": lambda: MistralConfig(**TEXT, sliding_window=None),
}
# Grids of 12x12. InternVL reads its tower's last layer, the others leave that out
TOWERS = {
    "clip": lambda side: CLIPVisionConfig(hidden_size=32, image_size=side, patch_size=7, **LAYERS),
    "siglip": lambda side: SiglipVisionConfig(hidden_size=32, image_size=side, patch_size=7, **LAYERS),
    "dinov2": lambda side: Dinov2Config(
        hidden_size=32, mlp_ratio=2, num_hidden_layers=3, num_attention_heads=4, image_size=side, patch_size=7
    ),
    "internvl": lambda side: InternVLVisionConfig(hidden_size=32, image_size=side, patch_size=7, **LAYERS),
}
PATCH_PATHS = {"internvl": {"patch_downsample_factor": 2, "patch_layer_norm": True}}
FEATURE_LAYERS = {"internvl": -1}
# What the features of the last layer but one pass by
UNUSED_PARAMETERS = {
    "clip": ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm."),
    "siglip": ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm.", "vision_tower.head."),
    "internvl": (),
}
# A vector that is added to all keys changes no softmax: its gradient is zero up to rounding
WITHOUT_EFFECT = ("k_proj.bias", "key_proj.bias", "key_norm.bias")

# Tiles of 42 pixels: grids of 6x6. The single tile is the whole image alone
TILE = 42
PINPOINTS = [[TILE * rows, TILE * columns] for rows, columns in ((2, 1), (1, 2), (2, 2), (1, 3), (1, 1))]

# A text, a question about one image and a comparison of two: every batch of them needs padding
TEXTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
IMAGE_SIZES = [[], [(80, 32)], [(80, 75), (30, 31)]]
NUM_TILES = [[], [3], [5, 1]]


def make_config(tower: str, variant: str, language_model: str, tiles: bool = False) -> LlavaSPConfig:
    sizes = {"spatial_hidden_size": 16, **VARIANTS[variant], **PATCH_PATHS.get(tower, {})}
    return LlavaSPConfig(
        vision_config=TOWERS[tower](TILE if tiles else 84),
        text_config=LANGUAGE_MODELS[language_model](),
        projector_config={**sizes, "spatial_scales": [2, 4, 6]} if tiles else sizes,
        image_token_id=IMAGE_TOKEN_ID,
        vision_feature_layer=FEATURE_LAYERS.get(tower, -2),
        image_grid_pinpoints=PINPOINTS if tiles else None,
    )


def make_samples(config: LlavaSPConfig, texts: list[list[int]], image_sizes: list[list], seed: int = 1) -> list[dict]:
    """
    Inputs of samples, each a batch of its own: its images of the sizes (height, width), which matter only for tiles,
    each followed by one id, and then its text.
    """
    generator = torch.Generator().manual_seed(seed)
    side, samples = config.tile_size, []
    for text, sizes in zip(texts, image_sizes, strict=True):
        layouts = [config.get_image_layout(size) for size in sizes]
        ids = [1]
        for layout in layouts:
            ids += [IMAGE_TOKEN_ID] * layout.num_tokens + [3]
        input_ids = torch.tensor([ids + text])
        sample = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if sizes:
            images = [torch.randn(layout.num_tiles, 3, side, side, generator=generator) for layout in layouts]
            if config.image_grid_pinpoints is None:
                sample["pixel_values"] = torch.cat(images)
            else:
                # What stands behind an image's last tile must have no effect
                sample["pixel_values"] = pad_sequence(images, batch_first=True, padding_value=torch.nan)
                sample["image_sizes"] = torch.tensor(sizes)
        samples.append(sample)
    return samples


def collate(samples: list[dict]) -> dict:
    """One left-padded batch of several."""
    batch = {
        name: pad_sequence([sample[name][0] for sample in samples], batch_first=True, padding_side="left")
        for name in ("input_ids", "attention_mask")
    }
    images = [image for sample in samples for image in sample.get("pixel_values", ())]
    batch["pixel_values"] = pad_sequence(images, batch_first=True, padding_value=torch.nan)
    sizes = [sample["image_sizes"] for sample in samples if "image_sizes" in sample]
    if sizes:
        batch["image_sizes"] = torch.cat(sizes)
    return batch


class Backbone:
    """One combination: a seeded model in evaluation mode and a batch for it, with what it answers."""

    def __init__(self, tower: str, variant: str, language_model: str, tiles: bool = False):
        self.tower, self.tiles = tower, tiles
        model = LlavaSPForConditionalGeneration(make_config(tower, variant, language_model, tiles))
        self.model = randomize_(model).eval()
        self.model.generation_config.eos_token_id = None
        self.samples = make_samples(self.model.config, TEXTS, IMAGE_SIZES)
        self.inputs = collate(self.samples)

    @cached_property
    def logits(self) -> torch.Tensor:
        return logits_of(self.model, self.inputs)

    @cached_property
    def answer(self) -> Answer:
        return greedy(self.model, self.inputs)


COMBINATIONS = {
    f"{tower}-{variant}-{language_model}": (tower, variant, language_model)
    for tower in ("clip", "siglip", "internvl")
    for variant in VARIANTS
    for language_model in ("llama", "qwen2", "mistral")
} | {
    f"tiles-{tower}-{variant}-{language_model}": (tower, variant, language_model, True)
    for tower, variant, language_model in (
        ("clip", "cropping-dfi", "llama"),
        ("clip", "pooling", "qwen2"),
        ("siglip", "cropping", "mistral"),
        ("siglip", "pooling-dfi", "llama"),
        ("internvl", "cropping-dfi", "qwen2"),
    )
}


@pytest.fixture(scope="module", params=COMBINATIONS.values(), ids=COMBINATIONS)
def backbone(request) -> Backbone:
    return Backbone(*request.param)


def test_the_batch_has_samples_of_different_lengths_and_images(backbone):
    lengths = backbone.inputs["attention_mask"].sum(dim=1)
    assert lengths.unique().numel() == len(TEXTS)
    config = backbone.model.config
    if backbone.tiles:
        assert [[config.get_image_layout(size).num_tiles for size in sizes] for sizes in IMAGE_SIZES] == NUM_TILES
        assert backbone.inputs["pixel_values"].shape[:2] == (3, 5)
        assert backbone.inputs["pixel_values"].isnan().any()
    else:
        assert config.get_image_layout() == ImageLayout(6, 6 if backbone.tower == "internvl" else 12)
        assert backbone.inputs["pixel_values"].shape == (3, 3, 84, 84)
    assert backbone.logits.isfinite().all()


def test_saved_equals_loaded(backbone, tmp_path):
    backbone.model.save_pretrained(tmp_path)
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(loaded) is LlavaSPForConditionalGeneration
    assert ("model.image_newline" in loaded.state_dict()) == backbone.tiles
    for key, tensor in backbone.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert_logits_equal(logits_of(loaded, backbone.inputs), backbone.logits, atol=0)


def test_left_padded_batch_equals_each_alone(backbone):
    for row, sample in enumerate(backbone.samples):
        length = sample["input_ids"].shape[1]
        assert_logits_equal(backbone.logits[row, -length:], logits_of(backbone.model, sample)[0])
        assert_same_answer(backbone.answer.of_sample(row), greedy(backbone.model, sample))


def test_generating_without_a_cache_equals_the_default(backbone):
    assert_same_answer(greedy(backbone.model, backbone.inputs, use_cache=False), backbone.answer)


def test_embeddings_put_together_by_hand_equal_ids(backbone):
    model, embedded = backbone.model, dict(backbone.inputs)
    input_ids = embedded.pop("input_ids")
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(input_ids)
        features = model.get_image_features(
            embedded.pop("pixel_values"), image_sizes=embedded.pop("image_sizes", None)
        ).pooler_output
        embeddings[input_ids == IMAGE_TOKEN_ID] = torch.cat(list(features))
    assert_logits_equal(logits_of(model, {**embedded, "inputs_embeds": embeddings}), backbone.logits)
    # Placeholders are found by their embedding where there are no ids
    placeholders = {**backbone.inputs, "inputs_embeds": model.get_input_embeddings()(input_ids).detach()}
    del placeholders["input_ids"]
    assert_logits_equal(logits_of(model, placeholders), backbone.logits)


def test_eager_attention_equals_sdpa(backbone):
    model, real = backbone.model, backbone.inputs["attention_mask"].bool()
    expected, expected_answer = backbone.logits, backbone.answer
    parts = (model.config.vision_config, model.config.text_config)
    assert [part._attn_implementation for part in parts] == ["sdpa", "sdpa"]
    model.set_attn_implementation("eager")
    try:
        assert [part._attn_implementation for part in parts] == ["eager", "eager"]
        assert_logits_equal(logits_of(model, backbone.inputs)[real], expected[real])
        assert_same_answer(greedy(model, backbone.inputs), expected_answer)
    finally:
        model.set_attn_implementation("sdpa")


def test_gradients_reach_every_parameter(backbone):
    model = backbone.model
    _, gradients = loss_and_gradients(model, backbone.inputs, question_and_answer_labels(backbone.inputs))
    unused = tuple(f"model.{prefix}" for prefix in UNUSED_PARAMETERS[backbone.tower])
    names = {name for name, _ in model.named_parameters()}
    assert names - gradients.keys() == {name for name in names if name.startswith(unused)}
    assert ("model.image_newline" in gradients) == backbone.tiles
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        if not name.endswith(WITHOUT_EFFECT):
            assert gradient.abs().max() > 1e-7, name


# Towers


# Tower, side of its grid and how many tokens stand in front of the patches
OTHER_TOWERS = {
    "clip-16x16": (CLIPVisionConfig(hidden_size=32, image_size=64, patch_size=4, **LAYERS), 16, 1),
    "clip-24x24": (CLIPVisionConfig(hidden_size=32, image_size=96, patch_size=4, **LAYERS), 24, 1),
    "siglip-27x27-and-a-rest": (SiglipVisionConfig(hidden_size=32, image_size=110, patch_size=4, **LAYERS), 27, 0),
    "internvl-32x32": (InternVLVisionConfig(hidden_size=32, image_size=128, patch_size=4, **LAYERS), 32, 1),
    "dinov2": (
        Dinov2Config(
            hidden_size=32, mlp_ratio=2, num_hidden_layers=3, num_attention_heads=4, image_size=84, patch_size=7
        ),
        12,
        1,
    ),
    "dinov2-with-registers": (
        Dinov2WithRegistersConfig(
            hidden_size=32, mlp_ratio=2, num_hidden_layers=3, num_attention_heads=4, image_size=84, patch_size=7
        ),
        12,
        5,
    ),
    "dinov3": (
        DINOv3ViTConfig(hidden_size=32, image_size=84, patch_size=7, num_register_tokens=4, **LAYERS),
        12,
        5,
    ),
    "vit": (ViTConfig(hidden_size=32, image_size=84, patch_size=7, **LAYERS), 12, 1),
    "ijepa": (IJepaConfig(hidden_size=32, image_size=84, patch_size=7, **LAYERS), 12, 0),
    "aimv2": (Aimv2VisionConfig(hidden_size=32, image_size=84, patch_size=7, **LAYERS), 12, 0),
}


def model_with_tower(vision_config: PreTrainedConfig, **arguments) -> LlavaSPModel:
    config = LlavaSPConfig(
        vision_config=vision_config,
        text_config=LlamaConfig(**TEXT),
        projector_config={"spatial_hidden_size": 16},
        image_token_id=IMAGE_TOKEN_ID,
        **arguments,
    )
    return randomize_(LlavaSPModel(config)).eval()


@pytest.mark.parametrize(("vision_config", "grid_size", "num_others"), OTHER_TOWERS.values(), ids=OTHER_TOWERS)
@torch.no_grad()
def test_patches_of_a_tower(vision_config, grid_size, num_others):
    """The projector gets one state per patch, row by row: before the first layer, a patch changes its own alone."""
    model = model_with_tower(vision_config)
    given = []
    model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    images = torch.randn(2, 3, model.config.tile_size, model.config.tile_size, generator=torch.Generator())

    output = model.get_image_features(images, output_hidden_states=True)
    assert output.pooler_output.shape == (2, 6 + grid_size**2, TEXT["hidden_size"])
    assert output.pooler_output.isfinite().all()
    assert output.hidden_states[-2].shape == (2, num_others + grid_size**2, 32)
    assert torch.equal(given[0], output.hidden_states[-2][:, num_others:])

    row, column = 3, grid_size - 2
    patch_size = torch.tensor(vision_config.patch_size).flatten()[0]
    changed = images.clone()
    changed[1, :, row * patch_size : (row + 1) * patch_size, column * patch_size : (column + 1) * patch_size] += 1
    model.config.vision_feature_layer = 0
    model.get_image_features(images)
    model.get_image_features(changed)
    difference = (given[2] - given[1]).abs().amax(dim=-1)
    assert (difference > 1e-5).nonzero().tolist() == [[1, row * grid_size + column]]


@torch.no_grad()
def test_patch_path_of_internvl():
    """The patch tokens equal those of Transformers' InternVL with the same weights."""
    vision_config = InternVLVisionConfig(hidden_size=32, image_size=84, patch_size=7, **LAYERS)
    theirs = InternVLModel(InternVLConfig(vision_config=vision_config, text_config=Qwen2Config(**TEXT)))
    randomize_(theirs).eval()

    config = make_config("internvl", "cropping-dfi", "qwen2")
    ours = randomize_(LlavaSPModel(config), seed=1).eval()
    ours.vision_tower.load_state_dict(theirs.vision_tower.state_dict())
    patch_path, projector = ours.multi_modal_projector.patch_mlp, theirs.multi_modal_projector
    patch_path.norm.load_state_dict(projector.layer_norm.state_dict())
    patch_path.layers[0].load_state_dict(projector.linear_1.state_dict())
    patch_path.layers[1].load_state_dict(projector.linear_2.state_dict())
    assert patch_path.norm.eps == projector.layer_norm.eps

    images = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(1))
    expected = theirs.get_image_features(
        images, vision_feature_layer=-1, vision_feature_select_strategy="default"
    ).pooler_output
    features = ours.get_image_features(images).pooler_output
    assert features.shape == (2, 6 + 36, TEXT["hidden_size"])
    assert expected.std() > 0.1
    torch.testing.assert_close(features[:, 6:], expected, rtol=0, atol=1e-6)


# Deployment: what test_deployment.py shows for CLIP and Llama, at corners far from them


CORNERS = {
    "siglip-pooling-qwen2": ("siglip", "pooling", "qwen2"),
    "internvl-cropping-dfi-mistral": ("internvl", "cropping-dfi", "mistral-without-window"),
    "dinov2-pooling-dfi-llama": ("dinov2", "pooling-dfi", "llama"),
    "tiles-siglip-cropping-dfi-qwen2": ("siglip", "cropping-dfi", "qwen2", True),
}


@pytest.fixture
def corner(request) -> Iterator[Backbone]:
    torch._dynamo.reset()
    deployment.counters.clear()
    backbone = Backbone(*CORNERS[request.param])
    # Greedy search by hand, which these tests compare with, suppresses nothing
    backbone.model.generation_config.suppress_tokens = None
    yield backbone
    torch._dynamo.reset()


every_corner = pytest.mark.parametrize("corner", CORNERS, indirect=True)
whole_image_corners = pytest.mark.parametrize(
    "corner", [name for name in CORNERS if "tiles" not in name], indirect=True
)
tiles_corner = pytest.mark.parametrize("corner", [name for name in CORNERS if "tiles" in name], indirect=True)

# The sizes of the images decide how many tiles there are and what is dropped of them
sizes_as_numbers_or_tensor = pytest.mark.parametrize(
    "sizes_of",
    [
        pytest.param(torch.Tensor.tolist, id="sizes-as-numbers"),
        pytest.param(
            torch.Tensor.clone,
            id="sizes-in-a-tensor",
            marks=pytest.mark.xfail(
                raises=(torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError, RuntimeError),
                reason="a graph cannot read from a tensor how many tiles an image has",
                strict=True,
            ),
        ),
    ],
)


@pytest.mark.slow
@whole_image_corners
def test_compiled_prefill_equals_eager(corner):
    deployment.check_compiled_prefill(corner.model, corner.inputs, "inductor")


@pytest.mark.slow
@tiles_corner
@sizes_as_numbers_or_tensor
def test_compiled_prefill_of_tiles_equals_eager(corner, sizes_of):
    inputs = {**corner.inputs, "image_sizes": sizes_of(corner.inputs["image_sizes"])}
    deployment.check_compiled_prefill(corner.model, inputs, "inductor")


@pytest.mark.slow
@every_corner
def test_compiled_decoding_equals_eager(corner):
    deployment.check_compiled_decoding(corner.model, corner.inputs, "inductor")


@pytest.mark.slow
@every_corner
def test_compiled_generation_equals_eager(corner):
    deployment.check_compiled_generation(corner.model, corner.inputs, deployment.FAST_BACKEND)


@pytest.mark.slow
@pytest.mark.xfail(
    raises=AssertionError,
    reason="the cache of a sliding window counts in a number of Python's, for which a second graph is compiled; that "
    "of a Mistral alone is no different",
    strict=True,
)
def test_a_sliding_window_compiles_to_one_graph():
    torch._dynamo.reset()
    deployment.counters.clear()
    backbone = Backbone("internvl", "cropping-dfi", "mistral")
    deployment.check_compiled_generation(backbone.model, backbone.inputs, deployment.FAST_BACKEND)


@pytest.mark.slow
@whole_image_corners
def test_exported_with_a_dynamic_batch_equals_eager(corner, tmp_path):
    model = corner.model
    # An argument that is no tensor would be part of the exported signature
    model.config.text_config.use_cache = False

    def batch(texts: list[list[int]], seed: int) -> dict:
        return collate(make_samples(model.config, texts, [[(80, 32)]] * len(texts), seed))

    inputs = batch([[5, 6, 7, 8], [9, 10]], seed=1)
    dimension = torch.export.Dim("batch")
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, dynamic_shapes={name: {0: dimension} for name in inputs})
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    texts = [[9, 10, 11, 12], [5], [7, 8], [13, 14, 15], [3, 4]]
    for size in (1, len(texts)):
        other = batch(texts[:size], seed=size + 1)
        expected = deployment.logits_of(model, other)
        for program in (exported, loaded):
            assert_logits_equal(deployment.logits_of(program.module(), other), expected)


@pytest.mark.slow
@tiles_corner
@sizes_as_numbers_or_tensor
def test_exported_with_tiles_equals_eager(corner, sizes_of):
    """For images of these sizes, and any pixels and text."""
    model, inputs = corner.model, {**corner.inputs, "image_sizes": sizes_of(corner.inputs["image_sizes"])}
    model.config.text_config.use_cache = False
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs)
    other = collate(make_samples(model.config, [[8, 7, 6, 5], [10, 9], [13, 12, 11]], IMAGE_SIZES, seed=2))
    other["image_sizes"] = inputs["image_sizes"]
    expected = deployment.logits_of(model, other)
    assert (expected - deployment.logits_of(model, inputs)).abs().max() > 0.1
    assert_logits_equal(deployment.logits_of(exported.module(), other), expected)


# A model whose first module is on the disk counts as on the meta device, of which 5.19.0 warns
@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:You are calling .generate.. with the `input_ids` being on a device type:UserWarning"
)
@pytest.mark.parametrize("device_map", deployment.ON_DISK.values(), ids=deployment.ON_DISK)
@every_corner
def test_offloaded_to_disk_equals_in_memory(request, corner, device_map, tmp_path):
    model = corner.model
    if corner.tower == "siglip" and "disk" in (device_map.get("model.vision_tower"), device_map.get("")):
        request.applymarker(
            pytest.mark.xfail(
                raises=RuntimeError,
                reason="SigLIP's pooling head, of which nothing is used here, is PyTorch's MultiheadAttention: it "
                "reads the weights of a part of its own without running it, which is when accelerate would load them",
                strict=True,
            )
        )
    if "" not in device_map:
        if corner.tiles:
            # A parameter outside of all submodules: where it lies must be said
            device_map = {**device_map, "model.image_newline": "cpu"}
        if model.config.tie_word_embeddings and "model.language_model" not in device_map:
            # One weight cannot be in two places
            device_map = {**device_map, "lm_head": device_map["model.language_model.embed_tokens"]}
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    deployment.assert_answers_equal(loaded, model, corner.inputs)


@pytest.mark.slow
@every_corner
def test_automatic_device_map_equals_in_memory(corner, tmp_path):
    """With room for nine tenths of the model."""
    model = corner.model
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": int(0.9 * model.get_memory_footprint())},
        offload_folder=tmp_path / "offload",
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert "model.multi_modal_projector" in loaded.hf_device_map
    if corner.tiles:
        assert loaded.hf_device_map["model.image_newline"] == "cpu"
    deployment.assert_answers_equal(loaded, model, corner.inputs)


@pytest.mark.slow
def test_two_tensor_parallel_processes_equal_one(tmp_path, monkeypatch):
    backbones = {name: Backbone(*combination) for name, combination in CORNERS.items()}
    for name, backbone in backbones.items():
        backbone.model.save_pretrained(tmp_path / f"model-{name}")
        save_file(backbone.inputs, tmp_path / f"model-{name}" / "inputs.safetensors")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    mp.spawn(deployment.run_tensor_parallel_rank, args=(2, str(tmp_path)), nprocs=2)

    for name, backbone in backbones.items():
        model, inputs = backbone.model, backbone.inputs
        for rank in range(2):
            answers = load_file(tmp_path / f"model-{name}-rank{rank}.safetensors")
            assert_logits_equal(answers["logits"], deployment.logits_of(model, inputs))
            assert torch.equal(answers["ids"], deployment.greedy(model, inputs))
            sharded = json.loads((tmp_path / f"model-{name}-rank{rank}.json").read_text())
            assert "model.language_model.layers.1.mlp.down_proj.weight" in sharded
            assert not [part for part in sharded if "vision_tower" in part or "projector" in part]
