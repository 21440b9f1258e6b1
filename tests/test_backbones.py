"""
Every tower with every language model: what must be equal, over {CLIP, SigLIP, InternVL} x {cropping, pooling} x {with
and without details} x {Llama, Qwen2, Mistral} and over images in tiles; and every row of the tables that
docs/backbones.md has.

Logits have a standard deviation of about 1 here. Measured on an x86 CPU with PyTorch 2.13, Transformers 5.19.0 and
5.23.0: a batch against each alone 8e-6, eager attention against sdpa 5e-6, no cache against the default 4e-6, tensor
parallel 2e-6, compiled decoding 1e-6; nothing at all saved against loaded, embeddings against ids, exported and
offloaded.
"""

import copy
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pytest
import test_deployment as deployment
import torch
import torch.multiprocessing as mp
from conftest import IMAGE_TOKEN_ID, VARIANTS, randomize_
from safetensors.torch import load_file, save_file
from test_docs import REPOSITORY, code, table
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
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTModel,
    Dinov2Config,
    InternVLConfig,
    InternVLModel,
    InternVLVisionConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from transformers_llava_sp import LlavaSPConfig, LlavaSPForConditionalGeneration, LlavaSPProjectorConfig
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
    assert ("model.image_newline.weight" in loaded.state_dict()) == backbone.tiles
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
    assert ("model.image_newline.weight" in gradients) == backbone.tiles
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        if not name.endswith(WITHOUT_EFFECT):
            assert gradient.abs().max() > 1e-7, name


# The tables of docs/backbones.md


GUIDE = (REPOSITORY / "docs" / "backbones.md").read_text(encoding="utf-8")

VISION = {"hidden_size": 32, "image_size": 84, "patch_size": 7, **LAYERS}
# What a class has beside the sizes of all, or calls otherwise
OTHER_SETTINGS = {
    "dinov3_vit": {"num_register_tokens": 4},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3": {"text_config": TEXT, "vision_config": VISION},
    "gemma3_text": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2},
    "gptj": {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8},
    "granite": {"logits_scaling": 8.0},
    "mistral": {"sliding_window": 128},
    "mixtral": {"num_local_experts": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
}


def make_model(vision_tower: PreTrainedModel, text_model: PreTrainedModel) -> LlavaSPForConditionalGeneration:
    return LlavaSPForConditionalGeneration.from_vision_text_pretrained(
        vision_tower, text_model, image_token_id=IMAGE_TOKEN_ID, spatial_hidden_size=16
    )


def tiny_vision_tower() -> PreTrainedModel:
    return randomize_(CLIPVisionModel(CLIPVisionConfig(**VISION)))


def tiny_language_model(model_type: str = "llama") -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **{**TEXT, **OTHER_SETTINGS.get(model_type, {})})
    return randomize_(AutoModelForCausalLM.from_config(config)).eval()


def saved_and_loaded(model: LlavaSPForConditionalGeneration, folder: Path) -> LlavaSPForConditionalGeneration:
    """
    The model from a file, with equal weights. What it computes can differ by rounding, as kernels depend on where in
    memory a weight begins.
    """
    model.save_pretrained(folder)
    loaded, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key
    return loaded


GRIDS = table(GUIDE, "grid", "for example", "scales", "detail kernel", "detail features", "tokens of an image")


@pytest.mark.parametrize(("grid", "scales", "kernel", "details", "tokens"), [row[:1] + row[2:] for row in GRIDS])
def test_scales_of_a_grid(grid, scales, kernel, details, tokens):
    config = LlavaSPProjectorConfig(grid_size=int(grid))
    assert ", ".join(map(str, config.spatial_scales)) == scales
    assert str(config.detail_kernel_size) == kernel
    assert str(config.num_detail_tokens) == details
    assert f"{config.num_spatial_tokens} + {config.num_patch_tokens}" == tokens


def test_grids_are_those_that_the_guide_promises():
    assert [int(row[0]) for row in GRIDS] == [12, 16, 24, 27, 32, 37]
    for size in range(1, 11):
        with pytest.raises(ValueError, match="too small for 6 different default scales"):
            LlavaSPProjectorConfig(grid_size=size)
    LlavaSPProjectorConfig(grid_size=11)


