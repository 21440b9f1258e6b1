"""
The converter: every tensor of the authors' checkpoints goes where it belongs, with the right value, in all variants;
what cannot be converted is refused with a reason, and leaves nothing behind. That the outputs are the authors' is the
business of test_golden.py; here are mostly the things that outputs cannot show.
"""

import hashlib
import json
import logging
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES, MINI_GOLDEN
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from typer.testing import CliRunner

from transformers_llava_sp import LlavaSPConfig, LlavaSPForConditionalGeneration
from transformers_llava_sp.cli import app
from transformers_llava_sp.conversion import ConversionError, checkpoint, convert_checkpoint, inspect_checkpoint
from transformers_llava_sp.conversion.original import PROJECTOR_KEYS


PREFIX = "base_model.model.model."
PROJECTOR = "model.multi_modal_projector."
DETAIL = f"{PROJECTOR}detail_feature_integrator."

# Of the miniature checkpoints: widths of vision, spatial and text features, patch grid, image side
VISION, SPATIAL, TEXT, GRID, IMAGE_SIDE = 16, 6, 32, 24, 336


def write_json(path, **changes):
    """Change entries of a JSON file; `...` removes one."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@dataclass
class Inputs:
    """Copies of a miniature checkpoint, its base model and its vision tower, to be changed by a test."""

    folder: Path

    def __post_init__(self):
        self.release, self.base, self.tower = (self.folder / name for name in ("release", "base", "vision"))
        self.output = self.folder / "converted"
        self.projector_file = self.release / "non_lora_trainables.bin"
        self.adapter_file = self.release / "adapter_model.safetensors"
        self.tower_file = self.tower / "model.safetensors"

    def convert(self, **kwargs):
        parts = {"base_model": self.base, "vision_tower": self.tower}
        return convert_checkpoint(self.release, self.output, **{**parts, **kwargs})

    def projector(self):
        return torch.load(self.projector_file, weights_only=True)

    def write_projector(self, tensors):
        torch.save(tensors, self.projector_file)

    def adapter(self):
        return load_file(self.adapter_file)

    def write_adapter(self, tensors):
        save_file(tensors, self.adapter_file)

    def base_weights(self):
        shards = [torch.load(path, weights_only=True) for path in self.base.glob("*.bin")]
        shards += [load_file(path) for path in self.base.glob("*.safetensors")]
        return {key: tensor for shard in shards for key, tensor in shard.items()}

    def write_base(self, tensors):
        """The base model's weights as one safetensors file."""
        for path in self.base.glob("pytorch_model*"):
            path.unlink()
        save_file(tensors, self.base / "model.safetensors")

    def tower_weights(self):
        return load_file(self.tower_file)

    def write_tower(self, tensors):
        save_file(tensors, self.tower_file)


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small take longer to hand to threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_inputs(tmp_path):
    def make(name="mini-cropping"):
        for part in ("release", "base", "vision"):
            shutil.copytree(FIXTURES / name / part, tmp_path / part)
        return Inputs(tmp_path)

    return make


@pytest.fixture
def inputs(make_inputs):
    return make_inputs()


def converted_tensors(inputs):
    return load_file(inputs.output / "model.safetensors")


def random_tensors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes.items()}


def projector_shapes(
    sizes,
    pooled=False,
    detail_kernel=None,
    bias=False,
    layers=2,
    numbers=None,
    spatial=SPATIAL,
    vision=VISION,
    text=TEXT,
):
    """The keys, without prefix, and shapes of a projector as the authors' code writes it."""
    shapes = {}
    for number, size in zip(numbers or sizes, sizes, strict=True):
        infix = ".1" if pooled and size != max(sizes) else ""
        shapes[f"conv_{number}{infix}.weight"] = (spatial, vision, size, size)
    width = spatial
    if detail_kernel is not None:
        width = 2 * spatial
        shapes["conv_CM.weight"] = (spatial, vision, detail_kernel, detail_kernel)
        for name in ("query", "key", "value"):
            shapes[f"{name}_projector.0.weight"] = shapes[f"{name}_projector.0.bias"] = (spatial,)
            shapes[f"{name}_projector.1.weight"] = (spatial, spatial)
            shapes[f"{name}_projector.1.bias"] = (spatial,)
    shapes["conv_linear.1.weight"] = (text, width)
    if bias:
        shapes["conv_linear.1.bias"] = (text,)
    for layer in range(layers or 1):
        position = f".{2 * layer}" if layers is not None else ""
        shapes[f"mm_projector{position}.weight"] = (text, text if layer else vision)
        shapes[f"mm_projector{position}.bias"] = (text,)
    return {PREFIX + key: shape for key, shape in shapes.items()}


SIX = [4, 8, 12, 16, 20, 24]
CHECKPOINTS = {
    "cropping-dfi": projector_shapes(SIX, detail_kernel=16, bias=True),
    "pooling-dfi": projector_shapes(SIX, pooled=True, detail_kernel=16),
    "pooling": projector_shapes(SIX, pooled=True),
    "cropping": projector_shapes(SIX),
    "3-scales": projector_shapes([8, 16, 24]),
    "12-scales": projector_shapes(list(range(2, 25, 2))),
    "1-scale": projector_shapes([24]),
    "detail-kernel-12": projector_shapes(SIX, pooled=True, detail_kernel=12),
    "detail-kernel-9": projector_shapes(SIX, detail_kernel=9, bias=True),
    "other-width": projector_shapes(SIX, detail_kernel=16, bias=True, spatial=10),
    "linear-patch-path": projector_shapes(SIX, layers=None),
    "1-patch-layer": projector_shapes(SIX, layers=1),
    "3-patch-layers": projector_shapes(SIX, layers=3),
    "224-pixels": projector_shapes(list(range(2, 17, 2)), numbers=list(range(1, 9))),
}
PROJECTOR_TYPES = {"linear-patch-path": "linear", "1-patch-layer": "mlp1x_gelu", "3-patch-layers": "mlp3x_gelu"}


def shrink_tower(inputs, grid):
    """Make the vision tower one for smaller images, with the same patches."""
    side = IMAGE_SIDE * grid // GRID
    tower_with(image_size=side)(inputs)
    write_json(inputs.tower / "preprocessor_config.json", size={"shortest_edge": side}, crop_size=side)
    weights = inputs.tower_weights()
    key = "vision_model.embeddings.position_embedding.weight"
    inputs.write_tower({**weights, key: weights[key][: grid**2 + 1].clone()})


