"""
Conversion of checkpoints with other parts than the released ones: SigLIP towers, image tiles, Mistral, other widths.

Each is put together here, and the converted model's logits are compared with a plain computation on the authors'
files: their preprocessing, projector and sequence written out, with Transformers' own tower and language model.
"""

import hashlib
import json
import math
import re
import shutil
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES, randomize_
from PIL import Image
from safetensors.torch import load_file, save_file
from test_conversion import (
    GRID,
    PREFIX,
    SIX,
    SPATIAL,
    TEXT,
    VISION,
    Inputs,
    make_full,
    make_pretraining,
    plain_projector,
    projector_shapes,
    random_tensors,
    write_json,
)
from test_remote_code import run_without_the_package
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    LlamaConfig,
    MistralConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from typer.testing import CliRunner

from transformers_llava_sp.cli import app
from transformers_llava_sp.conversion import ConversionError, inspect_checkpoint
from transformers_llava_sp.processing_llava_sp import VICUNA_V1_CHAT_TEMPLATE, LlavaSPProcessor


# The authors', as (width, height)
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIGLIP_PINPOINTS = [[192, 384], [384, 192], [384, 384], [576, 192]]
NEWLINE = f"{PREFIX}image_newline"
PROMPT = "USER: <image>\nWhat is shown in this image? ASSISTANT:"


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small take longer to hand to threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def inputs(tmp_path):
    for part in ("release", "base", "vision"):
        shutil.copytree(FIXTURES / "mini-cropping" / part, tmp_path / part)
    return Inputs(tmp_path)


# Parts of other checkpoints


def use_siglip(inputs, side=384):
    """The vision tower replaced by a SigLIP, whole as it is published, with patches of 16 pixels."""
    config = SiglipVisionConfig(
        hidden_size=VISION,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=side,
        patch_size=16,
    )
    model = randomize_(SiglipVisionModel(config), seed=5)
    weights = {"vision_model." + key.removeprefix("vision_model."): value for key, value in model.state_dict().items()}
    assert any(key.startswith("vision_model.head.") for key in weights)
    weights["text_model.final_layer_norm.bias"] = torch.zeros(4)
    weights["logit_scale"] = weights["logit_bias"] = torch.zeros(1)
    shutil.rmtree(inputs.tower)
    inputs.tower.mkdir()
    inputs.write_tower({key: value.clone() for key, value in weights.items()})
    write_json(
        inputs.tower / "config.json",
        model_type="siglip",
        vision_config={**config.to_diff_dict(), "model_type": "siglip_vision_model"},
    )
    write_json(
        inputs.tower / "preprocessor_config.json",
        **{"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3, "rescale_factor": 1 / 255},
        **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": side, "width": side}},
        image_processor_type="SiglipImageProcessor",
    )
    write_json(inputs.release / "config.json", mm_vision_tower="google/siglip-large-patch16-384")


def use_projector(inputs, sizes, seed=3, **kwargs):
    """The projector replaced by one of other kernels or widths."""
    inputs.write_projector(random_tensors(projector_shapes(sizes, **kwargs), seed))


def use_tiles(inputs, pinpoints=PINPOINTS, width=TEXT):
    """The checkpoint as one of images in tiles."""
    newline = torch.randn(width, generator=torch.Generator().manual_seed(4)) * 0.2
    inputs.write_projector({**inputs.projector(), NEWLINE: newline})
    write_json(
        inputs.release / "config.json",
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=pinpoints,
    )


def use_language_model(inputs, config):
    """The base model replaced by one of random weights, and the adapter by one for it."""
    model = randomize_(AutoModelForCausalLM.from_config(config), seed=6)
    inputs.write_base({key: tensor.clone() for key, tensor in model.state_dict().items()})
    (inputs.base / "pytorch_model.bin.index.json").unlink(missing_ok=True)
    (inputs.base / "config.json").write_text(json.dumps(config.to_dict()))
    for name, value in config.to_dict().items():
        if name in json.loads((inputs.release / "config.json").read_text()) and name != "architectures":
            write_json(inputs.release / "config.json", **{name: value})
    write_json(inputs.release / "config.json", model_type=f"llava_{config.model_type}")
    shapes = {}
    for key, tensor in model.state_dict().items():
        if "_proj." in key:
            name = f"base_model.model.{key.removesuffix('.weight')}.lora_"
            shapes[f"{name}A.weight"], shapes[f"{name}B.weight"] = (8, tensor.shape[1]), (tensor.shape[0], 8)
    inputs.write_adapter(random_tensors(shapes, seed=7))


def llama(width, **kwargs):
    """Sizes in the proportions of Vicuna-13B, of which no two are equal."""
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=108,
        num_hidden_layers=3,
        num_attention_heads=5,
        vocab_size=1000,
        max_position_embeddings=4096,
        **kwargs,
    )


