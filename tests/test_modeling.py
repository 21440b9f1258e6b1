"""
What must be equal: each test computes one answer in two ways, for each of the four variants.

Logits have a standard deviation of about 1 here. Measured on an x86 CPU with PyTorch 2.13, Transformers 5.19.0 and
5.23.0: a batch against each alone 5e-6, attention implementations against sdpa 4e-6, no cache and a static cache
against the default 3e-6, prefill and decoding against one forward 2e-6, embeddings against ids 2e-6, speculative
decoding 2e-6, a continued conversation 1.5e-6, beam scores 2e-7; nothing at all where the arithmetic is the same
(saved against loaded, the text alone against Llama, tied weights, gradient checkpointing). The greedy tokens of the
mixed batch win by 4e-3 or more.
"""

import copy
import logging
import shutil
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGE_TOKEN_ID, tiny_inputs, tiny_model
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)

from transformers_llava_sp import LlavaSPForConditionalGeneration
from transformers_llava_sp.modeling_llava_sp import CACHE, MaskTokensLogitsProcessor


LOGITS_ATOL = 2e-5
NEW_TOKENS = 8

MISMATCH = "Image features and image tokens do not match"
MISSING_IMAGES = "image tokens, but `pixel_values` is missing"

# A text, a question about one image and a comparison of two: every batch of them needs padding
MIXED_TEXTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
MIXED_IMAGES = [0, 1, 2]


@pytest.fixture
def inputs(model) -> dict:
    """A left-padded batch of three samples, with 0, 1 and 2 images."""
    return tiny_inputs(model, MIXED_TEXTS, MIXED_IMAGES)


def alone(model: LlavaSPForConditionalGeneration, inputs: dict) -> list[dict]:
    """The samples of a batch, each in a batch of its own: without padding and with its own images."""
    images = inputs["pixel_values"]
    samples = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        sample = {"input_ids": ids[mask][None], "attention_mask": torch.ones(1, int(mask.sum()), dtype=torch.long)}
        count = int((ids == IMAGE_TOKEN_ID).sum()) // model.config.projector_config.num_image_tokens
        if count:
            sample["pixel_values"], images = images[:count], images[count:]
        samples.append(sample)
    assert len(images) == 0
    return samples


@dataclass
class Answer:
    """
    What `generate` answers: the new tokens, `(samples, steps)`, and the logits that chose them, `(samples, steps,
    vocabulary)`. The tokens of models as small as these repeat themselves and would hide a difference; logits do not.
    """

    tokens: torch.Tensor
    logits: torch.Tensor

    def of_sample(self, row: int) -> "Answer":
        return Answer(self.tokens[row : row + 1], self.logits[row : row + 1])


def greedy(model, inputs: dict, **kwargs) -> Answer:
    """`NEW_TOKENS` new tokens, by greedy search unless told otherwise."""
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}
    output = model.generate(**inputs, **arguments, output_logits=True, return_dict_in_generate=True)
    return Answer(output.sequences[:, -NEW_TOKENS:], torch.stack(output.logits, dim=1))


@torch.no_grad()
def logits_of(model, inputs: dict, **kwargs) -> torch.Tensor:
    return model(**inputs, **kwargs).logits


def assert_logits_equal(actual: torch.Tensor, expected: torch.Tensor, atol: float = LOGITS_ATOL) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_same_answer(actual: Answer, expected: Answer, atol: float = LOGITS_ATOL) -> None:
    assert torch.equal(actual.tokens, expected.tokens)
    assert_logits_equal(actual.logits, expected.logits, atol)


def embed(model, inputs: dict, scatter: bool) -> dict:
    """`inputs` with `inputs_embeds` for `input_ids`; with `scatter`, the image features stand in them already."""
    embedded = dict(inputs)
    input_ids = embedded.pop("input_ids")
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(input_ids)
        if scatter:
            features = model.get_image_features(embedded.pop("pixel_values")).pooler_output
            embeddings[input_ids == IMAGE_TOKEN_ID] = features.flatten(0, 1)
    embedded["inputs_embeds"] = embeddings
    return embedded


# Saving and loading


@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"], ids=["single-file", "sharded"])
def test_saved_equals_loaded(model, inputs, tmp_path, max_shard_size):
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if max_shard_size == "1GB" else len(files) > 5
    assert (tmp_path / "model.safetensors.index.json").exists() == (len(files) > 1)
    assert not list(tmp_path.glob("*.bin"))
    stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert stored.keys() == model.state_dict().keys()

    loaded, report = LlavaSPForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.generation_config.suppress_tokens == [IMAGE_TOKEN_ID]
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
        assert torch.equal(stored[key], tensor), key
    assert_logits_equal(logits_of(loaded, inputs), logits_of(model, inputs), atol=0)
    assert_same_answer(greedy(loaded, inputs), greedy(model, inputs))