def plain_projector(tensors, pooled, patch_features, grid):
    """
    The projector's formulas on the authors' tensors: the maps cut or pooled, convolutions as convolutions, the
    attention written out. Nothing here is shared with the package.
    """
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    feature_map = patch_features.transpose(1, 2).unflatten(2, (grid, grid))
    kernels = [key for key in tensors if key.startswith("conv_") and tensors[key].ndim == 4 and "CM" not in key]
    spatial = []
    for key in sorted(kernels, key=lambda key: tensors[key].shape[-1]):
        size = tensors[key].shape[-1]
        first = (grid - size) // 2
        if pooled:
            scaled = F.adaptive_avg_pool2d(feature_map, size)
        else:
            scaled = feature_map[:, :, first : first + size, first : first + size]
        spatial.append(F.conv2d(scaled, tensors[key]).flatten(1))
    spatial = torch.stack(spatial, dim=1)
    if "conv_CM.weight" in tensors:
        details = F.conv2d(feature_map, tensors["conv_CM.weight"], stride=2).flatten(2).transpose(1, 2)

        def project(name, features):
            normed = F.layer_norm(
                features,
                features.shape[-1:],
                tensors[f"{name}_projector.0.weight"],
                tensors[f"{name}_projector.0.bias"],
            )
            return normed @ tensors[f"{name}_projector.1.weight"].T + tensors[f"{name}_projector.1.bias"]

        scores = project("query", spatial) @ project("key", details).transpose(1, 2) / spatial.shape[-1] ** 0.5
        spatial = torch.cat([spatial, scores.softmax(-1) @ project("value", details)], dim=-1)
    spatial = F.gelu(spatial) @ tensors["conv_linear.1.weight"].T + tensors.get("conv_linear.1.bias", 0.0)

    patches = patch_features
    names = sorted({key.rsplit(".", 1)[0] for key in tensors if key.startswith("mm_projector")})
    for index, name in enumerate(names):
        patches = F.gelu(patches) if index else patches
        patches = patches @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
    return torch.cat([spatial, patches], dim=1)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_architecture_comes_from_keys_and_shapes(inputs, name):
    shapes = CHECKPOINTS[name]
    sizes = sorted(shape[-1] for key, shape in shapes.items() if len(shape) == 4 and "CM" not in key)
    grid = sizes[-1]
    pooled = any(".1.weight" in key and len(shape) == 4 for key, shape in shapes.items())
    source = random_tensors(shapes)
    # The order in the file must not matter
    inputs.write_projector(dict(sorted(source.items(), reverse=True)))
    write_json(inputs.release / "config.json", mm_projector_type=PROJECTOR_TYPES.get(name, "mlp2x_gelu"))
    if grid != GRID:
        shrink_tower(inputs, grid)

    report = inputs.convert()

    config = LlavaSPConfig.from_pretrained(inputs.output).projector_config
    assert config.to_dict() == report.config.projector_config.to_dict()
    detail = shapes.get(f"{PREFIX}conv_CM.weight")
    assert (config.spatial_variant, config.spatial_scales) == ("pooling" if pooled else "cropping", sizes)
    assert (config.vision_hidden_size, config.text_hidden_size, config.grid_size) == (VISION, TEXT, grid)
    assert config.spatial_hidden_size == shapes[f"{PREFIX}conv_linear.1.weight"][1] // (2 if detail else 1)
    assert config.use_detail_integrator == (detail is not None)
    assert config.num_detail_tokens == (((grid - detail[-1]) // 2 + 1) ** 2 if detail else 0)
    assert config.spatial_projection_bias == (f"{PREFIX}conv_linear.1.bias" in shapes)

    model = LlavaSPForConditionalGeneration.from_pretrained(inputs.output)
    projector = model.model.multi_modal_projector.double()
    assert sum(parameter.numel() for parameter in projector.parameters()) == sum(
        tensor.numel() for tensor in source.values()
    )
    source = {key: tensor.double() for key, tensor in source.items()}
    patch_features = torch.randn(2, grid**2, VISION, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        features = projector(patch_features).last_hidden_state
    torch.testing.assert_close(features, plain_projector(source, pooled, patch_features, grid))

    processor = AutoProcessor.from_pretrained(inputs.output)
    assert processor.num_image_tokens == len(sizes) + grid**2 == config.num_image_tokens


def test_key_table_lists_every_projector_key():
    keys = {key.removeprefix(PREFIX) for shapes in CHECKPOINTS.values() for key in shapes}
    keys = {re.sub(r"conv_\d+", "conv_{number}", key) for key in keys}
    assert {re.sub(r"mm_projector\.\d+", "mm_projector.{position}", key) for key in keys} == set(PROJECTOR_KEYS)


CONVOLUTIONS = f"{PROJECTOR}spatial_feature_extractor.convolutions"
STORED_PROJECTOR = {
    "conv_CM.weight": f"{DETAIL}detail_convolution.weight",
    "query_projector.0.weight": f"{DETAIL}query_norm.weight",
    "query_projector.0.bias": f"{DETAIL}query_norm.bias",
    "query_projector.1.weight": f"{DETAIL}query_proj.weight",
    "query_projector.1.bias": f"{DETAIL}query_proj.bias",
    "key_projector.0.weight": f"{DETAIL}key_norm.weight",
    "key_projector.0.bias": f"{DETAIL}key_norm.bias",
    "key_projector.1.weight": f"{DETAIL}key_proj.weight",
    "key_projector.1.bias": f"{DETAIL}key_proj.bias",
    "value_projector.0.weight": f"{DETAIL}value_norm.weight",
    "value_projector.0.bias": f"{DETAIL}value_norm.bias",
    "value_projector.1.weight": f"{DETAIL}value_proj.weight",
    "value_projector.1.bias": f"{DETAIL}value_proj.bias",
    "conv_linear.1.weight": f"{PROJECTOR}spatial_projection.weight",
    "mm_projector.0.weight": f"{PROJECTOR}patch_mlp.layers.0.weight",
    "mm_projector.0.bias": f"{PROJECTOR}patch_mlp.layers.0.bias",
    "mm_projector.2.weight": f"{PROJECTOR}patch_mlp.layers.1.weight",
    "mm_projector.2.bias": f"{PROJECTOR}patch_mlp.layers.1.bias",
}
STORED = {
    "mini-cropping": {
        **STORED_PROJECTOR,
        "conv_linear.1.bias": f"{PROJECTOR}spatial_projection.bias",
        **{f"conv_{s}.weight": f"{CONVOLUTIONS}.{i}.weight" for i, s in enumerate(SIX)},
    },
    "mini-pooling": {
        **STORED_PROJECTOR,
        **{f"conv_{s}{'' if s == 24 else '.1'}.weight": f"{CONVOLUTIONS}.{i}.weight" for i, s in enumerate(SIX)},
    },
}


def expected_tensors(inputs, stored_projector):
    """All tensors of the converted model, from the authors' files, in float64."""
    expected = {}
    for key, tensor in inputs.projector().items():
        expected[stored_projector[key.removeprefix(PREFIX)]] = tensor.double()
    for key, tensor in inputs.tower_weights().items():
        if key.startswith("vision_model.") and not key.endswith("position_ids"):
            expected[key.replace("vision_model.", "model.vision_tower.", 1)] = tensor.double()
    config = json.loads((inputs.release / "adapter_config.json").read_text())
    adapter = inputs.adapter()
    for key, tensor in inputs.base_weights().items():
        if key.endswith("inv_freq"):
            continue
        tensor, lora = tensor.double(), f"base_model.model.{key.removesuffix('.weight')}.lora_"
        if f"{lora}A.weight" in adapter:
            product = adapter.pop(f"{lora}B.weight").double() @ adapter.pop(f"{lora}A.weight").double()
            tensor = tensor + product * config["lora_alpha"] / config["r"]
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = -(-(len(tensor) + 1) // 64) * 64 - len(tensor)
            tensor = torch.cat([tensor, tensor.mean(0, keepdim=True).repeat(rows, 1)])
        expected[key if key == "lm_head.weight" else key.replace("model.", "model.language_model.", 1)] = tensor
    assert not adapter
    return expected


@pytest.mark.parametrize("name", MINI_GOLDEN)
def test_every_stored_tensor_is_its_source(make_inputs, name):
    inputs = make_inputs(name)
    inputs.convert()
    expected, converted = expected_tensors(inputs, STORED[name]), converted_tensors(inputs)

    assert converted.keys() == expected.keys()
    merged = {key for key in expected if re.search(r"language_model\.layers\.\d+\.(self_attn|mlp)\.", key)}
    assert len(merged) == len(inputs.adapter()) // 2
    for key, tensor in converted.items():
        assert tensor.dtype == torch.float32
        if key in merged:
            torch.testing.assert_close(tensor.double(), expected[key], atol=1e-6, rtol=0, msg=key)
        elif key in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            assert torch.equal(tensor[:1000].double(), expected[key][:1000]), key
            torch.testing.assert_close(tensor[1000:].double(), expected[key][1000:], atol=1e-7, rtol=0, msg=key)
        else:
            assert torch.equal(tensor.double(), expected[key]), key


def test_old_buffers_and_the_text_half_are_dropped_and_said_so(inputs):
    weights = inputs.tower_weights()
    weights["vision_model.embeddings.position_ids"] = torch.arange(GRID**2 + 1)[None]
    inputs.write_tower(weights)

    report = inputs.convert()

    unused = {key for key in weights if not key.startswith("vision_model.") or key.endswith("position_ids")}
    assert len(unused) > 3
    assert set(report.dropped_keys) == unused | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)}


@pytest.mark.parametrize("use_rslora, scaling", [(False, 16 / 8), (True, 16 / 8**0.5)], ids=["lora", "rslora"])
def test_adapter_is_scaled_as_it_was_trained(inputs, use_rslora, scaling):
    write_json(inputs.release / "adapter_config.json", use_rslora=use_rslora)
    inputs.convert()
    key = "layers.1.mlp.down_proj"
    a, b = (inputs.adapter()[f"{PREFIX}{key}.lora_{matrix}.weight"] for matrix in "AB")
    merged = inputs.base_weights()[f"model.{key}.weight"] + (b @ a) * scaling
    converted = converted_tensors(inputs)[f"model.language_model.{key}.weight"]
    torch.testing.assert_close(converted, merged, atol=1e-6, rtol=0)


def test_adapter_of_the_head_is_merged_before_the_vocabulary_grows(inputs):
    adapter = {
        **inputs.adapter(),
        "base_model.model.lm_head.lora_A.weight": torch.full((8, TEXT), 0.5),
        "base_model.model.lm_head.lora_B.weight": torch.full((1000, 8), 0.25),
    }
    inputs.write_adapter(adapter)
    inputs.convert()
    head = converted_tensors(inputs)["lm_head.weight"]
    torch.testing.assert_close(head[:1000], inputs.base_weights()["lm_head.weight"] + 2.0)
    torch.testing.assert_close(head[1023], head[:1000].mean(0))


# Vocabulary


def test_image_token_is_the_first_free_id(inputs):
    report = inputs.convert()
    config, processor = LlavaSPConfig.from_pretrained(inputs.output), AutoProcessor.from_pretrained(inputs.output)
    assert (
        processor.tokenizer.convert_tokens_to_ids("<image>")
        == processor.image_token_id
        == config.image_token_id
        == 1000
    )
    assert len(processor.tokenizer) == 1001
    assert report.config.text_config.vocab_size == config.text_config.vocab_size == 1024
    assert converted_tensors(inputs)["lm_head.weight"].shape == (1024, TEXT)


def test_rows_without_a_piece_take_the_image_token(inputs):
    weights = inputs.base_weights()
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[key] = torch.cat([weights[key], torch.full((24, TEXT), 7.0)])
    inputs.write_base(weights)
    for folder in (inputs.base, inputs.release):
        write_json(folder / "config.json", vocab_size=1024)

    inputs.convert()

    assert LlavaSPConfig.from_pretrained(inputs.output).image_token_id == 1000
    assert torch.equal(converted_tensors(inputs)["lm_head.weight"], weights["lm_head.weight"])
    assert GenerationConfig.from_pretrained(inputs.output).suppress_tokens == list(range(1000, 1024))


def test_generation_is_greedy_and_cannot_yield_ids_without_a_piece(inputs, caplog):
    inputs.convert()
    logging.getLogger("transformers").propagate = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = GenerationConfig.from_pretrained(inputs.output)
        config.validate(strict=True)
    assert not caplog.records
    assert {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"} == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "do_sample": False,
        "suppress_tokens": list(range(1000, 1024)),
    }


# Tokenizer and processor


def bare_tokenizer(folder):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()


def no_tokenizer(folder):
    bare_tokenizer(folder)
    (folder / "tokenizer.model").unlink()


def no_release_tokenizer(inputs):
    no_tokenizer(inputs.release)


def bare_release_tokenizer(inputs):
    bare_tokenizer(inputs.release)


def bare_base_tokenizer(inputs):
    no_tokenizer(inputs.release)
    bare_tokenizer(inputs.base)


@pytest.mark.parametrize(
    "change",
    [None, no_release_tokenizer, bare_release_tokenizer, bare_base_tokenizer],
    ids=lambda c: getattr(c, "__name__", "as-released"),
)
def test_tokenizer_gives_the_authors_ids_wherever_it_comes_from(inputs, change):
    if change is not None:
        change(inputs)
    inputs.convert()

    processor = AutoProcessor.from_pretrained(inputs.output)
    tokenizer = processor.tokenizer
    assert (tokenizer.padding_side, tokenizer.model_max_length, tokenizer.pad_token) == ("left", 4096, "<unk>")
    assert tokenizer.legacy is False
    samples = json.loads((FIXTURES / "mini-cropping" / "golden" / "golden.json").read_text())["samples"]
    for sample in samples.values():
        # One slot for each image, and the space that the processor puts behind a run of them
        ids = tokenizer(sample["prompt"].replace("<image>", "<image> ")).input_ids
        assert [-200 if token == 1000 else token for token in ids] == sample["input_ids"]


def test_no_trace_of_this_machine_is_saved(inputs):
    inputs.convert()
    for path in inputs.output.glob("*.json"):
        assert str(inputs.folder) not in path.read_text(), path
        assert (
            not {"is_local", "local_files_only", "_name_or_path", "torch_dtype"} & json.loads(path.read_text()).keys()
        )


@pytest.mark.parametrize("aspect_ratio", ["square", None], ids=["square", "absent"])
def test_without_padding_the_towers_image_processor_crops(inputs, aspect_ratio):
    write_json(inputs.release / "config.json", image_aspect_ratio=aspect_ratio or ...)
    inputs.convert()
    processor = AutoProcessor.from_pretrained(inputs.output)
    image = Image.open(FIXTURES / "mini-cropping" / "golden" / "landscape.png")
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    reference = CLIPImageProcessorPil.from_pretrained(inputs.tower)(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, reference)


def test_padding_takes_the_towers_preprocessing(inputs):
    write_json(inputs.tower / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    inputs.convert()
    image_processor = AutoProcessor.from_pretrained(inputs.output).image_processor
    assert image_processor.do_pad
    pixels = image_processor(Image.new("RGB", (200, 100), "white"), return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, IMAGE_SIDE, IMAGE_SIDE)
    background = torch.tensor(
        [(int(mean * 255) / 255 - mean) / std for mean, std in zip((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), strict=True)]
    )
    torch.testing.assert_close(pixels[:, 0, 0], background, atol=1e-6, rtol=0)


# Configuration


def test_text_config_is_the_base_models(inputs):
    stated = {"rms_norm_eps": 2e-6, "rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    for folder in (inputs.base, inputs.release):
        write_json(folder / "config.json", **stated)
    write_json(inputs.base / "config.json", max_position_embeddings=777, pretraining_tp=2)

    inputs.convert()

    config = LlavaSPConfig.from_pretrained(inputs.output).text_config
    assert config.rms_norm_eps == 2e-6
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == ("linear", 2.0)
    assert (
        config.max_position_embeddings
        == AutoProcessor.from_pretrained(inputs.output).tokenizer.model_max_length
        == 777
    )
    assert config.pretraining_tp == 1


def test_vision_feature_layer_is_the_checkpoints(inputs):
    write_json(inputs.release / "config.json", mm_vision_select_layer=-3)
    inputs.convert()
    assert LlavaSPConfig.from_pretrained(inputs.output).vision_feature_layer == -3


@pytest.mark.parametrize("head", ["absent", "stored"])
def test_base_model_with_tied_embeddings(inputs, head):
    weights = inputs.base_weights()
    if head == "absent":
        weights.pop("lm_head.weight")
    inputs.write_base(weights)
    for folder in (inputs.base, inputs.release):
        write_json(folder / "config.json", tie_word_embeddings=True)

    inputs.convert()

    model = LlavaSPForConditionalGeneration.from_pretrained(inputs.output)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight[:1000], weights["model.embed_tokens.weight"])


# Number formats


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", "bfloat16"])
def test_dtype(inputs, stored, dtype):
    inputs.write_base({key: tensor.to(stored) for key, tensor in inputs.base_weights().items()})
    expected_dtype = stored if dtype == "auto" else getattr(torch, dtype)

    report = inputs.convert(dtype=dtype)

    assert report.dtype == expected_dtype
    assert f"torch.{json.loads((inputs.output / 'config.json').read_text())['dtype']}" == str(expected_dtype)
    assert LlavaSPForConditionalGeneration.from_pretrained(inputs.output).dtype == expected_dtype
    # Merged in float32 and rounded once: the result differs from the exact one by half a unit in the last place
    for key, expected in expected_tensors(inputs, STORED["mini-cropping"]).items():
        tensor = converted_tensors(inputs)[key]
        assert tensor.dtype == expected_dtype, key
        error = (tensor.double() - expected).abs()
        assert (error <= expected.abs() * torch.finfo(expected_dtype).eps / 2 * 1.01 + 1e-6).all(), key


def test_values_out_of_range_are_refused(inputs):
    weights = inputs.tower_weights()
    weights["vision_model.post_layernorm.bias"][3] = 1e5
    inputs.write_tower(weights)
    with pytest.raises(ConversionError, match=r"'vision_model\.post_layernorm\.bias'.*range of torch\.float16"):
        inputs.convert(dtype="float16")
    assert not inputs.output.exists()


# Files


def adapter_as_bin(inputs):
    torch.save(inputs.adapter(), inputs.release / "adapter_model.bin")
    inputs.adapter_file.unlink()


def base_as_one_file(inputs):
    inputs.write_base(inputs.base_weights())


def base_as_one_bin(inputs):
    weights = inputs.base_weights()
    for path in inputs.base.glob("pytorch_model*"):
        path.unlink()
    torch.save(weights, inputs.base / "pytorch_model.bin")


def base_as_saved_by_transformers(inputs):
    weights = inputs.base_weights()
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(inputs.base))
    model.load_state_dict({key: tensor for key, tensor in weights.items() if not key.endswith("inv_freq")})
    for path in [*inputs.base.glob("pytorch_model*"), inputs.base / "generation_config.json"]:
        path.unlink()
    model.save_pretrained(inputs.base, max_shard_size="100KB")
    assert len(list(inputs.base.glob("*.safetensors"))) > 1


def tower_as_bin(inputs):
    weights = inputs.tower_weights()
    weights["vision_model.embeddings.position_ids"] = torch.arange(GRID**2 + 1)[None]
    inputs.tower_file.unlink()
    torch.save(weights, inputs.tower / "pytorch_model.bin")


def tower_in_the_format_before_zip_archives(inputs):
    torch.save(inputs.tower_weights(), inputs.tower / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    inputs.tower_file.unlink()


def tower_without_text_half(inputs):
    model = CLIPVisionModel.from_pretrained(inputs.tower)
    inputs.tower_file.unlink()
    (inputs.tower / "config.json").unlink()
    model.save_pretrained(inputs.tower)


def tower_with_keys_of_transformers_5(inputs):
    weights = inputs.tower_weights()
    inputs.write_tower(
        {
            key.removeprefix("vision_model."): tensor
            for key, tensor in weights.items()
            if key.startswith("vision_model.")
        }
    )


@pytest.mark.parametrize(
    "change",
    [
        adapter_as_bin,
        base_as_one_file,
        base_as_one_bin,
        base_as_saved_by_transformers,
        tower_as_bin,
        tower_in_the_format_before_zip_archives,
        tower_without_text_half,
        tower_with_keys_of_transformers_5,
    ],
    ids=lambda change: change.__name__,
)
def test_file_formats_make_no_difference(inputs, change):
    inputs.convert()
    reference = {path.name: path.read_bytes() for path in inputs.output.iterdir()}
    shutil.rmtree(inputs.output)
    change(inputs)
    inputs.convert()
    found = {path.name: path.read_bytes() for path in inputs.output.iterdir()}
    # The card has the digests of the files
    card, other_card = found.pop("README.md"), reference.pop("README.md")
    assert found == reference
    assert card != other_card


def test_files_are_those_that_transformers_saves(inputs):
    inputs.convert()
    LlavaSPForConditionalGeneration.from_pretrained(inputs.output).save_pretrained(inputs.folder / "saved")
    for path in (inputs.folder / "saved").iterdir():
        assert (inputs.output / path.name).read_bytes() == path.read_bytes(), path.name


def test_shards_hold_the_whole_model(inputs):
    inputs.convert()
    expected = converted_tensors(inputs)
    shutil.rmtree(inputs.output)
    inputs.convert(max_shard_size="300KB")
    files = sorted(inputs.output.glob("*.safetensors"))
    assert len(files) == 5
    shards = {path.name: load_file(path) for path in files}
    index = json.loads((inputs.output / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: name for name, tensors in shards.items() for key in tensors}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    loaded = LlavaSPForConditionalGeneration.from_pretrained(inputs.output).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


def test_two_runs_write_the_same_bytes(inputs):
    def digests(output):
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.iterdir()}

    first, second = inputs.folder / "first", inputs.folder / "other" / "second"
    for output in (first, second):
        convert_checkpoint(inputs.release, output, base_model=inputs.base, vision_tower=inputs.tower)
    assert digests(first) == digests(second)


def test_inputs_are_left_alone(inputs):
    def content():
        folders = (inputs.release, inputs.base, inputs.tower)
        return {path: path.read_bytes() for folder in folders for path in folder.rglob("*")}

    before = content()
    inputs.convert()
    assert content() == before
    assert {path.name for path in inputs.folder.iterdir()} == {"release", "base", "vision", "converted"}


def test_report_says_what_was_found(inputs):
    report = inputs.convert()
    parameters = sum(tensor.numel() for tensor in converted_tensors(inputs).values())
    assert (report.num_parameters, report.num_merged_weights) == (parameters, 14)
    for part in (
        str(inputs.output),
        "cropping",
        "4, 8, 12, 16, 20, 24",
        "25 detail features",
        "6 spatial + 576 patch",
        f"{parameters:,} in float32",
    ):
        assert part in str(report)


def test_parts_can_be_hub_ids(inputs, monkeypatch):
    snapshots = {}
    for name, folder in (("release", inputs.release), ("base", inputs.base), ("tower", inputs.tower)):
        # The cache calls a snapshot's folder by its commit
        snapshots[f"authors/{name}"] = folder.rename(inputs.folder / f"commit-of-{name}")
    requests = []

    def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns):
        requests.append((repo_id, revision, allow_patterns[-1]))
        assert {"*.json", "*.model", "README.md", "non_lora_trainables.bin"} <= set(allow_patterns)
        return str(snapshots[repo_id])

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)
    monkeypatch.chdir(inputs.folder)
    convert_checkpoint("authors/release@v1", "converted", base_model="authors/base", vision_tower="authors/tower")
    assert LlavaSPConfig.from_pretrained(inputs.output).projector_config.spatial_variant == "cropping"
    # Weights are fetched in one format only
    assert requests == [
        ("authors/release", "v1", "*.safetensors"),
        ("authors/base", None, "*.safetensors"),
        ("authors/base", None, "*.bin"),
        ("authors/tower", None, "*.safetensors"),
    ]
    card = (inputs.output / "README.md").read_text()
    assert "[authors/release](https://huggingface.co/authors/release) at revision `commit-of-release`" in card
    assert (
        "llava-sp convert authors/release@commit-of-release --base-model authors/base@commit-of-base "
        "--vision-tower authors/tower@commit-of-tower"
    ) in card


# Layouts


def projector_under(inputs, prefix):
    return {prefix + key.removeprefix(PREFIX): tensor for key, tensor in inputs.projector().items()}


def make_full(inputs, tower=True, file="model.safetensors"):
    """The checkpoint as the authors' code saves it when the adapter is merged. Returns its tensors."""
    config = json.loads((inputs.release / "adapter_config.json").read_text())
    adapter = inputs.adapter()
    weights = {key: tensor for key, tensor in inputs.base_weights().items() if not key.endswith("inv_freq")}
    for key in adapter:
        if key.endswith("lora_A.weight"):
            target = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            product = adapter[key.replace("lora_A", "lora_B")] @ adapter[key]
            weights[target] = weights[target] + product * config["lora_alpha"] / config["r"]
    weights.update(projector_under(inputs, "model."))
    if tower:
        prefix = "model.vision_tower.vision_tower."
        weights.update(
            {prefix + key: tensor for key, tensor in inputs.tower_weights().items() if key.startswith("vision_model.")}
        )
    for name in ("adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"):
        (inputs.release / name).unlink()
    shutil.copyfile(inputs.base / "generation_config.json", inputs.release / "generation_config.json")
    if file == "model.safetensors":
        save_file(weights, inputs.release / file)
    elif file == "pytorch_model.bin":
        torch.save(weights, inputs.release / file)
    else:
        names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        weight_map = {key: names[index % 2] for index, key in enumerate(weights)}
        for name in names:
            save_file({key: weights[key] for key in weights if weight_map[key] == name}, inputs.release / name)
        write_json(inputs.release / file, weight_map=weight_map)
    return weights


def make_pretraining(inputs, file="mm_projector.bin"):
    """The checkpoint as pre-training leaves it: the projector and a configuration, no tokenizer."""
    torch.save(projector_under(inputs, "model."), inputs.release / file)
    for path in inputs.release.iterdir():
        if path.name not in (file, "config.json"):
            path.unlink()
    write_json(inputs.release / "config.json", image_aspect_ratio="square", _name_or_path=str(inputs.base))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"], ids=["whole", "bin", "shards"]
)
@pytest.mark.parametrize("name", MINI_GOLDEN)
def test_full_checkpoint_is_the_release_merged(make_inputs, name, file):
    inputs = make_inputs(name)
    inputs.convert()
    expected = converted_tensors(inputs)
    reference = {path.name: path.read_bytes() for path in inputs.output.glob("*.json")}
    shutil.rmtree(inputs.output)
    make_full(inputs, file=file)

    report = inputs.convert(base_model=None)

    assert report.layout.name == "SP_FULL"
    found = converted_tensors(inputs)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=0, msg=key)
    assert {path.name: path.read_bytes() for path in inputs.output.glob("*.json")} == reference


