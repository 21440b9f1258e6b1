"""
What a deployment does with the model changes nothing that it answers: compiled, exported, offloaded, split between
processes, quantised.

Measured on an x86 CPU with PyTorch 2.13, Transformers 5.19.0 and 5.23.0; logits have a standard deviation of about 1:
compiled 3e-6, exported 0, offloaded 0, tensor parallel 2e-6. In 4 bits, 5e-2 against the same weights unpacked, where
the quantisation itself makes 9e-1: bitsandbytes multiplies in bfloat16 on the CPU.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import cpu_offload
from conftest import IMAGE_TOKEN_ID, VARIANTS, tiny_inputs, tiny_model
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CompileConfig,
    StaticCache,
)
from transformers.distributed import DistributedConfig


LOGITS_ATOL = 2e-5
QUANTISED_ATOL = 0.15
NEW_TOKENS = 5

# Two samples of different lengths, with one image each
TEXTS = [[5, 6, 7, 8], [9, 10]]
IMAGES = [1, 1]

# No graph break and no recompilation show with any backend, and this one takes two seconds per variant. Inductor takes
# half a minute: it compiles the two variants that have every operation between them.
FAST_BACKEND = "aot_eager"
INDUCTOR_VARIANTS = ("cropping-dfi", "pooling")

# What stays in 16 bits: the parts that see the image, and the head. The names are anchored, so that a language model's
# own `lm_head` or a module that merely ends like them is not meant
UNQUANTISED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def inputs(model) -> dict:
    return tiny_inputs(model, TEXTS, IMAGES)


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """The model, saved."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def logits_of(model, inputs: dict) -> torch.Tensor:
    """The logits (tokens, vocabulary) of the batch without its padding."""
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def greedy(model, inputs: dict, **kwargs) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **kwargs)[:, -NEW_TOKENS:]


def assert_logits_equal(actual: torch.Tensor, expected: torch.Tensor, atol: float = LOGITS_ATOL) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# torch.compile


def check_compiled_prefill(model, inputs: dict, backend: str) -> None:
    # Eager first, also for who only wants it compiled: in its first forward the vision tower gets hooks for its hidden
    # states from Transformers, under a lock that torch.compile cannot trace. Transformers' LLaVA is no different
    expected = logits_of(model, inputs)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert_logits_equal(logits_of(compiled, inputs), expected)
    assert counter.frame_count == 1


