"""
How large a LLaVA-SP model is: parameters by part, and bytes of weights and of cache by number format.

    python examples/model_size.py          # the released LLaVA-SP-Cropping 7B
    python examples/model_size.py MODEL    # any converted model: a folder or a Hub id

Everything follows from the configuration; no weights are loaded.
"""

import argparse

import torch

from transformers_llava_sp import LlavaSPConfig, LlavaSPForConditionalGeneration


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", help="a folder or a Hub id")
arguments = parser.parse_args()
config = LlavaSPConfig.from_pretrained(arguments.model) if arguments.model else LlavaSPConfig()
with torch.device("meta"):
    model = LlavaSPForConditionalGeneration(config)


def count(*modules: torch.nn.Module) -> int:
    # Embeddings may be the head, too
    parameters = {parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() for parameter in parameters)


projector = model.model.multi_modal_projector
language_model = model.model.language_model
parts = {
    "vision tower": count(model.model.vision_tower),
    "Spatial Feature Extractor": count(projector.spatial_feature_extractor),
    "Detail Feature Integrator": count(projector.detail_feature_integrator)
    if config.projector_config.use_detail_integrator
    else 0,
    "spatial projection": count(projector.spatial_projection),
    "patch MLP": count(projector.patch_mlp),
    "language model and head": count(language_model, model.lm_head),
}
if config.image_grid_pinpoints is not None:
    parts["image separator"] = count(model.model.image_newline)
total = sum(parts.values())
assert total == count(model), "a part is missing from the list"

print("| part | parameters |")
print("|---|---:|")
for name, parameters in parts.items():
    print(f"| {name} | {parameters:,} |")
print(f"| **together** | **{total:,}** |")

text_config = config.text_config
key_value_numbers = (
    2 * text_config.num_hidden_layers * text_config.num_key_value_heads * language_model.layers[0].self_attn.head_dim
)
num_image_tokens = config.projector_config.num_image_tokens
# bitsandbytes turns the linear layers of the language model's blocks into 4 bits per weight and one float32 scale per
# 64 weights, and leaves the rest in 16 bits
quantized = count(*(module for module in language_model.modules() if isinstance(module, torch.nn.Linear)))
weights = {
    "float32": 4 * total,
    "bfloat16, float16": 2 * total,
    "4 bits (bitsandbytes)": quantized * (4 + 32 / 64) / 8 + 2 * (total - quantized),
}

print()
print(f"| number format | weights | cache for one image ({num_image_tokens} tokens) | cache for 4096 tokens |")
print("|---|---:|---:|---:|")
for name, size in weights.items():
    cache_per_token = key_value_numbers * (4 if name == "float32" else 2)
    print(
        f"| {name} | {size / 1e9:.1f} GB | {cache_per_token * num_image_tokens / 1e9:.2f} GB | "
        f"{cache_per_token * 4096 / 1e9:.1f} GB |"
    )