def test_tower_inside_a_full_checkpoint_is_used_unless_another_is_given(inputs):
    weights = make_full(inputs)
    inside = weights["model.vision_tower.vision_tower.vision_model.post_layernorm.bias"].clone()
    given = inputs.tower_weights()
    given["vision_model.post_layernorm.bias"] += 1.0
    inputs.write_tower(given)
    key = "model.vision_tower.post_layernorm.bias"

    inputs.convert(base_model=None)
    assert torch.equal(converted_tensors(inputs)[key], inside + 1.0)
    shutil.rmtree(inputs.output)

    # Named by the configuration: its configuration and preprocessing, not its weights
    (inputs.tower / "model.safetensors").unlink()
    write_json(inputs.release / "config.json", mm_vision_tower=str(inputs.tower))
    report = inputs.convert(base_model=None, vision_tower=None)
    assert torch.equal(converted_tensors(inputs)[key], inside)
    assert "vision tower's weights are those in the checkpoint" in str(report)


def test_full_checkpoint_without_the_tower_takes_the_named_one(inputs):
    make_full(inputs, tower=False)
    write_json(inputs.release / "config.json", mm_vision_tower=str(inputs.tower))
    inputs.convert(base_model=None, vision_tower=None)
    expected = inputs.tower_weights()["vision_model.post_layernorm.bias"]
    assert torch.equal(converted_tensors(inputs)["model.vision_tower.post_layernorm.bias"], expected)