def mistral():
    return MistralConfig(
        hidden_size=TEXT,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        max_position_embeddings=8192,
        sliding_window=100,
        rms_norm_eps=1e-5,
    )


def tower_inside(inputs, head=True):
    """A full checkpoint with the vision tower in it, which config.json names only for its configuration."""
    weights = make_full(inputs)
    weights = {key: tensor for key, tensor in weights.items() if head or ".vision_model.head." not in key}
    save_file(weights, inputs.release / "model.safetensors")
    inputs.tower_file.unlink()
    write_json(inputs.release / "config.json", mm_vision_tower=str(inputs.tower))


# The plain computation


@dataclass
class Plain:
    """What the authors' code computes, from the files of a release before anything is done to their layout."""

    inputs: Inputs

    def __post_init__(self):
        config = json.loads((self.inputs.release / "config.json").read_text())
        pinpoints = config.get("image_grid_pinpoints")
        self.pinpoints = (
            json.loads(pinpoints.replace("(", "[").replace(")", "]")) if type(pinpoints) is str else pinpoints
        )
        self.projector = self.inputs.projector()
        self.newline = self.projector.pop(NEWLINE, None)
        self.pooled = any(".1.weight" in key and tensor.ndim == 4 for key, tensor in self.projector.items())
        preprocessing = json.loads((self.inputs.tower / "preprocessor_config.json").read_text())
        self.mean, self.std = preprocessing["image_mean"], preprocessing["image_std"]
        self.is_siglip = preprocessing.get("image_processor_type") == "SiglipImageProcessor"
        self.tower = (SiglipVisionModel if self.is_siglip else CLIPVisionModel).from_pretrained(self.inputs.tower)
        self.side = self.tower.config.image_size
        self.grid = self.side // self.tower.config.patch_size
        self.language_model = AutoModelForCausalLM.from_pretrained(self.inputs.base, dtype=torch.float32)

    def merge_adapter(self):
        adapter, weights = self.inputs.adapter(), self.language_model.state_dict()
        scaling = json.loads((self.inputs.release / "adapter_config.json").read_text())["lora_alpha"] / 8
        for key in adapter:
            if "lora_A" in key:
                name = key.removeprefix("base_model.model.").replace(".lora_A", "")
                weights[name] += adapter[key.replace("lora_A", "lora_B")] @ adapter[key] * scaling
        self.language_model.load_state_dict(weights)
        return self

    def pixels(self, image):
        array = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
        return torch.from_numpy((array - np.float32(self.mean)) / np.float32(self.std)).permute(2, 0, 1)

    def best_grid(self, image):
        """(width, height) that keeps most of the image's pixels; of several the least padded; of several the first."""
        best, most, least = None, 0, math.inf
        for width, height in self.pinpoints:
            scale = min(width / image.width, height / image.height)
            kept = min(int(image.width * scale) * int(image.height * scale), image.width * image.height)
            if kept > most or (kept == most and width * height - kept < least):
                best, most, least = (width, height), kept, width * height - kept
        return best

    def tiles(self, image):
        """The inputs of the vision tower, the whole image first, and rows and columns of the tiles."""
        side = self.side
        if self.pinpoints is None:
            longest = max(image.size)
            canvas = Image.new("RGB", (longest, longest), tuple(int(mean * 255) for mean in self.mean))
            canvas.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
            return [self.pixels(canvas.resize((side, side), Image.Resampling.BICUBIC))], 0, 0
        width, height = self.best_grid(image)
        tiles = [image.resize((side, side), Image.Resampling.BICUBIC)]
        if width / image.width < height / image.height:
            size = width, min(math.ceil(image.height * (width / image.width)), height)
        else:
            size = min(math.ceil(image.width * (height / image.height)), width), height
        canvas = Image.new("RGB", (width, height))
        canvas.paste(image.resize(size, Image.Resampling.BICUBIC), ((width - size[0]) // 2, (height - size[1]) // 2))
        for top, left in product(range(0, height, side), range(0, width, side)):
            tiles.append(canvas.crop((left, top, left + side, top + side)))
        return [self.pixels(tile) for tile in tiles], height // side, width // side

    @torch.no_grad()
    def image_tokens(self, image):
        tiles, rows, columns = self.tiles(image)
        states = self.tower(torch.stack(tiles), output_hidden_states=True).hidden_states[-2]
        patches = states if self.is_siglip else states[:, 1:]
        tokens = plain_projector(self.projector, self.pooled, patches, self.grid)
        num_spatial = tokens.shape[1] - self.grid**2
        if not rows:
            return tokens[0]
        sequence = [token for tile in tokens for token in tile[:num_spatial]] + list(tokens[0][num_spatial:])
        # What is left of the padding in patches, cut off on both sides
        height, width = rows * self.grid, columns * self.grid
        top = left = 0
        if image.width / image.height > width / height:
            top = (height - int(image.height * (width / image.width))) // 2
        else:
            left = (width - int(image.width * (height / image.height))) // 2
        for row in range(top, height - top):
            for column in range(left, width - left):
                tile = 1 + row // self.grid * columns + column // self.grid
                patch = row % self.grid * self.grid + column % self.grid
                sequence.append(tokens[tile][num_spatial + patch])
            sequence.append(self.newline)
        return torch.stack(sequence)

    @torch.no_grad()
    def logits(self, input_ids, image_id, image):
        """Of a prompt with one image, whose slots only say where it stands."""
        ids = input_ids.tolist()
        first = ids.index(image_id)
        behind = first + ids.count(image_id)
        embed = self.language_model.get_input_embeddings()
        tokens = self.image_tokens(image)
        assert len(tokens) == behind - first
        parts = [embed(input_ids[:first]), tokens, embed(input_ids[behind:])]
        return self.language_model(inputs_embeds=torch.cat(parts)[None]).logits[0]


def draw(width, height):
    """An image that no flip, turn or shift leaves the same."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // width, y * 255 // height, (x * y // 37) % 256]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


# Two resolutions fit the square one equally well; of the next, 29.999... rows of patches are left in floating point
IMAGES = {
    "square": draw(300, 300),
    "almost-30-rows": draw(328, 205),
    "tall": draw(190, 328),
    "wide": draw(700, 210),
    "small": draw(50, 40),
}


def load(inputs):
    model = AutoModelForImageTextToText.from_pretrained(inputs.output).eval()
    return model, AutoProcessor.from_pretrained(inputs.output)


def check(inputs, plain, images=IMAGES):
    """The converted model gives the plain computation's logits, and generates."""
    model, processor = load(inputs)
    for name in images:
        image = IMAGES[name]
        batch = processor(images=image, text=PROMPT, return_tensors="pt")
        tiles = torch.stack(plain.tiles(image)[0])
        pixel_values = batch["pixel_values"].flatten(0, -4)
        torch.testing.assert_close(pixel_values, tiles, atol=1e-5, rtol=0, msg=name)
        with torch.no_grad():
            logits = model(**batch).logits[0, :, :1000]
        expected = plain.logits(batch["input_ids"][0], processor.image_token_id, image)
        torch.testing.assert_close(
            logits, expected, atol=2e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert expected.std() > 0.1
    generated = model.generate(**batch, max_new_tokens=3, min_new_tokens=3)
    assert generated.shape[1] == batch["input_ids"].shape[1] + 3
    return model, processor


def siglip_pooling(inputs):
    use_siglip(inputs)
    use_projector(inputs, SIX, pooled=True, detail_kernel=16)


def siglip_pooling_without_details(inputs):
    use_siglip(inputs, side=192)
    use_projector(inputs, [2, 4, 6, 8, 10, 12], pooled=True)


def anyres_cropping(inputs):
    use_tiles(inputs)


def anyres_as_text(inputs):
    use_tiles(inputs, str([tuple(pair) for pair in PINPOINTS]))


def anyres_siglip(inputs):
    use_siglip(inputs, side=192)
    use_projector(inputs, [2, 4, 6, 8, 10, 12], detail_kernel=8, bias=True)
    use_tiles(inputs, SIGLIP_PINPOINTS)


def mistral_base(inputs):
    use_language_model(inputs, mistral())


def mistral_anyres(inputs):
    use_language_model(inputs, mistral())
    use_tiles(inputs)


def other_width(inputs):
    use_language_model(inputs, llama(40))
    use_projector(inputs, SIX, pooled=True, detail_kernel=16, text=40)


def other_width_anyres(inputs):
    use_language_model(inputs, llama(40))
    use_projector(inputs, SIX, detail_kernel=16, bias=True, text=40)
    use_tiles(inputs, width=40)


RELEASES = {
    "siglip-pooling-dfi": siglip_pooling,
    "siglip-pooling": siglip_pooling_without_details,
    "anyres-cropping-dfi": anyres_cropping,
    "anyres-as-text": anyres_as_text,
    "anyres-siglip": anyres_siglip,
    "mistral": mistral_base,
    "mistral-anyres": mistral_anyres,
    "other-width": other_width,
    "other-width-anyres": other_width_anyres,
}


@pytest.mark.parametrize("name", RELEASES)
def test_release_gives_the_plain_logits(inputs, name):
    RELEASES[name](inputs)
    plain = Plain(inputs).merge_adapter()

    report = inputs.convert()

    assert report.verification.projector_error is not None
    model, processor = check(inputs, plain)
    pinpoints = plain.pinpoints and [[height, width] for width, height in plain.pinpoints]
    assert model.config.image_grid_pinpoints == pinpoints
    assert getattr(processor.image_processor, "image_grid_pinpoints", None) == pinpoints
    stored = load_file(inputs.output / "model.safetensors").get("model.image_newline.weight")
    assert (stored is None) == (plain.newline is None)
    if stored is not None:
        assert torch.equal(stored, plain.newline)
    assert model.config.vision_feature_select_strategy == ("full" if plain.is_siglip else "default")
    assert not any("vision_tower.head" in key for key in model.state_dict())


def test_mistral_keeps_what_llama_has_not(inputs):
    mistral_base(inputs)
    inputs.convert()
    model, processor = load(inputs)
    text = model.config.text_config
    assert (text.model_type, text.sliding_window, text.num_key_value_heads) == ("mistral", 100, 2)
    assert processor.tokenizer.model_max_length == 8192


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "LlamaTokenizerFast", None])
def test_mistral_gives_the_authors_ids(inputs, tokenizer_class):
    mistral_base(inputs)
    write_json(inputs.release / "tokenizer_config.json", tokenizer_class=tokenizer_class or "LlamaTokenizer")
    if tokenizer_class is None:
        (inputs.release / "tokenizer_config.json").unlink()
    inputs.convert()
    processor = AutoProcessor.from_pretrained(inputs.output)
    samples = json.loads((FIXTURES / "mini-cropping" / "golden" / "golden.json").read_text())["samples"]
    for sample in samples.values():
        prompt = sample["prompt"].replace("<image>", f"<image>{processor.image_suffix}")
        ids = processor.tokenizer(prompt).input_ids
        assert [-200 if token == processor.image_token_id else token for token in ids] == sample["input_ids"]


# Other layouts


@pytest.mark.parametrize("head", [True, False], ids=["with-head", "without-head"])
def test_full_checkpoint_with_a_siglip_tower_inside(inputs, head):
    siglip_pooling_without_details(inputs)
    plain = Plain(inputs).merge_adapter()
    tower_inside(inputs, head)

    report = inputs.convert(base_model=None, vision_tower=None)

    dropped = [key for key in report.dropped_keys if ".head." in key]
    assert bool(dropped) == head
    assert all(key.startswith("model.vision_tower.vision_tower.vision_model.head.") for key in dropped)
    check(inputs, plain, ["wide"])


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json"], ids=["whole", "shards"])
def test_full_checkpoint_with_tiles(inputs, file):
    anyres_cropping(inputs)
    plain = Plain(inputs).merge_adapter()
    assert "model.image_newline" in make_full(inputs, file=file)
    assert inspect_checkpoint(inputs.release).problems == []
    inputs.convert(base_model=None)
    check(inputs, plain, ["tall"])


def test_pretraining_with_tiles_draws_the_separator(inputs):
    plain = Plain(inputs)
    make_pretraining(inputs)
    config = {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": PINPOINTS,
    }
    write_json(inputs.release / "config.json", **config)
    assert inspect_checkpoint(inputs.release).problems == []

    def digests():
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs.output.iterdir()}

    report = inputs.convert()
    first = digests()
    shutil.rmtree(inputs.output)
    torch.manual_seed(99)
    inputs.convert()
    assert digests() == first

    sentence = "The separator of image tiles (`image_newline`) was drawn at random"
    assert sentence in str(report)
    assert sentence in " ".join((inputs.output / "README.md").read_text().split())
    newline = load_file(inputs.output / "model.safetensors")["model.image_newline.weight"]
    # As long as a vector of unit length, as the authors' code draws it
    assert newline.shape == (TEXT,)
    assert 0.5 < newline.norm() < 1.5
    plain.newline, plain.pinpoints = newline, PINPOINTS
    check(inputs, plain, ["square"])


