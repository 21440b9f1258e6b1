"""The processor: slots, pixels, chat template, what it saves, and what it says about bad input."""

import base64
import functools
import http.server
import inspect
import io
import json
import re
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from jinja2.exceptions import TemplateError
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, LlamaTokenizer
from transformers.models.auto import image_processing_auto

from transformers_llava_sp import LlavaSPProcessor
from transformers_llava_sp.configuration_llava_sp import HUB_MODULES


PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
NUM_TOKENS = 582
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@pytest.fixture(scope="module")
def folder(golden) -> Path:
    return golden("mini-cropping").converted


@pytest.fixture(scope="module")
def loaded(folder) -> LlavaSPProcessor:
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture
def processor(loaded, folder) -> LlavaSPProcessor:
    """A processor that a test may change."""
    return AutoProcessor.from_pretrained(folder)


def photo(width: int = 30, height: int = 20, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise, so that any change of place, channel or filter shows."""
    draw = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(draw.integers(0, 2**16, (height, width), dtype=np.uint16))
    noise = draw.integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode in ("RGBA", "CMYK"):
        return Image.frombytes(mode, (width, height), noise.tobytes())
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(noise[:, :, 0]), Image.fromarray(noise[:, :, 1])])
    if mode == "P":
        return Image.fromarray(noise[:, :, :3]).quantize(16)
    return Image.fromarray(noise[:, :, :3]).convert(mode)


def expected_pixels(image: Image.Image) -> np.ndarray:
    """The authors' pixels, (3, 336, 336): on a square of the mean colour, bicubic with PIL, rescaled, normalised."""
    image = image.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in MEAN.tolist()))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(square.resize((336, 336), Image.Resampling.BICUBIC))
    pixels = ((pixels * (1 / 255)).astype(np.float32) - MEAN) / STD
    return pixels.transpose(2, 0, 1)


def encoded(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def user(*content) -> list[dict]:
    """One user message of texts and of images, which are anything but a string."""
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in content
    ]
    return [{"role": "user", "content": parts}]


def tokenizer_with(*tokens: str) -> LlamaTokenizer:
    """Vicuna's tokenizer, as its checkpoint ships it, and added special tokens."""
    tokenizer = LlamaTokenizer.from_pretrained(FIXTURES / "mini-cropping" / "base")
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def slots(processor, inputs) -> list[int]:
    return [list(ids).count(processor.image_token_id) for ids in inputs["input_ids"]]


def unpadded(inputs) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


# Slots, batches, padding


def test_counts_come_from_the_configuration(golden, loaded):
    model, _ = golden("mini-cropping").load()
    assert loaded.num_image_tokens == model.config.projector_config.num_image_tokens == NUM_TOKENS
    assert loaded.image_token_id == model.config.image_token_id == loaded.tokenizer.convert_tokens_to_ids("<image>")
    assert loaded.image_token == "<image>"


@pytest.mark.parametrize("num_spatial_tokens, grid_size", [(6, 24), (3, 4), (1, 7), (12, 32)])
def test_slots_of_any_geometry(loaded, num_spatial_tokens, grid_size):
    processor = LlavaSPProcessor(
        loaded.image_processor, loaded.tokenizer, num_spatial_tokens=num_spatial_tokens, grid_size=grid_size
    )
    expected = num_spatial_tokens + grid_size**2
    assert processor.num_image_tokens == expected
    assert slots(processor, processor(text=PROMPT, images=photo())) == [expected]
    counts = processor._get_num_multimodal_tokens(image_sizes=[(20, 30), (336, 336), (1, 999)])
    assert counts.num_image_tokens == [expected] * 3
    assert counts.num_image_patches == [1] * 3
    assert processor._get_num_multimodal_tokens().num_image_tokens is None


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_mixed_batch_equals_each_sample_alone(loaded, nested):
    images = [photo(seed=seed) for seed in range(3)]
    texts = [PROMPT, "USER: Hello. ASSISTANT:", "USER: <image>\n<image>\nWhich one? ASSISTANT:"]
    per_sample = [images[:1], [], images[1:]]
    batch = loaded(text=texts, images=per_sample if nested else images, padding=True, return_tensors="pt")
    alone = [loaded(text=text, images=own, return_tensors="pt") for text, own in zip(texts, per_sample, strict=True)]

    assert slots(loaded, batch) == [NUM_TOKENS, 0, 2 * NUM_TOKENS]
    assert unpadded(batch) == [inputs["input_ids"][0].tolist() for inputs in alone]
    assert torch.equal(batch["pixel_values"], torch.cat([alone[0]["pixel_values"], alone[2]["pixel_values"]]))
    assert "pixel_values" not in alone[1]
    np.testing.assert_array_equal(batch["pixel_values"][2].numpy(), expected_pixels(images[2]))


