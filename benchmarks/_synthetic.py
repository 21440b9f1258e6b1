"""
Synthetic checkpoints with the shapes of the released LLaVA-SP-Cropping-7B: a LoRA release, its base model, and its
vision tower, in the files that the authors, lmsys and OpenAI ship, but in float16 throughout.
"""

import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.serialization import set_default_mmap_options, skip_data
from tqdm import tqdm


# Configurations and tokenizers are those of this miniature of a release, with the sizes below
PATTERN = Path(__file__).parents[1] / "tests" / "fixtures" / "mini-cropping"
VOCABULARY_SIZE = 32000
TEXT_HIDDEN_SIZE = 4096
TEXT_INTERMEDIATE_SIZE = 11008
TEXT_HEADS = 32
LORA_RANK = 128
LORA_ALPHA = 256
VISION_HIDDEN_SIZE = 1024
SPATIAL_HIDDEN_SIZE = 512
SPATIAL_SCALES = (4, 8, 12, 16, 20, 24)
DETAIL_KERNEL_SIZE = 16
# (out_features, in_features) of the linear layers that LoRA adapts
ADAPTED_LAYERS = {
    "self_attn.q_proj": (TEXT_HIDDEN_SIZE, TEXT_HIDDEN_SIZE),
    "self_attn.k_proj": (TEXT_HIDDEN_SIZE, TEXT_HIDDEN_SIZE),
    "self_attn.v_proj": (TEXT_HIDDEN_SIZE, TEXT_HIDDEN_SIZE),
    "self_attn.o_proj": (TEXT_HIDDEN_SIZE, TEXT_HIDDEN_SIZE),
    "mlp.gate_proj": (TEXT_INTERMEDIATE_SIZE, TEXT_HIDDEN_SIZE),
    "mlp.up_proj": (TEXT_INTERMEDIATE_SIZE, TEXT_HIDDEN_SIZE),
    "mlp.down_proj": (TEXT_HIDDEN_SIZE, TEXT_INTERMEDIATE_SIZE),
}
CLIP_CONFIG: dict[str, Any] = {
    "projection_dim": 768,
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
        "vocab_size": 49408,
    },
    "vision_config": {
        "hidden_size": VISION_HIDDEN_SIZE,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "projection_dim": 768,
    },
}
CLIP_POSITIONS = {"text_config": 77, "vision_config": 577}
PATCH_SIZE = 14

BASE_SHARD_SIZE = 10 * 10**9  # bytes

Shapes = dict[str, tuple[int, ...]]