def test_pretraining_that_stores_the_separator_keeps_it(inputs):
    anyres_cropping(inputs)
    newline = inputs.projector()[NEWLINE]
    make_pretraining(inputs)
    write_json(inputs.release / "config.json", image_aspect_ratio="anyres")
    report = inputs.convert()
    assert "drawn at random" not in str(report)
    assert torch.equal(load_file(inputs.output / "model.safetensors")["model.image_newline.weight"], newline)


def test_separator_of_a_shard_of_its_own_is_in_the_card(inputs):
    anyres_cropping(inputs)
    weights = make_full(inputs)
    (inputs.release / "model.safetensors").unlink()
    key, name = "model.image_newline", "model-00002-of-00002.safetensors"
    save_file({key: weights[key]}, inputs.release / name)
    save_file(
        {each: weights[each] for each in weights if each != key}, inputs.release / "model-00001-of-00002.safetensors"
    )
    weight_map = {each: name if each == key else "model-00001-of-00002.safetensors" for each in weights}
    write_json(inputs.release / "model.safetensors.index.json", weight_map=weight_map)
    inputs.convert(base_model=None)
    digest = hashlib.sha256((inputs.release / name).read_bytes()).hexdigest()
    assert f"{digest}  {name}" in (inputs.output / "README.md").read_text()


