"""`pipeline("image-text-to-text")` on a converted checkpoint gives what `generate` and the authors' code give."""

import base64

import pytest
import torch
from PIL import Image
from transformers import pipeline


QUESTION = "What is shown in this image?"
GREEDY = {"max_new_tokens": 16, "do_sample": False}


@pytest.fixture(scope="module", params=["mini-cropping", "siglip-cropping", "anyres-pooling"])
def case(request, golden):
    return golden(request.param)


@pytest.fixture(scope="module")
def pipe(case):
    return pipeline("image-text-to-text", model=str(case.converted))


def image_of(case, source: str):
    file = case.image_files["landscape"]
    if source == "object":
        return Image.open(file)
    if source == "path":
        return str(file)
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def ask(text: str, *images) -> list[dict]:
    """A conversation of one message."""
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def generated_tokens(output: dict, num_tokens: int = 16) -> list[int]:
    return output["generated_token_ids"][-num_tokens:].tolist()


def test_loads_model_and_processor(pipe, case):
    assert type(pipe.model).__name__ == "LlavaSPForConditionalGeneration"
    assert type(pipe.processor).__name__ == "LlavaSPProcessor"
    tiles = case.num_tiles("landscape") > 1
    image_processor = "LlavaNextImageProcessorPil" if tiles else "LlavaImageProcessorPil"
    assert type(pipe.processor.image_processor).__name__ == image_processor
    assert pipe.model.dtype == torch.float32


@pytest.mark.parametrize("source", ["object", "path", "data-uri"])
def test_conversation_of_one_message(pipe, case, source):
    messages = ask(QUESTION, image_of(case, source))
    [output] = pipe(messages, generate_kwargs=GREEDY, return_tensors=True)
    assert generated_tokens(output) == case.samples["single"]["generated_ids"]

    [output] = pipe(text=messages, generate_kwargs=GREEDY, return_full_text=False)
    assert output["generated_text"].strip() == case.samples["single"]["generated_text"]

    [output] = pipe(messages, generate_kwargs=GREEDY)
    *asked, answer = output["generated_text"]
    assert [message["role"] for message in asked] == ["user"]
    assert answer["role"] == "assistant"
    assert answer["content"].strip() == case.samples["single"]["generated_text"]


def test_max_new_tokens_alone(pipe, case):
    [output] = pipe(ask(QUESTION, image_of(case, "path")), max_new_tokens=4, return_tensors=True)
    assert generated_tokens(output, 4) == case.samples["single"]["generated_ids"][:4]


@pytest.mark.parametrize("source", ["object", "path", "data-uri"])
def test_list_of_conversations(pipe, case, source):
    samples = {
        "single": ask(QUESTION, image_of(case, source)),
        "text_only": ask("Name three primary colors and explain why the sky is blue."),
        "two_images": ask(
            "What is different between these two pictures?",
            *(str(case.image_files[name]) for name in case.samples["two_images"]["images"]),
        ),
    }
    outputs = pipe(text=list(samples.values()), generate_kwargs=GREEDY, return_tensors=True)
    assert len(outputs) == len(samples)
    for name, [output] in zip(samples, outputs, strict=True):
        assert generated_tokens(output) == case.samples[name]["generated_ids"]


def test_conversation_of_several_turns(pipe, case):
    messages = [
        *ask("Describe the image in detail.", str(case.image_files["portrait"])),
        {"role": "assistant", "content": "There is a red flower, and 42 green leaves."},
        *ask("Where is the flower? Answer the question using a single word or phrase."),
    ]
    [output] = pipe(messages, generate_kwargs=GREEDY, return_tensors=True)
    assert generated_tokens(output) == case.samples["two_turn"]["generated_ids"]


@torch.no_grad()
def test_beginning_of_an_answer_is_continued(pipe, case):
    beginning = {"role": "assistant", "content": [{"type": "text", "text": "There is"}]}
    messages = [*ask(QUESTION, str(case.image_files["landscape"])), beginning]
    [output] = pipe(messages, generate_kwargs=GREEDY, return_tensors=True)
    prompt = case.samples["single"]["prompt"] + " There is"
    inputs = pipe.processor(text=prompt, images=case.images("single"), return_tensors="pt")
    assert output["generated_token_ids"].tolist() == pipe.model.generate(**inputs, **GREEDY)[0].tolist()

    [output] = pipe(messages, generate_kwargs=GREEDY)
    assert output["generated_text"][-1]["content"][0]["text"].startswith("There is")


@pytest.mark.parametrize("source", ["object", "path", "data-uri"])
def test_prompt_string_and_image(pipe, case, source):
    prompt = case.samples["single"]["prompt"]
    [output] = pipe(images=image_of(case, source), text=prompt, generate_kwargs=GREEDY, return_tensors=True)
    assert generated_tokens(output) == case.samples["single"]["generated_ids"]
    [output] = pipe(images=image_of(case, source), text=prompt, generate_kwargs=GREEDY)
    assert output["generated_text"].startswith(prompt)
    assert output["generated_text"].removeprefix(prompt).strip() == case.samples["single"]["generated_text"]


def test_prompt_strings_and_their_images(pipe, case):
    names = ("single", "single_square")
    outputs = pipe(
        images=[str(case.image_files[name]) for name in ("landscape", "square")],
        text=[case.samples[name]["prompt"] for name in names],
        generate_kwargs=GREEDY,
        return_tensors=True,
    )
    assert [generated_tokens(output) for output in outputs] == [case.samples[name]["generated_ids"] for name in names]


def test_prompt_string_with_two_images(pipe, case):
    [output] = pipe(
        images=case.images("two_images"),
        text=case.samples["two_images"]["prompt"],
        generate_kwargs=GREEDY,
        return_tensors=True,
    )
    assert generated_tokens(output) == case.samples["two_images"]["generated_ids"]


@torch.no_grad()
def test_equals_generate(pipe, case):
    messages = ask(QUESTION, image_of(case, "object"))
    inputs = pipe.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = pipe.model.generate(**inputs, **GREEDY)[0]
    [output] = pipe(messages, generate_kwargs=GREEDY, return_tensors=True)
    assert torch.equal(output["generated_token_ids"], expected)


def test_bad_input_is_reported_by_the_processor(pipe, case):
    with pytest.raises(ValueError, match="Sample 0 has 2 <image> slots, but 1 images"):
        pipe(ask("What does <image> mean?", image_of(case, "path")), generate_kwargs=GREEDY)
    with pytest.raises(ValueError, match=r"Cannot read images\[0\]\[0\] \(missing.png\)"):
        pipe(ask(QUESTION, "missing.png"), generate_kwargs=GREEDY)