# Batches and caches


def test_left_padded_batch_equals_each_alone(model, inputs):
    logits, generated = logits_of(model, inputs), greedy(model, inputs)
    assert inputs["attention_mask"].sum(dim=1).unique().numel() == len(MIXED_TEXTS)
    for row, sample in enumerate(alone(model, inputs)):
        length = sample["input_ids"].shape[1]
        assert_logits_equal(logits[row, -length:], logits_of(model, sample)[0])
        assert_same_answer(generated.of_sample(row), greedy(model, sample))


def test_images_reach_the_answer_in_order(model, inputs):
    """What makes the equalities above mean something: other images, or the same ones swapped, change the logits."""
    swapped = dict(inputs, pixel_values=inputs["pixel_values"][[0, 2, 1]])
    difference = (logits_of(model, swapped) - logits_of(model, inputs)).abs().amax(dim=(1, 2))
    assert difference[0] == difference[1] == 0
    assert difference[2] > 1000 * LOGITS_ATOL


def test_decoding_with_a_cache_equals_one_forward(model, inputs):
    """The logits of the last positions, each fed by itself behind a cached prefill, and in one forward."""
    num_decoded = 3
    input_ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    expected = logits_of(model, inputs, position_ids=position_ids)

    with torch.no_grad():
        prefill = model(
            input_ids=input_ids[:, :-num_decoded],
            attention_mask=attention_mask[:, :-num_decoded],
            position_ids=position_ids[:, :-num_decoded],
            pixel_values=inputs["pixel_values"],
            use_cache=True,
        )
        assert_logits_equal(prefill.logits, expected[:, :-num_decoded])
        for position in range(input_ids.shape[1] - num_decoded, input_ids.shape[1]):
            step = model(
                input_ids=input_ids[:, position : position + 1],
                attention_mask=attention_mask[:, : position + 1],
                position_ids=position_ids[:, position : position + 1],
                cache=prefill[CACHE],
            )
            assert step.image_hidden_states is None
            assert_logits_equal(step.logits[:, 0], expected[:, position])


@pytest.mark.parametrize(
    "cache", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["no-cache", "static-cache"]
)
def test_generating_without_or_with_a_static_cache_equals_the_default(model, inputs, cache):
    assert_same_answer(greedy(model, inputs, **cache), greedy(model, inputs))


def test_vision_tower_runs_once_per_generation(model, inputs):
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    greedy(model, inputs)
    assert len(calls) == 1


@dataclass
class SecondTurn:
    """A conversation of two turns with images, and the cache that the first turn returned."""

    conversation: dict
    new_images: torch.Tensor
    cache: Cache

    def continued(self, only_new_tokens: bool) -> dict:
        """What to call the model with: the whole conversation, or only what the cache does not hold."""
        arguments = {**self.conversation, "cache": copy.deepcopy(self.cache)}
        if only_new_tokens:
            arguments["input_ids"] = arguments["input_ids"][:, self.cache.get_seq_length() :]
        return arguments


@pytest.fixture
def second_turn(model) -> SecondTurn:
    """Two samples, with one image and none in the first turn, and a further image each in the second."""
    num_tokens = model.config.projector_config.num_image_tokens
    first = tiny_inputs(model, [[5, 6, 7, 8], [9, 10]], [1, 0])
    output = model.generate(**first, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)

    placeholders = [IMAGE_TOKEN_ID] * num_tokens
    turn = torch.tensor([[*placeholders, 3, 14, 15], [*placeholders, 3, 16, 17]])
    input_ids = torch.cat([output.sequences, turn], dim=1)
    num_new_positions = input_ids.shape[1] - first["input_ids"].shape[1]
    new_images = tiny_inputs(model, [[], []], [1, 1], seed=2)["pixel_values"]
    conversation = {
        "input_ids": input_ids,
        "attention_mask": F.pad(first["attention_mask"], (0, num_new_positions), value=1),
        # In the order of their placeholders: both images of the first sample, then that of the second
        "pixel_values": torch.cat([first["pixel_values"], new_images]),
    }
    return SecondTurn(conversation, new_images, output[CACHE])


@pytest.mark.parametrize("only_new_tokens", [False, True], ids=["whole-conversation", "only-new-tokens"])
def test_conversation_continues_from_the_returned_cache(model, second_turn, only_new_tokens):
    expected = greedy(model, second_turn.conversation)
    continued = second_turn.continued(only_new_tokens)
    assert_same_answer(greedy(model, {**continued, "pixel_values": second_turn.new_images}), expected)


