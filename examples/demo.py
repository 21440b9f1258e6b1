"""
From the authors' checkpoint format to an answer, with a miniature that is in this repository.

    make demo

Converts tests/fixtures/mini-cropping, asks it about a bundled photo through Transformers' pipeline and compares the
answer, token by token, with what the authors' own code generates from the same checkpoint. The miniature has random
weights: its words mean nothing, but each of its tokens depends on every step from the photo's pixels on.
"""

import json
import shutil
import sys
import time
from pathlib import Path

from safetensors.torch import load_file
from transformers import pipeline

import transformers_llava_sp  # noqa: F401  registers LLaVA-SP with Transformers
from transformers_llava_sp.conversion import convert_checkpoint


start = time.perf_counter()
repository = Path(__file__).resolve().parent.parent
fixture = repository / "tests" / "fixtures" / "mini-cropping"
output = repository / "build" / "demo" / "mini-cropping"
shutil.rmtree(output, ignore_errors=True)

print(f"Converting {fixture.relative_to(repository)} to {output.relative_to(repository)}")
convert_checkpoint(
    fixture / "release", output, base_model=fixture / "base", vision_tower=fixture / "vision", dtype="float32"
)

sample = json.loads((fixture / "golden" / "prompts.json").read_text())["single"]
photo = fixture / "golden" / f"{sample['images'][0]}.png"
question = sample["prompt"].split("<image>\n")[1].removesuffix(" ASSISTANT:")
authors_ids = load_file(fixture / "golden" / "golden.safetensors")["single.generated_ids"].tolist()

pipe = pipeline("image-text-to-text", model=str(output))
messages = [
    {"role": "user", "content": [{"type": "image", "path": str(photo)}, {"type": "text", "text": question}]},
]
(result,) = pipe(
    messages, return_tensors=True, generate_kwargs={"do_sample": False, "max_new_tokens": len(authors_ids)}
)
ids = result["generated_token_ids"].tolist()[-len(authors_ids) :]

print(f"Photo:    {photo.relative_to(repository)}")
print(f"Question: {question}")
print(f"Answer:   {pipe.tokenizer.decode(ids, skip_special_tokens=True)!r}")
print("          (a miniature with random weights: the words mean nothing)")
print(f"Tokens:   {ids}")
if ids != authors_ids:
    print(f"Authors:  {authors_ids}")
    sys.exit("The answer differs from the authors' output.")
print(f"Equal to the authors' output, token by token: all {len(ids)} tokens.")
print(f"Converting, loading and answering took {time.perf_counter() - start:.1f} s.")
