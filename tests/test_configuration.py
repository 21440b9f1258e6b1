"""What the configurations derive, accept, refuse and keep."""

import json
from fractions import Fraction

import pytest
from conftest import tiny_config
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    Qwen2Config,
    ResNetConfig,
    SiglipVisionConfig,
    Swinv2Config,
)

from transformers_llava_sp import LlavaSPConfig, LlavaSPProjectorConfig
from transformers_llava_sp.configuration_llava_sp import get_image_layout, vision_grid_size


def nearest_of_parity(value: Fraction, grid_size: int) -> int:
    """The size of the grid's parity nearest to `value`, ties going to the larger one, by trying all of them."""
    sizes = [size for size in range(grid_size + 1) if size % 2 == grid_size % 2]
    return min(sizes, key=lambda size: (abs(size - value), -size))


@pytest.mark.parametrize(
    "grid_size, spatial_scales, detail_kernel_size, num_detail_tokens",
    [
        (24, [4, 8, 12, 16, 20, 24], 16, 25),
        (12, [2, 4, 6, 8, 10, 12], 8, 9),
        (32, [6, 10, 16, 22, 26, 32], 22, 36),
        (27, [5, 9, 13, 19, 23, 27], 19, 25),
        (16, [2, 6, 8, 10, 14, 16], 10, 16),
        (11, [1, 3, 5, 7, 9, 11], 7, 9),
    ],
)
def test_derived_sizes(grid_size, spatial_scales, detail_kernel_size, num_detail_tokens):
    config = LlavaSPProjectorConfig(grid_size=grid_size)
    assert config.spatial_scales == spatial_scales
    assert config.detail_kernel_size == detail_kernel_size
    assert config.num_detail_tokens == num_detail_tokens
    assert config.num_spatial_tokens == 6
    assert config.num_patch_tokens == grid_size**2
    assert config.num_image_tokens == get_image_layout(6, grid_size).num_tokens == 6 + grid_size**2


@pytest.mark.parametrize("grid_size", range(11, 66))
def test_derived_sizes_are_the_nearest_of_the_grids_parity(grid_size):
    config = LlavaSPProjectorConfig(grid_size=grid_size)
    sixths = [nearest_of_parity(Fraction(sixth * grid_size, 6), grid_size) for sixth in range(1, 7)]
    assert config.spatial_scales == sixths
    assert config.detail_kernel_size == nearest_of_parity(Fraction(2 * grid_size, 3), grid_size)


@pytest.mark.parametrize("grid_size", range(1, 11))
def test_small_grids_must_list_their_scales(grid_size):
    with pytest.raises(ValueError, match=rf"{grid_size}x{grid_size} patches is too small .* List `spatial_scales`"):
        LlavaSPProjectorConfig(grid_size=grid_size)
    config = LlavaSPProjectorConfig(grid_size=grid_size, spatial_scales=[grid_size])
    assert config.num_image_tokens == 1 + grid_size**2
    assert 1 <= config.detail_kernel_size <= grid_size


def test_without_detail_integrator_there_are_no_details():
    config = LlavaSPProjectorConfig(use_detail_integrator=False)
    assert config.num_detail_tokens == 0
    assert config.detail_kernel_size is None


@pytest.mark.parametrize("scales", [[8, 16, 24], [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24], [24], (4, 24)], ids=str)
def test_listed_scales(scales):
    config = LlavaSPProjectorConfig(spatial_scales=scales)
    assert config.spatial_scales == list(scales)
    assert config.num_image_tokens == len(scales) + 576