@pytest.mark.parametrize("only_new_tokens", [False, True], ids=["whole-conversation", "only-new-tokens"])
def test_conversation_does_not_continue_without_its_new_images(model, second_turn, only_new_tokens):
    continued = second_turn.continued(only_new_tokens)
    del continued["pixel_values"]
    with pytest.raises(ValueError, match=MISSING_IMAGES):
        greedy(model, continued)


def test_text_turn_continues_from_the_returned_cache(model):
    """The image of the first turn is in the cache: a second turn of text needs no `pixel_values`."""
    first = tiny_inputs(model, [[5, 6, 7, 8]], [1])
    output = model.generate(**first, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
    input_ids = torch.cat([output.sequences, torch.tensor([[14, 15, 16]])], dim=1)
    expected = greedy(model, {"input_ids": input_ids, "pixel_values": first["pixel_values"]})
    assert_same_answer(greedy(model, {"input_ids": input_ids}, cache=output[CACHE]), expected)


def test_both_names_of_the_cache_are_taken(model):
    """Transformers 5.24 calls it `cache`, earlier releases `past_key_values`; here both work with all of them."""
    first = tiny_inputs(model, [[5, 6, 7, 8]], [1])
    output = model.generate(**first, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
    input_ids = torch.cat([output.sequences, torch.tensor([[14, 15, 16]])], dim=1)
    caches = {name: {name: copy.deepcopy(output[CACHE])} for name in ("cache", "past_key_values")}
    new_ids = input_ids[:, output[CACHE].get_seq_length() :]
    with torch.no_grad():
        logits = {name: model(input_ids=new_ids, **copy.deepcopy(cache)).logits for name, cache in caches.items()}
    assert torch.equal(logits["cache"], logits["past_key_values"])
    answers = {name: greedy(model, {"input_ids": input_ids}, **cache) for name, cache in caches.items()}
    assert_same_answer(answers["cache"], answers["past_key_values"])
    both = dict.fromkeys(caches, output[CACHE])
    with pytest.raises(ValueError, match="two names of the same argument"):
        model(input_ids=new_ids, **both)
    with pytest.raises(ValueError, match="two names of the same argument"):
        greedy(model, {"input_ids": input_ids}, **both)


# Beams and samples


@pytest.mark.parametrize("num_beams", [2, 3])
def test_beams_equal_each_alone(model, num_beams):
    inputs = tiny_inputs(model, [[5, 6, 7], [9, 10]], [2, 1])

    def search(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        output = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            num_beams=num_beams,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return output.sequences[:, -NEW_TOKENS:], output.sequences_scores

    sequences, scores = search(inputs)
    for row, sample in enumerate(alone(model, inputs)):
        # Features that stand in the embeddings already need no order of images: a wrong one cannot hide in both
        alone_sequences, alone_scores = search(embed(model, sample, scatter=True))
        assert torch.equal(sequences[row], alone_sequences[0])
        torch.testing.assert_close(scores[row], alone_scores[0], rtol=0, atol=LOGITS_ATOL)


def first_logits_of_samples(model, inputs: dict, num_copies: int) -> torch.Tensor:
    """Sample `num_copies` answers; the logits of their first token, `(samples, num_copies, vocabulary)`."""
    torch.manual_seed(0)
    output = model.generate(
        **inputs,
        max_new_tokens=2,
        do_sample=True,
        num_return_sequences=num_copies,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.logits[0].unflatten(0, (-1, num_copies))


@pytest.mark.parametrize("as_embeddings", [False, True], ids=["input_ids", "inputs_embeds"])
def test_copies_of_a_sample_see_its_own_images(model, monkeypatch, as_embeddings):
    inputs = tiny_inputs(model, [[5, 6, 7], [9, 10]], [2, 1])
    expected = torch.stack([logits_of(model, sample)[0, -1] for sample in alone(model, inputs)])
    expected = expected[:, None].expand(-1, 3, -1)
    given = embed(model, inputs, scatter=False) if as_embeddings else inputs
    assert_logits_equal(first_logits_of_samples(model, given, num_copies=3), expected)

    # Transformers' own expansion repeats each image by itself: the copies then see each other's images
    monkeypatch.setattr(
        LlavaSPForConditionalGeneration,
        "_expand_inputs_for_generation",
        GenerationMixin._expand_inputs_for_generation,
    )
    difference = (first_logits_of_samples(model, given, num_copies=3) - expected).abs().amax(dim=(1, 2))
    assert difference[0] > 1000 * LOGITS_ATOL


def test_sampling_never_yields_the_image_token(model, tmp_path):
    """10,000 tokens at temperature 2, after a round trip to disk; without what is suppressed there would be some."""
    model.save_pretrained(tmp_path)
    model = LlavaSPForConditionalGeneration.from_pretrained(tmp_path)
    inputs = tiny_inputs(model, [[9, 10]], [1])

    def count_image_tokens(num_samples: int, **kwargs) -> int:
        torch.manual_seed(0)
        sequences = model.generate(
            **inputs,
            max_new_tokens=100,
            do_sample=True,
            temperature=2.0,
            top_k=0,
            num_return_sequences=num_samples,
            **kwargs,
        )
        new_tokens = sequences[:, inputs["input_ids"].shape[1] :]
        assert new_tokens.numel() == 100 * num_samples
        return int((new_tokens == IMAGE_TOKEN_ID).sum())

    assert count_image_tokens(100) == 0
    model.generation_config.suppress_tokens = None
    assert count_image_tokens(10) > 0


def logits_processors(mixin, model, suppressed, *own) -> LogitsProcessorList:
    """Those of an answer, as `GenerationMixin` or a model of ours prepares them."""
    config = GenerationConfig(suppress_tokens=suppressed, do_sample=False)
    given = LogitsProcessorList(own)
    return mixin._get_logits_processor(model, config, 0, device="cpu", logits_processor=given)


@pytest.mark.parametrize(
    "suppressed", [[3, IMAGE_TOKEN_ID, -1, 10**6], [], None], ids=["some-that-there-are-not", "none", "unset"]
)
@pytest.mark.parametrize("own", [None, [5, 6]], ids=["", "own-processor"])
def test_suppressed_tokens_are_masked_as_transformers_does(model, suppressed, own):
    given = [] if own is None else [SuppressTokensLogitsProcessor(own)]
    theirs = logits_processors(GenerationMixin, model, suppressed, *given)
    ours = logits_processors(type(model), model, suppressed, *given)
    assert [type(processor) for processor in theirs] == [SuppressTokensLogitsProcessor] * len(theirs)
    assert [type(processor) for processor in ours] == [MaskTokensLogitsProcessor] * len(theirs)
    # An assistant's vocabulary may be smaller
    for vocab_size in (model.config.text_config.vocab_size, 4, model.config.text_config.vocab_size):
        scores = torch.randn(2, vocab_size)
        before = scores.clone()
        assert torch.equal(ours(None, scores), theirs(None, scores))
        assert torch.equal(scores, before)


def test_the_mask_of_suppressed_tokens_is_made_once(model, monkeypatch):
    calls = []
    isin = torch.isin
    monkeypatch.setattr(torch, "isin", lambda *args: calls.append(1) or isin(*args))
    [processor] = logits_processors(type(model), model, [3])
    scores = torch.zeros(2, 8)
    assert [processor(None, scores).isinf().sum() for _ in range(3)] == [2, 2, 2]
    assert len(calls) == 1


# Speculative decoding


@pytest.mark.parametrize("text", [[9, 10, 9, 10], [9, 10, 1]], ids=["repeated-text", "ends-as-before-the-image"])
def test_prompt_lookup_equals_greedy(model, text):
    """The second text ends with the id in front of the image, so that what follows it there is `<image>`."""
    inputs = tiny_inputs(model, [text], [1])
    assert_same_answer(greedy(model, inputs, prompt_lookup_num_tokens=4), greedy(model, inputs))


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_assisted_generation_equals_greedy(variant, model, num_images):
    assistant = tiny_model(variant, seed=1, hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    inputs = tiny_inputs(model, [[9, 10, 11]], [num_images])
    assert_same_answer(greedy(model, inputs, assistant_model=assistant), greedy(model, inputs))


# Inputs


@pytest.mark.parametrize("scatter", [False, True], ids=["with-pixel_values", "features-scattered-in"])
def test_embeddings_equal_ids(model, inputs, scatter):
    embedded = embed(model, inputs, scatter)
    assert_logits_equal(logits_of(model, embedded), logits_of(model, inputs))
    assert_same_answer(greedy(model, embedded), greedy(model, inputs))
    assert_same_answer(greedy(model, embedded, num_beams=2), greedy(model, inputs, num_beams=2))


def test_text_alone_equals_the_language_model(model):
    language_model = LlamaForCausalLM(model.config.text_config).eval()
    language_model.model.load_state_dict(model.model.language_model.state_dict())
    language_model.lm_head.load_state_dict(model.lm_head.state_dict())
    language_model.generation_config = copy.deepcopy(model.generation_config)

    inputs = tiny_inputs(model, [[5, 6, 7, 8], [9, 10]], [0, 0])
    logits = logits_of(model, inputs)
    assert_logits_equal(logits, logits_of(language_model, inputs), atol=0)
    assert_same_answer(greedy(model, inputs), greedy(language_model, inputs))

    # Rotary positions count by their distances: only uneven ones show whether they arrive
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None] ** 2
    assert (logits_of(model, inputs) - logits).abs().max() > 1000 * LOGITS_ATOL
    assert_logits_equal(logits_of(model, inputs), logits_of(language_model, inputs), atol=0)


def test_positional_prompt_equals_input_ids(model, inputs):
    others = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    sequences = model.generate(inputs["input_ids"], **others, max_new_tokens=NEW_TOKENS)
    assert torch.equal(sequences[:, -NEW_TOKENS:], greedy(model, inputs).tokens)


@pytest.mark.parametrize(
    "logits_to_keep", [1, 5, torch.tensor([0, 2, -1])], ids=["last", "last-five", "positions-of-a-tensor"]
)
def test_logits_to_keep(model, inputs, logits_to_keep):
    logits = logits_of(model, inputs)
    expected = logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]
    kept = logits_of(model, inputs, logits_to_keep=logits_to_keep)
    assert kept.shape[1] < logits.shape[1]
    assert_logits_equal(kept, expected)


# Attention implementations


# Tracing FlexAttention runs into what PyTorch deprecates of itself
ignore_deprecations_of_tracing = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@ignore_deprecations_of_tracing
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_implementations_equal_sdpa(model, inputs, implementation):
    """
    Forward and generation. FlexAttention runs uncompiled here, as PyTorch's reference of it: the compiled kernel of
    PyTorch 2.13 for CPUs does not build for a decoding step behind left padding, for a plain Llama neither.
    """
    expected, expected_answer = logits_of(model, inputs), greedy(model, inputs)
    assert model.config.text_config._attn_implementation == model.config.vision_config._attn_implementation == "sdpa"

    model.set_attn_implementation(implementation)
    assert model.config.text_config._attn_implementation == implementation
    assert model.config.vision_config._attn_implementation == implementation
    real = inputs["attention_mask"].bool()
    with torch.compiler.set_stance("force_eager"):
        assert_logits_equal(logits_of(model, inputs)[real], expected[real])
        assert_same_answer(greedy(model, inputs), expected_answer)


@pytest.mark.slow
@ignore_deprecations_of_tracing
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile builds FlexAttention for CPUs with g++")
def test_compiled_flex_attention_equals_sdpa():
    """The compiled kernel, which takes half a minute to build. One variant: the attention layers are the towers'."""
    model = tiny_model("cropping-dfi")
    inputs = tiny_inputs(model, MIXED_TEXTS, MIXED_IMAGES)
    real = inputs["attention_mask"].bool()
    expected = logits_of(model, inputs)[real]
    model.set_attn_implementation("flex_attention")
    assert_logits_equal(logits_of(model, inputs)[real], expected)


# Training


def loss_and_gradients(model, inputs: dict, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs, labels=labels, use_cache=False).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def question_and_answer_labels(inputs: dict) -> torch.Tensor:
    """Labels that supervise the last three tokens of each sample and nothing else."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    labels[inputs["input_ids"] == IMAGE_TOKEN_ID] = -100
    return labels


def test_loss_is_the_mean_cross_entropy_of_the_labels(model, inputs):
    labels = question_and_answer_labels(inputs)
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        log_probabilities = output.logits.log_softmax(dim=-1)
        terms = [
            -log_probabilities[row, position - 1, labels[row, position]]
            for row, position in (labels != -100).nonzero().tolist()
        ]
        assert len(terms) == 9
        torch.testing.assert_close(output.loss, torch.stack(terms).mean(), rtol=1e-5, atol=0)

        # How Trainer accumulates gradients: the sum, divided by the tokens of all accumulated batches
        accumulated = model(**inputs, labels=labels, num_items_in_batch=100).loss
        torch.testing.assert_close(accumulated, torch.stack(terms).sum() / 100, rtol=1e-5, atol=0)


def test_gradient_checkpointing_equals_plain_training(model, inputs):
    model.train()
    labels = question_and_answer_labels(inputs)
    layers = [model.model.language_model.layers[0].mlp, model.model.vision_tower.encoder.layers[0].mlp]
    calls = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))

    loss, gradients = loss_and_gradients(model, inputs, labels)
    assert len(calls) == len(layers)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed_loss, checkpointed_gradients = loss_and_gradients(model, inputs, labels)
    assert len(calls) == 3 * len(layers), "each checkpointed layer runs again in the backward pass"

    torch.testing.assert_close(checkpointed_loss, loss, rtol=1e-5, atol=0)
    assert checkpointed_gradients.keys() == gradients.keys()
    assert any(name.startswith("model.multi_modal_projector.") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            checkpointed_gradients[name],
            gradient,
            rtol=0,
            atol=1e-6,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def test_frozen_tower_does_not_run_backwards(model, inputs):
    """What adapters and gradient checkpointing ask for, gradients of the embeddings, is nothing to a frozen tower."""
    model.model.vision_tower.requires_grad_(False)
    model.train()
    labels = question_and_answer_labels(inputs)
    _, expected = loss_and_gradients(model, inputs, labels)
    # Asks for them
    model.gradient_checkpointing_enable({"use_reentrant": False})
    features = []
    model.model.vision_tower.register_forward_hook(lambda module, arguments, output: features.append(output))
    embeddings = []
    model.get_input_embeddings().register_forward_hook(lambda module, arguments, output: embeddings.append(output))
    _, gradients = loss_and_gradients(model, inputs, labels)
    assert not features[0].last_hidden_state.requires_grad
    assert embeddings[0].requires_grad
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-6)
    model.get_input_embeddings().requires_grad_(False)
    model.disable_input_require_grads()
    model(**inputs)
    assert not embeddings[-1].requires_grad


def test_gradients_reach_every_output(model, inputs):
    """Hidden states, attentions and image features are parts of the graph: their gradients can be retained."""
    model.set_attn_implementation("eager")
    output = model(**inputs, output_hidden_states=True, output_attentions=True, use_cache=False)
    retained = {
        "embeddings": output.hidden_states[0],
        "last hidden state": output.hidden_states[-1],
        "attentions": output.attentions[0],
        "image features": output.image_hidden_states,
    }
    for tensor in retained.values():
        tensor.retain_grad()
    output.logits[:, -1].sum().backward()
    for name, tensor in retained.items():
        assert tensor.grad is not None, name
        assert tensor.grad.abs().sum() > 0, name


# 16 bits


@pytest.mark.parametrize(
    ("dtype", "feature_tolerance", "logits_atol"),
    [(torch.float16, 0.01, 0.03), (torch.bfloat16, 0.02, 0.2)],
    ids=["float16", "bfloat16"],
)
def test_half_precision_follows_single_precision(model, inputs, dtype, feature_tolerance, logits_atol):
    """
    Finite, image features within 1 % (float16) and 2 % (bfloat16), and the same greedy tokens up to a step at which
    the two best logits lie closer to each other than rounding was seen to move them; such steps are printed.

    Measured: features 0.10 % and 0.79 %, spatial tokens alone 0.10 % and 0.87 %, logits 0.012 and 0.089.
    """
    half = copy.deepcopy(model).to(dtype)
    half_inputs = dict(inputs, pixel_values=inputs["pixel_values"].to(dtype))
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        half_features = half.get_image_features(half_inputs["pixel_values"]).pooler_output
    assert half_features.dtype == dtype
    assert half_features.isfinite().all()
    num_spatial = model.config.projector_config.num_spatial_tokens
    for kind in (slice(num_spatial), slice(num_spatial, None)):
        difference = half_features[:, kind].float() - features[:, kind]
        assert difference.norm() / features[:, kind].norm() < feature_tolerance

    real = inputs["attention_mask"].bool()
    half_logits = logits_of(half, half_inputs)
    assert half_logits.isfinite().all()
    rounding = (half_logits.float() - logits_of(model, inputs))[real].abs().max()
    assert rounding < logits_atol

    answer = greedy(model, inputs)
    tokens, half_tokens = answer.tokens, greedy(half, half_inputs).tokens
    allowed = answer.logits.index_fill(-1, torch.tensor([IMAGE_TOKEN_ID]), -torch.inf)
    best, second = allowed.topk(2).values.unbind(-1)  # (samples, steps)
    margins = best - second
    assert (margins[:, 0] > 2 * rounding).any(), "no first token is certain: this compares nothing"
    for row in range(len(tokens)):
        different = (tokens[row] != half_tokens[row]).nonzero().flatten().tolist()
        if different:
            # After the first difference the two go on with different texts
            step = different[0]
            note = (
                f"sample {row}, step {step}: {dtype} gives token {half_tokens[row, step]} in place of "
                f"{tokens[row, step]}, whose margin is {margins[row, step]:.4f}; rounding moves logits by up to "
                f"{rounding:.4f}"
            )
            print(note)
            assert margins[row, step] <= 2 * rounding, note


def test_projector_may_have_a_dtype_of_its_own(model, inputs):
    """As in training, where the projector stays in float32 beside frozen 16-bit towers."""
    half = model.to(torch.bfloat16)
    expected = logits_of(half, inputs)
    half.model.multi_modal_projector.float()
    logits = logits_of(half, inputs)
    assert logits.dtype == torch.bfloat16
    real = inputs["attention_mask"].bool()
    assert_logits_equal(logits[real].float(), expected[real].float(), atol=0.2)


# Vocabulary


@pytest.mark.parametrize("vocab_size", [192, 112], ids=["grown", "shrunk"])
def test_resized_vocabulary(model, inputs, tmp_path, vocab_size):
    common = min(vocab_size, model.config.text_config.vocab_size)
    expected = logits_of(model, inputs)
    model.resize_token_embeddings(vocab_size)

    assert model.config.text_config.vocab_size == vocab_size
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == vocab_size
    logits = logits_of(model, inputs)
    assert logits.shape[-1] == vocab_size
    assert_logits_equal(logits[..., :common], expected[..., :common])

    labels = question_and_answer_labels(inputs)
    labels[:, -1] = vocab_size - 1
    with torch.no_grad():
        loss = model(**inputs, labels=labels).loss
    expected_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)

    model.save_pretrained(tmp_path)
    loaded, report = LlavaSPForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_answer(greedy(loaded, inputs), greedy(model, inputs))


def test_vocabulary_without_the_image_token_is_not_saved(model, tmp_path):
    model.resize_token_embeddings(IMAGE_TOKEN_ID)
    message = f"`image_token_index` is {IMAGE_TOKEN_ID}, which is outside `text_config.vocab_size` {IMAGE_TOKEN_ID}"
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        model.save_pretrained(tmp_path)


def test_tied_embeddings(variant, tmp_path):
    model = tiny_model(variant, tie_word_embeddings=True)
    inputs = tiny_inputs(model, MIXED_TEXTS, MIXED_IMAGES)
    assert model.lm_head.weight is model.get_input_embeddings().weight

    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    tied_keys = {"lm_head.weight", "model.language_model.embed_tokens.weight"}
    assert len(tied_keys & stored.keys()) == 1
    assert stored.keys() | tied_keys == model.state_dict().keys()

    loaded, report = LlavaSPForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert_logits_equal(logits_of(loaded, inputs), logits_of(model, inputs), atol=0)

    loaded.resize_token_embeddings(192)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


# Image features


def test_image_features(model, inputs):
    config = model.config.projector_config
    pixel_values = inputs["pixel_values"]
    with torch.no_grad():
        output = model.get_image_features(pixel_values, output_attentions=True)
        as_tuple = model.get_image_features(pixel_values, output_attentions=True, return_dict=False)
        plain = model.get_image_features(pixel_values)
        merged = model(**inputs).image_hidden_states

    num_images = len(pixel_values)
    assert output.pooler_output.shape == (num_images, config.num_image_tokens, config.text_hidden_size)
    assert output.last_hidden_state.shape == (num_images, config.num_patch_tokens + 1, config.vision_hidden_size)
    if config.use_detail_integrator:
        assert output.detail_attentions.shape == (num_images, config.num_spatial_tokens, config.num_detail_tokens)
        assert (output.detail_attentions > 0).all()
        torch.testing.assert_close(
            output.detail_attentions.sum(dim=-1), torch.ones(num_images, config.num_spatial_tokens)
        )
        assert torch.equal(as_tuple[-1], output.detail_attentions)
    else:
        assert output.detail_attentions is None
    assert plain.detail_attentions is None

    assert isinstance(as_tuple, tuple)
    for first, second in zip(as_tuple, output.to_tuple(), strict=True):
        assert type(first) is type(second)
    assert torch.equal(as_tuple[0], output.last_hidden_state)
    assert torch.equal(as_tuple[1], output.pooler_output)
    assert torch.equal(plain.pooler_output, output.pooler_output)
    assert torch.equal(merged, output.pooler_output)


def test_image_features_are_of_the_configured_layer(model, inputs):
    """All hidden states on request; the features come from the one that `vision_feature_layer` names."""
    config = model.config
    with torch.no_grad():
        output = model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
        states = output.hidden_states
        assert len(states) == config.vision_config.num_hidden_layers + 1
        expected = model.model.multi_modal_projector(states[config.vision_feature_layer][:, 1:]).last_hidden_state
        assert torch.equal(output.pooler_output, expected)

        config.vision_feature_layer = 1
        other = model.get_image_features(inputs["pixel_values"]).pooler_output
        assert torch.equal(other, model.model.multi_modal_projector(states[1][:, 1:]).last_hidden_state)
        assert not torch.equal(other, expected)


def test_image_features_with_the_vision_towers_attentions(model, inputs):
    model.set_attn_implementation("eager")
    vision_config = model.config.vision_config
    with torch.no_grad():
        attentions = model.get_image_features(inputs["pixel_values"], output_attentions=True).attentions
    num_positions = model.config.projector_config.num_patch_tokens + 1
    assert len(attentions) == vision_config.num_hidden_layers
    for attention in attentions:
        assert attention.shape == (3, vision_config.num_attention_heads, num_positions, num_positions)


# Bad input


@pytest.mark.parametrize("call", ["forward", "generate", "generate-beams"])
@pytest.mark.parametrize(
    ("placeholders", "images"), [(1, 2), (2, 1), (0, 1)], ids=["too-few-slots", "too-many-slots", "no-slots"]
)
def test_wrong_number_of_placeholders(model, call, placeholders, images):
    inputs = tiny_inputs(model, [[5, 6]], [placeholders])
    inputs["pixel_values"] = tiny_inputs(model, [[5, 6]], [images])["pixel_values"]
    per_image = model.config.projector_config.num_image_tokens
    variant_name = model.config.projector_config.spatial_variant
    counts = f"{placeholders * per_image} image tokens .* {images * per_image} features"
    with pytest.raises(ValueError, match=f"{MISMATCH}: {counts}.*variant '{variant_name}'"):
        if call == "forward":
            model(**inputs)
        else:
            greedy(model, inputs, num_beams=2 if call == "generate-beams" else 1)


def test_incomplete_run_of_placeholders(model):
    inputs = tiny_inputs(model, [[5, 6]], [1])
    inputs["input_ids"][0, 1] = 7
    per_image = model.config.projector_config.num_image_tokens
    with pytest.raises(ValueError, match=f"{MISMATCH}: {per_image - 1} image tokens .* {per_image} features"):
        model(**inputs)


def test_placeholders_of_one_sample_in_another_do_not_generate_beams(model):
    inputs = tiny_inputs(model, [[5, 6], [7, 8]], [1, 1])
    per_image = model.config.projector_config.num_image_tokens
    inputs["input_ids"][0, 1], inputs["input_ids"][1, -1] = 9, model.config.image_token_id
    with pytest.raises(
        ValueError, match=rf"{MISMATCH}: .*\[{per_image - 1}, {per_image + 1}\].*those of whole images"
    ):
        greedy(model, inputs, num_beams=2)


def test_a_model_made_from_a_configuration_never_answers_with_the_image_token(model):
    """Also the first candidates of prompt lookup, which copies from the prompt, run of placeholders included."""
    fresh = LlavaSPForConditionalGeneration(model.config).eval()
    assert fresh.generation_config.suppress_tokens == [model.config.image_token_id]
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config.eos_token_id = None
    inputs = tiny_inputs(model, [[3]], [1])
    assert_same_answer(greedy(fresh, inputs, prompt_lookup_num_tokens=4), greedy(fresh, inputs))


def test_a_prefill_in_chunks_does_not_generate_with_images(model):
    inputs = tiny_inputs(model, [[5, 6]], [1])
    with pytest.raises(ValueError, match="`prefill_chunk_size` would cut through an image's tokens"):
        greedy(model, inputs, prefill_chunk_size=64)


@pytest.mark.parametrize("num_beams", [1, 2], ids=["greedy", "beams"])
def test_image_tokens_without_images_do_not_generate(model, num_beams):
    inputs = tiny_inputs(model, [[5, 6]], [1])
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match=MISSING_IMAGES):
        greedy(model, inputs, num_beams=num_beams)
    with pytest.raises(ValueError, match=MISSING_IMAGES):
        model.generate(inputs["input_ids"], num_beams=num_beams)


@pytest.mark.filterwarnings("ignore:.*predefined maximum length:UserWarning")
def test_prompt_longer_than_the_language_model(variant, caplog):
    """`generate` refuses a prompt that does not fit and only warns of an answer that may not; `forward` is silent."""
    model, assistant = (tiny_model(variant, seed=seed, max_position_embeddings=160) for seed in (0, 1))
    text = [9, 10, 11, 12, 13, 9, 10, 11, 12]
    fitting, too_long = tiny_inputs(model, [text[1:]], [1]), tiny_inputs(model, [text], [1])
    assert fitting["input_ids"].shape[1] == 160
    assert greedy(model, fitting).tokens.shape == (1, NEW_TOKENS)
    # The candidates of speculative decoding follow the prompt, they are no part of it
    for speculation in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant}):
        assert_same_answer(greedy(model, fitting, **speculation), greedy(model, fitting))
    for inputs in (too_long, embed(model, too_long, scatter=False)):
        with pytest.raises(ValueError, match=r"161 tokens long.* 160 positions.*max_position_embeddings.* 150 tokens"):
            greedy(model, inputs)
    with caplog.at_level(logging.WARNING):
        assert logits_of(model, too_long).shape[1] == 161
    # Transformers warns of other things too, once in a process
    assert not [record for record in caplog.records if "length" in record.getMessage()]


def test_ids_or_embeddings_exactly_one(model, inputs):
    embeddings = embed(model, inputs, scatter=False)["inputs_embeds"]
    for given in ({}, {"input_ids": inputs["input_ids"], "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**given)