@torch.no_grad()
def decode(model, inputs: dict, decode_step) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Greedy search with a static cache: `model` computes the prefill, `decode_step` the steps after it.

    Returns the ids (samples, NEW_TOKENS) and the logits (samples, NEW_TOKENS - 1, vocabulary) of the decode steps.
    """
    mask = inputs["attention_mask"]
    cache = StaticCache(config=model.config, max_cache_len=mask.shape[1] + NEW_TOKENS)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    prefill = model(**inputs, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1)
    ids, logits = [prefill.logits.argmax(dim=-1)], []
    # As long as the cache from the beginning: a mask that grew would be a new shape at each step
    mask = torch.cat([mask, mask.new_ones(len(mask), NEW_TOKENS)], dim=1)
    for step in range(1, NEW_TOKENS):
        output = decode_step(
            input_ids=ids[-1],
            attention_mask=mask,
            position_ids=positions[:, -1:] + step,
            cache=cache,
            use_cache=True,
        )
        logits.append(output.logits)
        ids.append(output.logits.argmax(dim=-1))
    return torch.cat(ids, dim=1), torch.cat(logits, dim=1)


def check_compiled_decoding(model, inputs: dict, backend: str) -> None:
    ids, logits = decode(model, inputs, decode_step=model)
    assert torch.equal(ids, greedy(model, inputs))
    counter = CompileCounterWithBackend(backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled_ids, compiled_logits = decode(
            model, inputs, decode_step=torch.compile(model, fullgraph=True, backend=counter)
        )
    assert counter.frame_count == 1
    assert_logits_equal(compiled_logits, logits)
    assert torch.equal(compiled_ids, ids)


def test_compiled_prefill_equals_eager(model, inputs):
    check_compiled_prefill(model, inputs, FAST_BACKEND)


def test_compiled_decoding_equals_eager(model, inputs):
    check_compiled_decoding(model, inputs, FAST_BACKEND)


@pytest.mark.slow
@pytest.mark.parametrize("variant", INDUCTOR_VARIANTS)
@pytest.mark.parametrize("check", [check_compiled_prefill, check_compiled_decoding], ids=["prefill", "decoding"])
def test_inductor_equals_eager(check, variant):
    model = tiny_model(variant)
    check(model, tiny_inputs(model, TEXTS, IMAGES), "inductor")


@pytest.mark.parametrize("backend", [FAST_BACKEND, pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled_projector_equals_eager(model, backend):
    projector = model.model.multi_modal_projector
    config = projector.config
    features = torch.randn(
        2, config.num_patch_tokens, config.vision_hidden_size, generator=torch.Generator().manual_seed(2)
    )
    counter = CompileCounterWithBackend(backend)
    actual = torch.compile(projector, fullgraph=True, backend=counter)(features, output_attentions=True)
    expected = projector(features, output_attentions=True)
    assert counter.frame_count == 1
    assert len(actual) == len(expected) == 1 + config.use_detail_integrator
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-5)


def check_compiled_generation(model, inputs: dict, backend: str) -> None:
    """`generate` compiles the decode step by itself, on accelerators; its private switch makes it do so here."""
    expected = greedy(model, inputs)
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    actual = greedy(model, inputs, cache_implementation="static", compile_config=config)
    assert torch.equal(actual, expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_generation_equals_eager(model, inputs):
    check_compiled_generation(model, inputs, FAST_BACKEND)


@pytest.mark.slow
@pytest.mark.parametrize("variant", INDUCTOR_VARIANTS)
def test_inductor_generation_equals_eager(variant):
    model = tiny_model(variant)
    check_compiled_generation(model, tiny_inputs(model, TEXTS, IMAGES), "inductor")


# torch.export


def test_exported_with_a_dynamic_batch_equals_eager(model, inputs, tmp_path):
    # An argument that is no tensor would be part of the exported signature
    model.config.text_config.use_cache = False
    # One image per sample ties all three: each has this one dimension
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs, dynamic_shapes={name: {0: batch} for name in inputs})
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")

    # The mask decides how far the padding reaches: same length, other lengths inside
    texts = [[9, 10, 11, 12], [5], [7, 8], [13, 14, 15], [3, 4]]
    for size in (1, len(texts)):
        other = tiny_inputs(model, texts[:size], [1] * size, seed=size)
        assert other["input_ids"].shape == (size, inputs["input_ids"].shape[1])
        expected = logits_of(model, other)
        assert_logits_equal(logits_of(exported.module(), other), expected)
        assert_logits_equal(logits_of(loaded.module(), other), expected)

    # It cannot name the numbers any more, but it must not put one image's features into the place of another's
    other["input_ids"][0, -1] = IMAGE_TOKEN_ID
    for program in (exported, loaded):
        with pytest.raises(RuntimeError, match="Runtime assertion failed"):
            program.module()(**other)


# Devices


ON_DISK = {
    "projector": {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "disk",
        "model.language_model": "cpu",
        "lm_head": "cpu",
    },
    "vision-tower-and-head": {
        "model.vision_tower": "disk",
        "model.multi_modal_projector": "cpu",
        "model.language_model": "cpu",
        "lm_head": "disk",
    },
    "inside-the-language-model": {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.language_model.embed_tokens": "disk",
        "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "disk",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
    "everything": {"": "disk"},
}


def assert_answers_equal(loaded, model, inputs: dict) -> None:
    assert_logits_equal(logits_of(loaded, inputs), logits_of(model, inputs))
    assert torch.equal(greedy(loaded, inputs), greedy(model, inputs))


# A model whose first module is on the disk counts as on the meta device, of which 5.19.0 warns
@pytest.mark.filterwarnings(
    "ignore:You are calling .generate.. with the `input_ids` being on a device type:UserWarning"
)
@pytest.mark.parametrize("device_map", ON_DISK.values(), ids=ON_DISK)
def test_offloaded_to_disk_equals_in_memory(model, inputs, folder, tmp_path, device_map):
    loaded = AutoModelForImageTextToText.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.hf_device_map == device_map
    on_disk = tuple(name for name, device in device_map.items() if device == "disk")
    for name, parameter in loaded.named_parameters():
        assert parameter.is_meta == name.startswith(on_disk), name
    assert_answers_equal(loaded, model, inputs)


def test_automatic_device_map_equals_in_memory(model, inputs, folder, tmp_path):
    """With room for nine tenths of the model: the language model is divided, the projector is not."""
    loaded = AutoModelForImageTextToText.from_pretrained(
        folder,
        device_map="auto",
        max_memory={"cpu": int(0.9 * model.get_memory_footprint())},
        offload_folder=tmp_path / "offload",
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert "model.multi_modal_projector" in loaded.hf_device_map
    assert_answers_equal(loaded, model, inputs)


def test_offloaded_to_cpu_equals_in_memory(model, inputs):
    """As on a GPU that is too small: a module's weights come to the device when it runs, and leave it afterwards."""
    expected = logits_of(model, inputs)
    cpu_offload(model, execution_device="cpu", offload_buffers=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_logits_equal(logits_of(model, inputs), expected)


# Tensor parallelism


def run_tensor_parallel_rank(rank: int, world_size: int, root: str) -> None:
    """One of the processes: load every model of `root` sharded, and write down its answers and what is sharded."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    # A file as the meeting point, since a free port may be taken by the time that it is used
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting-point", rank=rank, world_size=world_size)
    for folder in sorted(Path(root).glob("model-*")):
        model = AutoModelForImageTextToText.from_pretrained(
            folder, distributed_config=DistributedConfig(tp_plan="auto")
        )
        inputs = load_file(folder / "inputs.safetensors")
        answers = {"logits": logits_of(model, inputs), "ids": greedy(model, inputs)}
        save_file({name: tensor.contiguous() for name, tensor in answers.items()}, f"{folder}-rank{rank}.safetensors")
        sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
        Path(f"{folder}-rank{rank}.json").write_text(json.dumps(sharded))
    dist.barrier()
    dist.destroy_process_group()


def test_two_tensor_parallel_processes_equal_one(tmp_path, monkeypatch):
    # One start of the processes for all variants: it takes longer than everything they compute
    models = {variant: tiny_model(variant) for variant in VARIANTS}
    all_inputs = {variant: tiny_inputs(model, TEXTS, IMAGES) for variant, model in models.items()}
    for variant, model in models.items():
        model.save_pretrained(tmp_path / f"model-{variant}")
        save_file(all_inputs[variant], tmp_path / f"model-{variant}" / "inputs.safetensors")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    mp.spawn(run_tensor_parallel_rank, args=(2, str(tmp_path)), nprocs=2)

    for variant, model in models.items():
        expected_logits, expected_ids = logits_of(model, all_inputs[variant]), greedy(model, all_inputs[variant])
        for rank in range(2):
            answers = load_file(tmp_path / f"model-{variant}-rank{rank}.safetensors")
            assert_logits_equal(answers["logits"], expected_logits)
            assert torch.equal(answers["ids"], expected_ids)
            sharded = json.loads((tmp_path / f"model-{variant}-rank{rank}.json").read_text())
            assert "lm_head.weight" in sharded
            assert "model.language_model.layers.1.mlp.down_proj.weight" in sharded
            assert not [name for name in sharded if "vision_tower" in name or "projector" in name]


# bitsandbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_four_bits(variant, tmp_path, dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="loading in 4 bits needs bitsandbytes")

    def modules_in_4_bits(model) -> dict[str, torch.nn.Module]:
        linear = bitsandbytes.nn.Linear4bit
        return {name: module for name, module in model.named_modules() if isinstance(module, linear)}

    # bitsandbytes packs blocks of 64 weights of a row for the CPU: the widths have to be multiples of it
    model = tiny_model(variant, hidden_size=64, intermediate_size=128).to(dtype)
    inputs = tiny_inputs(model, TEXTS, IMAGES)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    model.save_pretrained(tmp_path / "model")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=UNQUANTISED,
    )
    quantised = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", dtype=dtype, quantization_config=config
    )

    # Every linear layer of the language model's blocks and no other
    expected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.language_model.layers.")
    }
    assert set(modules_in_4_bits(quantised)) == expected
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in expected:
            assert torch.equal(quantised.get_parameter(name), parameter), name

    # Saved before it has answered: for its first answer on a CPU, bitsandbytes packs the weights into an order of its
    # own, and saves them in that order
    quantised.save_pretrained(tmp_path / "quantised")
    # The same weights unpacked, which is what it must compute with
    unpacked = tiny_model(variant, hidden_size=64, intermediate_size=128).to(dtype)
    with torch.no_grad():
        for name, module in modules_in_4_bits(quantised).items():
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            unpacked.get_submodule(name).weight.copy_(weight)
    logits = logits_of(quantised, inputs)
    assert_logits_equal(logits, logits_of(unpacked, inputs), atol=QUANTISED_ATOL)
    assert (logits - logits_of(model, inputs)).abs().max() > 2 * QUANTISED_ATOL

    ids = greedy(quantised, inputs)
    assert ids.shape == (len(TEXTS), NEW_TOKENS)
    assert not (ids == IMAGE_TOKEN_ID).any()

    # The folder remembers what is quantised
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "quantised")
    assert set(modules_in_4_bits(loaded)) == expected
    assert torch.equal(logits_of(loaded, inputs), logits)
    assert torch.equal(greedy(loaded, inputs), ids)