def test_full_checkpoint_takes_a_missing_tokenizer_from_the_base_model(inputs):
    make_full(inputs)
    no_tokenizer(inputs.release)
    with pytest.raises(ConversionError, match=r"There is no tokenizer in .*release"):
        inputs.convert(base_model=None)
    inputs.convert()
    assert AutoProcessor.from_pretrained(inputs.output).tokenizer.convert_tokens_to_ids("<image>") == 1000


@pytest.mark.parametrize("file", ["model.bin", "mm_projector.bin"])
@pytest.mark.parametrize("name", MINI_GOLDEN)
def test_pretraining_output_is_the_base_model_with_the_projector(make_inputs, name, file):
    inputs = make_inputs(name)
    projector = {STORED[name][key.removeprefix(PREFIX)]: tensor for key, tensor in inputs.projector().items()}
    make_pretraining(inputs, file)

    # The base model is the one that it names
    report = inputs.convert(base_model=None)

    assert report.layout.name == "SP_PRETRAINING"
    found = converted_tensors(inputs)
    for key, tensor in projector.items():
        assert torch.equal(found[key], tensor), key
    for key, tensor in inputs.base_weights().items():
        if not key.endswith("inv_freq"):
            ours = found[key if key == "lm_head.weight" else key.replace("model.", "model.language_model.", 1)]
            assert torch.equal(ours[: len(tensor)], tensor), key
    assert "the prompt `<image>`" in " ".join((inputs.output / "README.md").read_text().split())
    assert not getattr(AutoProcessor.from_pretrained(inputs.output).image_processor, "do_pad", False)


@pytest.mark.parametrize("layout", ["lora", "full", "pretraining"])
@pytest.mark.parametrize(
    "named, message",
    [
        ("/home/somebody/clip", r"vision tower /home/somebody/clip does not exist on this machine.*--vision-tower"),
        (None, "names no vision tower .*--vision-tower"),
    ],
    ids=["path-of-another-machine", "none"],
)
def test_tower_that_cannot_be_found_is_asked_for(inputs, layout, named, message):
    {"lora": lambda inputs: None, "full": make_full, "pretraining": make_pretraining}[layout](inputs)
    write_json(inputs.release / "config.json", mm_vision_tower=named or ...)
    with pytest.raises(ConversionError, match=message):
        inputs.convert(vision_tower=None)
    assert not inputs.output.exists()


def test_base_model_that_cannot_be_found_is_asked_for(inputs):
    write_json(inputs.release / "adapter_config.json", base_model_name_or_path="/home/somebody/vicuna")
    with pytest.raises(ConversionError, match=r"base model /home/somebody/vicuna does not exist .*--base-model"):
        inputs.convert(base_model=None)
    write_json(inputs.release / "adapter_config.json", base_model_name_or_path=...)
    write_json(inputs.release / "config.json", _name_or_path=...)
    with pytest.raises(ConversionError, match=r"does not say which base model .*--base-model"):
        inputs.convert(base_model=None)