# The vision tower


@pytest.mark.parametrize(
    "named, noted",
    [
        ("openai/clip-vit-large-patch14-336", True),
        ("/home/somebody/clip-vit-large-patch14-336", True),
        ("/home/somebody/vision", False),
        (None, False),
    ],
    ids=["another", "path-to-another", "same-name-elsewhere", "none"],
)
def test_tower_of_another_name_is_noted(inputs, named, noted):
    """A SigLIP can have the width and grid of a CLIP: nothing but its name tells that it was not trained with."""
    use_siglip(inputs)
    write_json(inputs.release / "config.json", mm_vision_tower=named or ...)
    report = inputs.convert()
    sentence = "calls its vision tower 'clip-vit-large-patch14-336', and the one used here is called 'vision'"
    card = " ".join((inputs.output / "README.md").read_text().split())
    assert (sentence in str(report)) == (sentence in card) == noted
    assert ("calls its vision tower" in card) == noted
    assert "/home/" not in card


def test_siglip_in_transformers_5s_own_form(inputs):
    siglip_pooling_without_details(inputs)
    inputs.convert()
    expected = load_file(inputs.output / "model.safetensors")
    shutil.rmtree(inputs.output)
    tower = SiglipVisionModel.from_pretrained(inputs.tower)
    for name in ("config.json", "model.safetensors"):
        (inputs.tower / name).unlink()
    tower.save_pretrained(inputs.tower)
    inputs.convert()
    found = load_file(inputs.output / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def crop_after_resizing(inputs):
    write_json(inputs.tower / "preprocessor_config.json", size={"shortest_edge": 384})


def not_normalised(inputs):
    write_json(inputs.tower / "preprocessor_config.json", do_normalize=False)


@pytest.mark.parametrize("change", [crop_after_resizing, not_normalised], ids=lambda change: change.__name__)
@pytest.mark.parametrize("aspect_ratio", ["pad", "anyres", "square"])
def test_other_preprocessing_is_not_left_out_in_silence(inputs, aspect_ratio, change):
    if aspect_ratio == "anyres":
        anyres_cropping(inputs)
    write_json(inputs.release / "config.json", image_aspect_ratio=aspect_ratio)
    change(inputs)
    if aspect_ratio != "anyres":
        inputs.convert()
        processor = AutoProcessor.from_pretrained(inputs.output)
        own = AutoImageProcessor.from_pretrained(inputs.tower, backend="pil")
        square = Image.radial_gradient("L").convert("RGB")
        pixels, expected = (
            one(square, return_tensors="pt")["pixel_values"] for one in (processor.image_processor, own)
        )
        assert torch.equal(pixels, expected)
        return
    with pytest.raises(ConversionError, match=r"preprocessor_config.json describes something else than resizing"):
        inputs.convert()
    assert not inputs.output.exists()


# The chat template


OWN_TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"


def saved_templates(inputs):
    """The chat templates in the output, by file."""
    found = {path.name: path.read_text() for path in inputs.output.rglob("*.jinja")}
    for name in ("tokenizer_config.json", "processor_config.json"):
        assert "chat_template" not in json.loads((inputs.output / name).read_text())
    return found


def messages():
    content = [{"type": "image", "image": IMAGES["small"]}, {"type": "text", "text": "What is this?"}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    "own",
    [None, OWN_TEMPLATE, [{"name": "default", "template": OWN_TEMPLATE}, {"name": "tool_use", "template": "{{ x }}"}]],
    ids=["none", "one", "several"],
)
def test_vicuna_v1_is_the_chat_template_whatever_the_tokenizer_has(inputs, own):
    write_json(inputs.release / "tokenizer_config.json", chat_template=own or ...)
    inputs.convert()
    assert saved_templates(inputs) == {"chat_template.jinja": VICUNA_V1_CHAT_TEMPLATE}
    assert AutoProcessor.from_pretrained(inputs.output).chat_template == VICUNA_V1_CHAT_TEMPLATE
    card = (inputs.output / "README.md").read_text()
    assert "--chat-template" not in card
    assert "USER: <image>\nWhat is shown in this image? ASSISTANT:" in card
    # An earlier result can be replaced
    inputs.convert(overwrite=True)


@pytest.mark.parametrize(
    "own",
    [OWN_TEMPLATE, [{"name": "default", "template": OWN_TEMPLATE}, {"name": "tool_use", "template": "{{ x }}"}]],
    ids=["one", "several"],
)
def test_the_tokenizers_own_chat_template_with_images(inputs, own):
    write_json(inputs.release / "tokenizer_config.json", chat_template=own)
    arguments = ["convert", inputs.release, inputs.output, "--base-model", inputs.base, "--vision-tower", inputs.tower]
    result = CliRunner().invoke(app, [*map(str, arguments), "--chat-template", "tokenizer"])
    assert result.exit_code == 0, result.output
    [(name, template)] = saved_templates(inputs).items()
    assert name == "chat_template.jinja"
    model, processor = load(inputs)
    assert processor.chat_template == template
    rendered = processor.apply_chat_template(messages(), add_generation_prompt=True)
    assert rendered == "[user] <image>\nWhat is this?\n"
    batch = processor.apply_chat_template(messages(), tokenize=True, return_dict=True, return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=2).shape[1] > batch["input_ids"].shape[1]
    card = (inputs.output / "README.md").read_text()
    assert "--vision-tower vision --chat-template tokenizer\n" in card
    assert "is the language model's own, made to take images" in card
    assert "ASSISTANT:" not in card


def test_no_chat_template_of_the_tokenizer_is_made_up(inputs):
    with pytest.raises(
        ConversionError, match=r"The tokenizer in .*release has no chat template: leave out --chat-temp"
    ):
        inputs.convert(chat_template="tokenizer")
    with pytest.raises(ConversionError, match=r"Unknown chat template 'llama3': expected 'vicuna_v1' or 'tokenizer'"):
        inputs.convert(chat_template="llama3", base_model="not/looked-at")
    assert not inputs.output.exists()


# What is said about them


def test_inspection_of_tiles(inputs):
    anyres_as_text(inputs)
    result = CliRunner().invoke(app, ["inspect", str(inputs.release)])
    assert result.exit_code == 0, result.output
    rows = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["tokens per image"] == "582 for the whole image; its tiles take more"
    assert rows["images"] == (
        "cut into tiles, in the best-fitting of 672x336, 336x672, 672x672, 336x1008, 1008x336 (height x width)"
    )
    result = CliRunner().invoke(app, ["inspect", str(inputs.release), "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["image_grid_pinpoints"] == [[height, width] for width, height in PINPOINTS]
    assert (found["image_tokens"], found["images"], found["problems"]) == (582, "cut into tiles", [])
    assert found["parameters"]["projector"] == sum(tensor.numel() for tensor in inputs.projector().values())

    inputs.convert()
    converted = inspect_checkpoint(inputs.output)
    assert converted.image_grid_pinpoints == found["image_grid_pinpoints"]
    assert converted.image_tokens == 582


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_inspection_sees_a_wrong_separator(inputs, change):
    anyres_cropping(inputs)
    tensors = inputs.projector()
    del tensors[NEWLINE]
    inputs.write_projector(tensors if change == "missing" else {**tensors, NEWLINE: torch.zeros(TEXT + 1)})
    inspection = inspect_checkpoint(inputs.release)
    [problem] = inspection.problems
    assert repr(NEWLINE) in problem
    assert inspection.variant == "cropping"


def test_inspection_of_a_siglip_checkpoint(inputs):
    siglip_pooling_without_details(inputs)
    result = CliRunner().invoke(app, ["inspect", str(inputs.release), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["variant"], found["grid_size"], found["image_tokens"]) == ("pooling", 12, 150)
    assert (found["vision_tower"], found["problems"]) == ("google/siglip-large-patch16-384", [])
    assert found["image_grid_pinpoints"] is None


def table_rows(card):
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]
    return {row[0]: row[1] for row in cells}


def test_report_and_card_of_tiles(inputs):
    anyres_siglip(inputs)
    report = inputs.convert()
    # 2 x 2 tiles without padding: 5 x 6 spatial tokens, 144 of the whole image, 24 rows of 24 and a separator each
    most = 5 * 6 + 12**2 + 24 * 25
    assert f"  tokens per image: 6 spatial + 144 patch, up to {most} with tiles\n" in str(report)
    card = (inputs.output / "README.md").read_text()
    rows = table_rows(card)
    assert rows["vision tower"] == (
        f"`siglip_vision_model`, 3 layers, width {VISION}; images of 192 x 192 pixels, a grid of 12 x 12 patches"
    )
    assert rows["image tiles"] == (
        "of 192 x 192 pixels, in the best-fitting of 384 x 192, 192 x 384, 384 x 384, 192 x 576 (height x width)"
    )
    assert rows["tokens per image"] == (
        "150: 6 spatial, 144 patch for the whole image; 6 and its patches for each tile, and 1 for each row of "
        f"patches; up to {most} in all"
    )
    assert f"takes up to {most} of these tokens." in card
    processor = AutoProcessor.from_pretrained(inputs.output)
    counts = [
        processor.get_image_layout((height, width)).num_tokens
        for height in range(9, 800, 77)
        for width in (8, 384, 900)
    ]
    assert max(counts) <= most == processor.get_image_layout((384, 384)).num_tokens


def test_nothing_is_said_about_tiles_where_there_are_none(inputs):
    report = inputs.convert()
    assert "  tokens per image: 6 spatial + 576 patch\n" in str(report)
    card = (inputs.output / "README.md").read_text()
    assert table_rows(card)["tokens per image"] == "582: 6 spatial, 576 patch"
    assert "tile" not in card


def test_examples_of_the_card_run_with_tiles(inputs, tmp_path):
    anyres_cropping(inputs)
    inputs.convert()
    IMAGES["wide"].save(inputs.output / "photo.jpg")
    blocks = re.findall(r"^```python\n(.*?)^```$", (inputs.output / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    code = f"""
import os

os.chdir({str(inputs.output)!r})
for block in {blocks!r}:
    exec(block, {{"__name__": "__main__"}})
    print("end of an answer")
"""
    process = run_without_the_package(code, tmp_path)
    assert process.returncode == 0, process.stderr
    by_pipeline, by_model, rest = process.stdout.split("end of an answer\n")
    assert (by_pipeline.strip(), rest) == (by_model.strip(), "")
    assert by_model.strip()


@pytest.mark.parametrize(
    "change",
    [{"image_grid_pinpoints": [[336, 672], [672, 336]]}, {"image_grid_pinpoints": [[672, 336]]}],
    ids=["order", "number"],
)
def test_verification_sees_a_processor_of_other_tiles(inputs, monkeypatch, change):
    use_tiles(inputs, [[336, 672], [672, 336]])
    save_pretrained = LlavaSPProcessor.save_pretrained

    def save_another(self, folder, **kwargs):
        save_pretrained(self, folder, **kwargs)
        path = Path(folder) / "processor_config.json"
        config = json.loads(path.read_text())
        config["image_processor"].update(change)
        path.write_text(json.dumps(config))

    monkeypatch.setattr(LlavaSPProcessor, "save_pretrained", save_another)
    with pytest.raises(ConversionError, match=r"read again, are wrong: the processor cuts images into tiles at \[\["):
        inputs.convert()
    assert not inputs.output.exists()


def test_constants_are_those_of_the_miniature():
    config = json.loads((Path(FIXTURES) / "mini-cropping" / "release" / "config.json").read_text())
    assert (config["hidden_size"], config["mm_hidden_size"], GRID, SPATIAL) == (TEXT, VISION, 24, 6)