@pytest.mark.parametrize("images", [None, [], (), [[], []]], ids=["none", "list", "tuple", "nested"])
def test_no_images(loaded, images):
    inputs = loaded(text=["USER: a", "USER: b"], images=images, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].shape[0] == 2


@pytest.mark.parametrize("text", [PROMPT, [PROMPT], (PROMPT,)], ids=["string", "list", "tuple"])
@pytest.mark.parametrize("wrap", [lambda image: image, lambda image: [image], lambda image: [[image]]], ids=range(3))
def test_text_and_images_alone_or_in_lists(loaded, text, wrap):
    expected = loaded(text=PROMPT, images=photo(), return_tensors="pt")
    inputs = loaded(text=text, images=wrap(photo()), return_tensors="pt")
    assert {name: tensor.shape for name, tensor in inputs.items()} == {
        "input_ids": expected["input_ids"].shape,
        "attention_mask": expected["attention_mask"].shape,
        "pixel_values": (1, 3, 336, 336),
    }
    assert all(torch.equal(inputs[name], tensor) for name, tensor in expected.items())


def test_the_callers_lists_are_left_alone(loaded):
    image = photo(mode="L")
    texts, images = [PROMPT, "USER: a"], [[image], []]
    loaded(text=texts, images=images, padding=True)
    assert texts == [PROMPT, "USER: a"]
    assert images == [[image], []]
    assert images[0][0] is image


def test_padding_is_left_unless_asked_for(loaded):
    texts = ["USER: a", "USER: a a a a a a"]
    left = loaded(text=texts, padding=True, return_tensors="pt")
    assert left["attention_mask"][0, 0] == 0
    assert left["attention_mask"][:, -1].all()
    assert left["input_ids"][0, 0] == loaded.tokenizer.pad_token_id
    right = loaded(text=texts, padding=True, padding_side="right", return_tensors="pt")
    assert right["attention_mask"][:, 0].all()
    assert right["attention_mask"][0, -1] == 0
    assert unpadded(right) == unpadded(left)
    assert loaded.tokenizer.padding_side == "left"


def test_return_tensors(loaded):
    lists = loaded(text=PROMPT, images=photo())
    assert isinstance(lists["input_ids"][0][0], int)
    arrays = loaded(text=PROMPT, images=photo(), return_tensors="np")
    tensors = loaded(text=PROMPT, images=photo(), return_tensors="pt")
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert isinstance(arrays[name], np.ndarray)
        assert isinstance(tensors[name], torch.Tensor)
        np.testing.assert_array_equal(arrays[name], tensors[name].numpy())
    assert tensors["input_ids"].tolist() == lists["input_ids"]
    assert tensors["pixel_values"].dtype == torch.float32
    assert set(tensors) == set(loaded.model_input_names)


def test_images_alone(loaded):
    inputs = loaded(images=[photo(), photo(9, 9)], return_tensors="pt")
    assert {name: tensor.shape for name, tensor in inputs.items()} == {"pixel_values": (2, 3, 336, 336)}


def test_token_type_ids_mark_the_slots(loaded):
    inputs = loaded(text=PROMPT, images=photo(), return_mm_token_type_ids=True)
    is_slot = [token == loaded.image_token_id for token in inputs["input_ids"][0]]
    assert inputs["mm_token_type_ids"][0] == [int(slot) for slot in is_slot]


# Saving and loading


def test_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path / "once")
    saved_once = AutoProcessor.from_pretrained(tmp_path / "once")
    saved_once.save_pretrained(tmp_path / "twice")
    saved_twice = AutoProcessor.from_pretrained(tmp_path / "twice")

    texts, images = [PROMPT, "USER: a</s>USER: b"], [[photo()], []]
    expected = processor(text=texts, images=images, padding=True, return_tensors="pt")
    for copy in (saved_once, saved_twice):
        assert type(copy) is LlavaSPProcessor
        assert copy.chat_template == processor.chat_template
        inputs = copy(text=texts, images=images, padding=True, return_tensors="pt")
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], tensor) for name, tensor in expected.items())
    once, twice = ({path.name: path.read_text() for path in (tmp_path / name).iterdir()} for name in ("once", "twice"))
    assert once == twice