FULL_REFUSALS = {
    "layer-missing": (
        lambda inputs, weights: weights.pop("model.layers.1.mlp.up_proj.weight"),
        "release do not fit its config.json: missing 'model.language_model.layers.1.mlp.up_proj.weight'",
    ),
    "kernel-missing": (lambda inputs, weights: weights.pop("model.conv_12.weight"), "missing 'model.conv_12.weight'"),
    "unknown-tensor": (
        lambda inputs, weights: weights.update({"model.extra.weight": torch.zeros(2)}),
        "unexpected 'model.extra.weight'",
    ),
    "tower-tensor-missing": (
        lambda inputs, weights: weights.pop("model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"),
        "missing 'model.vision_tower.pre_layrnorm.bias'",
    ),
    "other-model-type": (
        lambda inputs, weights: write_json(inputs.release / "config.json", model_type="llava_nobody"),
        "config.json: model_type is 'nobody', expected 'llava_llama'",
    ),
    "nan": (
        lambda inputs, weights: weights["model.norm.weight"][:1].fill_(float("nan")),
        "'model.norm.weight' has values that are NaN",
    ),
}


@pytest.mark.parametrize("name", FULL_REFUSALS)
def test_full_checkpoint_refused_with_the_reason(inputs, name):
    change, message = FULL_REFUSALS[name]
    weights = make_full(inputs)
    write_json(inputs.release / "config.json", mm_vision_tower=str(inputs.tower))
    change(inputs, weights)
    save_file(weights, inputs.release / "model.safetensors")
    before = {path.name for path in inputs.folder.iterdir()}
    with pytest.raises(ConversionError, match=message):
        inputs.convert(base_model=None, vision_tower=None)
    assert {path.name for path in inputs.folder.iterdir()} == before


# Inspection


def test_inspection_of_a_release(inputs, monkeypatch):
    inspection = inspect_checkpoint(inputs.release)
    assert inspection.to_dict() == {
        "checkpoint": "release",
        "layout": "sp_lora",
        "description": "a LLaVA-SP LoRA release",
        "variant": "cropping",
        "spatial_scales": SIX,
        "spatial_hidden_size": SPATIAL,
        "grid_size": GRID,
        "vision_hidden_size": VISION,
        "text_hidden_size": TEXT,
        "detail_integrator": True,
        "detail_kernel_size": 16,
        "num_detail_tokens": 25,
        "spatial_projection_bias": True,
        "num_patch_layers": 2,
        "image_tokens": 582,
        "image_grid_pinpoints": None,
        "images": "padded to squares",
        "vision_tower": "openai/clip-vit-large-patch14-336",
        "base_model": "lmsys/vicuna-7b-v1.5",
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_targets": dict.fromkeys(
            ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 2
        ),
        "parameters": {
            "projector": sum(tensor.numel() for tensor in inputs.projector().values()),
            "LoRA": sum(tensor.numel() for tensor in inputs.adapter().values()),
        },
        "needs": [
            "the base model 'lmsys/vicuna-7b-v1.5', or another one passed with --base-model",
            "the vision tower 'openai/clip-vit-large-patch14-336', or another one passed with --vision-tower",
        ],
        "problems": [],
    }


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_inspection_agrees_with_conversion(inputs, name):
    inputs.write_projector(random_tensors(CHECKPOINTS[name]))
    write_json(inputs.release / "config.json", mm_projector_type=PROJECTOR_TYPES.get(name, "mlp2x_gelu"))
    inspection = inspect_checkpoint(inputs.release)
    if inspection.grid_size != GRID:
        shrink_tower(inputs, inspection.grid_size)
    config = inputs.convert().config.projector_config
    assert not inspection.problems
    assert (inspection.variant, inspection.spatial_scales) == (config.spatial_variant, config.spatial_scales)
    assert inspection.detail_kernel_size == config.detail_kernel_size
    assert inspection.image_tokens == config.num_image_tokens


def test_inspection_of_the_other_layouts(make_inputs, inputs, tmp_path):
    inputs.convert()
    converted = inspect_checkpoint(inputs.output)
    assert (converted.layout, converted.variant) == ("converted", "cropping")
    assert converted.problems == ["It is converted already: load it as it is."]
    assert sum(converted.parameters.values()) == sum(tensor.numel() for tensor in converted_tensors(inputs).values())

    base = inspect_checkpoint(inputs.base)
    assert base.problems == ["It is a text-only language model, not a LLaVA-SP checkpoint."]
    make_full(inputs)
    full = inspect_checkpoint(inputs.release)
    assert (full.layout, full.variant, full.problems) == ("sp_full", "cropping", [])
    assert set(full.parameters) == {"projector", "language model", "vision tower"}
    assert full.needs[0].startswith("the vision tower's configuration")


def test_inspection_names_problems_and_goes_on(inputs):
    without("projector", *INCOMPLETE)(inputs)
    write_json(inputs.release / "adapter_config.json", base_model_name_or_path="/home/somebody/vicuna")
    write_json(inputs.release / "config.json", mm_vision_tower="/home/somebody/clip")
    inspection = inspect_checkpoint(inputs.release)
    assert len(inspection.problems) == 1
    assert all(repr(key) in inspection.problems[0] for key in INCOMPLETE)
    assert inspection.lora_rank == 8
    assert (
        "'/home/somebody/vicuna', a path that does not exist on this machine: pass --base-model"
        in (inspection.needs[0])
    )
    assert "pass --vision-tower" in inspection.needs[1]


