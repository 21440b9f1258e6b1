"""
Batches to train on: what is learned is what the authors' training code supervises, and nothing else of a batch, be it
padding, other examples or an image that keeps processes in step, changes the loss.
"""

import json

import pytest
import torch
from conftest import FIXTURES, randomize_
from PIL import Image
from sentencepiece import SentencePieceProcessor
from test_golden import collapse
from test_tiles import photo, tiled_config, tiled_processor
from transformers import AutoProcessor

from transformers_llava_sp import LlavaSPForConditionalGeneration, LlavaSPProcessor
from transformers_llava_sp.processing_llava_sp import VICUNA_V1_CHAT_TEMPLATE
from transformers_llava_sp.training import LlavaSPDataCollator, RecordError, to_example


RECORDS = json.loads((FIXTURES / "labels.json").read_text())
PHOTOS = FIXTURES / "mini-cropping" / "golden"
NAMES = ("landscape", "portrait", "square")
UNMARKED = VICUNA_V1_CHAT_TEMPLATE.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")


@pytest.fixture(scope="module")
def loaded(golden):
    return golden("mini-cropping").load(dtype=torch.float32)


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture
def processor(golden):
    return AutoProcessor.from_pretrained(golden("mini-cropping").converted)


def authors_example(record):
    image = str(PHOTOS / "square.png") if record["has_image"] else None
    return to_example({"id": record["name"], "conversations": record["conversations"], "image": image})