def test_every_argument_survives(loaded, tmp_path):
    tokenizer = tokenizer_with("<picture>")
    image_processor = type(loaded.image_processor)(
        do_pad=False, image_mean=[0.5, 0.25, 0.125], size={"shortest_edge": 40}
    )
    arguments = {
        "image_processor": image_processor,
        "tokenizer": tokenizer,
        "num_spatial_tokens": 3,
        "grid_size": 4,
        "patch_downsample_factor": 2,
        "chat_template": "{% for message in messages %}{{ message['role'] }}{% endfor %}",
        "image_token": "<picture>",
        "image_prefix": "<start>",
        "image_suffix": "<end>",
    }
    assert set(arguments) == set(inspect.signature(LlavaSPProcessor.__init__).parameters) - {"self"}
    LlavaSPProcessor(**arguments).save_pretrained(tmp_path)

    processor = LlavaSPProcessor.from_pretrained(tmp_path)
    assert processor.num_spatial_tokens == 3
    assert processor.grid_size == 4
    assert processor.patch_downsample_factor == 2
    assert (processor.image_prefix, processor.image_suffix) == ("<start>", "<end>")
    assert processor.num_image_tokens == 3 + 4
    assert processor.image_token == "<picture>"
    assert processor.image_token_id == tokenizer.convert_tokens_to_ids("<picture>")
    assert processor.apply_chat_template(user("a")) == "user"
    assert processor.image_processor.do_pad is False
    assert list(processor.image_processor.image_mean) == [0.5, 0.25, 0.125]
    assert processor.image_processor.size["shortest_edge"] == 40
    assert slots(processor, processor(text="<picture>", images=photo())) == [7]


def test_saved_files(loaded, tmp_path):
    saved = loaded.save_pretrained(tmp_path)
    assert saved == [str(tmp_path / "processor_config.json")]
    names = {path.name for path in tmp_path.iterdir()}
    assert set(HUB_MODULES) | {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"} <= names
    assert "preprocessor_config.json" not in names
    config = json.loads((tmp_path / "processor_config.json").read_text())
    assert config["auto_map"] == {"AutoProcessor": "processing_llava_sp.LlavaSPProcessor"}
    assert config["processor_class"] == "LlavaSPProcessor"
    assert {name: config[name] for name in ("num_spatial_tokens", "grid_size", "image_token")} == {
        "num_spatial_tokens": 6,
        "grid_size": 24,
        "image_token": "<image>",
    }
    assert config["image_processor"]["do_pad"] is True
    assert (tmp_path / "chat_template.jinja").read_text() == loaded.chat_template


def test_loads_from_a_subfolder(loaded, tmp_path):
    loaded.save_pretrained(tmp_path / "below")
    processor = LlavaSPProcessor.from_pretrained(tmp_path, subfolder="below")
    assert processor(text="USER: a")["input_ids"] == loaded(text="USER: a")["input_ids"]


def test_pushing_uploads_the_saved_folder(processor, tmp_path, monkeypatch):
    pushed = {}
    monkeypatch.setattr(
        LlavaSPProcessor, "push_to_hub", lambda self, repo_id, **kwargs: pushed.update(repo_id=repo_id, **kwargs)
    )
    processor.save_pretrained(tmp_path / "name", push_to_hub=True, private=True)
    assert pushed == {"repo_id": "name", "private": True}
    assert (tmp_path / "name" / "processing_llava_sp.py").is_file()


def test_tokenizer(loaded):
    tokenizer = loaded.tokenizer
    assert tokenizer.legacy is False
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 4096
    pieces = tokenizer.convert_ids_to_tokens
    # With legacy=True, sentencepiece's space would stand in front of the text behind the end token
    assert pieces(tokenizer("a</s>USER: b")["input_ids"]) == ["<s>", "▁a", "</s>", "USER", ":", "▁b"]
    # As in the authors' ids, a space stands alone on both sides of an image
    ids = loaded(text="USER: <image>\nHi", images=photo())["input_ids"][0]
    slot = ids.index(loaded.image_token_id)
    assert pieces(ids[:slot]) == ["<s>", "▁USER", ":", "▁"]
    assert pieces(ids[slot + NUM_TOKENS :])[:2] == ["▁", "<0x0A>"]


# The image processor's backend


@pytest.fixture
def backends(monkeypatch) -> list[str]:
    """The backends that image processors are loaded with while torchvision seems to be installed."""
    resolved = []
    resolve = image_processing_auto._resolve_backend

    def record(*args, **kwargs):
        resolved.append(resolve(*args, **kwargs))
        return resolved[-1]

    monkeypatch.setattr(image_processing_auto, "_resolve_backend", record)
    monkeypatch.setattr(image_processing_auto, "is_torchvision_available", lambda: True)
    return resolved


def test_pil_is_the_default_even_with_torchvision(backends, folder):
    AutoImageProcessor.from_pretrained(folder)
    assert backends == ["torchvision"]
    for load in (AutoProcessor.from_pretrained, LlavaSPProcessor.from_pretrained):
        backends.clear()
        processor = load(folder)
        assert backends == ["pil"]
        assert type(processor.image_processor).__name__ == "LlavaImageProcessorPil"


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_backend_on_request_is_the_image_processors_alone(backends, folder, tmp_path, backend):
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "default")
    backends.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where torchvision is missing, PIL steps in with a warning
        processor = AutoProcessor.from_pretrained(folder, backend=backend)
    assert backends == [backend]
    assert processor.tokenizer.init_kwargs.get("backend") != backend
    processor.save_pretrained(tmp_path / "chosen")
    default, chosen = ((tmp_path / name / "tokenizer_config.json").read_text() for name in ("default", "chosen"))
    assert chosen == default
    config = json.loads((tmp_path / "chosen" / "processor_config.json").read_text())
    assert config["image_processor"]["image_processor_type"] == "LlavaImageProcessor"


