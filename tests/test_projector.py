"""The projector against a plain implementation written here, in float64 and without any module of the package."""

import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize_
from transformers import AutoConfig, AutoModel

from transformers_llava_sp import LlavaSPProjector, LlavaSPProjectorConfig, modeling_llava_sp
from transformers_llava_sp.configuration_llava_sp import HUB_MODULES
from transformers_llava_sp.modeling_llava_sp import MatmulConv2d, SpatialFeatureExtractor, multiply_on_cpu


SIZES = {"vision_hidden_size": 6, "text_hidden_size": 10, "spatial_hidden_size": 5}

# Grids of both parities, maps of one patch and of the whole grid, pooling with and without a remainder, kernels of one
# patch and of the whole grid, strides that leave patches over
GEOMETRIES = {
    "cropping-24": {"grid_size": 24},
    "cropping-27": {"grid_size": 27},
    "cropping-7-listed": {
        "grid_size": 7,
        "spatial_scales": [1, 3, 7],
        "detail_kernel_size": 4,
        "detail_stride": 3,
        "num_patch_layers": 3,
    },
    "cropping-one-scale": {"grid_size": 12, "spatial_scales": [12], "detail_kernel_size": 1, "detail_stride": 5},
    "pooling-24": {"grid_size": 24, "spatial_variant": "pooling", "spatial_projection_bias": False},
    "pooling-12": {"grid_size": 12, "spatial_variant": "pooling", "num_patch_layers": 1, "hidden_act": "relu"},
    "pooling-9-any-parity": {
        "grid_size": 9,
        "spatial_variant": "pooling",
        "spatial_scales": [2, 3, 8, 9],
        "detail_kernel_size": 9,
        "detail_stride": 1,
        "layer_norm_eps": 0.1,
    },
}


def random_geometry(seed: int) -> dict:
    """A valid configuration drawn from a seed."""
    draw = random.Random(seed)
    grid_size = draw.randint(3, 17)
    spatial_variant = draw.choice(["cropping", "pooling"])
    step = 2 if spatial_variant == "cropping" else 1
    candidates = list(range(grid_size, 0, -step))
    return {
        "grid_size": grid_size,
        "spatial_variant": spatial_variant,
        "spatial_scales": sorted(draw.sample(candidates, draw.randint(1, len(candidates)))),
        "detail_kernel_size": draw.randint(1, grid_size),
        "detail_stride": draw.randint(1, 4),
        "spatial_projection_bias": draw.random() < 0.5,
        "num_patch_layers": draw.randint(1, 3),
    }


GEOMETRIES |= {f"random-{seed}": random_geometry(seed) for seed in range(12)}


def make_projector(seed: int = 0, **overrides) -> LlavaSPProjector:
    return randomize_(LlavaSPProjector(LlavaSPProjectorConfig(**{**SIZES, **overrides})), seed).eval()


def make_features(config: LlavaSPProjectorConfig, num_images: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, config.grid_size**2, config.vision_hidden_size, generator=generator)


def activation(x: torch.Tensor, name: str) -> torch.Tensor:
    return {"gelu": lambda: x * (1 + torch.erf(x / math.sqrt(2))) / 2, "relu": lambda: x.clamp(min=0)}[name]()


def normalise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def averaging_matrix(grid_size: int, size: int) -> torch.Tensor:
    """Row `i` averages the patches from `floor(i * grid / size)` up to `ceil((i + 1) * grid / size)`."""
    matrix = torch.zeros(size, grid_size, dtype=torch.float64)
    for row in range(size):
        start, end = row * grid_size // size, -(-(row + 1) * grid_size // size)
        matrix[row, start:end] = 1 / (end - start)
    return matrix