def conversation(*turns, images=(), record_id="example"):
    """An example of turns that alternate, `<image>` standing for the images."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]
    return to_example({"id": record_id, "messages": messages, "images": list(images)})


def learned_text(processor, batch, row=0):
    labels = batch["labels"][row]
    return processor.tokenizer.decode(labels[labels != -100])


TEXT_ONLY = conversation("Name three colors.", "Red, yellow and blue.", "One more?", "Green.", record_id="text")
SHORT_TEXT = conversation("Yes?", "No.", record_id="short")
ONE_IMAGE = conversation(
    "<image>\nWhat is this?", "A coffee.", images=[str(PHOTOS / "square.png")], record_id="one image"
)
THREE_IMAGES = conversation(
    "What is different?<image><image>",
    "The colours.",
    "And here?\n<image>",
    "Nothing.",
    images=[str(PHOTOS / f"{name}.png") for name in NAMES],
    record_id="three images",
)
EXAMPLES = [TEXT_ONLY, ONE_IMAGE, SHORT_TEXT, THREE_IMAGES]


@pytest.mark.parametrize("record", RECORDS, ids=[record["name"] for record in RECORDS])
def test_ids_and_labels_are_the_authors(processor, record):
    batch = LlavaSPDataCollator(processor, stage=record["stage"])([authors_example(record)])
    [input_ids], [labels] = batch["input_ids"].tolist(), batch["labels"].tolist()
    is_slot = [token == processor.image_token_id for token in input_ids]
    num_tokens = [processor.num_image_tokens] * record["has_image"]
    assert collapse(input_ids, is_slot, num_tokens) == record["input_ids"]
    # `collapse` writes an image's slots as -200 wherever they are
    assert all(label == -100 for label, slot in zip(labels, is_slot, strict=True) if slot)
    expected = [
        -200 if token == -200 else label for token, label in zip(record["input_ids"], record["labels"], strict=True)
    ]
    assert collapse(labels, is_slot, num_tokens) == expected
    assert batch["attention_mask"].all()
    assert ("pixel_values" in batch) == record["has_image"]


def test_batch_of_all_the_authors_records(processor):
    records = [record for record in RECORDS if record["stage"] == "finetune"]
    collator = LlavaSPDataCollator(processor)
    batch = collator([authors_example(record) for record in records])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    for row, record in enumerate(records):
        [alone] = [collator([authors_example(record)])]
        length = alone["input_ids"].shape[1]
        for key, padding in (("input_ids", processor.tokenizer.pad_token_id), ("attention_mask", 0), ("labels", -100)):
            assert torch.equal(batch[key][row, :length], alone[key][0])
            assert (batch[key][row, length:] == padding).all()
    assert batch["pixel_values"].shape[0] == sum(record["has_image"] for record in records)


@pytest.mark.parametrize("caption", ["42 leaves", "a palace", "  spaces stay ", "two\nlines"])
def test_all_behind_the_image_is_learned_of_a_caption(processor, caption):
    """As the authors tokenize it: a string of its own, whose first piece may be a bare `▁`."""
    example = conversation("Anything at all. <image>", caption, images=[str(PHOTOS / "square.png")])
    batch = LlavaSPDataCollator(processor, stage="pretrain")([example])
    behind = SentencePieceProcessor(str(FIXTURES / "mini-cropping" / "base" / "tokenizer.model")).encode(
        f"{caption}\n"
    )
    num_tokens = processor.num_image_tokens
    assert batch["input_ids"].tolist() == [
        [processor.tokenizer.bos_token_id] + [processor.image_token_id] * num_tokens + behind
    ]
    assert batch["labels"].tolist() == [[-100] * (num_tokens + 1) + behind]


def test_what_closes_an_image_is_not_learned(processor):
    tokens = ["<img>", "</img>"]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    framed = LlavaSPProcessor(
        processor.image_processor,
        processor.tokenizer,
        num_spatial_tokens=processor.num_spatial_tokens,
        grid_size=processor.grid_size,
        image_prefix=tokens[0],
        image_suffix=tokens[1],
    )
    example = conversation("<image>", "a palace", images=[str(PHOTOS / "square.png")])
    collator = LlavaSPDataCollator(framed, stage="pretrain")
    batch = collator([example])
    assert learned_text(framed, batch) == "a palace\n"
    assert collator.num_tokens([example]) == [batch["input_ids"].shape[1]]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_is_on_the_right_and_the_tokenizer_stays_as_it_is(processor, padding_side):
    tokenizer = processor.tokenizer
    tokenizer.padding_side = padding_side
    before = tokenizer.backend_tokenizer.to_str()
    collator = LlavaSPDataCollator(processor, pad_to_multiple_of=64)
    collator.num_tokens(EXAMPLES)
    batch = collator(EXAMPLES)
    mask = batch["attention_mask"]
    assert (mask.diff(dim=1) <= 0).all()
    assert not mask.all()
    assert mask.shape[1] % 64 == 0
    assert tokenizer.padding_side == padding_side
    assert tokenizer.backend_tokenizer.to_str() == before


def test_batch_length_is_the_longest_unless_a_multiple_is_asked_for(processor):
    collator = LlavaSPDataCollator(processor)
    lengths = collator.num_tokens(EXAMPLES)
    assert collator(EXAMPLES)["input_ids"].shape == (len(EXAMPLES), max(lengths))
    assert collator(EXAMPLES)["attention_mask"].sum(1).tolist() == lengths
    rounded = LlavaSPDataCollator(processor, pad_to_multiple_of=max(lengths))
    assert rounded(EXAMPLES)["input_ids"].shape == (len(EXAMPLES), max(lengths))


def test_images_come_in_the_order_of_their_slots(processor):
    batch = LlavaSPDataCollator(processor)([ONE_IMAGE, TEXT_ONLY, THREE_IMAGES])
    expected = [
        processor.image_processor(str(PHOTOS / f"{name}.png"), return_tensors="pt")["pixel_values"][0]
        for name in ("square", *NAMES)
    ]
    assert torch.equal(batch["pixel_values"], torch.stack(expected))
    counts = (batch["input_ids"] == processor.image_token_id).sum(1) // processor.num_image_tokens
    assert counts.tolist() == [1, 0, 3]
    assert learned_text(processor, batch, 2) == "The colours.</s> Nothing.</s>"


def test_loss_is_the_mean_over_the_learned_tokens(model, processor):
    batch = LlavaSPDataCollator(processor)(EXAMPLES)
    with torch.no_grad():
        outputs = model(**batch)
        weighted = model(**batch, num_items_in_batch=1000).loss
    probabilities = outputs.logits[:, :-1].double().log_softmax(-1)
    labels = batch["labels"][:, 1:]
    learned = labels != -100
    total = -probabilities[learned].gather(1, labels[learned][:, None]).sum()
    assert torch.isfinite(total)
    torch.testing.assert_close(outputs.loss.double(), total / learned.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(weighted.double(), total / 1000, rtol=1e-5, atol=0)
    # No label is lost by the shift: the first token of a row is never learned
    assert learned.sum() == (batch["labels"] != -100).sum()


def test_batch_learns_as_its_examples_do(model, processor):
    collator = LlavaSPDataCollator(processor)
    total = count = 0.0
    with torch.no_grad():
        for example in EXAMPLES:
            batch = collator([example])
            num_learned = int((batch["labels"] != -100).sum())
            total += model(**batch).loss.double() * num_learned
            count += num_learned
        loss = model(**collator(EXAMPLES)).loss
    torch.testing.assert_close(loss.double(), total / count, rtol=1e-5, atol=0)


# An image that is in nobody's sight


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("multiple", [None, 64], ids=["unpadded", "multiple of 64"])
@pytest.mark.parametrize(
    "examples", [[TEXT_ONLY], [SHORT_TEXT, TEXT_ONLY, SHORT_TEXT]], ids=["one example", "three examples"]
)
def test_dummy_image_reaches_the_projector_and_changes_nothing(model, processor, examples, multiple):
    plain = LlavaSPDataCollator(processor, pad_to_multiple_of=multiple)(examples)
    batch = LlavaSPDataCollator(processor, pad_to_multiple_of=multiple, dummy_image=True)(examples)
    assert "pixel_values" not in plain
    assert len(batch["pixel_values"]) == 1
    assert len(batch["input_ids"]) == len(examples)
    assert (batch["input_ids"] == processor.image_token_id).sum() == processor.num_image_tokens
    # No more room than it needs
    assert batch["input_ids"].shape[1] <= plain["input_ids"].shape[1] + processor.num_image_tokens // len(examples) + (
        multiple or 1
    )
    assert batch["attention_mask"].sum(1).tolist() == plain["attention_mask"].sum(1).tolist()
    assert (batch["labels"] != -100).sum() == (plain["labels"] != -100).sum()

    plain_loss, plain_gradients = gradients(model, plain)
    loss, actual = gradients(model, batch)
    assert abs(loss - plain_loss) <= 1e-6
    for name, gradient in actual.items():
        if "multi_modal_projector" in name:
            assert plain_gradients[name] is None
            assert torch.equal(gradient, torch.zeros_like(gradient)), name
        elif plain_gradients[name] is not None:
            torch.testing.assert_close(gradient, plain_gradients[name], rtol=0, atol=1e-6)
    assert any("multi_modal_projector" in name for name in actual)


def test_dummy_image_stays_out_of_batches_with_images(processor):
    plain = LlavaSPDataCollator(processor)([ONE_IMAGE, TEXT_ONLY])
    batch = LlavaSPDataCollator(processor, dummy_image=True)([ONE_IMAGE, TEXT_ONLY])
    assert batch.keys() == plain.keys()
    assert all(torch.equal(batch[key], plain[key]) for key in plain)


def test_dummy_image_takes_no_positions(processor):
    """Language models with a fixed number of positions, or of frequencies that follow the length, see the same."""
    collator = LlavaSPDataCollator(processor, dummy_image=True)
    batch = collator([TEXT_ONLY, SHORT_TEXT])
    lengths = collator.num_tokens([TEXT_ONLY, SHORT_TEXT])
    assert batch["position_ids"].amax(1).tolist() == [length - 1 for length in lengths]
    for row, length in enumerate(lengths):
        assert batch["position_ids"][row, :length].tolist() == list(range(length))


# Tiles


@pytest.fixture(scope="module")
def tiled():
    processor = tiled_processor()
    config = tiled_config(image_token_id=processor.image_token_id, vocab_size=1024, max_position_embeddings=8192)
    processor.tokenizer.model_max_length = 8192
    return randomize_(LlavaSPForConditionalGeneration(config)).eval(), processor


def test_tiles_and_texts_in_one_batch(tiled):
    model, processor = tiled
    sizes = [(300, 300), (330, 900), (40, 60)]
    examples = [
        conversation("<image>What?", "This.", images=[photo(*sizes[0])]),
        conversation("What?", "Nothing."),
        conversation("<image><image>What?", "Two.", images=[photo(*size) for size in sizes[1:]]),
    ]
    collator = LlavaSPDataCollator(processor)
    batch = collator(examples)
    assert batch["image_sizes"].tolist() == [list(size) for size in sizes]
    assert batch["pixel_values"].ndim == 5
    assert batch["attention_mask"].sum(1).tolist() == collator.num_tokens(examples)
    num_tokens = [processor.get_image_layout(size).num_tokens for size in sizes]
    assert len(set(num_tokens)) == 3
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [
        num_tokens[0], 0, num_tokens[1] + num_tokens[2],
    ]  # fmt: skip
    with torch.no_grad():
        total, counts = 0.0, 0
        for example in examples:
            alone = collator([example])
            count = int((alone["labels"] != -100).sum())
            total, counts = total + model(**alone).loss.double() * count, counts + count
        loss = model(**batch).loss
    torch.testing.assert_close(loss.double(), total / counts, rtol=1e-5, atol=0)


def test_dummy_image_in_tiles(tiled):
    model, processor = tiled
    examples = [conversation("What?", "Nothing."), TEXT_ONLY]
    loss, _ = gradients(model, LlavaSPDataCollator(processor)(examples))
    with_dummy, actual = gradients(model, LlavaSPDataCollator(processor, dummy_image=True)(examples))
    assert abs(loss - with_dummy) <= 1e-6
    projector = {name: gradient for name, gradient in actual.items() if "multi_modal_projector" in name}
    assert projector
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in projector.values())
    assert torch.equal(actual["model.image_newline.weight"], torch.zeros_like(actual["model.image_newline.weight"]))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_lengths_of_images_that_are_turned(tiled, tmp_path, orientation):
    _, processor = tiled
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(200, 700).save(tmp_path / "photo.jpg", exif=exif)
    collator = LlavaSPDataCollator(processor)
    examples = [
        conversation("<image>What?", "This.", images=[image])
        for image in (str(tmp_path / "photo.jpg"), {"bytes": (tmp_path / "photo.jpg").read_bytes(), "path": None})
    ]
    lengths = collator.num_tokens(examples)
    assert lengths[0] == lengths[1]
    assert collator(examples)["attention_mask"].sum(1).tolist() == lengths
    upright = conversation("<image>What?", "This.", images=[photo(*((200, 700) if orientation < 5 else (700, 200)))])
    assert collator.num_tokens([upright]) == lengths[:1]


# What is refused


def test_template_that_marks_no_answers_is_refused(processor):
    processor.chat_template = UNMARKED
    with pytest.raises(ValueError, match=r"no \{% generation %\}.*chat_template=VICUNA_V1_CHAT_TEMPLATE"):
        LlavaSPDataCollator(processor)
    expected = LlavaSPDataCollator(processor, chat_template=VICUNA_V1_CHAT_TEMPLATE)([ONE_IMAGE])
    assert learned_text(processor, expected) == "A coffee.</s>"
    # Captions need no template
    LlavaSPDataCollator(processor, stage="pretrain")


def test_tokenizers_own_template_is_refused_where_it_marks_no_answers(processor):
    processor.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    own = LlavaSPProcessor(
        processor.image_processor,
        processor.tokenizer,
        num_spatial_tokens=processor.num_spatial_tokens,
        grid_size=processor.grid_size,
    )
    with pytest.raises(ValueError, match="does not say which tokens are the answers"):
        LlavaSPDataCollator(own)


def test_default_of_several_templates_is_taken(processor):
    processor.chat_template = {"default": VICUNA_V1_CHAT_TEMPLATE, "other": UNMARKED}
    assert (
        learned_text(processor, LlavaSPDataCollator(processor)([TEXT_ONLY])) == "Red, yellow and blue.</s> Green.</s>"
    )
    processor.chat_template = {"other": VICUNA_V1_CHAT_TEMPLATE}
    with pytest.raises(ValueError, match="does not say which tokens are the answers"):
        LlavaSPDataCollator(processor)


def test_template_whose_marks_are_empty_is_refused_with_the_example(processor):
    template = UNMARKED + "{% generation %}{% endgeneration %}"
    with pytest.raises(RecordError, match="Example 'text' has no token to learn"):
        LlavaSPDataCollator(processor, chat_template=template)([TEXT_ONLY])


def test_too_long_example_raises_with_the_numbers(processor):
    [length] = LlavaSPDataCollator(processor).num_tokens([ONE_IMAGE])
    assert LlavaSPDataCollator(processor, max_length=length)([ONE_IMAGE])["input_ids"].shape == (1, length)
    collator = LlavaSPDataCollator(processor, max_length=length - 1)
    message = f"Example 'one image' has {length} tokens, but `max_length` is {length - 1}"
    with pytest.raises(RecordError, match=message) as raised:
        collator([TEXT_ONLY, ONE_IMAGE])
    assert raised.value.reason == "too long"


def test_longest_example_is_what_the_tokenizer_says(processor):
    assert LlavaSPDataCollator(processor).max_length == processor.tokenizer.model_max_length
    with pytest.raises(ValueError, match=r"`max_length` is 99999, but the model takes at most \d+ tokens"):
        LlavaSPDataCollator(processor, max_length=99999)


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(TEXT_ONLY, id="no image"),
        pytest.param(THREE_IMAGES, id="several images"),
        pytest.param(
            conversation("<image>a", "b", "c", "d", images=[str(PHOTOS / "square.png")]), id="several answers"
        ),
    ],
)
def test_what_is_no_caption_is_refused_in_pre_training(processor, example):
    collator = LlavaSPDataCollator(processor, stage="pretrain")
    for use in (collator, collator.num_tokens):
        with pytest.raises(RecordError, match=f"Example '{example['id']}' has [^:]*: expected one image"):
            use([example])


def test_broken_image_is_refused_with_the_example(processor, tmp_path):
    (tmp_path / "broken.png").write_bytes((PHOTOS / "square.png").read_bytes()[:2000])
    example = conversation("<image>What?", "This.", images=[str(tmp_path / "broken.png")], record_id="17")
    with pytest.raises(RecordError, match=r"Example '17': Cannot read .*broken\.png"):
        LlavaSPDataCollator(processor)([TEXT_ONLY, example])


def test_columns_that_trainer_removed_are_named(processor):
    with pytest.raises(ValueError, match=r"has only 'id', expected 'messages'.*remove_unused_columns=False"):
        LlavaSPDataCollator(processor)([{"id": "1"}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"stage": "sft"}, "Unknown stage 'sft': expected one of pretrain, finetune"), ({}, "no padding token")],
    ids=["stage", "padding token"],
)
def test_settings_that_cannot_work_are_refused(processor, settings, message):
    if not settings:
        processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=message):
        LlavaSPDataCollator(processor, **settings)


# What else it takes and gives


def test_records_are_taken_as_they_are(processor):
    """As other trainers hand them over, which read the data themselves."""
    path = str(PHOTOS / "square.png")
    records = [
        {"id": "one image", "conversations": [
            {"from": "human", "value": "What is this?\n<image>"}, {"from": "gpt", "value": "A coffee."},
        ], "image": path},
        {"messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A coffee.", "index": None}]},
        ], "images": [Image.open(path)]},
    ]  # fmt: skip
    expected = LlavaSPDataCollator(processor)([ONE_IMAGE])
    for record in records:
        batch = LlavaSPDataCollator(processor)([record])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
    with pytest.raises(RecordError, match="Example '5': it has 0 <image> slots, but 1 images"):
        LlavaSPDataCollator(processor)([{**records[0], "id": "5", "conversations": [
            {"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."},
        ]}])  # fmt: skip


def test_ids_are_given_where_they_are_asked_for(processor):
    assert "ids" not in LlavaSPDataCollator(processor)(EXAMPLES)
    batch = LlavaSPDataCollator(processor, return_ids=True)(EXAMPLES)
    assert batch["ids"] == ["text", "one image", "short", "three images"]


def test_examples_are_not_changed(processor):
    before = json.dumps(EXAMPLES)
    LlavaSPDataCollator(processor)(EXAMPLES)
    assert json.dumps(EXAMPLES) == before


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_lengths_are_those_of_the_batches(processor, stage):
    collator = LlavaSPDataCollator(processor, stage=stage)
    examples = [authors_example(record) for record in RECORDS if record["stage"] == stage]
    if stage == "finetune":
        examples += EXAMPLES
    assert collator.num_tokens(examples) == [collator([example])["input_ids"].shape[1] for example in examples]