# The chat template


def render(processor, messages, **kwargs) -> str:
    return processor.apply_chat_template(messages, **kwargs)


def test_default_system_prompt(loaded):
    assert render(loaded, user("Hi.")) == SYSTEM + "USER: Hi."
    assert render(loaded, user("Hi."), add_generation_prompt=True) == SYSTEM + "USER: Hi. ASSISTANT:"


@pytest.mark.parametrize(
    "system",
    ["Be brief.", [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]],
    ids=["str", "parts"],
)
def test_custom_system_prompt(loaded, system):
    messages = [{"role": "system", "content": system}, *user("Hi.")]
    assert render(loaded, messages, add_generation_prompt=True) == "Be brief. USER: Hi. ASSISTANT:"


@pytest.mark.parametrize("system", ["", []], ids=["str", "parts"])
def test_empty_system_prompt(loaded, system):
    assert render(loaded, [{"role": "system", "content": system}, *user("Hi.")]) == "USER: Hi."


def test_turns(loaded):
    messages = [
        *user(photo(), "What is this?"),
        {"role": "assistant", "content": [{"type": "text", "text": "Noise."}]},
        *user("Why?", photo()),
        {"role": "assistant", "content": "By chance."},
    ]
    turns = SYSTEM + "USER: <image>\nWhat is this? ASSISTANT: Noise.</s>USER: <image>\nWhy? ASSISTANT: By chance.</s>"
    assert render(loaded, messages) == turns
    assert render(loaded, [*messages, *user("So?")], add_generation_prompt=True) == turns + "USER: So? ASSISTANT:"


def test_content_as_string(loaded):
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]
    assert render(loaded, messages) == SYSTEM + "USER: Hi. ASSISTANT: Ho.</s>"


def test_images_come_first_in_their_turn(loaded):
    expected = SYSTEM + "USER: <image>\n<image>\nThis one and that one?"
    assert render(loaded, user(photo(), photo(), "This one and that one?")) == expected
    assert render(loaded, user("This one", photo(), " and that one?", photo())) == expected
    assert render(loaded, user(photo())) == SYSTEM + "USER: <image>\n"


def test_continue_final_message(loaded):
    messages = [*user("Hi."), {"role": "assistant", "content": [{"type": "text", "text": "I think"}]}]
    assert render(loaded, messages, continue_final_message=True) == SYSTEM + "USER: Hi. ASSISTANT: I think"


def test_batch_of_conversations(loaded):
    conversations = [user(photo(), "One?"), user("Two?"), user(photo(seed=1), photo(seed=2), "Three?")]
    prompts = [SYSTEM + f"USER: {text}" for text in ("<image>\nOne?", "Two?", "<image>\n<image>\nThree?")]
    assert render(loaded, conversations) == prompts
    batch = loaded.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    images = [[photo()], [], [photo(seed=1), photo(seed=2)]]
    expected = loaded(text=prompts, images=images, padding=True, return_tensors="pt")
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], tensor) for name, tensor in expected.items())