def test_pooling_takes_scales_of_any_parity():
    assert LlavaSPProjectorConfig(spatial_variant="pooling", spatial_scales=[3, 8, 23]).spatial_scales == [3, 8, 23]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"grid_size": 0}, "`grid_size` must be at least 1, got 0"),
        ({"spatial_variant": "croping"}, "Unknown `spatial_variant` 'croping': expected one of cropping, pooling"),
        ({"spatial_scales": []}, "`spatial_scales` is empty"),
        ({"spatial_scales": [8, 4]}, r"`spatial_scales` must grow strictly, got \[8, 4\]"),
        ({"spatial_scales": [4, 4, 8]}, r"`spatial_scales` must grow strictly, got \[4, 4, 8\]"),
        ({"spatial_scales": [0, 4]}, r"`spatial_scales` must be at least 1, got \[0, 4\]"),
        ({"spatial_scales": [4, 26]}, "Scale 26 of `spatial_scales` is larger than `grid_size` 24"),
        ({"spatial_scales": [25], "spatial_variant": "pooling"}, "Scale 25 .* is larger than `grid_size` 24"),
        ({"spatial_scales": [4, 7]}, "Scale 7 .* cannot be centred on `grid_size` 24.*parity"),
        ({"grid_size": 27, "spatial_scales": [4]}, "Scale 4 .* cannot be centred on `grid_size` 27.*parity"),
        ({"detail_kernel_size": 25}, "`detail_kernel_size` 25 does not fit `grid_size` 24"),
        ({"detail_kernel_size": 0}, "`detail_kernel_size` 0 does not fit `grid_size` 24"),
        ({"detail_stride": 0}, "`detail_stride` must be at least 1, got 0"),
        ({"num_patch_layers": 0}, "`num_patch_layers` must be at least 1, got 0"),
        ({"vision_hidden_size": 0}, "`vision_hidden_size` must be at least 1, got 0"),
        ({"text_hidden_size": -1}, "`text_hidden_size` must be at least 1, got -1"),
        ({"spatial_hidden_size": 0}, "`spatial_hidden_size` must be at least 1, got 0"),
    ],
    ids=lambda value: ",".join(f"{name}={item}" for name, item in value.items()) if isinstance(value, dict) else "",
)
def test_projector_contradictions_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        LlavaSPProjectorConfig(**overrides)


def test_details_are_not_checked_without_detail_integrator():
    assert LlavaSPProjectorConfig(use_detail_integrator=False, detail_kernel_size=99).num_detail_tokens == 0


def tower(**overrides):
    return CLIPVisionConfig(
        **{"hidden_size": 32, "num_attention_heads": 4, "image_size": 84, "patch_size": 7, **overrides}
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"projector_config": {"grid_size": 24}},
            r"`projector_config.grid_size` is 24, but `vision_config` gives a grid of 12 .*size 84, patch_size 7",
        ),
        (
            {"projector_config": {"vision_hidden_size": 48}},
            "`projector_config.vision_hidden_size` is 48, but `vision_config.hidden_size` is 32",
        ),
        (
            {"projector_config": {"text_hidden_size": 128}},
            "`projector_config.text_hidden_size` is 128, but `text_config.hidden_size` is 64",
        ),
        ({"projector_config": LlavaSPProjectorConfig()}, "is 24, but `vision_config` gives a grid of 12"),
        ({"projector_config": tower()}, "must be a LlavaSPProjectorConfig, got CLIPVisionConfig"),
        ({"image_token_id": 128}, "`image_token_index` is 128, which is outside `text_config.vocab_size` 128"),
        ({"image_token_id": -1}, "`image_token_index` is -1, which is outside `text_config.vocab_size` 128"),
        (
            {"vision_feature_layer": 13},
            "`vision_feature_layer` is 13, but `vision_config.num_hidden_layers` 12 gives 13 hidden states",
        ),
        ({"vision_feature_layer": -14}, "`vision_feature_layer` is -14, but .* 12 gives 13 hidden states"),
        (
            {"vision_feature_select_strategy": "cls"},
            "Unknown `vision_feature_select_strategy` 'cls': expected 'default' .* or 'full'",
        ),
        ({"vision_config": tower(image_size=[84, 42])}, "`vision_config.image_size` is 84x42: .* square images"),
        ({"vision_config": Swinv2Config(patch_size=[4, 2])}, "`vision_config.patch_size` is 4x2: .* square"),
        ({"vision_config": ResNetConfig()}, "`vision_config` of type 'resnet' has no `image_size`"),
        ({"vision_config": LlamaConfig()}, "`vision_config` of type 'llama' has no `image_size`"),
        ({"vision_config": tower(image_size=28)}, "A grid of 4x4 patches is too small"),
    ],
    ids=[
        "grid",
        "vision-width",
        "text-width",
        "projector-object",
        "projector-type",
        "image-token-too-large",
        "image-token-negative",
        "feature-layer-too-large",
        "feature-layer-too-small",
        "select-strategy",
        "image-not-square",
        "patch-not-square",
        "no-image-size",
        "no-vision-config",
        "small-grid",
    ],
)
def test_contradictions_are_refused(arguments, message):
    valid = {
        "vision_config": tower(),
        "text_config": LlamaConfig(vocab_size=128, hidden_size=64, num_attention_heads=4),
        "image_token_id": 100,
    }
    LlavaSPConfig(**valid)
    with pytest.raises(ValueError, match=message):
        LlavaSPConfig(**{**valid, **arguments})