def reference(projector: LlavaSPProjector, patch_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The projector's tokens and detail attention, from its weights and configuration alone."""
    config = projector.config
    weights = {name: tensor.double() for name, tensor in projector.state_dict().items()}
    features = patch_features.double()
    grid = features.reshape(len(features), config.grid_size, config.grid_size, -1).permute(0, 3, 1, 2)

    spatial = []
    for index, size in enumerate(config.spatial_scales):
        kernel = weights[f"spatial_feature_extractor.convolutions.{index}.weight"]
        if config.spatial_variant == "cropping":
            # A crop under its kernel is the whole grid under the kernel with a frame of zeros
            margin = (config.grid_size - size) // 2
            spatial.append(F.conv2d(grid, F.pad(kernel, [margin] * 4))[:, :, 0, 0])
        else:
            pool = averaging_matrix(config.grid_size, size)
            pooled = torch.einsum("ri,nvij,cj->nvrc", pool, grid, pool)
            spatial.append(torch.einsum("nvrc,mvrc->nm", pooled, kernel))
    spatial = torch.stack(spatial, dim=1)

    attention = None
    if config.use_detail_integrator:

        def project(x, name):
            prefix = f"detail_feature_integrator.{name}"
            x = normalise(x, weights[f"{prefix}_norm.weight"], weights[f"{prefix}_norm.bias"], config.layer_norm_eps)
            return torch.einsum("nti,oi->nto", x, weights[f"{prefix}_proj.weight"]) + weights[f"{prefix}_proj.bias"]

        kernel = weights["detail_feature_integrator.detail_convolution.weight"]
        starts = range(0, config.grid_size - config.detail_kernel_size + 1, config.detail_stride)
        windows = [
            grid[:, :, row : row + config.detail_kernel_size, column : column + config.detail_kernel_size]
            for row in starts
            for column in starts
        ]
        details = torch.stack([torch.einsum("nvrc,mvrc->nm", window, kernel) for window in windows], dim=1)
        scores = torch.einsum("nsd,ntd->nst", project(spatial, "query"), project(details, "key"))
        exponentials = (scores / math.sqrt(config.spatial_hidden_size)).exp()
        attention = exponentials / exponentials.sum(-1, keepdim=True)
        integrated = torch.einsum("nst,ntd->nsd", attention, project(details, "value"))
        spatial = torch.cat([spatial, integrated], dim=-1)

    spatial_tokens = torch.einsum(
        "nsi,oi->nso", activation(spatial, config.hidden_act), weights["spatial_projection.weight"]
    )
    if config.spatial_projection_bias:
        spatial_tokens = spatial_tokens + weights["spatial_projection.bias"]

    patch_tokens = features
    for layer in range(config.num_patch_layers):
        if layer > 0:
            patch_tokens = activation(patch_tokens, config.hidden_act)
        patch_tokens = torch.einsum("npi,oi->npo", patch_tokens, weights[f"patch_mlp.layers.{layer}.weight"])
        patch_tokens = patch_tokens + weights[f"patch_mlp.layers.{layer}.bias"]
    return torch.cat([spatial_tokens, patch_tokens], dim=1), attention


@pytest.mark.parametrize("use_detail_integrator", [True, False], ids=["dfi", "no-dfi"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@torch.no_grad()
def test_equals_the_plain_implementation(geometry, use_detail_integrator):
    projector = make_projector(**geometry, use_detail_integrator=use_detail_integrator)
    config = projector.config
    patch_features = make_features(config)
    outputs = projector(patch_features, output_attentions=True)
    tokens, attention = reference(projector, patch_features)

    assert outputs.last_hidden_state.shape == (2, config.num_image_tokens, config.text_hidden_size)
    assert outputs.last_hidden_state.dtype == torch.float32
    torch.testing.assert_close(outputs.last_hidden_state.double(), tokens, rtol=0, atol=1e-5)
    if use_detail_integrator:
        assert outputs.detail_attentions.shape == (2, config.num_spatial_tokens, config.num_detail_tokens)
        torch.testing.assert_close(outputs.detail_attentions.double(), attention, rtol=0, atol=1e-5)
    else:
        assert outputs.detail_attentions is None
        assert not any("detail" in name for name in projector.state_dict())


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.002}


@pytest.mark.parametrize("with_gradients", [True, False], ids=["with-gradients", "without"])
@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("shape", "out_channels", "kernel_size", "stride", "bias"),
    [
        ((6, 8, 8), 64, 8, 1, False),  # a whole map, as the Spatial Feature Extractor's
        ((6, 12, 12), 24, 8, 2, False),  # windows, as the Detail Feature Integrator's
        ((3, 9, 7), 5, (4, 2), (3, 1), True),
        ((4, 6, 6), 6, 1, 1, True),  # as PEFT's second factor
    ],
    ids=["map", "windows", "odd", "pointwise"],
)
def test_convolutions_are_pytorchs(shape, out_channels, kernel_size, stride, bias, dtype, num_images, with_gradients):
    torch.manual_seed(0)
    module = MatmulConv2d(shape[0], out_channels, kernel_size, stride, bias=bias).to(dtype)
    maps = torch.randn(num_images, *shape, dtype=dtype)
    with torch.set_grad_enabled(with_gradients):
        output = module(maps)
    assert output.dtype == dtype
    weight, bias = (None if parameter is None else parameter.double() for parameter in (module.weight, module.bias))
    expected = F.conv2d(maps.double(), weight, bias, stride)
    torch.testing.assert_close(output.double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("out_features", [64, 6, 5])
@pytest.mark.parametrize("library", ["HAS_MKL", "HAS_AMX", None])
def test_products_in_every_form(monkeypatch, library, out_features, num_rows, dtype):
    """In the forms for libraries that are not on this machine as well, which only make them fast."""
    for name in ("HAS_MKL", "HAS_AMX"):
        monkeypatch.setattr(modeling_llava_sp, name, name == library)
    calls = []
    for module, name in ((F, "linear"), (torch, "bmm")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, n=name, f=function: calls.append(n) or f(*args))
    torch.manual_seed(0)
    rows, weight = torch.randn(num_rows, 40, dtype=dtype), torch.randn(out_features, 40, dtype=dtype)
    products = multiply_on_cpu(rows, weight)
    batched = {"HAS_MKL": dtype == torch.float32, "HAS_AMX": dtype == torch.bfloat16 and num_rows == 1}
    assert calls == ["bmm" if batched.get(library) else "linear"]
    assert products.dtype == dtype
    expected = rows.double() @ weight.double().T
    torch.testing.assert_close(products.double(), expected, rtol=TOLERANCES[dtype], atol=10 * TOLERANCES[dtype])


@pytest.mark.parametrize("arguments", [{"padding": 1}, {"dilation": 2}, {"groups": 2}], ids=str)
def test_what_the_product_does_not_compute_is_refused(arguments):
    with pytest.raises(ValueError, match=r"neither padding nor dilation nor groups: MatmulConv2d\(4, 4, kernel_size"):
        MatmulConv2d(4, 4, 2, **arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("library", ["HAS_MKL", "HAS_AMX"])
@torch.no_grad()
def test_traced_for_one_image_and_run_for_three(monkeypatch, library):
    monkeypatch.setattr(modeling_llava_sp, library, True)
    dtype = torch.float32 if library == "HAS_MKL" else torch.bfloat16
    convolution = MatmulConv2d(3, 5, 2, stride=2, bias=False).to(dtype)
    one, three = torch.randn(1, 3, 2, 2, dtype=dtype), torch.randn(3, 3, 2, 2, dtype=dtype)
    traced = torch.jit.trace(convolution, one)
    torch.testing.assert_close(traced(three), convolution(three))


@pytest.mark.parametrize("spatial_variant", ["cropping", "pooling"])
@torch.no_grad()
def test_autocast_computes_as_it_does_elsewhere(monkeypatch, spatial_variant):
    """By PyTorch's plain functions, of which it knows what dtype each should have."""
    projector = make_projector(grid_size=12, spatial_variant=spatial_variant)
    patch_features = make_features(projector.config)
    monkeypatch.setattr(modeling_llava_sp, "multiply_on_cpu", None)
    monkeypatch.setattr(F, "adaptive_avg_pool1d", None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = projector(patch_features).last_hidden_state
    monkeypatch.undo()
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), projector(patch_features).last_hidden_state, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid_size", [24, 27])
def test_pooled_maps_are_pytorchs(grid_size, dtype):
    config = LlavaSPProjectorConfig(**SIZES, grid_size=grid_size, spatial_variant="pooling")
    extractor = SpatialFeatureExtractor(config)
    patch_grid = torch.randn(2, SIZES["vision_hidden_size"], grid_size, grid_size).to(dtype)
    for size, pooled in zip(config.spatial_scales, extractor.get_feature_maps(patch_grid), strict=True):
        assert pooled.dtype == dtype
        # Rounded once, to half of a step at most
        expected = F.adaptive_avg_pool2d(patch_grid.double(), size)
        tolerance = torch.finfo(dtype).eps * (0.51 if dtype.itemsize == 2 else 4)
        smallest = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        torch.testing.assert_close(pooled.double(), expected, rtol=tolerance, atol=smallest)


@torch.no_grad()
def test_outputs():
    projector = make_projector(grid_size=12)
    patch_features = make_features(projector.config)
    with_attention = projector(patch_features, output_attentions=True)
    assert projector(patch_features).detail_attentions is None
    [tokens] = projector(patch_features, return_dict=False)
    assert torch.equal(tokens, with_attention.last_hidden_state)
    tokens, attention = projector(patch_features, output_attentions=True, return_dict=False)
    assert torch.equal(attention, with_attention.detail_attentions)
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


@pytest.mark.parametrize("spatial_variant", ["cropping", "pooling"])
@torch.no_grad()
def test_scales_see_their_own_part_of_the_grid(spatial_variant):
    projector = make_projector(grid_size=12, spatial_variant=spatial_variant, use_detail_integrator=False)
    patch_features = make_features(projector.config, num_images=1)
    changed = patch_features.clone()
    changed[:, 0] += 1  # the corner patch, which only the whole grid's crop has
    is_equal = (projector(changed).last_hidden_state == projector(patch_features).last_hidden_state).all(-1)[0]
    num_blind = 5 if spatial_variant == "cropping" else 0
    assert is_equal.tolist() == [True] * num_blind + [False] * (6 - num_blind) + [False] + [True] * 143


@torch.no_grad()
def test_nan_is_not_hidden():
    projector = make_projector(grid_size=12)
    patch_features = make_features(projector.config)
    patch_features[1, 77, 3] = torch.nan
    tokens = projector(patch_features).last_hidden_state
    assert tokens[0].isfinite().all()
    assert tokens[1, projector.config.num_spatial_tokens - 1].isnan().all()
    assert tokens[1, projector.config.num_spatial_tokens + 77].isnan().all()


@pytest.mark.parametrize("use_detail_integrator", [True, False], ids=["dfi", "no-dfi"])
@torch.no_grad()
def test_batch_equals_each_image_alone(use_detail_integrator):
    projector = make_projector(grid_size=12, use_detail_integrator=use_detail_integrator)
    patch_features = make_features(projector.config, num_images=5)
    batch = projector(patch_features).last_hidden_state
    alone = torch.cat([projector(image[None]).last_hidden_state for image in patch_features])
    torch.testing.assert_close(batch, alone, rtol=0, atol=1e-6)


@torch.no_grad()
def test_input_is_cast_to_the_projectors_dtype():
    projector = make_projector(grid_size=12).to(torch.bfloat16)
    patch_features = make_features(projector.config)
    tokens = projector(patch_features).last_hidden_state
    assert tokens.dtype == torch.bfloat16
    assert torch.equal(tokens, projector(patch_features.to(torch.bfloat16)).last_hidden_state)
    expected = make_projector(grid_size=12)(patch_features).last_hidden_state
    assert (tokens.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    "shape",
    [(2, 145, 6), (2, 143, 6), (2, 144, 5), (144, 6), (2, 12, 12, 6)],
    ids=["class-token", "patch-missing", "channels", "no-batch", "grid"],
)
def test_wrong_shapes_are_refused(shape):
    projector = make_projector(grid_size=12)
    with pytest.raises(ValueError) as error:
        projector(torch.zeros(shape))
    message = str(error.value)
    assert message.startswith(
        f"The projector expects patch features of shape (images, 144, 6), a grid of 12x12, but got {shape}."
    )
    assert "`vision_feature_select_strategy`" in message


@pytest.mark.parametrize("spatial_variant", ["cropping", "pooling"])
@pytest.mark.parametrize("use_detail_integrator", [True, False], ids=["dfi", "no-dfi"])
def test_gradient_reaches_every_parameter(spatial_variant, use_detail_integrator):
    projector = make_projector(
        grid_size=12, spatial_variant=spatial_variant, use_detail_integrator=use_detail_integrator
    )
    patch_features = make_features(projector.config).requires_grad_()
    tokens = projector(patch_features).last_hidden_state
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))
    (tokens * weights).sum().backward()

    # What is added to every key moves all scores of a query alike, which the softmax does not see
    invariant = {f"detail_feature_integrator.{name}.bias" for name in ("key_norm", "key_proj")}
    assert patch_features.grad.abs().min() > 0
    names = set()
    for name, parameter in projector.named_parameters():
        names.add(name)
        if name in invariant:
            assert parameter.grad.abs().max() < 1e-5
        else:
            assert parameter.grad.abs().max() > 1e-3, name
    assert invariant <= names if use_detail_integrator else not invariant & names


@torch.no_grad()
def test_keys_can_be_shifted_without_effect():
    projector = make_projector(grid_size=12)
    patch_features = make_features(projector.config)
    before = projector(patch_features).last_hidden_state
    projector.detail_feature_integrator.key_proj.bias.add_(3)
    torch.testing.assert_close(projector(patch_features).last_hidden_state, before, rtol=0, atol=1e-5)
    projector.detail_feature_integrator.query_proj.bias.add_(3)
    assert (projector(patch_features).last_hidden_state - before).abs().max() > 1e-3


@pytest.mark.parametrize("load", [LlavaSPProjector.from_pretrained, AutoModel.from_pretrained], ids=["class", "auto"])
@torch.no_grad()
def test_saves_and_loads_alone(tmp_path, load):
    geometry = {"grid_size": 9, "spatial_scales": [3, 9], "num_patch_layers": 3, "spatial_projection_bias": False}
    projector = make_projector(**geometry)
    projector.save_pretrained(tmp_path)
    loaded, report = load(tmp_path, output_loading_info=True)

    assert type(loaded) is LlavaSPProjector
    assert {key: len(value) for key, value in report.items() if value} == {}
    assert type(AutoConfig.from_pretrained(tmp_path)) is LlavaSPProjectorConfig
    assert {name: getattr(loaded.config, name) for name in geometry} == geometry
    expected = projector.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    patch_features = make_features(projector.config)
    assert torch.equal(loaded(patch_features).last_hidden_state, projector(patch_features).last_hidden_state)


def test_saved_folder_describes_itself(tmp_path):
    make_projector(grid_size=12).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlavaSPProjector"]
    assert config["model_type"] == "llava_sp_projector"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_llava_sp.LlavaSPProjectorConfig",
        "AutoModel": "modeling_llava_sp.LlavaSPProjector",
    }
    assert set(HUB_MODULES) <= {path.name for path in tmp_path.iterdir()}


