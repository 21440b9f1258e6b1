"""
What only a CUDA device can show: the authors' numbers through every attention kernel, in fp32 and bf16.

`pytest -m gpu tests/test_cuda.py -rA` prints every measured difference. The whole file takes a few minutes; a single
case is selected with `-k`, so that a run cut short can be taken up again.
"""

from contextlib import nullcontext

import pytest
import torch
from conftest import MINI_GOLDEN, randomize_
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from transformers_llava_sp import LlavaSPConfig, LlavaSPForConditionalGeneration


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="these checks need a CUDA device, and there is none"),
]

FLASH_PACKAGES = {
    "flash_attention_2": is_flash_attn_2_available,
    "flash_attention_3": is_flash_attn_3_available,
    "flash_attention_4": is_flash_attn_4_available,
}
SAMPLES = ("single", "text_only", "two_images", "two_turn", "single_square")

# fp32 as on the CPU; half precision relative to the fp32 norm, as bf16 keeps 8 bits
FEATURES_FP32, LOGITS_FP32 = 5e-5, 2e-4
FEATURES_BF16, LOGITS_BF16 = 2e-2, 1e-1


@pytest.fixture(autouse=True)
def full_fp32_precision():
    """PyTorch lets convolutions use TF32 by default, which keeps 10 of fp32's 23 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def test_device_is_named(capsys):
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    assert torch.cuda.get_device_capability() >= (7, 0)


def run_sample(golden_data, model, processor, sample):
    """Image features (images, tokens, dim), last prefill logits and greedy ids of one golden sample, on the CPU."""
    prompt, images = golden_data.samples[sample]["prompt"], golden_data.images(sample)
    inputs = processor(text=prompt, images=images or None, return_tensors="pt").to("cuda", model.dtype)
    features = None
    with torch.no_grad():
        if images:
            features = model.get_image_features(inputs["pixel_values"]).pooler_output.float().cpu()
        expected_logits = golden_data.last_logits(sample)
        logits = model(**inputs, logits_to_keep=len(expected_logits)).logits[0, :, : golden_data.vocab_size]
        generated = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    return features, logits.float().cpu(), generated.tolist()


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("name", MINI_GOLDEN)
def test_fp32_gives_the_authors_numbers(golden, name, attention, sample):
    golden_data = golden(name)
    model, processor = golden_data.load(dtype=torch.float32, attn_implementation=attention, device_map="cuda")

    features, logits, generated = run_sample(golden_data, model, processor, sample)

    expected = golden_data.samples[sample]
    if features is not None:
        stored = torch.stack([golden_data.tensors[f"image_features.{image}"] for image in expected["images"]])
        difference = (features - stored).abs().max().item()
        print(f"{name} {sample} fp32 {attention}: features differ by {difference:.1e}")
        assert difference < FEATURES_FP32
    difference = (logits - golden_data.last_logits(sample)).abs().max().item()
    print(f"{name} {sample} fp32 {attention}: logits differ by {difference:.1e}")
    assert difference < LOGITS_FP32
    assert generated == expected["generated_ids"]


def check_half_precision(golden_data, model, processor, sample, label):
    """
    Features and logits close. Along the authors' answer, each token whose fp32 margin is above twice the logits'
    largest error is the likeliest one here, too.
    """
    features, logits, generated = run_sample(golden_data, model, processor, sample)
    expected, expected_logits = golden_data.samples[sample], golden_data.last_logits(sample)
    if features is not None:
        stored = torch.stack([golden_data.tensors[f"image_features.{image}"] for image in expected["images"]])
        relative = ((features - stored).norm() / stored.norm()).item()
        print(f"{golden_data.name} {sample} {label}: features differ by {relative:.2%}")
        assert relative < FEATURES_BF16
    relative = ((logits - expected_logits).norm() / expected_logits.norm()).item()
    error = (logits - expected_logits).abs().max().item()

    images, answer = golden_data.images(sample), torch.tensor([expected["generated_ids"]])
    inputs = processor(text=expected["prompt"], images=images or None, return_tensors="pt")
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer[:, :-1]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        along = model(**inputs.to("cuda", model.dtype), logits_to_keep=answer.shape[1]).logits
    likeliest = along[0, :, : golden_data.vocab_size].argmax(dim=-1).tolist()

    decided = [step for step, margin in enumerate(expected["generation_margins"]) if margin > 2 * error]
    same = sum(a == b for a, b in zip(generated, expected["generated_ids"], strict=True))
    print(
        f"{golden_data.name} {sample} {label}: logits differ by {relative:.2%}, at most {error:.3f}; "
        f"{same}/16 generated ids equal; decided steps {decided}"
    )
    assert relative < LOGITS_BF16
    assert [likeliest[step] for step in decided] == [expected["generated_ids"][step] for step in decided]


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", MINI_GOLDEN)
def test_bf16_through_the_flash_kernel_of_torch(golden, name, sample):
    golden_data = golden(name)
    model, processor = golden_data.load(dtype=torch.bfloat16, attn_implementation="sdpa", device_map="cuda")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        check_half_precision(golden_data, model, processor, sample, "bf16 torch flash")


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("attention", list(FLASH_PACKAGES))
@pytest.mark.parametrize("name", MINI_GOLDEN)
def test_bf16_through_flash_attention_packages(golden, name, attention, sample):
    if not FLASH_PACKAGES[attention]():
        pytest.skip(f"{attention} is not installed here")
    golden_data = golden(name)
    model, processor = golden_data.load(dtype=torch.bfloat16, attn_implementation=attention, device_map="cuda")
    check_half_precision(golden_data, model, processor, sample, f"bf16 {attention}")


@pytest.fixture(scope="module")
def real_widths():
    """The released Cropping model's widths and projector with two language-model layers; random weights, fp32."""
    config = LlavaSPConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=3,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(vocab_size=32064, num_hidden_layers=2, max_position_embeddings=4096, pad_token_id=0),
    )
    with torch.device("cuda"):
        model = LlavaSPForConditionalGeneration(config).eval()
    model = randomize_(model.cpu()).cuda()
    generator = torch.Generator().manual_seed(0)
    slots = [config.image_token_id] * config.projector_config.num_image_tokens
    inputs = {
        "input_ids": torch.tensor([[1, *slots, 5, 6, 7], [1, *slots, 8, 9, 10]], device="cuda"),
        "pixel_values": torch.randn(2, 3, 336, 336, generator=generator).cuda(),
    }
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        logits = model(**inputs, logits_to_keep=4).logits
    return model, inputs, features, logits


@pytest.mark.parametrize("attention", ["sdpa-flash", "flex_attention", *FLASH_PACKAGES])
def test_real_widths_in_bf16_stay_close_to_fp32(real_widths, attention):
    if attention in FLASH_PACKAGES and not FLASH_PACKAGES[attention]():
        pytest.skip(f"{attention} is not installed here")
    model, inputs, features, logits = real_widths
    config = model.config
    half = LlavaSPForConditionalGeneration._from_config(
        config, dtype=torch.bfloat16, attn_implementation=attention.removesuffix("-flash")
    )
    half.load_state_dict(model.state_dict())
    half = half.cuda().eval()
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}

    kernel = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if attention == "sdpa-flash" else nullcontext()
    with torch.no_grad(), kernel:
        half_features = half.get_image_features(inputs["pixel_values"]).pooler_output.float()
        half_logits = half(**inputs, logits_to_keep=4).logits.float()

    relative_features = ((half_features - features).norm() / features.norm()).item()
    relative_logits = ((half_logits - logits).norm() / logits.norm()).item()
    print(f"real widths bf16 {attention}: features {relative_features:.2%}, logits {relative_logits:.2%} from fp32")
    assert relative_features < FEATURES_BF16
    assert relative_logits < LOGITS_BF16
