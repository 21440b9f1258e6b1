"""
An answer as it comes: `generate` runs in a thread, and its words arrive one after the other.

    python examples/streaming.py
    python examples/streaming.py llava-sp-cropping-7b --image photo.jpg --question "Describe the image in detail."
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer

from transformers_llava_sp import tiny_model_path


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default=tiny_model_path(), help="a folder or a Hub id")
parser.add_argument("--image", default=str(Path(__file__).with_name("shapes.png")), help="a file or a URL")
parser.add_argument("--question", default="Describe the image.")
arguments = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(arguments.model).to(device)
processor = AutoProcessor.from_pretrained(arguments.model)
content = [{"type": "image", "image": arguments.image}, {"type": "text", "text": arguments.question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)


def answer() -> None:
    try:
        model.generate(**inputs, do_sample=False, max_new_tokens=256, streamer=streamer)
    finally:
        streamer.end()  # or the loop below would wait for ever after an error


with ThreadPoolExecutor() as executor:
    generation = executor.submit(answer)
    for words in streamer:
        print(words, end="", flush=True)
    print()
    generation.result()  # raises what went wrong