def test_initialisation_is_pytorchs():
    """Uniform within 1/sqrt(fan in), as the authors train from; all maps' outputs are then of one magnitude."""
    torch.manual_seed(0)
    projector = LlavaSPProjector(
        LlavaSPProjectorConfig(grid_size=12, vision_hidden_size=32, spatial_hidden_size=64, text_hidden_size=48)
    )
    for name, parameter in projector.named_parameters():
        module = projector.get_submodule(name.rpartition(".")[0])
        if isinstance(module, torch.nn.LayerNorm):
            assert torch.equal(parameter, torch.full_like(parameter, name.endswith("weight")))
        else:
            bound = module.weight[0].numel() ** -0.5
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2), name


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ({}, {"spatial_projection": 1024 * 4096 + 4096}),
        (
            {"spatial_variant": "pooling", "spatial_projection_bias": False},
            {"spatial_projection": 1024 * 4096},
        ),
        (
            {"spatial_variant": "pooling", "spatial_projection_bias": False, "use_detail_integrator": False},
            {"spatial_projection": 512 * 4096, "detail_feature_integrator": 0},
        ),
    ],
    ids=["released-cropping", "released-pooling", "pooling-without-dfi"],
)
def test_parameter_counts_of_the_7b_projectors(overrides, expected):
    with torch.device("meta"):
        projector = LlavaSPProjector(LlavaSPProjectorConfig(**overrides))
    counts = dict.fromkeys(
        ("spatial_feature_extractor", "detail_feature_integrator", "spatial_projection", "patch_mlp"), 0
    )
    for name, parameter in projector.named_parameters():
        counts[name.partition(".")[0]] += parameter.numel()
    assert counts == {
        "spatial_feature_extractor": 1456 * 1024 * 512,
        "detail_feature_integrator": 16**2 * 1024 * 512 + 3 * (2 * 512 + 512**2 + 512),
        "patch_mlp": 1024 * 4096 + 4096 + 4096**2 + 4096,
        **expected,
    }
