"""
The converted golden checkpoints give what the authors' own code gives: token ids, pixels, features, logits and greedy
tokens, in float32 on the CPU. The tolerances are those of the golden data, where repeating the authors' run with
another attention implementation already moves the logits by 1e-5.
"""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import FIXTURES, LARGE_GOLDEN, MINI_GOLDEN


IMAGES = ("landscape", "portrait", "square")

# The golden samples as messages: role, number of images, text. The sample says which images.
CONVERSATIONS = {
    "single": [("user", 1, "What is shown in this image?")],
    "text_only": [("user", 0, "Name three primary colors and explain why the sky is blue.")],
    "two_images": [("user", 2, "What is different between these two pictures?")],
    "two_turn": [
        ("user", 1, "Describe the image in detail."),
        ("assistant", 0, "There is a red flower, and 42 green leaves."),
        ("user", 0, "Where is the flower? Answer the question using a single word or phrase."),
    ],
    "single_square": [("user", 1, "How many people are there in the picture?")],
}
FINETUNE_RECORDS = [
    record for record in json.loads((FIXTURES / "labels.json").read_text()) if record["stage"] == "finetune"
]


def messages_of(case, sample):
    names = iter(case.samples[sample]["images"])
    return [
        {
            "role": role,
            "content": [{"type": "image", "path": str(case.image_files[next(names)])} for _ in range(num_images)]
            + [{"type": "text", "text": text}],
        }
        for role, num_images, text in CONVERSATIONS[sample]
    ]


def record_to_messages(record, image_file):
    """LLaVA's JSON record as messages: an answer before the first question is dropped, as the authors do."""
    turns = record["conversations"]
    turns = turns[1:] if turns[0]["from"] == "gpt" else turns
    messages = []
    for turn in turns:
        images = [{"type": "image", "path": str(image_file)}] * turn["value"].count("<image>")
        text = {"type": "text", "text": turn["value"].replace("<image>", "").strip()}
        messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": [*images, text]})
    return messages


def collapse(values, is_slot, image_tokens):
    """`values` with each image's run of slots replaced by one -200, as the authors write an image."""
    collapsed, position, image_tokens = [], 0, list(image_tokens)
    while position < len(values):
        if is_slot[position]:
            count = image_tokens.pop(0)
            assert all(is_slot[position : position + count])
            assert not is_slot[position + count]
            collapsed.append(-200)
            position += count
        else:
            collapsed.append(values[position])
            position += 1
    assert not image_tokens
    return collapsed


def image_tokens(case, processor, sample):
    """How many tokens each image of a sample takes."""
    return [processor.get_image_layout(image.size[::-1]).num_tokens for image in case.images(sample)]


def collapse_ids(case, processor, sample, input_ids):
    is_slot = [token == processor.image_token_id for token in input_ids]
    return collapse(input_ids, is_slot, image_tokens(case, processor, sample))


@pytest.fixture(scope="module", params=[*MINI_GOLDEN, *LARGE_GOLDEN])
def case(request, golden):
    return golden(request.param)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def loaded(request, case):
    return case.load(dtype=torch.float32, attn_implementation=request.param)


@pytest.fixture(scope="module")
def loaded_in_double(case):
    return case.load(dtype=torch.float64)


@pytest.fixture(scope="module")
def processor(case):
    return case.load(dtype=torch.float32)[1]


def prompt_inputs(case, processor, sample):
    return processor(text=case.samples[sample]["prompt"], images=case.images(sample) or None, return_tensors="pt")