def test_inspect_command(inputs):
    result = CliRunner().invoke(app, ["inspect", str(inputs.release)])
    assert result.exit_code == 0, result.output
    rows = dict(line.split("  ", 1) for line in result.stdout.splitlines() if not line.startswith("needs"))
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["is"] == "a LLaVA-SP LoRA release"
    assert rows["scales"] == "4, 8, 12, 16, 20, 24"
    assert rows["details (DFI)"] == "25 features, kernel 16x16"
    assert rows["LoRA"].startswith("rank 8, alpha 16, on ")
    assert rows["problems"] == "none seen"

    result = CliRunner().invoke(app, ["inspect", str(inputs.base), "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["layout"] == "language_model"

    result = CliRunner().invoke(app, ["inspect", str(inputs.folder / "nowhere")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "does not exist on this machine" in result.stderr


# Refusals


def edit(part, file, **changes):
    def change(inputs):
        write_json(getattr(inputs, part) / file, **changes)

    return change


def edit_release(**changes):
    return edit("release", "config.json", **changes)


def edit_adapter_config(**changes):
    return edit("release", "adapter_config.json", **changes)


def tower_with(**changes):
    def change(inputs):
        config = json.loads((inputs.tower / "config.json").read_text())
        write_json(inputs.tower / "config.json", vision_config={**config["vision_config"], **changes})

    return change


def edit_tensors(part, function):
    """Rewrite the tensors of `part` with a function that changes a dict in place."""

    def change(inputs):
        read, write = {
            "projector": (inputs.projector, inputs.write_projector),
            "adapter": (inputs.adapter, inputs.write_adapter),
            "base": (inputs.base_weights, inputs.write_base),
            "tower": (inputs.tower_weights, inputs.write_tower),
        }[part]
        tensors = read()
        function(tensors)
        write(tensors)

    return change


def without(part, *keys):
    return edit_tensors(part, lambda tensors: [tensors.pop(key) for key in keys])


def with_tensors(part, **shapes):
    return edit_tensors(part, lambda tensors: tensors.update(random_tensors(shapes)))


def with_projector(*shapes):
    """The projector replaced by one of the given shapes, keys without prefix."""
    return edit_tensors("projector", lambda tensors: (tensors.clear(), tensors.update(random_tensors({**shapes[0]}))))


def renamed(part, old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return edit_tensors(part, change)


def reshaped(part, key, *shape):
    return edit_tensors(part, lambda tensors: tensors.update({key: torch.zeros(shape)}))


def filled(part, key, value):
    return edit_tensors(part, lambda tensors: tensors[key].view(-1)[:1].fill_(value))


def content(part, file, data):
    def change(inputs):
        (getattr(inputs, part) / file).write_bytes(data)

    return change


def truncated(part, file):
    def change(inputs):
        path = getattr(inputs, part) / file
        path.write_bytes(path.read_bytes()[:-100])

    return change


def removed(part, file):
    return lambda inputs: (getattr(inputs, part) / file).unlink()


def emptied(part):
    def change(inputs):
        shutil.rmtree(getattr(inputs, part))
        getattr(inputs, part).mkdir()

    return change


def tiles(**changes):
    """The checkpoint as one of images in tiles, but for the changes of its configuration."""
    settings = {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[336, 672], [672, 336]],
    }

    def change(inputs):
        with_tensors("projector", **{f"{PREFIX}image_newline": (TEXT,)})(inputs)
        edit_release(**{**settings, **changes})(inputs)

    return change


def siglip_tower(**changes):
    """The vision tower replaced by a SigLIP of the same width and patch grid, but for the changes."""

    def change(inputs):
        vision = json.loads((inputs.tower / "config.json").read_text())["vision_config"]
        vision.pop("projection_dim")
        config = SiglipVisionConfig(**{**vision, "model_type": "siglip_vision_model", **changes})
        weights = SiglipVisionModel(config).state_dict()
        inputs.write_tower({f"vision_model.{key.removeprefix('vision_model.')}": weights[key] for key in weights})
        (inputs.tower / "config.json").write_text(json.dumps(config.to_dict()))
        write_json(
            inputs.tower / "preprocessor_config.json",
            size={"height": config.image_size, "width": config.image_size},
            **dict.fromkeys(("crop_size", "do_center_crop", "feature_extractor_type"), ...),
            image_processor_type="SiglipImageProcessor",
        )

    return change


def both(*changes):
    return lambda inputs: [change(inputs) for change in changes]


def replaced(part, config, tensors, file="model.safetensors"):
    """A part of the inputs replaced by a folder of the given keys."""

    def change(inputs):
        emptied(part)(inputs)
        folder = getattr(inputs, part)
        write_json(folder / "config.json", **config)
        weights = {key: torch.zeros(2, 2) for key in tensors}
        torch.save(weights, folder / file) if file.endswith(".bin") else save_file(weights, folder / file)

    return change


def index_outside(inputs):
    index = json.loads((inputs.base / "pytorch_model.bin.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.bin"
    (inputs.base / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def index_wrong(inputs):
    index = json.loads((inputs.base / "pytorch_model.bin.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "pytorch_model-00001-of-00002.bin"
    (inputs.base / "pytorch_model.bin.index.json").write_text(json.dumps(index))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickle_that_runs_code(inputs):
    torch.save({"weight": Malicious(inputs.folder / "code-was-run")}, inputs.projector_file)


def already_converted(inputs):
    inputs.convert()
    shutil.rmtree(inputs.release)
    inputs.output.rename(inputs.release)


def half_the_vocabulary(tensors):
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = tensors[key][:500].clone()


INCOMPLETE = [
    f"{PREFIX}{key}"
    for key in STORED["mini-cropping"]
    if not key.startswith(("mm_projector", "conv_4.", "conv_CM", "conv_linear"))
]
CLIP_BIAS = "vision_model.encoder.layers.0.mlp.fc1.bias"

REFUSALS = {
    # What the folders are
    "plain-llava": (
        replaced("release", {}, ["model.layers.0.mlp.up_proj.weight", "model.mm_projector.0.bias"]),
        "is a plain LLaVA-1.5 checkpoint, which has no spatial tokens",
    ),
    "plain-llava-lora": (
        edit_tensors("projector", lambda t: [t.pop(key) for key in list(t) if "mm_projector" not in key]),
        "is a LoRA release of plain LLaVA-1.5, which has no spatial tokens",
    ),
    "plain-llava-pre-training": (
        replaced("release", {}, ["model.mm_projector.0.bias"], "mm_projector.bin"),
        "is the projector of a plain LLaVA-1.5",
    ),
    "transformers-llava": (
        replaced(
            "release",
            {"model_type": "llava"},
            ["language_model.lm_head.weight", "multi_modal_projector.linear_1.bias"],
        ),
        "is a plain LLaVA checkpoint in Transformers' format",
    ),
    "transformers-5-llava": (
        replaced("release", {"model_type": "llava"}, ["lm_head.weight", "model.multi_modal_projector.linear_1.bias"]),
        "is a plain LLaVA checkpoint in Transformers' format",
    ),
    "language-model-as-checkpoint": (
        lambda inputs: setattr(inputs, "release", inputs.base),
        "checkpoint .* is a text-only language model, expected a checkpoint of the LLaVA-SP authors",
    ),
    "clip-as-checkpoint": (
        lambda inputs: setattr(inputs, "release", inputs.tower),
        "checkpoint .* is a CLIP checkpoint",
    ),
    "converted": (already_converted, "is an already converted LLaVA-SP model"),
    "adapter-alone": (
        removed("release", "non_lora_trainables.bin"),
        "is a LoRA adapter alone.*non_lora_trainables.bin",
    ),
    "empty-checkpoint": (emptied("release"), "checkpoint .*release is an empty folder"),
    "empty-base": (emptied("base"), "base model .*base is an empty folder, expected a text-only language model"),
    "empty-tower": (
        emptied("tower"),
        "vision tower .*vision is an empty folder, expected a CLIP checkpoint or a SigLIP",
    ),
    "notes": (both(emptied("release"), content("release", "notes.txt", b"hello")), "neither weights nor an adapter"),
    "other-model": (replaced("release", {}, ["bert.encoder.weight"]), "is a checkpoint of some other model"),
    "no-checkpoint": (
        lambda inputs: setattr(inputs, "release", inputs.folder / "nowhere"),
        "checkpoint .*nowhere does not exist on this machine, and is no Hub id",
    ),
    "checkpoint-is-a-file": (
        lambda inputs: setattr(inputs, "release", inputs.projector_file),
        "non_lora_trainables.bin is a file: pass the folder",
    ),
    "tower-as-base": (lambda inputs: setattr(inputs, "base", inputs.tower), "base model .* is a CLIP checkpoint"),
    "release-as-base": (
        lambda inputs: setattr(inputs, "base", inputs.release),
        "base model .* is a LLaVA-SP LoRA release",
    ),
    "base-as-tower": (lambda inputs: setattr(inputs, "tower", inputs.base), "tower .* is a text-only language model"),
    "tower-without-its-class-token": (
        without("tower", "vision_model.embeddings.class_embedding"),
        "vision do not fit its config.json: missing 'model.vision_tower.embeddings.class_embedding'",
    ),
    "clip-called-siglip": (
        edit("tower", "config.json", model_type="siglip"),
        "vision do not fit its config.json: missing 'model.vision_tower.embeddings.patch_embedding.bias'",
    ),
    "siglip-of-more-patches": (
        siglip_tower(image_size=336, patch_size=12),
        "largest spatial kernel is 24x24.* but this one has 28x28.*names 'openai/clip-vit-large-patch14-336'",
    ),
    "siglip-of-fewer-patches": (
        siglip_tower(image_size=336, patch_size=16),
        "largest spatial kernel is 24x24.* but this one has 21x21.*names 'openai/clip-vit-large-patch14-336'",
    ),
    "siglip-of-another-width": (
        siglip_tower(hidden_size=24),
        r"\(mm_hidden_size\) takes vision features of width 16, but the vision tower's have width 24",
    ),
    "siglip-with-a-preprocessor-of-another-size": (
        both(siglip_tower(), edit("tower", "preprocessor_config.json", size={"height": 224, "width": 224})),
        r"makes images of \(224, 224\) pixels, but the vision tower takes \(336, 336\)",
    ),
    "chinese-clip-tower": (
        edit("tower", "config.json", model_type="chinese_clip"),
        "model_type is 'chinese_clip', expected 'clip', 'clip_vision_model', 'siglip', 'siglip_vision_model'",
    ),
    # config.json of the release
    "anyres-max": (
        tiles(image_aspect_ratio="anyres_max_9"),
        "release/config.json: image_aspect_ratio is 'anyres_max_9': .*expected 'anyres'",
    ),
    "tiles-not-unpadded": (
        tiles(mm_patch_merge_type="spatial"),
        "release/config.json: mm_patch_merge_type is 'spatial': with image tiles, expected 'spatial_unpad'",
    ),
    "tiles-flat": (
        tiles(mm_patch_merge_type=...),
        "release/config.json: mm_patch_merge_type is 'flat': with image tiles, expected 'spatial_unpad'",
    ),
    **{
        f"pinpoints-{name}": (
            tiles(image_grid_pinpoints=value),
            "release/config.json: image_grid_pinpoints is .*: with image_aspect_ratio 'anyres', expected a list of",
        )
        for name, value in {
            "absent": ...,
            "null": None,
            "empty": [],
            "of-three": [[336, 672, 3]],
            "of-fractions": [[336.5, 672]],
            "of-texts": [["336", "672"]],
            "of-numbers": [336, 672],
            "zero": [[336, 0]],
            "negative": [[336, -672]],
            "number": 336,
            "text": "(1x1),...,(6x6)",
            "text-of-a-number": "336",
            "text-that-calls": "__import__('os').getcwd()",
        }.items()
    },
    "pinpoints-of-another-tower": (
        tiles(image_grid_pinpoints=[[336, 672], [384, 768]]),
        r"release/config.json: image_grid_pinpoints has \[384, 768\], expected multiples of 336 pixels.*vision tower",
    ),
    "pinpoints-smaller-than-the-tower": (
        tiles(image_grid_pinpoints=[[168, 336]]),
        r"release/config.json: image_grid_pinpoints has \[168, 336\], expected multiples of 336 pixels",
    ),
    "tiles-without-a-separator": (
        both(tiles(), without("projector", f"{PREFIX}image_newline")),
        "non_lora_trainables.bin lacks 'base_model.model.model.image_newline', which a checkpoint with image tiles",
    ),
    "separator-of-another-shape": (
        both(tiles(), reshaped("projector", f"{PREFIX}image_newline", 1, TEXT)),
        r"trainables.bin: 'base_model.model.model.image_newline' has shape \(1, 32\), expected \(32,\)",
    ),
    "separator-nan": (
        both(tiles(), filled("projector", f"{PREFIX}image_newline", float("nan"))),
        "trainables.bin: 'base_model.model.model.image_newline' has values that are NaN or infinite",
    ),
    "separator-of-integers": (
        both(
            tiles(), edit_tensors("projector", lambda t: t.update({f"{PREFIX}image_newline": torch.ones(TEXT).int()}))
        ),
        "image_newline' is torch.int32, expected floating point numbers",
    ),
    "unpad-without-anyres": (
        edit_release(mm_patch_merge_type="spatial_unpad"),
        "mm_patch_merge_type is 'spatial_unpad'",
    ),
    "cls-patch": (
        edit_release(mm_vision_select_feature="cls_patch"),
        "mm_vision_select_feature is 'cls_patch'.*square",
    ),
    "identity": (edit_release(mm_projector_type="identity"), "mm_projector_type is 'identity'.*mlpNx_gelu"),
    "mlp0x": (edit_release(mm_projector_type="mlp0x_gelu"), "mm_projector_type is 'mlp0x_gelu'"),
    "no-projector-type": (
        edit_release(mm_projector_type=...),
        "patch path of 1 layer.*missing 'base_model.model.model.mm_projector.weight'",
    ),
    "start-end-tokens": (edit_release(mm_use_im_start_end=True), "mm_use_im_start_end is True"),
    "patch-token": (edit_release(mm_use_im_patch_token=True), "mm_use_im_patch_token is True"),
    "patch-token-absent": (
        edit_release(mm_use_im_patch_token=...),
        "mm_use_im_patch_token is None.*absent value for true",
    ),
    "no-select-layer": (
        edit_release(mm_vision_select_layer=...),
        "mm_vision_select_layer is None: expected the index",
    ),
    "select-layer-too-deep": (
        edit_release(mm_vision_select_layer=-9),
        "`vision_feature_layer` is -9.*5 hidden states",
    ),
    "broken-config": (content("release", "config.json", b"{"), "release/config.json cannot be read as JSON"),
    "list-config": (content("release", "config.json", b"[]"), "config.json holds a JSON list, expected an object"),
    "no-config": (removed("release", "config.json"), "release/config.json is missing"),
    # The projector's tensors
    "incomplete-intermediate": (
        without("projector", *INCOMPLETE),
        f"missing (?=.*{re.escape('.conv_8.weight')})"
        + "".join(f"(?=.*{re.escape(repr(key))})" for key in INCOMPLETE)
        + ".*intermediate checkpoints",
    ),
    "unexpected-projector-tensor": (
        with_tensors("projector", **{f"{PREFIX}image_newline": (TEXT,)}),
        "unexpected 'base_model.model.model.image_newline'",
    ),
    "prefix-missing": (
        renamed("projector", f"{PREFIX}conv_8.weight", "conv_8.weight"),
        "missing 'base_model.model.model.conv_8.weight'; unexpected 'conv_8.weight'",
    ),
    "mixed-variants": (
        renamed("projector", f"{PREFIX}conv_8.weight", f"{PREFIX}conv_8.1.weight"),
        "mixes two variants: 'conv_4.weight', .* of cropping, 'conv_8.1.weight' of pooling",
    ),
    "two-kernels-of-a-size": (
        with_tensors("projector", **{f"{PREFIX}conv_7.weight": (SPATIAL, VISION, 8, 8)}),
        "conv_8.weight' and 'base_model.model.model.conv_7.weight' both have kernels of size 8",
    ),
    "uneven-sizes": (
        with_tensors("projector", **{f"{PREFIX}conv_5.weight": (SPATIAL, VISION, 5, 5)}),
        r"spatial kernels of sizes \[4, 5, 8, 12, 16, 20, 24\], .*missing",
    ),
    "oblong-kernel": (
        reshaped("projector", f"{PREFIX}conv_8.weight", SPATIAL, VISION, 8, 7),
        r"trainables.bin: 'base_model.model.model.conv_8.weight' has shape \(6, 16, 8, 7\), expected a square",
    ),
    "flat-projection": (
        reshaped("projector", f"{PREFIX}conv_linear.1.weight", TEXT),
        r"'base_model.model.model.conv_linear.1.weight' has shape \(32,\), expected a matrix",
    ),
    "narrow-projection": (
        reshaped("projector", f"{PREFIX}conv_linear.1.weight", TEXT, SPATIAL),
        r"'base_model.model.model.conv_linear.1.weight' has shape \(32, 6\), expected \(32, 12\)",
    ),
    "kernel-of-other-width": (
        reshaped("projector", f"{PREFIX}conv_8.weight", SPATIAL, VISION + 1, 8, 8),
        r"conv_8.weight' has shape \(6, 17, 8, 8\), expected \(6, 16, 8, 8\)",
    ),
    "kernel-larger-than-the-grid": (
        reshaped("projector", f"{PREFIX}conv_CM.weight", SPATIAL, VISION, 26, 26),
        "`detail_kernel_size` 26 does not fit `grid_size` 24",
    ),
    "integers": (
        edit_tensors("projector", lambda t: t.update({f"{PREFIX}conv_4.weight": t[f"{PREFIX}conv_4.weight"].int()})),
        "conv_4.weight' is torch.int32, expected floating point numbers",
    ),
    "nan": (filled("projector", f"{PREFIX}conv_8.weight", float("nan")), "conv_8.weight' has values that are NaN"),
    "multi-fuse": (
        with_tensors("projector", **{f"{PREFIX}query_projector_small.0.weight": (SPATIAL,)}),
        "'query_projector_small.0.weight' belongs to the ablation with three detail convolutions",
    ),
    "conv-49": (
        with_projector(
            {f"{PREFIX}conv_CM.weight": (SPATIAL, VISION, 12, 12), f"{PREFIX}conv_linear.1.weight": (TEXT, SPATIAL)}
        ),
        "the ablation that takes the detail features themselves as tokens",
    ),
    "cm-transformer": (
        with_tensors("projector", **{f"{PREFIX}CM_P.layers.0.norm1.weight": (VISION,)}),
        "the ablation with a transformer over the detail features",
    ),
    "conv-blocks": (
        with_projector({f"{PREFIX}conv_4.0.weight": (SPATIAL, VISION, 3, 3), f"{PREFIX}conv_4.1.weight": (SPATIAL,)}),
        "'conv_4.0.weight' belongs to the ablation with blocks of several convolutions and BatchNorm",
    ),
    "transformer-extractors": (
        with_projector({f"{PREFIX}tfm_4.encoder.norm.weight": (VISION,), f"{PREFIX}query_4": (1, 1, VISION)}),
        "the ablation with transformers in place of the spatial convolutions",
    ),
    "no-spatial-kernels": (
        without("projector", *[f"{PREFIX}conv_{size}.weight" for size in SIX]),
        r"sizes \[\], .*missing 'base_model.model.model.conv_\*.weight'",
    ),
    # The base model
    "base-wider": (
        edit("base", "config.json", hidden_size=64),
        "release/config.json: hidden_size is 32, but 64 in the base model",
    ),
    "base-deeper": (edit("base", "config.json", num_hidden_layers=3), "num_hidden_layers is 2, but 3"),
    "base-heads": (
        edit("base", "config.json", num_attention_heads=8, num_key_value_heads=8),
        "num_attention_heads is 4, but 8",
    ),
    "base-vocabulary": (
        both(edit("base", "config.json", vocab_size=500), edit_tensors("base", half_the_vocabulary)),
        "vocab_size is 1000, but 500 in the base model",
    ),
    "tokenizer-larger-than-embeddings": (
        both(
            edit("base", "config.json", vocab_size=500),
            edit_release(vocab_size=500),
            edit_tensors("base", half_the_vocabulary),
        ),
        "tokenizer in .*release has 1000 tokens, but the language model has embeddings for 500",
    ),
    "base-rope": (edit("base", "config.json", rope_theta=5e5), "rope_parameters is .*10000.0.*but .*500000.0"),
    "base-type": (
        edit("base", "config.json", model_type="mistral"),
        "model_type is 'llava_llama', but .* is a 'mistral'",
    ),
    "base-unknown-type": (
        edit("base", "config.json", model_type="nobody"),
        "base/config.json is not a configuration that",
    ),
    "base-nonsense-config": (
        edit("base", "config.json", hidden_size="wide"),
        "base/config.json is not a configuration that",
    ),
    "base-no-config": (removed("base", "config.json"), "base/config.json is missing"),
    "base-layer-missing": (
        without("base", "model.layers.1.mlp.up_proj.weight"),
        "adapts weights that the base model does not have: 'model.layers.1.mlp.up_proj.weight'",
    ),
    "base-norm-missing": (
        without("base", "model.norm.weight"),
        "base do not fit.*missing 'model.language_model.norm.weight'",
    ),
    "base-bias": (
        with_tensors("base", **{"model.layers.0.mlp.up_proj.bias": (80,)}),
        "base do not fit its config.json: unexpected 'model.layers.0.mlp.up_proj.bias'",
    ),
    "base-shape": (
        reshaped("base", "model.norm.weight", 31),
        r"base/model.safetensors: 'model.norm.weight' has shape \(31,\), expected \(32,\)",
    ),
    "base-int8": (
        edit_tensors("base", lambda t: t.update({key: value.to(torch.int8) for key, value in t.items()})),
        "base are stored as torch.int8.*choose a dtype",
    ),
    "base-truncated": (
        truncated("base", "pytorch_model-00002-of-00002.bin"),
        "00002-of-00002.bin is not a readable PyTorch",
    ),
    "base-shard-missing": (removed("base", "pytorch_model-00002-of-00002.bin"), "00002-of-00002.bin is missing"),
    "base-zero-bytes": (
        content("base", "pytorch_model-00001-of-00002.bin", b""),
        "00001-of-00002.bin is not a readable",
    ),
    "base-index-outside": (
        index_outside,
        r"index.json names '\.\./elsewhere.bin' for 'lm_head.weight', which is not a file of",
    ),
    "base-index-wrong": (index_wrong, "00001-of-00002.bin lacks tensors that .*index.json lists: 'lm_head.weight'"),
    "base-index-broken": (content("base", "pytorch_model.bin.index.json", b"{}"), "index.json has no `weight_map`"),
    "base-checkpoint-of-training": (
        both(
            lambda inputs: inputs.write_base({}),
            removed("base", "model.safetensors"),
            lambda inputs: torch.save({"step": 3}, inputs.base / "pytorch_model.bin"),
        ),
        "pytorch_model.bin holds an object of type int at 'step', expected tensors only",
    ),
    # The vision tower
    "tower-wider": (
        lambda inputs: write_json(inputs.release / "config.json", mm_hidden_size=24),
        r"config.json .*\(mm_hidden_size\) takes vision features of width 24, but the vision tower's have width 16",
    ),
    "tower-narrower-than-the-projector": (
        both(
            edit_release(mm_hidden_size=...),
            edit_tensors(
                "projector", lambda t: t.update(random_tensors(projector_shapes(SIX, detail_kernel=16, vision=20)))
            ),
        ),
        "projector takes vision features of width 20, but the vision tower's have width 16.*names 'openai/clip",
    ),
    "tower-of-fewer-patches": (
        lambda inputs: shrink_tower(inputs, 16),
        "largest spatial kernel is 24x24.* but this one has 16x16.*names 'openai/clip-vit-large-patch14-336'",
    ),
    "tower-of-more-patches": (
        tower_with(image_size=448),
        "largest spatial kernel is 24x24.* but this one has 32x32.*or the checkpoint lacks .*conv_28.weight",
    ),
    "tower-not-square": (
        tower_with(image_size=[336, 224]),
        "vision/config.json does not describe a vision tower",
    ),
    "tower-tensor-missing": (
        without("tower", CLIP_BIAS),
        "vision do not fit its config.json: missing 'model.vision_tower.encoder.layers.0.mlp.fc1.bias'",
    ),
    "tower-shape": (
        reshaped("tower", CLIP_BIAS, 31),
        r"vision/model.safetensors: .*has shape \(31,\), expected \(32,\)",
    ),
    "tower-zero-bytes": (
        content("tower", "model.safetensors", b""),
        "model.safetensors is not a readable safetensors file",
    ),
    "tower-truncated": (
        truncated("tower", "model.safetensors"),
        "model.safetensors is not a readable safetensors file",
    ),
    "no-preprocessor": (removed("tower", "preprocessor_config.json"), "preprocessor_config.json is missing"),
    "preprocessor-of-another-tower": (
        edit("tower", "preprocessor_config.json", crop_size=224, size={"shortest_edge": 224}),
        r"makes images of \(224, 224\) pixels, but the vision tower takes \(336, 336\)",
    ),
    "preprocessor-nonsense": (
        edit("tower", "preprocessor_config.json", image_processor_type="Nobody", feature_extractor_type=...),
        "preprocessor_config.json does not describe an image processor",
    ),
    # The adapter
    "dora": (edit_adapter_config(use_dora=True), "use_dora is True, expected False: only plain LoRA adapters"),
    "bias": (edit_adapter_config(bias="lora_only"), "bias is 'lora_only', expected 'none'"),
    "modules-to-save": (edit_adapter_config(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
    "rank-pattern": (edit_adapter_config(rank_pattern={"q_proj": 4}), "rank_pattern is"),
    "alpha-pattern": (edit_adapter_config(alpha_pattern={"q_proj": 4}), "alpha_pattern is"),
    "loha": (edit_adapter_config(peft_type="LOHA"), "peft_type is 'LOHA', expected 'LORA'"),
    "pissa": (edit_adapter_config(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "no-rank": (edit_adapter_config(r=...), "expected numbers for r and lora_alpha, got None and 16"),
    "rank-disagrees": (edit_adapter_config(r=4), r"has shape \(8, \d+\), but r is 4 in adapter_config.json"),
    "no-adapter-config": (removed("release", "adapter_config.json"), "adapter_config.json is missing"),
    "no-adapter": (
        removed("release", "adapter_model.safetensors"),
        "has no weights: expected adapter_model.safetensors or",
    ),
    "empty-adapter": (edit_tensors("adapter", dict.clear), "adapter in .*release has no tensors"),
    "half-a-pair": (
        without("adapter", f"{PREFIX}layers.1.mlp.up_proj.lora_B.weight"),
        r"'base_model.model.model.layers.1.mlp.up_proj.lora_A.weight' has no counterpart lora_B",
    ),
    "adapter-for-other-layers": (
        with_tensors(
            "adapter",
            **{
                f"{PREFIX}layers.7.mlp.up_proj.lora_A.weight": (8, 32),
                f"{PREFIX}layers.7.mlp.up_proj.lora_B.weight": (80, 8),
            },
        ),
        "adapts weights that the base model does not have: 'model.layers.7.mlp.up_proj.weight'",
    ),
    "adapter-for-the-tower": (
        with_tensors(
            "adapter",
            **{f"{PREFIX}vision_tower.fc1.lora_A.weight": (8, 16), f"{PREFIX}vision_tower.fc1.lora_B.weight": (32, 8)},
        ),
        "adapts weights that the base model does not have: 'model.vision_tower.fc1.weight'",
    ),
    "adapter-for-a-norm": (
        with_tensors("adapter", **{f"{PREFIX}norm.lora_A.weight": (8, 32), f"{PREFIX}norm.lora_B.weight": (32, 8)}),
        "adapts 'model.norm.weight', which is no matrix",
    ),
    "adapter-shape": (
        reshaped("adapter", f"{PREFIX}layers.1.mlp.up_proj.lora_A.weight", 8, 33),
        r"up_proj.lora_A.weight' has shape \(8, 33\), expected \(8, 32\)",
    ),
    "dora-tensor": (
        with_tensors("adapter", **{f"{PREFIX}layers.1.mlp.up_proj.lora_magnitude_vector.weight": (80,)}),
        "unexpected '.*lora_magnitude_vector.weight'",
    ),
    "adapter-nan": (
        filled("adapter", f"{PREFIX}layers.1.mlp.up_proj.lora_A.weight", float("inf")),
        "'model.layers.1.mlp.up_proj.weight', merged with the LoRA adapter, has values that are NaN or infinite",
    ),
    # The tokenizer
    "no-tokenizer": (
        both(removed("release", "tokenizer.model"), removed("base", "tokenizer.model")),
        "There is no tokenizer in .*release or .*base: expected tokenizer.model",
    ),
    "broken-tokenizer": (content("release", "tokenizer.model", b"junk"), "tokenizer in .*release cannot be loaded"),
    "pickle-that-runs-code": (
        pickle_that_runs_code,
        "non_lora_trainables.bin is not a readable PyTorch file of tensors",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_the_reason_and_nothing_written(inputs, name):
    change, message = REFUSALS[name]
    change(inputs)
    before = {path.name for path in inputs.folder.iterdir()}
    arguments = ["convert", inputs.release, inputs.output, "--base-model", inputs.base, "--vision-tower", inputs.tower]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.fullmatch(f"llava-sp: error: .*{message}.*", result.stderr.splitlines()[-1])
    # Neither the output nor a temporary folder, nor what a pickle would have made
    assert {path.name for path in inputs.folder.iterdir()} == before - {"converted"}


@pytest.mark.parametrize(
    "name, key", [(name, key) for name in MINI_GOLDEN for key in STORED[name]], ids=lambda value: value
)
def test_each_projector_tensor_is_needed(make_inputs, name, key):
    inputs = make_inputs(name)
    without("projector", PREFIX + key)(inputs)
    with pytest.raises(ConversionError, match=re.escape(repr(PREFIX + key))):
        inputs.convert()
    assert not inputs.output.exists()


@pytest.mark.parametrize("existing", ["folder", "file", "dangling-link"])
def test_existing_output_is_left_alone(inputs, existing):
    {
        "folder": lambda: inputs.output.mkdir(),
        "file": lambda: inputs.output.write_text("mine"),
        "dangling-link": lambda: inputs.output.symlink_to("nowhere"),
    }[existing]()
    with pytest.raises(ConversionError, match="converted exists already"):
        inputs.convert(base_model="not/looked-at")
    assert inputs.output.is_symlink() or inputs.output.is_file() or not list(inputs.output.iterdir())


@pytest.mark.parametrize("part", ["release", "base", "vision"])
def test_output_inside_an_input_is_refused(inputs, part):
    inputs.output = inputs.folder / part / "deep" / "converted"
    with pytest.raises(ConversionError, match=f"lies inside .*{part}, which is an input"):
        inputs.convert()
    assert not inputs.output.parent.exists()


def test_unknown_dtype_is_refused(inputs):
    with pytest.raises(
        ConversionError, match=r"Unknown dtype 'int8': expected 'auto', 'float32', 'float16', 'bfloat16'"
    ):
        inputs.convert(dtype="int8")
    assert not inputs.output.exists()


def test_failure_while_writing_leaves_nothing(inputs, monkeypatch):
    def save_pretrained(self, folder, **kwargs):
        (Path(folder) / "half.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers_llava_sp.processing_llava_sp.LlavaSPProcessor.save_pretrained", save_pretrained)
    with pytest.raises(ConversionError, match=r"Writing .*converted failed: No space left on device"):
        inputs.convert()
    assert {path.name for path in inputs.folder.iterdir()} == {"release", "base", "vision"}


def test_failed_download_says_why(inputs, monkeypatch):
    def snapshot_download(repo_id, **kwargs):
        raise ConnectionError("the Hub cannot be reached")

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)
    with pytest.raises(
        ConversionError, match=r"base model some/where is neither a folder on this machine nor .*cannot be reached"
    ):
        inputs.convert(base_model="some/where")
    assert not inputs.output.exists()