@pytest.mark.parametrize("layer", [-13, -1, 0, 12])
def test_every_hidden_state_can_be_chosen(layer):
    assert LlavaSPConfig(vision_config=tower(), vision_feature_layer=layer).vision_feature_layer == layer


@pytest.mark.parametrize(
    "config_class, field, value",
    [
        (LlavaSPProjectorConfig, "grid_size", "24"),
        (LlavaSPProjectorConfig, "grid_size", 24.0),
        (LlavaSPProjectorConfig, "spatial_scales", [4.0, 8.0]),
        (LlavaSPProjectorConfig, "spatial_scales", "4,8"),
        (LlavaSPProjectorConfig, "spatial_variant", None),
        (LlavaSPProjectorConfig, "use_detail_integrator", "yes"),
        (LlavaSPProjectorConfig, "spatial_projection_bias", 1),
        (LlavaSPProjectorConfig, "detail_stride", None),
        (LlavaSPProjectorConfig, "num_patch_layers", 2.5),
        (LlavaSPConfig, "image_token_index", "<image>"),
        (LlavaSPConfig, "vision_feature_layer", [-2]),
        (LlavaSPConfig, "vision_feature_select_strategy", None),
        (LlavaSPConfig, "vision_config", "clip"),
    ],
)
def test_types_are_enforced(config_class, field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{field}'"):
        config_class(**{field: value})


def test_types_are_enforced_on_assignment():
    config = LlavaSPProjectorConfig()
    with pytest.raises(StrictDataclassFieldValidationError, match="'grid_size' expected int, got str"):
        config.grid_size = "24"


def test_contradictions_are_refused_before_saving(tmp_path):
    config = tiny_config("cropping-dfi")
    config.image_token_id = 128
    with pytest.raises(StrictDataclassClassValidationError, match=r"`image_token_index` is 128, .* 128"):
        config.save_pretrained(tmp_path / "model")
    projector_config = LlavaSPProjectorConfig()
    projector_config.grid_size = 20
    with pytest.raises(StrictDataclassClassValidationError, match=r"Scale 24 .* larger than `grid_size` 20"):
        projector_config.save_pretrained(tmp_path / "projector")
    config = tiny_config("cropping-dfi")
    config.projector_config.spatial_scales = [3]
    with pytest.raises(StrictDataclassClassValidationError, match=r"Scale 3 .* cannot be centred on `grid_size` 12"):
        config.save_pretrained(tmp_path / "nested")


def comparable(config) -> dict:
    """All of a configuration but where it was loaded from."""
    return json.loads(json.dumps(config.to_dict(), sort_keys=True).replace(json.dumps(config._name_or_path), '""'))


def test_round_trip(variant, tmp_path):
    config = tiny_config(variant)
    config.save_pretrained(tmp_path)
    loaded = LlavaSPConfig.from_pretrained(tmp_path)
    assert comparable(loaded) == comparable(config)
    assert comparable(LlavaSPConfig.from_dict(config.to_dict())) == comparable(config)
    for name in ("vision_config", "text_config", "projector_config"):
        assert type(getattr(loaded, name)) is type(getattr(config, name))
    assert type(AutoConfig.from_pretrained(tmp_path)) is LlavaSPConfig
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "llava_sp"
    assert written["image_token_index"] == 100
    assert written["projector_config"]["spatial_scales"] == [2, 4, 6, 8, 10, 12]


def test_sub_configurations_load_from_a_full_folder(variant, tmp_path):
    config = tiny_config(variant)
    config.save_pretrained(tmp_path)
    projector_config = LlavaSPProjectorConfig.from_pretrained(tmp_path)
    assert comparable(projector_config) == comparable(config.projector_config)
    assert CLIPVisionConfig.from_pretrained(tmp_path).image_size == 84
    assert LlamaConfig.from_pretrained(tmp_path).vocab_size == 128


def test_projector_round_trip(tmp_path):
    config = LlavaSPProjectorConfig(
        vision_hidden_size=8,
        text_hidden_size=12,
        grid_size=9,
        spatial_variant="pooling",
        spatial_scales=[2, 5, 9],
        spatial_hidden_size=4,
        use_detail_integrator=True,
        detail_kernel_size=3,
        detail_stride=3,
        spatial_projection_bias=False,
        num_patch_layers=3,
        hidden_act="relu",
        layer_norm_eps=1e-3,
    )
    config.save_pretrained(tmp_path)
    assert comparable(LlavaSPProjectorConfig.from_pretrained(tmp_path)) == comparable(config)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LlavaSPProjectorConfig


def test_sub_configurations_as_dicts_or_objects():
    vision, text = tower(), LlamaConfig(vocab_size=128, hidden_size=64, num_attention_heads=4)
    objects = LlavaSPConfig(
        vision_config=vision,
        text_config=text,
        projector_config=LlavaSPProjectorConfig(vision_hidden_size=32, text_hidden_size=64, grid_size=12),
        image_token_id=100,
    )
    assert objects.vision_config is vision
    assert objects.text_config is text
    dicts = LlavaSPConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), projector_config={}, image_token_id=100
    )
    assert comparable(dicts) == comparable(objects)
    partial = LlavaSPConfig(
        vision_config={"hidden_size": 32, "num_attention_heads": 4, "image_size": 84, "patch_size": 7},
        text_config={"vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4},
        image_token_id=100,
    )
    assert comparable(partial) == comparable(objects)


def test_other_towers_and_language_models():
    config = LlavaSPConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 16, "hidden_size": 64},
        text_config={"model_type": "qwen2", "vocab_size": 128, "hidden_size": 48, "num_attention_heads": 4},
        image_token_index=3,
        vision_feature_select_strategy="full",
    )
    assert type(config.vision_config) is SiglipVisionConfig
    assert type(config.text_config) is Qwen2Config
    assert (config.projector_config.vision_hidden_size, config.projector_config.text_hidden_size) == (64, 48)
    assert config.projector_config.grid_size == 24