def chat_inputs(case, processor, sample):
    return processor.apply_chat_template(
        messages_of(case, sample), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize("sample", CONVERSATIONS)
@pytest.mark.parametrize("inputs_of", [prompt_inputs, chat_inputs], ids=["prompt", "messages"])
def test_token_ids(case, processor, sample, inputs_of):
    inputs = inputs_of(case, processor, sample)
    assert collapse_ids(case, processor, sample, inputs["input_ids"][0].tolist()) == case.samples[sample]["input_ids"]
    assert inputs["input_ids"].shape[1] == case.samples[sample]["sequence_length"]
    assert inputs["attention_mask"].all()
    assert len(inputs.get("pixel_values", [])) == len(case.samples[sample]["images"])


@pytest.mark.parametrize("sample", CONVERSATIONS)
def test_chat_template_renders_the_authors_prompt(case, processor, sample):
    rendered = processor.apply_chat_template(messages_of(case, sample), add_generation_prompt=True)
    assert rendered == case.samples[sample]["prompt"]
    assert rendered == json.loads((case.folder / "golden" / "prompts.json").read_text())[sample]["prompt"]


@pytest.mark.parametrize("image", IMAGES)
def test_pixel_values(case, processor, image):
    expected = json.loads((case.folder / "golden" / "golden.json").read_text())["images"][image]["pixel_values"]
    pixel_values = processor.image_processor(case.image_files[image].as_posix(), return_tensors="pt")["pixel_values"][
        0
    ]
    assert pixel_values.dtype == torch.float32
    assert list(pixel_values.shape) == expected["shape"]
    strided = case.tensors[f"pixel_values_strided.{image}"]
    torch.testing.assert_close(pixel_values[..., ::16, ::16], strided, rtol=0, atol=1e-6)
    assert hashlib.sha256(pixel_values.numpy().tobytes()).hexdigest() == expected["sha256"]


def test_pixel_values_of_every_stored_image(case, processor):
    stored = [key for key in case.tensors if key.startswith("pixel_u8.")]
    assert stored
    mean, std = (
        np.array(values, np.float32)[:, None, None]
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    for key in stored:
        image = case.image_files[key.removeprefix("pixel_u8.")]
        expected = ((case.tensors[key].numpy() * (1 / 255)).astype(np.float32) - mean) / std
        actual = processor.image_processor(image.as_posix(), return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("image", IMAGES)
@torch.no_grad()
def test_image_features(case, loaded, image):
    model, processor = loaded
    inputs = processor.image_processor(case.image_files[image].as_posix(), return_tensors="pt")
    outputs = model.get_image_features(**inputs)
    num_patches = model.config.projector_config.grid_size**2
    patch_features = outputs.hidden_states[model.config.vision_feature_layer][:, -num_patches:]
    # Of images in tiles, the authors' features of each tile are there, and what the language model gets of them
    features = {
        "image_features": outputs.pooler_output[0]
        if case.num_tiles(image) == 1
        else model.model.multi_modal_projector(patch_features).last_hidden_state,
        "patch_features": patch_features.squeeze(0),
        "merged_features": outputs.pooler_output[0],
        "merged_features_every8": outputs.pooler_output[0][::8],
    }
    stored = [name for name in features if f"{name}.{image}" in case.tensors]
    assert stored
    for name in stored:
        torch.testing.assert_close(features[name], case.tensors[f"{name}.{image}"], rtol=0, atol=5e-5)


def test_features_of_every_stored_kind_are_compared(case):
    stored = {key for key in case.tensors if "_features" in key}
    if case.num_tiles("landscape") > 1:
        assert stored == {
            "image_features.landscape",
            "merged_features.landscape",
            "merged_features_every8.portrait",
            "merged_features_every8.square",
        }
    else:
        assert stored == {"patch_features.landscape", *(f"image_features.{image}" for image in IMAGES)}


@pytest.mark.parametrize("sample", CONVERSATIONS)
@torch.no_grad()
def test_tokens_of_the_highest_scores(case, loaded_in_double, sample):
    """At every position, exactly: some of the two highest scores are only 1.5e-6 apart, less than float32 rounds."""
    model, processor = loaded_in_double
    logits = model(**chat_inputs(case, processor, sample)).logits[0, :, : case.vocab_size]
    assert torch.equal(logits.argmax(dim=-1), case.tensors[f"{sample}.logits_argmax"])


@pytest.mark.parametrize("sample", CONVERSATIONS)
@torch.no_grad()
def test_logits_and_greedy_tokens(case, loaded, loaded_in_double, sample):
    model, processor = loaded
    inputs = chat_inputs(case, processor, sample)

    logits = model(**inputs).logits[0, :, : case.vocab_size]
    expected = case.last_logits(sample)
    torch.testing.assert_close(logits[-len(expected) :], expected, rtol=0, atol=2e-4)
    # At most one position of a sample has two scores so close that float32 cannot tell the higher one; float64 can,
    # in test_tokens_of_the_highest_scores
    exact = loaded_in_double[0](**inputs).logits[0, :, : case.vocab_size]
    highest = exact.topk(2, dim=-1).values
    decided = highest[:, 0] - highest[:, 1] > 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (~decided).sum() <= 1
    assert torch.equal(logits.argmax(dim=-1)[decided], case.tensors[f"{sample}.logits_argmax"][decided])

    generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert generated.tolist() == case.samples[sample]["generated_ids"]
    assert generated.tolist() == case.tensors[f"{sample}.generated_ids"].tolist()
    # Bytes that are no UTF-8 are spelled differently by the slow tokenizer of the authors
    if "\N{REPLACEMENT CHARACTER}" not in case.samples[sample]["generated_text"]:
        assert processor.decode(generated, skip_special_tokens=True) == case.samples[sample]["generated_text"]


def test_batch_of_all_samples_generates_the_same(case, loaded):
    model, processor = loaded
    inputs = processor(
        text=[sample["prompt"] for sample in case.samples.values()],
        images=[case.images(name) for name in case.samples],
        padding=True,
        return_tensors="pt",
    )
    assert not inputs["attention_mask"].all()
    generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert generated.tolist() == [sample["generated_ids"] for sample in case.samples.values()]


def test_what_is_no_piece_of_text_is_never_generated(case, loaded):
    model, processor = loaded
    num_tokens, vocab_size = len(processor.tokenizer), model.config.text_config.vocab_size
    suppressed = set(model.generation_config.suppress_tokens)
    assert vocab_size % 64 == 0
    assert suppressed == {processor.image_token_id, *range(num_tokens, vocab_size)}
    assert not suppressed & {token for sample in case.samples.values() for token in sample["generated_ids"]}


def test_every_sample_is_covered(case):
    assert set(case.samples) == set(CONVERSATIONS)
    assert set(case.image_files) == set(IMAGES)


@pytest.mark.parametrize("record", FINETUNE_RECORDS, ids=[record["name"] for record in FINETUNE_RECORDS])
def test_generation_mask_is_what_the_authors_supervise(golden, record):
    case = golden("mini-cropping")
    _, processor = case.load(dtype=torch.float32)
    inputs = processor.apply_chat_template(
        record_to_messages(record, case.image_files["square"]),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    [input_ids], [mask] = inputs["input_ids"], inputs["assistant_masks"]
    is_slot = [token == processor.image_token_id for token in input_ids]
    labels = [token if supervised else -100 for token, supervised in zip(input_ids, mask, strict=True)]

    num_images = record["input_ids"].count(-200)
    assert collapse(input_ids, is_slot, [processor.num_image_tokens] * num_images) == record["input_ids"]
    # The authors ignore an image's slots, which `collapse` writes as -200 in ids and labels alike
    expected = [
        -200 if token == -200 else label for token, label in zip(record["input_ids"], record["labels"], strict=True)
    ]
    assert collapse(labels, is_slot, [processor.num_image_tokens] * num_images) == expected
    supervised = [token for token in labels if token != -100]
    assert processor.tokenizer.convert_ids_to_tokens(supervised) == record["supervised_pieces"]