def test_generation_mask_in_a_padded_batch(loaded):
    conversations = [
        [*user(photo(), "One?"), {"role": "assistant", "content": "Yes."}],
        [
            *user("Two?"),
            {"role": "assistant", "content": "No."},
            *user(photo()),
            {"role": "assistant", "content": "A b."},
        ],
    ]
    batch = loaded.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True},
    )
    answers = [
        [token for token, marked in zip(ids, mask, strict=True) if marked]
        for ids, mask in zip(batch["input_ids"], batch["assistant_masks"], strict=True)
    ]
    expected = [["Yes.</s>"], ["No.</s>", "A b.</s>"]]
    assert answers == [
        [token for text in texts for token in loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
        for texts in expected
    ]


@pytest.mark.parametrize(
    "messages, message",
    [
        ([*user("a"), *user("b")], "roles must alternate, user first.*message 1 has the role 'user'"),
        ([{"role": "assistant", "content": "a"}], "message 0 has the role 'assistant'"),
        ([*user("a"), {"role": "system", "content": "b"}], "message 1 has the role 'system'"),
        ([{"role": "tool", "content": "a"}], "message 0 has the role 'tool'"),
        (
            [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],
            "A message of the user cannot have a part of type 'video'",
        ),
        (
            [*user("a"), {"role": "assistant", "content": [{"type": "image", "image": photo()}]}],
            "A message of the assistant cannot have a part of type 'image'",
        ),
        (
            [{"role": "system", "content": [{"type": "image", "image": photo()}]}, *user("a")],
            "A message of the system cannot have a part of type 'image'",
        ),
    ],
    ids=["two-users", "assistant-first", "late-system", "tool", "video", "assistant-image", "system-image"],
)
def test_bad_messages_are_refused(loaded, messages, message):
    with pytest.raises(TemplateError, match=message):
        render(loaded, messages)


def test_template_has_the_processors_image_token(loaded):
    processor = LlavaSPProcessor(loaded.image_processor, tokenizer_with("<picture>"), 6, 24, image_token="<picture>")
    assert render(processor, user(photo(), "a")) == SYSTEM + "USER: <picture>\na"


# Where images come from


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a web server for `tmp_path`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.func.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


SOURCES = ("path", "path-object", "image-path", "data-uri", "image-data-uri", "base64", "url", "image-url", "object")


def name_image(source: str, file: Path, address: str) -> tuple:
    """One of the `SOURCES` of an image file, as the key and value of a message's part."""
    text = base64.b64encode(file.read_bytes()).decode()
    return {
        "path": ("path", str(file)),
        "path-object": ("path", file),
        "image-path": ("image", str(file)),
        "data-uri": ("url", f"data:image/png;base64,{text}"),
        "image-data-uri": ("image", f"data:image/png;base64,{text}"),
        "base64": ("base64", text),
        "url": ("url", f"{address}/{file.name}"),
        "image-url": ("image", f"{address}/{file.name}"),
        "object": ("image", Image.open(file)),
    }[source]


@pytest.mark.parametrize("source", SOURCES)
def test_sources_of_an_image(loaded, server, tmp_path, source):
    (tmp_path / "photo.png").write_bytes(encoded(photo()))
    key, value = name_image(source, tmp_path / "photo.png", server)
    messages = [{"role": "user", "content": [{"type": "image", key: value}, {"type": "text", "text": "What?"}]}]
    from_message = loaded.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    from_call = loaded(text=SYSTEM + "USER: <image>\nWhat?", images=value, return_tensors="pt")
    for inputs in (from_message, from_call):
        np.testing.assert_array_equal(inputs["pixel_values"][0].numpy(), expected_pixels(photo()))
        assert slots(loaded, inputs) == [NUM_TOKENS]
    assert torch.equal(from_message["input_ids"], from_call["input_ids"])


def test_openai_style_parts(loaded, tmp_path):
    (tmp_path / "photo.png").write_bytes(encoded(photo()))
    part = {"type": "image_url", "image_url": {"url": str(tmp_path / "photo.png")}}
    inputs = loaded.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True, return_dict=True)
    np.testing.assert_array_equal(inputs["pixel_values"][0], expected_pixels(photo()))