def test_the_guide_prints_what_it_says(capsys):
    [block] = [
        block for block in re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL) if "print(" in block
    ]
    exec(block, {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^print\(.+\)  # (.+)$", block, re.MULTILINE)


# A tower, the side of its grid and how many tokens stand in front of the patches
TOWERS_OF_OTHER_SIZES = {
    "clip-16x16": ("clip_vision_model", {"image_size": 64, "patch_size": 4}, 16, 1),
    "clip-24x24": ("clip_vision_model", {"image_size": 96, "patch_size": 4}, 24, 1),
    "siglip-27x27-and-a-rest": ("siglip_vision_model", {"image_size": 110, "patch_size": 4}, 27, 0),
    "internvl-32x32": ("internvl_vision", {"image_size": 128, "patch_size": 4}, 32, 1),
}
TOWERS_OF_THE_GUIDE = {
    code(model_type)[0]: (code(model_type)[0], {}, 12, int(dropped))
    for _, model_type, _, dropped in table(GUIDE, "vision tower", "`model_type`", "in front of its patches", "dropped")
}


@pytest.mark.parametrize(
    ("model_type", "sizes", "grid_size", "num_others"),
    [pytest.param(*tower, id=name) for name, tower in [*TOWERS_OF_THE_GUIDE.items(), *TOWERS_OF_OTHER_SIZES.items()]],
)
@torch.no_grad()
def test_patches_of_a_tower(model_type, sizes, grid_size, num_others, tmp_path):
    """
    The projector gets one state per patch, row by row: before the first layer, a patch changes its own alone. What one
    image shows changes nothing of another.
    """
    settings = {**VISION, **OTHER_SETTINGS.get(model_type, {}), **sizes}
    vision_config = AutoConfig.for_model(model_type, **settings)
    model = randomize_(make_model(AutoModel.from_config(vision_config), tiny_language_model())).eval()
    given = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    images = torch.randn(2, 3, model.config.tile_size, model.config.tile_size, generator=torch.Generator())

    output = model.get_image_features(images, output_hidden_states=True)
    features = output.pooler_output
    assert features.shape == (2, 6 + grid_size**2, TEXT["hidden_size"])
    assert features.isfinite().all()
    assert output.hidden_states[-2].shape == (2, num_others + grid_size**2, 32)
    assert torch.equal(given[0], output.hidden_states[-2][:, num_others:])
    swapped = model.get_image_features(images.flip(0)).pooler_output
    torch.testing.assert_close(swapped.flip(0), features, rtol=0, atol=1e-5)
    assert (swapped - features).abs().max() > 0.1

    row, column, patch_size = 3, grid_size - 2, settings["patch_size"]
    changed = images.clone()
    changed[1, :, row * patch_size : (row + 1) * patch_size, column * patch_size : (column + 1) * patch_size] += 1
    model.config.vision_feature_layer = 0
    before, after = (model.get_image_features(pixels).pooler_output for pixels in (images, changed))
    difference = (given[3] - given[2]).abs().amax(dim=-1)
    assert (difference > 1e-5).nonzero().tolist() == [[1, row * grid_size + column]]
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-6)
    # The largest map is the whole grid
    assert (after[1, 5] - before[1, 5]).abs().max() > 1e-4

    model.config.vision_feature_layer = -2
    loaded_features = saved_and_loaded(model, tmp_path).get_image_features(images).pooler_output
    torch.testing.assert_close(loaded_features, features, rtol=0, atol=1e-5)


REFUSED_TOWERS = [
    pytest.param(model_type, reason, id=model_type)
    for _, model_types, reason in table(GUIDE, "vision tower", "`model_type`", "what the error says")
    for model_type in code(model_types)
]
# What is refused for another reason by default, or only when it runs
REFUSED_SIZES = {"yolos": {"image_size": [84, 84]}, "pixtral": VISION}


@pytest.mark.parametrize(("model_type", "reason"), REFUSED_TOWERS)
def test_towers_that_are_refused(model_type, reason):
    vision_config = AutoConfig.for_model(model_type, **REFUSED_SIZES.get(model_type, {}))
    with pytest.raises(ValueError) as refused:
        LlavaSPConfig(vision_config=vision_config, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE_TOKEN_ID)
        make_model(AutoModel.from_config(vision_config), tiny_language_model())
    assert reason in str(refused.value)
    assert model_type in str(refused.value).lower()


@pytest.mark.parametrize(("config_class", "model_class"), [(CLIPConfig, CLIPModel), (SiglipConfig, SiglipModel)])
def test_tower_of_a_contrastive_model(config_class, model_class, tmp_path):
    text_config = {"hidden_size": 32, "vocab_size": 128, **LAYERS}
    whole = randomize_(model_class(config_class(text_config=text_config, vision_config=VISION)))
    whole.save_pretrained(tmp_path / "whole")
    model = make_model(tmp_path / "whole", tiny_language_model())
    expected = {key: value for key, value in whole.vision_model.state_dict().items() if not key.startswith("head.")}
    tower = model.model.vision_tower.state_dict()
    assert tower.keys() == expected.keys()
    assert all(torch.equal(tower[key], tensor) for key, tensor in expected.items())
    saved_and_loaded(model, tmp_path / "model")


@pytest.mark.parametrize(
    ("config_class", "classifier_class", "tower_class"),
    [(ViTConfig, ViTForImageClassification, ViTModel), (DeiTConfig, DeiTForImageClassification, DeiTModel)],
)
@torch.no_grad()
def test_classifier_without_a_pooler_is_taken_when_it_is_loaded(config_class, classifier_class, tower_class, tmp_path):
    classifier = randomize_(classifier_class(config_class(**VISION))).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    with pytest.raises(
        ValueError,
        match=r"lacks weights in the shapes .*: pooler\.dense\.bias, pooler\.dense\.weight\.$",
    ):
        make_model(tmp_path / "classifier", tiny_language_model())
    model = make_model(tower_class.from_pretrained(tmp_path / "classifier"), tiny_language_model())
    images = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(1))
    features = model.get_image_features(images, output_hidden_states=True)
    expected = classifier(images, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(features.hidden_states[-2], expected, rtol=0, atol=1e-6)
    saved_and_loaded(model, tmp_path / "model")


LANGUAGE_MODELS_OF_THE_GUIDE = [code(row[1])[0] for row in table(GUIDE, "language model", "`model_type`")]


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS_OF_THE_GUIDE)
@torch.no_grad()
def test_language_model_answers_as_before_and_reads_images(model_type, tmp_path):
    """To text alone as the plain model, bit by bit; to images as the plain model given their embeddings."""
    plain = tiny_language_model(model_type)
    model = make_model(tiny_vision_tower(), copy.deepcopy(plain))
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(3, IMAGE_TOKEN_ID, (2, 12), generator=generator)
    assert torch.equal(model(input_ids=text).logits, plain(input_ids=text).logits)

    image, other = torch.randn(2, 1, 3, 84, 84, generator=generator)
    input_ids = torch.tensor([[1, *[IMAGE_TOKEN_ID] * 150, 3, 4, 5]])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": image}
    logits = logits_of(model, inputs)
    embeddings = plain.get_input_embeddings()(input_ids)
    embeddings[input_ids == IMAGE_TOKEN_ID] = model.get_image_features(image).pooler_output[0]
    assert_logits_equal(logits, plain(inputs_embeds=embeddings).logits)
    assert (logits_of(model, {**inputs, "pixel_values": other})[0, -1] - logits[0, -1]).abs().max() > 1e-3

    answers = [
        model.generate(**inputs, max_new_tokens=3, eos_token_id=None, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*answers)
    assert_logits_equal(logits_of(saved_and_loaded(model, tmp_path), inputs), logits)


REFUSED_LANGUAGE_MODELS = [
    pytest.param(model_type, reason, id=model_type)
    for _, model_types, reason in table(GUIDE, "language model", "`model_type`", "what the error says")
    for model_type in code(model_types)
]


@pytest.mark.parametrize(("model_type", "reason"), REFUSED_LANGUAGE_MODELS)
def test_language_models_that_are_refused(model_type, reason):
    text_model = tiny_language_model(model_type)
    with pytest.raises(ValueError) as refused:
        make_model(tiny_vision_tower(), text_model)
    assert reason in str(refused.value)


def test_granite_without_scaled_scores_is_taken():
    config = AutoConfig.for_model("granite", **TEXT, logits_scaling=1.0)
    make_model(tiny_vision_tower(), AutoModelForCausalLM.from_config(config))


def test_appended_embeddings_change_no_score():
    """With a vocabulary that `<image>` does not fit in, for a model that scales and ties its embeddings."""
    config = AutoConfig.for_model("gemma", **{**TEXT, "vocab_size": IMAGE_TOKEN_ID, "head_dim": 16})
    plain = randomize_(AutoModelForCausalLM.from_config(config)).eval()
    model = make_model(tiny_vision_tower(), copy.deepcopy(plain))
    input_ids = torch.tensor([[1, 5, 6, 7]])
    logits = logits_of(model, {"input_ids": input_ids})
    assert logits.shape[-1] == 128
    assert_logits_equal(logits[..., :IMAGE_TOKEN_ID], logits_of(plain, {"input_ids": input_ids}))
    assert model.generation_config.suppress_tokens == list(range(IMAGE_TOKEN_ID, 128))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


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
            # Where each part lies must be said
            device_map = {**device_map, "model.image_newline": "disk"}
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
        assert "model.image_newline" in loaded.hf_device_map
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
