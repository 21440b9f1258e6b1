"""
What only a CUDA device can show: the authors' numbers through every attention kernel, in fp32 and bf16, and their
training steps.

`pytest -m gpu tests/test_cuda.py -rA` prints every measured difference. The whole file takes a few minutes; a single
case is selected with `-k`, so that a run cut short can be taken up again.
"""

import copy
import importlib
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import MINI_GOLDEN, randomize_
from test_training import authors_steps, compare_gradients, history, options, train_as_the_authors  # noqa: F401
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from transformers_llava_sp import LlavaSPConfig, LlavaSPForConditionalGeneration
from transformers_llava_sp.training import LlavaSPDataCollator
from transformers_llava_sp.training.train import train


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
# A tower without a class token, and images in tiles
OTHER_GOLDEN = ("siglip-cropping", "anyres-pooling")

# fp32 as on the CPU; half precision relative to the fp32 norm, as bf16 keeps 8 bits
FEATURES_FP32, LOGITS_FP32 = 5e-5, 2e-4
FEATURES_BF16, LOGITS_BF16 = 2e-2, 1e-1
# Of training, relative. In fp32, Adam makes a step of full length of the rounding of a gradient near zero, so that
# gradient norms of later steps are further apart than the losses
LOSS_FP32, NORM_FP32 = 1e-4, 1e-3
LOSS_BF16, GRADIENT_BF16, FALL_BF16 = 1e-2, 2e-1, 3e-1


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
    """Features of each image (tokens, dim), last prefill logits and greedy ids of one golden sample, on the CPU."""
    prompt, images = golden_data.samples[sample]["prompt"], golden_data.images(sample)
    inputs = processor(text=prompt, images=images or None, return_tensors="pt").to("cuda", model.dtype)
    features = []
    with torch.no_grad():
        if images:
            outputs = model.get_image_features(inputs["pixel_values"], inputs.get("image_sizes"))
            features = [image.float().cpu() for image in outputs.pooler_output]
        expected_logits = golden_data.last_logits(sample)
        logits = model(**inputs, logits_to_keep=len(expected_logits)).logits[0, :, : golden_data.vocab_size]
        generated = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    return features, logits.float().cpu(), generated.tolist()


def features_and_authors(golden_data, sample, features):
    """The features of a sample's images and the authors', in one tensor each, as far as theirs are stored."""
    pairs = []
    for image, found in zip(golden_data.samples[sample]["images"], features, strict=True):
        # Of an image in tiles, what the language model gets of it is stored, and the features of each tile
        names = {"image_features": 1} if golden_data.num_tiles(image) == 1 else {}
        names |= {"merged_features": 1, "merged_features_every8": 8}
        stored = [(golden_data.tensors.get(f"{name}.{image}"), every) for name, every in names.items()]
        pairs += [(found[::every], tensor) for tensor, every in stored if tensor is not None]
    assert len(pairs) == len(features)
    return tuple(torch.cat(side) for side in zip(*pairs, strict=True))


FP32_CASES = [(name, attention) for name in MINI_GOLDEN for attention in ("eager", "sdpa", "flex_attention")]


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize(("name", "attention"), [*FP32_CASES, *((name, "sdpa") for name in OTHER_GOLDEN)])
def test_fp32_gives_the_authors_numbers(golden, name, attention, sample):
    golden_data = golden(name)
    model, processor = golden_data.load(dtype=torch.float32, attn_implementation=attention, device_map="cuda")

    features, logits, generated = run_sample(golden_data, model, processor, sample)

    expected = golden_data.samples[sample]
    if features:
        found, stored = features_and_authors(golden_data, sample, features)
        difference = (found - stored).abs().max().item()
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
    if features:
        found, stored = features_and_authors(golden_data, sample, features)
        relative = ((found - stored).norm() / stored.norm()).item()
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
@pytest.mark.parametrize("name", [*MINI_GOLDEN, *OTHER_GOLDEN])
def test_bf16_through_the_flash_kernel_of_torch(golden, name, sample):
    golden_data = golden(name)
    model, processor = golden_data.load(dtype=torch.bfloat16, attn_implementation="sdpa", device_map="cuda")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        check_half_precision(golden_data, model, processor, sample, "bf16 torch flash")


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("attention", list(FLASH_PACKAGES))
@pytest.mark.parametrize("name", [*MINI_GOLDEN, *OTHER_GOLDEN])
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


# Training