def test_image_token_has_both_names():
    config = LlavaSPConfig(image_token_id=7)
    assert config.image_token_index == config.image_token_id == 7
    assert LlavaSPConfig(image_token_index=7).image_token_id == 7


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_follow_the_language_model(tied, tmp_path):
    config = tiny_config("cropping-dfi", tie_word_embeddings=tied)
    assert config.tie_word_embeddings is tied
    config.save_pretrained(tmp_path)
    assert LlavaSPConfig.from_pretrained(tmp_path).tie_word_embeddings is tied


@pytest.mark.parametrize(
    "image_size, patch_size, grid_size", [(336, 14, 24), (384, 16, 24), ([448, 448], (14, 14), 32), (340, 14, 24)]
)
def test_vision_grid_size(image_size, patch_size, grid_size):
    """As the towers' patch convolutions do, a remainder of less than one patch is left out."""
    config = CLIPVisionConfig()
    config.image_size, config.patch_size = image_size, patch_size
    assert vision_grid_size(config) == grid_size


def test_text_config_is_what_generation_reads():
    config = tiny_config("cropping-dfi")
    assert config.get_text_config() is config.text_config


def fields(config, *names: str) -> dict:
    return {name: getattr(config, name) for name in names}


def test_defaults_describe_the_released_cropping_7b():
    config = LlavaSPConfig()
    assert type(config.vision_config) is CLIPVisionConfig
    expected = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    assert fields(config.vision_config, *expected) == expected

    assert type(config.text_config) is LlamaConfig
    expected = {
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    assert fields(config.text_config, *expected) == expected

    expected = {
        "vision_hidden_size": 1024,
        "text_hidden_size": 4096,
        "grid_size": 24,
        "spatial_variant": "cropping",
        "spatial_scales": [4, 8, 12, 16, 20, 24],
        "spatial_hidden_size": 512,
        "use_detail_integrator": True,
        "detail_kernel_size": 16,
        "detail_stride": 2,
        "spatial_projection_bias": True,
        "num_patch_layers": 2,
        "hidden_act": "gelu",
        "num_spatial_tokens": 6,
        "num_detail_tokens": 25,
        "num_patch_tokens": 576,
        "num_image_tokens": 582,
    }
    assert fields(config.projector_config, *expected) == expected
    assert comparable(LlavaSPProjectorConfig()) == comparable(config.projector_config)

    expected = {
        "image_token_id": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }
    assert fields(config, *expected) == expected


@pytest.mark.parametrize("config", [LlavaSPProjectorConfig(), LlavaSPConfig()], ids=["projector", "model"])
def test_pushing_uploads_the_saved_folder(config, tmp_path, monkeypatch):
    pushed = {}
    monkeypatch.setattr(
        type(config), "push_to_hub", lambda self, repo_id, **kwargs: pushed.update(repo_id=repo_id, **kwargs)
    )
    config.save_pretrained(tmp_path / "name", push_to_hub=True, private=True)
    assert pushed == {"repo_id": "name", "private": True}
    config.save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="someone/else")
    assert pushed["repo_id"] == "someone/else"