@pytest.mark.parametrize("source", SOURCES)
def test_exif_orientation_is_applied_to_what_is_loaded(loaded, server, tmp_path, source):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    (tmp_path / "photo.png").write_bytes(encoded(photo(), exif=exif))
    _, value = name_image(source, tmp_path / "photo.png", server)
    upright = photo() if source == "object" else photo().transpose(Image.Transpose.ROTATE_270)
    pixels = loaded(images=value, return_tensors="pt")["pixel_values"][0]
    np.testing.assert_array_equal(pixels.numpy(), expected_pixels(upright))


@pytest.mark.parametrize("to_array", [np.asarray, lambda image: torch.tensor(np.asarray(image)).permute(2, 0, 1)])
def test_arrays_and_tensors(loaded, to_array):
    pixels = loaded(images=to_array(photo()), return_tensors="pt")["pixel_values"][0]
    np.testing.assert_array_equal(pixels.numpy(), expected_pixels(photo()))


# Images of every kind


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 50), (50, 1), (3, 50), (50, 3), (3, 3), (4, 50), (50, 4), (1, 3), (2, 3)]
)
def test_tiny_images(loaded, size):
    pixels = loaded(text=PROMPT, images=photo(*size), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 336, 336)
    np.testing.assert_array_equal(pixels[0].numpy(), expected_pixels(photo(*size)))


@pytest.mark.parametrize("size", [(500, 340), (340, 500), (336, 336), (337, 335), (700, 700)])
def test_large_images(loaded, size):
    pixels = loaded(images=photo(*size), return_tensors="pt")["pixel_values"]
    np.testing.assert_array_equal(pixels[0].numpy(), expected_pixels(photo(*size)))


@pytest.mark.parametrize(
    "mode, image_format",
    [
        ("P", "PNG"),
        ("P-transparent", "PNG"),
        ("P-transparent", "GIF"),
        ("RGB-transparent", "PNG"),
        ("L-transparent", "PNG"),
        ("I;16", "PNG"),
        ("CMYK", "JPEG"),
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("L", "PNG"),
        ("1", "PNG"),
        ("RGB", "JPEG"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
    ],
)
@pytest.mark.parametrize("as_path", [True, False], ids=["path", "object"])
def test_modes_are_converted_as_pil_does(loaded, tmp_path, mode, image_format, as_path):
    file = tmp_path / f"photo.{image_format.lower()}"
    mode, _, transparent = mode.partition("-")
    original = photo(mode=mode)
    # A colour that the image has, marked as transparent: `convert` ignores it
    options = {"transparency": 3 if mode == "P" else original.getpixel((4, 4))} if transparent else {}
    file.write_bytes(encoded(original, image_format, **options))
    image = Image.open(file)
    assert image.mode == mode
    assert ("transparency" in image.info) == bool(transparent)
    pixels = loaded(images=str(file) if as_path else image, return_tensors="pt")["pixel_values"]
    np.testing.assert_array_equal(pixels[0].numpy(), expected_pixels(image.convert("RGB")))
    assert image.mode == mode
    assert ("transparency" in image.info) == bool(transparent)


@pytest.mark.parametrize("as_path", [True, False], ids=["path", "object"])
def test_animations_give_their_first_frame(loaded, tmp_path, as_path):
    frames = [photo(seed=seed).quantize(16) for seed in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    image = Image.open(tmp_path / "moving.gif")
    assert image.n_frames == 3
    pixels = loaded(images=tmp_path / "moving.gif" if as_path else image, return_tensors="pt")["pixel_values"]
    assert len(pixels) == 1
    np.testing.assert_array_equal(pixels[0].numpy(), expected_pixels(frames[0]))


# Bad input


@pytest.mark.parametrize(
    "text, images, message",
    [
        (PROMPT, None, "Sample 0 has 1 <image> slots, but no images were passed"),
        (PROMPT, [], "Sample 0 has 1 <image> slots, but no images were passed"),
        (["USER: a", PROMPT], None, "Sample 1 has 1 <image> slots, but no images were passed"),
        (PROMPT, [photo()] * 2, "The text has 1 <image> slots, but 2 images were passed"),
        ("USER: a", photo(), "The text has 0 <image> slots, but 1 images were passed"),
        ("<image> <image> <image>", [[photo()] * 2], "Sample 0 has 3 <image> slots, but 2 images"),
        ([PROMPT, PROMPT], [photo()], "The 2 samples have 2 <image> slots, but 1 images were passed"),
        ([PROMPT, "USER: a"], [[], [photo()]], "Sample 0 has 1 <image> slots, but 0 images"),
        (
            [PROMPT, "<image> <image>", PROMPT],
            [[photo()], [photo()], [photo()] * 2],
            "Sample 1 has 2 <image> slots, but 1 images",
        ),
        ([PROMPT, PROMPT], [[photo(), photo()]], "`images` is a list of 1 lists, but there are 2 texts"),
    ],
    ids=[
        "none",
        "empty",
        "none-in-batch",
        "too-many",
        "no-slot",
        "too-few-nested",
        "too-few-flat",
        "shifted",
        "totals-agree",
        "lists",
    ],
)
def test_slots_and_images_must_agree(loaded, text, images, message):
    with pytest.raises(ValueError, match=message) as error:
        loaded(text=text, images=images)
    if "lists" not in message:
        assert "Each image needs one <image> in the text" in str(error.value)


@pytest.mark.parametrize("content", [["What does <image> mean?"], [photo(), "What does <image> mean?"]], ids=len)
def test_image_token_in_the_users_text(loaded, content):
    num_images = len(content) - 1
    found = "no images were passed" if not num_images else "1 images"
    with pytest.raises(
        ValueError, match=rf"Sample 0 has {num_images + 1} <image> slots, but {found}.*written otherwise"
    ):
        loaded.apply_chat_template(user(*content), tokenize=True, return_dict=True)


def test_image_part_without_an_image(loaded):
    with pytest.raises(ValueError, match="Sample 0 has 1 <image> slots, but no images were passed"):
        loaded.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=True)


@pytest.fixture
def bad_images(tmp_path) -> dict:
    (tmp_path / "text.png").write_text("This is no image.")
    (tmp_path / "empty.png").write_bytes(b"")
    whole = encoded(photo(200, 200), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    whole = encoded(photo(200, 200))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    return {
        "missing": tmp_path / "missing.png",
        "folder": tmp_path,
        "text": tmp_path / "text.png",
        "empty": tmp_path / "empty.png",
        "truncated-jpeg": tmp_path / "cut.jpg",
        "truncated-png": tmp_path / "cut.png",
    }


@pytest.mark.parametrize("name", ["missing", "folder", "text", "empty", "truncated-jpeg", "truncated-png"])
def test_unreadable_files_are_named(loaded, bad_images, name):
    file = bad_images[name]
    message = rf"Cannot read images\[1\]\[0\] \({re.escape(str(file))}\): expected an image as a path, URL, data URI"
    with pytest.raises(ValueError, match=message) as error:
        loaded(text=[PROMPT, PROMPT], images=[[photo()], [str(file)]])
    if name.startswith("truncated"):
        assert "OSError" in str(error.value)
        assert "truncated" in str(error.value)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        loaded.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "path": str(file)}]}], tokenize=True
        )