def train_on_one_batch(model, batch, autocast):
    """The losses before and after a step on one batch, and the gradients of that step on the CPU."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
    losses, gradients = [], {}
    for _ in range(2):
        with autocast:
            loss = model(**batch, use_cache=False).loss
        losses.append(loss.item())
        if not gradients:
            loss.backward()
            gradients = {name: parameter.grad.float().cpu() for name, parameter in trained.items()}
            optimizer.step()
    return losses, gradients


def test_a_lora_step_in_bf16_is_close_to_fp32_on_the_cpu(authors_steps):  # noqa: F811
    steps, model, processor, dataset = authors_steps
    collator = LlavaSPDataCollator(processor)
    batch = collator([dataset[index] for index in range(2)])
    expected, expected_gradients = train_on_one_batch(copy.deepcopy(model).train(), batch, nullcontext())

    half = copy.deepcopy(model).cuda().train()
    for parameter in half.parameters():
        # As `llava-sp train` has them
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    base = half.get_base_model()
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    losses, gradients = train_on_one_batch(half, batch, torch.autocast("cuda", dtype=torch.bfloat16))

    assert gradients.keys() == expected_gradients.keys()
    print(f"{steps['case']} bf16: losses {losses}, on the CPU in fp32 {expected}")
    for part in ("lora_A", "lora_B", "multi_modal_projector"):
        found, gradient = (
            torch.cat([tensor.flatten() for name, tensor in each.items() if part in name])
            for each in (gradients, expected_gradients)
        )
        relative = ((found - gradient).norm() / gradient.norm()).item()
        print(f"{steps['case']} bf16: gradients of {part} differ by {relative:.2%}")
        assert relative < GRADIENT_BF16, part
    assert losses == pytest.approx(expected, rel=LOSS_BF16)
    assert losses[0] - losses[1] == pytest.approx(expected[0] - expected[1], rel=FALL_BF16)


def test_fp32_steps_are_the_authors(authors_steps, tmp_path):  # noqa: F811
    trainer = train_as_the_authors(authors_steps, tmp_path)
    assert trainer.model.device.type == "cuda"
    steps = authors_steps[0]
    norms = [norm for [norm] in history(trainer, "grad_norm")]
    for number, (loss, norm, expected) in enumerate(zip(trainer.losses, norms, steps["steps"], strict=True)):
        print(
            f"{steps['case']} fp32 step {number}: loss {loss / expected['loss'] - 1:+.1e}, gradient norm "
            f"{norm / expected['grad_norm'] - 1:+.1e} from the authors'"
        )
        assert loss == pytest.approx(expected["loss"], rel=LOSS_FP32)
        assert norm == pytest.approx(expected["grad_norm"], rel=NORM_FP32)
    compare_gradients(trainer, authors_steps, NORM_FP32)


@torch.no_grad()
def test_quantized_step_has_the_loss_of_the_dequantized_weights(workspace, tmp_path):
    missing = [name for name in ("bitsandbytes", "datasets") if find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} is not installed here")
    from bitsandbytes.functional import dequantize_4bit

    overrides = {"bf16": True, "max_steps": 2, "learning_rate": 1e-2, "gradient_checkpointing": True}
    with torch.enable_grad():
        trainer = train("qlora", options(workspace, tmp_path, **overrides))
    losses = [loss for [loss] in history(trainer, "loss")]
    reference = AutoModelForImageTextToText.from_pretrained(workspace / "model", dtype=torch.float32)
    quantized = {
        name.removesuffix(".base_layer"): module
        for name, module in trainer.unwrapped_model.named_modules()
        if name.endswith("_proj.base_layer")
    }
    assert len(quantized) == 2 * 7
    for name, module in quantized.items():
        assert (type(module).__name__, module.weight.device.type) == ("Linear4bit", "cuda")
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        reference.get_submodule(name).weight.copy_(weight)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    batch.pop("ids")
    labels = batch.pop("labels")
    # Without a number of tokens, the mean over all of them: there is one batch in a step
    expected = float(trainer.compute_vocabulary_loss(reference(**batch), labels))
    print(f"losses in 4 bits {losses}, the first one with the weights dequantized, in fp32 on the CPU, {expected}")
    assert losses[0] == pytest.approx(expected, rel=LOSS_BF16)
    assert losses[1] != losses[0]


# Benchmark


@pytest.fixture(scope="module")
def train_step():
    """The benchmark of training steps, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module("train_step")


def test_the_projector_is_in_memory_once(train_step):
    figures = train_step.measure_projector_copies(torch.device("cuda"))
    text, met = train_step.report_copies(figures)
    print(text)
    assert figures["arms"]["frozen"]["projector_bytes"] > 3e9
    assert met
    # Much less than gradients and states would be memory that was not counted
    assert figures["excess"] > -0.25


@pytest.mark.parametrize("kind", ["sdpa", "sdpa-flash"])
def test_benchmark_measures_steps(train_step, kind):
    device = torch.device("cuda")
    arms = {name: train_step.Arm(name, train_step.SIZES["small"](), device) for name in train_step.MODELS}
    assert {parameter.device.type for arm in arms.values() for parameter in arm.model.parameters()} == {"cuda"}
    for part in train_step.measure_steps(arms, kind, warmup=1, repeats=2, label=kind).values():
        for step in part["steps"]:
            assert step["projector_forward_ms"] + step["projector_backward_ms"] < step["forward_backward_ms"]
            assert step["peak_bytes"] >= part["resident_bytes"]