def language_model_shapes(layers: int) -> Shapes:
    """The tensors of Vicuna-7B with `layers` layers, in the order in which its shards hold them."""
    shapes: Shapes = {"model.embed_tokens.weight": (VOCABULARY_SIZE, TEXT_HIDDEN_SIZE)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in ADAPTED_LAYERS.items()}
        shapes[f"{prefix}self_attn.rotary_emb.inv_freq"] = (TEXT_HIDDEN_SIZE // TEXT_HEADS // 2,)
        shapes[f"{prefix}input_layernorm.weight"] = (TEXT_HIDDEN_SIZE,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (TEXT_HIDDEN_SIZE,)
    shapes["model.norm.weight"] = (TEXT_HIDDEN_SIZE,)
    shapes["lm_head.weight"] = (VOCABULARY_SIZE, TEXT_HIDDEN_SIZE)
    return shapes


def adapter_shapes(layers: int) -> Shapes:
    """The tensors of the release's LoRA adapter."""
    shapes: Shapes = {}
    for layer in range(layers):
        for name, (out_features, in_features) in ADAPTED_LAYERS.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            shapes[f"{prefix}.lora_A.weight"] = (LORA_RANK, in_features)
            shapes[f"{prefix}.lora_B.weight"] = (out_features, LORA_RANK)
    return shapes


def projector_shapes() -> Shapes:
    """The tensors of the projector of LLaVA-SP-Cropping: 0.9 billion parameters."""
    hidden = SPATIAL_HIDDEN_SIZE
    shapes: Shapes = {
        "conv_linear.1.weight": (TEXT_HIDDEN_SIZE, 2 * hidden),
        "conv_linear.1.bias": (TEXT_HIDDEN_SIZE,),
    }
    for name in ("query_projector", "key_projector", "value_projector"):
        shapes |= {f"{name}.0.weight": (hidden,), f"{name}.0.bias": (hidden,)}
        shapes |= {f"{name}.1.weight": (hidden, hidden), f"{name}.1.bias": (hidden,)}
    for scale in SPATIAL_SCALES:
        shapes[f"conv_{scale}.weight"] = (hidden, VISION_HIDDEN_SIZE, scale, scale)
    shapes["conv_CM.weight"] = (hidden, VISION_HIDDEN_SIZE, DETAIL_KERNEL_SIZE, DETAIL_KERNEL_SIZE)
    for position, in_features in ((0, VISION_HIDDEN_SIZE), (2, TEXT_HIDDEN_SIZE)):
        shapes[f"mm_projector.{position}.weight"] = (TEXT_HIDDEN_SIZE, in_features)
        shapes[f"mm_projector.{position}.bias"] = (TEXT_HIDDEN_SIZE,)
    return {f"base_model.model.model.{name}": shape for name, shape in shapes.items()}


def tower_shapes() -> Shapes:
    """The tensors of CLIP-ViT-L/14-336, both its halves."""
    shapes: Shapes = {"logit_scale": ()}
    for half in ("text", "vision"):
        config = CLIP_CONFIG[f"{half}_config"]
        hidden, intermediate = config["hidden_size"], config["intermediate_size"]
        prefix = f"{half}_model."
        shapes[f"{prefix}embeddings.position_embedding.weight"] = (CLIP_POSITIONS[f"{half}_config"], hidden)
        if half == "text":
            shapes[f"{prefix}embeddings.token_embedding.weight"] = (config["vocab_size"], hidden)
            norms = ["final_layer_norm"]
        else:
            shapes[f"{prefix}embeddings.class_embedding"] = (hidden,)
            shapes[f"{prefix}embeddings.patch_embedding.weight"] = (hidden, 3, PATCH_SIZE, PATCH_SIZE)
            norms = ["pre_layrnorm", "post_layernorm"]  # the first is misspelt in every CLIP checkpoint
        matrices = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("k", "v", "q", "out")}
        matrices |= {"mlp.fc1": (intermediate, hidden), "mlp.fc2": (hidden, intermediate)}
        for layer in range(config["num_hidden_layers"]):
            block = f"encoder.layers.{layer}."
            norms += [f"{block}layer_norm1", f"{block}layer_norm2"]
            for name, shape in matrices.items():
                shapes[f"{prefix}{block}{name}.weight"] = shape
                shapes[f"{prefix}{block}{name}.bias"] = shape[:1]
        for name in norms:
            shapes |= {f"{prefix}{name}.weight": (hidden,), f"{prefix}{name}.bias": (hidden,)}
        shapes[f"{'text' if half == 'text' else 'visual'}_projection.weight"] = (CLIP_CONFIG["projection_dim"], hidden)
    return shapes


def count_bytes(shapes: Shapes) -> int:
    return sum(math.prod(shape) * torch.float16.itemsize for shape in shapes.values())


class RandomValues:
    """
    Fills tensors with random numbers of a size that trained weights have, each tensor with others.

    All of them are scaled parts of one block of random numbers, since drawing billions would take longer than
    converting them. They must not be zeros or holes in the files: those the file system neither stores nor reads, the
    kernel backs many of their pages by one, and then neither a copy nor a conversion would cost what it costs.
    """

    def __init__(self) -> None:
        # A length that no width divides, so that a matrix does not repeat its rows
        self.block = torch.empty(2**24 - 3, dtype=torch.float16).normal_(generator=torch.Generator().manual_seed(0))
        self.num_filled = 0

    def fill(self, tensor: torch.Tensor) -> None:
        """Fill a contiguous float16 tensor, in place."""
        # Keeps every product of a matrix and a vector of such numbers in the range of float16
        scale = math.prod(tensor.shape[1:]) ** -0.5
        start = self.num_filled * 1_000_003 % self.block.numel()
        self.num_filled += 1
        rest = tensor.view(-1)
        while rest.numel():
            part = self.block[start : start + rest.numel()]
            torch.mul(part, scale, out=rest[: part.numel()])
            rest, start = rest[part.numel() :], 0


def create_pytorch_file(path: Path, shapes: Shapes) -> dict[str, torch.Tensor]:
    """
    Create a file as `torch.save` writes it, and map it into memory for writing.

    The tensors' bytes go into the mapped file one tensor after the other, so that a shard of 10 GB needs no memory.
    Their checksums stay those of no bytes; PyTorch never looks at them.
    """
    # Never written to, so that they take no memory
    state = {name: torch.empty(shape, dtype=torch.float16) for name, shape in shapes.items()}
    with skip_data():
        torch.save(state, path)
    reserve(path, path.stat().st_size)
    with set_default_mmap_options(mmap.MAP_SHARED):
        return torch.load(path, mmap=True, weights_only=True)


def create_safetensors_file(path: Path, shapes: Shapes) -> dict[str, torch.Tensor]:
    """Create a safetensors file, and map it into memory for writing."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + count_bytes({name: shape})
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    offset = path.stat().st_size
    reserve(path, offset + end)
    content = torch.from_file(str(path), shared=True, size=offset + end, dtype=torch.uint8)
    tensors = {}
    for name, shape in shapes.items():
        start, end = (offset + position for position in header[name]["data_offsets"])
        tensors[name] = content[start:end].view(torch.float16).view(shape)
    return tensors


def reserve(path: Path, num_bytes: int) -> None:
    """Give a file its blocks on the disk: writing to a mapped file on a full one would kill this process."""
    with open(path, "rb+") as stream:
        os.posix_fallocate(stream.fileno(), 0, num_bytes)


def split_into_shards(shapes: Shapes) -> list[Shapes]:
    """Tensors, in their order, in shards of at most `BASE_SHARD_SIZE` bytes."""
    shards: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and count_bytes(shards[-1]) + count_bytes({name: shape}) > BASE_SHARD_SIZE:
            shards.append({})
        shards[-1][name] = shape
    return shards


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_configuration(name: str, folder: Path, changes: dict[str, dict[str, Any]]) -> None:
    """
    Copy everything but the weights of one folder of the miniature release.

    Args:
        name (`str`): The folder of the miniature.
        folder (`Path`): The folder to write, which is created.
        changes (`dict[str, dict[str, Any]]`): What to change in which JSON file, entries of objects inside it as well.
    """
    folder.mkdir()
    for file in (PATTERN / name).iterdir():
        if file.name == "tokenizer.model":
            write_tokenizer(file, folder / file.name)
        elif file.suffix == ".json" and not file.name.endswith(".index.json"):
            content = json.loads(file.read_text())
            for key, value in changes.get(file.name, {}).items():
                content[key] = {**content[key], **value} if isinstance(value, dict) else value
            write_json(folder / file.name, content)


def write_tokenizer(source: Path, target: Path) -> None:
    """
    Copy a sentencepiece model, with as many pieces as the language model has embeddings. With fewer, the image token
    would need no further embedding, and what it takes to append one to such large tensors would not be measured.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(source.read_bytes())
    lowest = min(piece.score for piece in model.pieces)
    for number in range(len(model.pieces), VOCABULARY_SIZE):
        # Characters for private use, which no text has
        model.pieces.add(piece=chr(0xF0000 + number), score=lowest - number)
    model.trainer_spec.vocab_size = VOCABULARY_SIZE
    target.write_bytes(model.SerializeToString())


@dataclass(frozen=True)
class Inputs:
    """
    The inputs of a conversion.

    Args:
        folder (`Path`): The folder that holds the three of them.
        layers (`int`): Layers of the language model.
    """

    folder: Path
    layers: int

    @property
    def release(self) -> Path:
        return self.folder / "release"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def tower(self) -> Path:
        return self.folder / "tower"

    @property
    def files(self) -> list[Path]:
        return list_files(self.folder)

    def write(self, file_format: str) -> None:
        """
        Make them.

        Args:
            file_format (`str`): `"bin"` or `"safetensors"`, of base model and vision tower. The release always has one
                of each.
        """
        text_sizes = {
            "hidden_size": TEXT_HIDDEN_SIZE,
            "intermediate_size": TEXT_INTERMEDIATE_SIZE,
            "num_attention_heads": TEXT_HEADS,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": TEXT_HEADS,
            "vocab_size": VOCABULARY_SIZE,
        }
        write_configuration(
            "release",
            self.release,
            {
                "config.json": {**text_sizes, "mm_hidden_size": VISION_HIDDEN_SIZE},
                "adapter_config.json": {"r": LORA_RANK, "lora_alpha": LORA_ALPHA},
            },
        )
        write_configuration("base", self.base, {"config.json": text_sizes})
        write_configuration("vision", self.tower, {"config.json": {**CLIP_CONFIG, "torch_dtype": "float16"}})

        files = {
            self.release / "adapter_model.safetensors": adapter_shapes(self.layers),
            self.release / "non_lora_trainables.bin": projector_shapes(),
        }
        stem, suffix = {"bin": ("pytorch_model", ".bin"), "safetensors": ("model", ".safetensors")}[file_format]
        files[self.tower / f"{stem}{suffix}"] = tower_shapes()
        shards = split_into_shards(language_model_shapes(self.layers))
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = self.base / f"{stem}-{number:05}-of-{len(shards):05}{suffix}"
            files[file] = shard
            weight_map |= dict.fromkeys(shard, file.name)
        total_size = sum(map(count_bytes, shards))
        write_json(
            self.base / f"{stem}{suffix}.index.json",
            {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))},
        )

        values = RandomValues()
        num_bytes = sum(map(count_bytes, files.values()))
        with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="writing the inputs", leave=False) as progress:
            for file, shapes in files.items():
                create = create_safetensors_file if file.suffix == ".safetensors" else create_pytorch_file
                for tensor in create(file, shapes).values():
                    values.fill(tensor)
                    progress.update(tensor.nbytes)


def list_files(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def estimate_input_bytes(layers: int) -> int:
    shapes = (language_model_shapes(layers), adapter_shapes(layers), projector_shapes(), tower_shapes())
    return sum(map(count_bytes, shapes))