@pytest.mark.parametrize("name", ["truncated-jpeg", "truncated-png"])
def test_truncated_image_objects_are_named(loaded, bad_images, name):
    message = r"Cannot read images\[0\] \(a PIL image of size \(200, 200\) and mode RGB\).*OSError: .*truncated"
    with pytest.raises(ValueError, match=message):
        loaded(text=PROMPT, images=[Image.open(bad_images[name])])


def test_unreadable_data_is_shortened(loaded):
    data = "data:image/png;base64," + base64.b64encode(b"no image" * 1000).decode()
    with pytest.raises(ValueError, match=r"Cannot read images \(data:image/png;base64,.*\.\.\.\)") as error:
        loaded(text=PROMPT, images=data)
    assert len(str(error.value)) < 1000


def test_unreachable_url_is_named(loaded, server):
    with pytest.raises(ValueError, match=rf"Cannot read images \({server}/missing.png\)"):
        loaded(text=PROMPT, images=f"{server}/missing.png")


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (0, 5)),
        Image.new("L", (5, 0)),
        np.zeros((0, 5, 3), np.uint8),
        torch.zeros(3, 5, 0, dtype=torch.uint8),
    ],
    ids=["pil", "pil-grey", "array", "tensor"],
)
def test_images_without_pixels_are_refused(loaded, image):
    with pytest.raises(ValueError, match=r"Cannot use images\[0\].*it has no pixels"):
        loaded(text=PROMPT, images=[image])


