"""
Time and memory of fine-tuning steps: LLaVA-SP against Transformers' LLaVA, in the same run.

    python benchmarks/train_step.py --output results                # the shapes of the released 7B, on a GPU
    python benchmarks/train_step.py --size small --output results   # tiny models, anywhere, in a minute
    python benchmarks/train_step.py projector                       # is the projector in memory only once?
    python benchmarks/train_step.py memory                          # what the methods keep in memory: computed

Steps and the projector's memory are measured, with random weights; `memory` follows from the shapes alone and is the
table of docs/training.md. Finished parts of a run are in the output folder and are not measured again by the next run.
benchmarks/README.md says what is measured and how. Exits with status 1 where a limit is not met.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import peft
import torch
from _measure import (
    Clock,
    PeakMemory,
    Results,
    add_output_arguments,
    attention_kernel,
    attention_kinds,
    check_output_arguments,
    count_bytes,
    describe_device,
    describe_machine,
    measure_matrix_products,
    median_and_range,
    plot_ratios,
    read_memory,
    synchronize,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from transformers_llava_sp import LlavaSPConfig, LlavaSPForConditionalGeneration
from transformers_llava_sp.training.parts import (
    LORA_TARGETS,
    PROJECTOR,
    prepare_full,
    prepare_lora,
    prepare_projector,
)
from transformers_llava_sp.training.train import UNQUANTIZED_MODULES


MODELS = ("llava-sp", "llava")
# The acceptance limits: time per token over LLaVA's, and memory beyond a frozen projector's as a part of its size
TIME_LIMIT = 1.03
COPY_LIMIT = 0.1

# Those of the recipe `lora`
LORA_LEARNING_RATE, PROJECTOR_LEARNING_RATE = 2e-4, 2e-5
MAX_GRAD_NORM = 1.0

SAMPLING_INTERVAL = 0.002  # seconds
NUM_BATCHES = 2
# What a step may take at most beside the weights, as a part of the GPU's memory
RESIDENT_LIMIT = 0.75
# Of the measured rate of matrix products, to say beforehand how long a run will take
EXPECTED_EFFICIENCY = 0.4
NUM_DEVICES = 8


@dataclass(frozen=True)
class Size:
    """
    What is measured.

    Args:
        config ([`LlavaSPConfig`]): The model's configuration. LLaVA's has the same tower and language model.
        text_tokens (`int`): Tokens of each sequence beside the image's.
        micro_batch (`int`): Sequences of a step, each with one image.
        lora_rank (`int`): Rank of the LoRA matrices.
        matrix_size (`int`): Rows and columns of the products that the device's rate is measured with.
    """

    config: LlavaSPConfig
    text_tokens: int
    micro_batch: int
    lora_rank: int
    matrix_size: int


def small_config() -> LlavaSPConfig:
    return LlavaSPConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=84,
            patch_size=7,
        ),
        text_config=LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
        ),
        projector_config={"spatial_hidden_size": 16},
        image_token_id=100,
    )


def copies_config() -> LlavaSPConfig:
    """A projector of 252 MB in float32 in a model in which nothing else takes memory."""
    config = small_config()
    config.vision_config.update({"hidden_size": 192, "image_size": 336, "patch_size": 14})
    return LlavaSPConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        projector_config={"spatial_hidden_size": 192},
        image_token_id=config.image_token_id,
    )


# In the 7B, 576 image tokens (LLaVA) or 582 and as much text as makes 700
SIZES = {
    "7b": lambda: Size(LlavaSPConfig(), text_tokens=118, micro_batch=16, lora_rank=128, matrix_size=8192),
    "small": lambda: Size(small_config(), text_tokens=20, micro_batch=2, lora_rank=4, matrix_size=128),
}


# Models


def make_model(name: str, config: LlavaSPConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """
    A model with random weights, made on the device and in the number format in which it is used.

    Args:
        name (`str`): `"llava-sp"`, or `"llava"` for Transformers' LLaVA of the same tower and language model.
        config ([`LlavaSPConfig`]): LLaVA-SP's configuration.
        device (`torch.device`): Where.
        dtype (`torch.dtype`): In which number format.

    Returns:
        [`PreTrainedModel`]: The model.
    """
    model_class, model_config = LlavaSPForConditionalGeneration, config
    if name == "llava":
        model_class = LlavaForConditionalGeneration
        model_config = LlavaConfig(
            vision_config=config.vision_config.to_dict(),
            text_config=config.text_config.to_dict(),
            image_token_index=config.image_token_id,
        )
    with device:
        return model_class._from_config(model_config, dtype=dtype, attn_implementation="sdpa")


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@dataclass
class Arm:
    """
    A model in training, as `llava-sp train lora` trains it: LoRA and the projector in float32 beside frozen weights in
    bfloat16, bfloat16 autocast, checkpointed activations, and one AdamW step for each batch.

    Args:
        name (`str`): One of `MODELS`.
        size ([`Size`]): Of what size.
        device (`torch.device`): Where.
    """

    name: str
    size: Size
    device: torch.device
    marks: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)
        torch.manual_seed(0)
        base = make_model(self.name, self.size.config, self.device, torch.bfloat16)
        # PEFT makes its matrices on the CPU otherwise
        with self.device:
            self.model = prepare_lora(base, r=self.size.lora_rank, lora_alpha=2 * self.size.lora_rank).train()
        # As Trainer does. Newer releases have renamed it
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        self.base = base
        self.projector = base.model.multi_modal_projector
        self.projector.register_forward_pre_hook(self.start_projector)
        self.projector.register_forward_hook(self.end_projector)
        self.trained = {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }
        self.trained_projector = [parameter for name, parameter in self.trained.items() if PROJECTOR in name]
        lora = [parameter for name, parameter in self.trained.items() if PROJECTOR not in name]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": lora, "lr": LORA_LEARNING_RATE},
                {"params": self.trained_projector, "lr": PROJECTOR_LEARNING_RATE},
            ],
            weight_decay=0.0,
            fused=True,
        )
        self.batches = [self.make_batch(seed) for seed in range(NUM_BATCHES)]

    def start_projector(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        [features] = inputs
        if features.requires_grad:
            # Before the layers in front of the projector, all of whose own gradients are there by then
            features.register_hook(lambda gradient: self.marks.update(projector_backward_end=self.clock.mark()))
        self.marks["projector_start"] = self.clock.mark()

    def end_projector(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        self.marks["projector_end"] = self.clock.mark()
        tokens = output if isinstance(output, torch.Tensor) else output.last_hidden_state
        tokens.register_hook(lambda gradient: self.marks.update(projector_backward_start=self.clock.mark()))

    def set_attention(self, implementation: str) -> None:
        """Choose the attention of the tower and the language model; the projector has none to choose."""
        self.base.set_attn_implementation(
            {"": implementation, "vision_config": implementation, "text_config": implementation}
        )

    @property
    def num_image_tokens(self) -> int:
        projector_config = self.size.config.projector_config
        return projector_config.grid_size**2 if self.name == "llava" else projector_config.num_image_tokens

    @property
    def sequence_length(self) -> int:
        return self.num_image_tokens + self.size.text_tokens

    @property
    def num_tokens(self) -> int:
        """`int`: Tokens of a step, those of images included."""
        return self.size.micro_batch * self.sequence_length

    def make_batch(self, seed: int) -> dict[str, torch.Tensor]:
        """Random images and texts, the same for both models. What follows the image is learned."""
        generator = torch.Generator(self.device).manual_seed(seed)
        num_rows, config = self.size.micro_batch, self.size.config
        side = config.vision_config.image_size
        text = torch.randint(
            3, config.image_token_id, (num_rows, self.size.text_tokens), generator=generator, device=self.device
        )
        slots = torch.full((num_rows, self.num_image_tokens), config.image_token_id, device=self.device)
        input_ids = torch.cat([text[:, :1], slots, text[:, 1:]], dim=1)
        labels = input_ids.clone()
        labels[:, : 1 + self.num_image_tokens] = -100
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": labels,
            "pixel_values": torch.randn(num_rows, 3, side, side, generator=generator, device=self.device),
        }

    def resident_bytes(self) -> int:
        """Bytes that stay between steps: weights, optimizer states, batches. Gradients do not."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        batches = [tensor for batch in self.batches for tensor in batch.values()]
        return count_bytes([*self.model.parameters(), *self.model.buffers(), *states, *batches])

    def step(self, number: int) -> dict[str, float]:
        """
        One step of training.

        Args:
            number (`int`): Which, so that not every step has the same batch.

        Returns:
            `dict[str, float]`: Milliseconds of its parts, and on a GPU the highest memory in bytes, without what the
            other model keeps there.
        """
        on_gpu = self.device.type == "cuda"
        synchronize(self.device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - self.resident_bytes()
        marks = self.marks = {"start": self.clock.mark()}
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.model(**self.batches[number % NUM_BATCHES], use_cache=False).loss
        loss.backward()
        marks["backward_end"] = self.clock.mark()
        if on_gpu:
            # Waits, but between what is timed
            forward_peak = torch.cuda.max_memory_allocated()
        marks["optimizer_start"] = self.clock.mark()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks["end"] = self.clock.mark()
        synchronize(self.device)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss of {self.name} is {loss.item()}: its times would say nothing.")
        # Without a gradient for what comes before it, the projector's is the last
        marks.setdefault("projector_backward_end", marks["backward_end"])
        between = {
            "forward_backward_ms": ("start", "backward_end"),
            "optimizer_ms": ("optimizer_start", "end"),
            "projector_forward_ms": ("projector_start", "projector_end"),
            "projector_backward_ms": ("projector_backward_start", "projector_backward_end"),
        }
        result = {key: self.clock.milliseconds(marks[one], marks[other]) for key, (one, other) in between.items()}
        if on_gpu:
            result["forward_backward_peak_bytes"] = forward_peak - others
            result["peak_bytes"] = torch.cuda.max_memory_allocated() - others
        return result


# Parts of a run


def count_operations(arm: Arm) -> dict[str, Any]:
    """
    Floating-point operations of a step's matrix products and convolutions, those that checkpointing repeats included,
    with attention written out. The half of the language model's attention that is masked is not counted: kernels skip
    it.
    """
    arm.set_attention("eager")
    with FlopCounterMode(display=False) as counter:
        arm.step(0)
    arm.set_attention("sdpa")
    total = counter.get_total_flops()
    text_config = arm.size.config.text_config
    # Two products forward, again where they are repeated, and four backward, each with a multiplication and an
    # addition for every pair of positions and every channel
    attention = 8 * 2 * arm.num_tokens * arm.sequence_length * text_config.hidden_size * text_config.num_hidden_layers
    return {"operations": total - attention // 2, "tokens": arm.num_tokens}


def measure_steps(arms: dict[str, Arm], kind: str, warmup: int, repeats: int, label: str) -> dict[str, Any]:
    """Steps of the models in turns, with one kind of attention; the figures of each step."""
    implementation = attention_kinds(next(iter(arms.values())).device)[0][kind]
    for arm in arms.values():
        arm.set_attention(implementation)
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    with attention_kernel(kind), tqdm(total=(warmup + repeats) * len(arms), desc=label, unit="step") as progress:
        for number in range(warmup + repeats):
            # Neither always comes first, so that nothing that drifts favours one
            for name in arms if number % 2 else reversed(arms):
                result = arms[name].step(number)
                if number >= warmup:
                    steps[name].append(result)
                progress.update()
    return {
        name: {
            "tokens": arm.num_tokens,
            "sequence_length": arm.sequence_length,
            "resident_bytes": arm.resident_bytes(),
            "trained_parameters": count_parameters(arm.trained.values()),
            "trained_projector_parameters": count_parameters(arm.trained_projector),
            # Weight, gradient and AdamW's two states, all in float32
            "trained_projector_bytes": 16 * count_parameters(arm.trained_projector),
            "steps": steps[name],
        }
        for name, arm in arms.items()
    }


# Whether the projector is in memory twice


def train_with_projector(trained: bool, device: torch.device) -> dict[str, int]:
    """
    Three steps of a small model with a large projector, all of it in float32.

    Args:
        trained (`bool`): Whether the projector is trained as `prepare_lora` trains it, beside LoRA; else LoRA alone is
            trained, and PEFT knows nothing of the projector.
        device (`torch.device`): Where.

    Returns:
        `dict[str, int]`: Bytes of the projector, and of gradients and optimizer states; on a GPU, the highest memory.
    """
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    config = LlavaSPConfig() if on_gpu else copies_config()
    if on_gpu:
        # The real projector, in front of a language model of its width with a single small layer
        config.text_config.update({"num_hidden_layers": 1, "intermediate_size": 256, "vocab_size": 32064})
        config.vision_config.num_hidden_layers = 2
    torch.manual_seed(0)
    base = make_model("llava-sp", config, device, torch.float32)
    with device:
        if trained:
            model = prepare_lora(base, r=4, lora_alpha=8)
        else:
            model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGETS))
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    projector_config, side = config.projector_config, config.vision_config.image_size
    slots = torch.full((1, projector_config.num_image_tokens), config.image_token_id, device=device)
    input_ids = torch.cat([slots, torch.arange(3, 9, device=device)[None]], dim=1)
    pixel_values = torch.randn(1, 3, side, side, device=device)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=input_ids, labels=input_ids, pixel_values=pixel_values, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
    result = {
        "projector_bytes": count_bytes(base.model.multi_modal_projector.parameters()),
        "gradient_bytes": count_bytes(parameter.grad for parameter in parameters),
        "state_bytes": count_bytes(value for state in optimizer.state.values() for value in state.values()),
    }
    if on_gpu:
        result["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return result


def sample_projector_process(trained: bool) -> dict[str, int]:
    """[`train_with_projector`] on the CPU in a fresh process, whose memory is sampled from here."""
    command = [sys.executable, __file__, "projector", "--arm", "trained" if trained else "frozen"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        ready = process.stdout.readline() == "ready\n"
        before = read_memory(process.pid)
        if not ready or before is None:
            _, errors = process.communicate()
            raise RuntimeError(f"{' '.join(command)} did not start (status {process.returncode}):\n{errors}")
        with PeakMemory(process.pid, SAMPLING_INTERVAL) as peak:
            answer, errors = process.communicate("go\n")
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed (status {process.returncode}):\n{errors}")
    return {**json.loads(answer), "peak_bytes": peak.anonymous - before["RssAnon"]}


def run_projector_process(arm: str) -> None:
    """The sampled process: import everything, say so, wait for a line, train, and print the figures."""
    # PyTorch keeps memory for each thread that works
    torch.set_num_threads(1)
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(train_with_projector(arm == "trained", torch.device("cpu"))), flush=True)


def measure_projector_copies(device: torch.device) -> dict[str, Any]:
    """
    Memory at its highest with a trained projector and with a frozen one, and by how much more they differ than by
    what training it needs, as a part of the projector's size.
    """
    measure = partial(train_with_projector, device=device) if device.type == "cuda" else sample_projector_process
    arms = {"frozen": measure(False), "trained": measure(True)}
    difference = {key: arms["trained"][key] - arms["frozen"][key] for key in arms["frozen"]}
    excess = difference["peak_bytes"] - difference["gradient_bytes"] - difference["state_bytes"]
    return {"arms": arms, "excess_bytes": excess, "excess": excess / arms["frozen"]["projector_bytes"]}


# What a method keeps in memory, computed


def count_memory(model: nn.Module, quantized: frozenset[str] = frozenset()) -> dict[str, float]:
    """
    Bytes that training a model with AdamW keeps, without activations.

    Args:
        model (`nn.Module`): The model, prepared for training; its weights may be on the meta device.
        quantized (`frozenset[str]`, *optional*): Names of weights that bitsandbytes turns into 4 bits each and one
            float32 scale for every 64 of them.

    Returns:
        `dict[str, float]`: Those of frozen weights, trained weights, gradients and optimizer states.
    """
    frozen = trained = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained += parameter.nbytes
        else:
            frozen += parameter.numel() * (4 + 32 / 64) / 8 if name in quantized else parameter.nbytes
    # Both of AdamW's states are as large as the weights
    return {
        "frozen weights": frozen,
        "trained weights": trained,
        "gradients": trained,
        "optimizer states": 2 * trained,
    }


def prepare_recipe(recipe: str, config: LlavaSPConfig, device: torch.device) -> tuple[nn.Module, frozenset[str]]:
    """
    A model as a recipe trains it, but not yet quantized.

    Args:
        recipe (`str`): `"pretrain"`, `"lora"`, `"qlora"` or `"full"`.
        config ([`LlavaSPConfig`]): The model's configuration.
        device (`torch.device`): Where to make it.

    Returns:
        `tuple(nn.Module, frozenset[str])`: The model, and the names of the weights that the recipe quantizes.
    """
    base = make_model("llava-sp", config, device, torch.bfloat16)
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    with device:
        if recipe == "pretrain":
            return prepare_projector(base), frozenset()
        if recipe == "full":
            return prepare_full(base), frozenset()
        model = prepare_lora(base)
    if recipe == "lora":
        return model, frozenset()
    quantized = {name for name in linear if not name.startswith(tuple(UNQUANTIZED_MODULES))}
    return model, frozenset(f"base_model.model.{name}.base_layer.weight" for name in quantized)


def print_memory(arguments: argparse.Namespace) -> None:
    """The table of docs/training.md."""
    size = SIZES[arguments.size]()
    columns = ("frozen weights", "trained weights", "gradients", "optimizer states")
    print(f"| recipe | {' | '.join(columns)} | together | each of {NUM_DEVICES} GPUs |")
    print("|---|" + "---:|" * (len(columns) + 2))
    for recipe in ("pretrain", "lora", "qlora", "full"):
        counts = count_memory(*prepare_recipe(recipe, size.config, torch.device("meta")))
        total = sum(counts.values())
        cells = [f"{number / 1e9:.1f} GB" for number in [*(counts[column] for column in columns), total]]
        # The others fit on one GPU
        cells.append(f"{total / NUM_DEVICES / 1e9:.1f} GB" if recipe == "full" else "-")
        print(f"| `{recipe}` | {' | '.join(cells)} |")


# Reports


def summarise_steps(part: dict[str, Any], operations: dict[str, Any], rate: float) -> dict[str, Any]:
    """Per model the medians, and LLaVA-SP's time per token over LLaVA's: that of the medians, and of each pair."""
    summary: dict[str, Any] = {}
    per_token: dict[str, list[float]] = {}
    for name in MODELS:
        steps = part[name]["steps"]
        forward_backward = [step["forward_backward_ms"] for step in steps]
        projector = [step["projector_forward_ms"] + step["projector_backward_ms"] for step in steps]
        per_token[name] = [milliseconds / part[name]["tokens"] for milliseconds in forward_backward]
        median = statistics.median(forward_backward)
        limit = operations[name]["operations"] / rate * 1e3
        summary[name] = {
            "forward_backward_ms": median,
            "tokens_per_second": part[name]["tokens"] / median * 1e3,
            "optimizer_ms": statistics.median(step["optimizer_ms"] for step in steps),
            "projector_ms": statistics.median(projector),
            "projector_share": statistics.median(
                one / other for one, other in zip(projector, forward_backward, strict=True)
            ),
            "limit_ms": limit,
            "share_of_limit": limit / median,
        }
    ratios = [ours / theirs for ours, theirs in zip(per_token["llava-sp"], per_token["llava"], strict=True)]
    summary["time_ratio"] = statistics.median(per_token["llava-sp"]) / statistics.median(per_token["llava"])
    summary["time_ratios"] = ratios
    return summary


def report(results: Results, kinds: Iterable[str], missing: dict[str, str]) -> tuple[str, bool]:
    """The figures as Markdown, and whether all limits are met."""
    met = True
    rate = results["matrix products"]["operations_per_second"]
    operations = results["operations"]
    lines = [
        "| attention | model | forward and backward, ms | tokens/s | of the device's limit | projector, ms | of it "
        "| optimizer, ms | peak memory | of it the trained projector |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    notes = []
    for kind in kinds:
        part = results[f"steps, {kind}"]
        summary = summarise_steps(part, operations, rate)
        part["summary"] = summary
        for name in MODELS:
            steps, figures = part[name]["steps"], summary[name]
            peak = f"{max(step['peak_bytes'] for step in steps) / 1e9:.1f} GB" if "peak_bytes" in steps[0] else "-"
            lines.append(
                f"| {kind} | {name} | {median_and_range(step['forward_backward_ms'] for step in steps)} | "
                f"{figures['tokens_per_second']:.0f} | {figures['share_of_limit']:.0%} | "
                f"{figures['projector_ms']:.1f} | {figures['projector_share']:.1%} | "
                f"{median_and_range(step['optimizer_ms'] for step in steps)} | {peak} | "
                f"{part[name]['trained_projector_bytes'] / 1e9:.2f} GB |"
            )
        low, high = min(summary["time_ratios"]), max(summary["time_ratios"])
        note = (
            f"{kind}: forward and backward per token {summary['time_ratio']:.3f} x LLaVA's, in pairs {low:.3f} to "
            f"{high:.3f}"
        )
        # Where the language model is tiny, the projector is most of the work
        if results.content["machine"]["size"] == "7b":
            kind_met = summary["time_ratio"] <= TIME_LIMIT
            met &= kind_met
            note += f", at most {TIME_LIMIT}: {'met' if kind_met else 'NOT MET'}"
        notes.append(note)
    for name in MODELS:
        count, tokens = operations[name]["operations"], operations[name]["tokens"]
        notes.append(
            f"{name}: {count / 1e12:.4g} TFLOP a step, {count / tokens / 1e9:.4g} GFLOP a token, which take "
            f"{count / rate * 1e3:.4g} ms at the measured {rate / 1e12:.4g} TFLOP/s of bfloat16 matrix products"
        )
    notes += [f"{name}: not measured, {reason}" for name, reason in missing.items()]
    copies, copies_met = report_copies(results["projector"])
    return "\n".join([*lines, "", *notes, copies]), met and copies_met


def report_copies(figures: dict[str, Any]) -> tuple[str, bool]:
    """The memory of the projector in a sentence, and whether the limit is met."""
    met = figures["excess"] <= COPY_LIMIT
    arms = figures["arms"]
    text = (
        f"a projector of {arms['frozen']['projector_bytes'] / 1e6:.0f} MB: at most "
        f"{arms['trained']['peak_bytes'] / 1e6:.0f} MB if it is trained and "
        f"{arms['frozen']['peak_bytes'] / 1e6:.0f} MB if it is frozen; less its gradients and optimizer states "
        f"{figures['excess']:.3f} x its size remain, at most {COPY_LIMIT}: {'met' if met else 'NOT MET'}"
    )
    return text, met


def check_memory(size: Size, device: torch.device) -> None:
    """Stop with a message if a GPU has no room for both models and a step."""
    if device.type != "cuda":
        return
    meta = torch.device("meta")
    resident = 0.0
    for name in MODELS:
        with meta:
            model = prepare_lora(make_model(name, size.config, meta, torch.bfloat16), r=size.lora_rank)
        counts = count_memory(model)
        print(f"{name}: {sum(counts.values()) / 1e9:.1f} GB with gradients, without activations")
        resident += sum(counts.values())
    memory = torch.cuda.get_device_properties(device).total_memory
    if resident > RESIDENT_LIMIT * memory:
        sys.exit(
            f"Both models take {resident / 1e9:.1f} GB before a step, and {torch.cuda.get_device_name(device)} has "
            f"{memory / 1e9:.1f} GB, of which a step needs {1 - RESIDENT_LIMIT:.0%}: take a GPU with more memory."
        )


def measure_run(arguments: argparse.Namespace) -> bool:
    """Measure all parts, and print and write what comes out; returns whether the limits are met."""
    device = torch.device(arguments.device)
    if arguments.size == "7b" and device.type != "cuda":
        sys.exit("The 7B shapes need a CUDA device: pass --device cuda where there is one, or --size small.")
    size = SIZES[arguments.size]()
    kinds, missing = attention_kinds(device)
    machine = {
        **describe_machine(),
        **describe_device(device),
        "peft": peft.__version__,
        "size": arguments.size,
        "repeats": arguments.repeats,
    }
    path = arguments.output / "train_step.json" if arguments.output else None
    results = Results(path, machine, ("peft", "size", "repeats"))
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    parts = ["matrix products", "projector", "operations", *(f"steps, {kind}" for kind in kinds)]
    print(f"parts: {'; '.join(parts)}")
    print("\n".join(f"{name}: not measured, {reason}" for name, reason in missing.items()), flush=True)
    check_memory(size, device)

    results.add("matrix products", lambda: measure_matrix_products(size.matrix_size, device))
    results.add("projector", lambda: measure_projector_copies(device))
    if any(part not in results for part in parts):
        start = time.perf_counter()
        arms = {name: Arm(name, size, device) for name in MODELS}
        synchronize(device)
        print(f"made both models in {time.perf_counter() - start:.1f} s", flush=True)
        results.add("operations", lambda: {name: count_operations(arm) for name, arm in arms.items()})
        rate = EXPECTED_EFFICIENCY * results["matrix products"]["operations_per_second"]
        seconds = sum(results["operations"][name]["operations"] for name in MODELS) / rate
        seconds *= arguments.warmup + arguments.repeats
        print(f"expected: {seconds:.0f} s for each kind of attention, {seconds * len(kinds):.0f} s in all", flush=True)
        for kind in kinds:
            results.add(
                f"steps, {kind}", partial(measure_steps, arms, kind, arguments.warmup, arguments.repeats, kind)
            )

    text, met = report(results, kinds, missing)
    print(f"\n{text}")
    results.write()
    if arguments.output:
        described = "\n".join(f"- {key}: {value}" for key, value in results.content["machine"].items())
        (arguments.output / "train_step.md").write_text(f"{described}\n\n{text}\n")
    if arguments.plot:
        rows = {kind: {"LLaVA-SP": results[f"steps, {kind}"]["summary"]["time_ratios"]} for kind in kinds}
        panels = {"forward and backward per token over LLaVA's": rows}
        plot_ratios(arguments.output / "train_step.png", panels)
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what",
        nargs="?",
        choices=("steps", "projector", "memory"),
        default="steps",
        help="steps (with the projector's memory), the projector's memory alone, or what is computed (default: steps)",
    )
    parser.add_argument("--size", choices=list(SIZES), default="7b", help="of the models (default: 7b)")
    add_output_arguments(parser, "train_step")
    parser.add_argument("--repeats", type=int, default=10, help="measured steps of each model (default: 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--arm", choices=("trained", "frozen"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.warmup < 1:
        parser.error("--repeats and --warmup must be 1 or more")
    check_output_arguments(parser, arguments)
    if arguments.arm:
        run_projector_process(arguments.arm)
        return
    if arguments.what != "steps" and (arguments.output or arguments.plot):
        parser.error("--output and --plot are for steps")
    if arguments.what == "memory":
        print_memory(arguments)
        return
    if arguments.what == "projector":
        text, met = report_copies(measure_projector_copies(torch.device(arguments.device)))
        print(text)
    else:
        met = measure_run(arguments)
    if not met:
        sys.exit(1)


if __name__ == "__main__":
    main()