@pytest.mark.parametrize("image", [None, 3, b"bytes"], ids=lambda image: type(image).__name__)
def test_other_objects_are_refused(loaded, image):
    with pytest.raises(ValueError, match=rf"images\[1\].*expected an image as .*{type(image).__name__}"):
        loaded(text="<image> <image>", images=[photo(), image])


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((20, 30), "uint8"),
        ((20, 30, 1), "uint8"),
        ((20, 30, 4), "uint8"),
        ((20, 30, 3), "bool"),
        ((20, 30, 3), "float32"),
    ],
    ids=["grey", "one-channel", "four-channels", "bool", "float"],
)
def test_arrays_that_need_a_guess_are_refused(loaded, shape, dtype, kind):
    image = kind(np.ones(shape, dtype=dtype))
    with pytest.raises(ValueError, match=rf"Cannot use images\[0\]: an array of shape .*{dtype}.* three channels"):
        loaded(text=PROMPT, images=[image])


def test_prompt_longer_than_the_model(processor):
    processor.tokenizer.model_max_length = 600
    fits = "a " * 599
    assert len(processor(text=fits.strip())["input_ids"][0]) == 600
    message = (
        r"Sample {} has {} tokens, but the model takes at most 600 \(tokenizer.model_max_length\)\. Shorten the text "
        "or pass fewer images: each takes 582 tokens"
    )
    with pytest.raises(ValueError, match=message.format(0, 601)):
        processor(text=fits + "a")
    for padding in ({}, {"padding": True, "return_tensors": "pt"}, {"return_attention_mask": False}):
        with pytest.raises(ValueError, match=message.format(1, 603)):
            processor(text=["a", fits + "a a a"], **padding)
    with pytest.raises(ValueError, match=message.format(0, 1167)):
        processor(text="<image><image>", images=[photo()] * 2)
    with pytest.raises(ValueError, match="takes at most 600"):
        processor.apply_chat_template(user(fits), tokenize=True)


def test_padding_does_not_count(processor):
    processor.tokenizer.model_max_length = 600
    inputs = processor(text="a", padding="max_length", max_length=700, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 700)


@pytest.mark.parametrize("truncation", [True, "longest_first", "only_first"])
@pytest.mark.parametrize("nested", [True, False], ids=["text_kwargs", "flat"])
def test_truncation_is_refused(loaded, truncation, nested, tmp_path):
    options = {"truncation": truncation, "max_length": 10}
    options = {"text_kwargs": options} if nested else options
    message = rf"`truncation={truncation!r}` is refused: it could cut through an image's 582 tokens"
    for text, images in ((PROMPT, photo()), ("a " * 20, None)):
        with pytest.raises(ValueError, match=message):
            loaded(text=text, images=images, **options)
    with pytest.raises(ValueError, match=message):
        loaded.apply_chat_template(user("a"), tokenize=True, processor_kwargs=options)
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None


@pytest.mark.parametrize("nested", [True, False], ids=["text_kwargs", "flat"])
@pytest.mark.parametrize("text, images", [(PROMPT, photo()), ("a " * 20, None)], ids=["image", "text"])
def test_a_bare_max_length_does_not_truncate(loaded, nested, text, images, tmp_path):
    """A tokenizer takes `max_length` alone for a wish to truncate."""
    options = {"text_kwargs": {"max_length": 10}} if nested else {"max_length": 10}
    with pytest.raises(ValueError, match=r"`max_length=10`.*refused"):
        loaded(text=text, images=images, **options)
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None


@pytest.mark.parametrize("truncation", [False, None, "do_not_truncate"])
def test_no_truncation_can_be_said(loaded, truncation):
    assert loaded(text="a b", truncation=truncation)["input_ids"] == loaded(text="a b")["input_ids"]


def test_nothing_to_process(loaded):
    with pytest.raises(ValueError, match="You need to provide at least one input to call LlavaSPProcessor"):
        loaded()


@pytest.mark.parametrize("argument", ["videos", "audio"])
def test_other_modalities_are_refused(loaded, argument):
    with pytest.raises(ValueError, match="LLaVA-SP takes text and images, but `videos` or `audio` was passed"):
        loaded(text="a", **{argument: [np.zeros(16)]})


def test_tokenizer_without_the_image_token(loaded):
    with pytest.raises(ValueError, match=r"does not know the image token '<image>'.*tokenizer.add_tokens\('<image>'"):
        LlavaSPProcessor(loaded.image_processor, tokenizer_with(), 6, 24)
    assert LlavaSPProcessor(loaded.image_processor, tokenizer_with("<image>"), 6, 24).image_token_id == 1000
