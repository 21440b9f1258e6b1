"""
An answer as it comes: `generate` runs in a thread, and its words arrive one after the other.

    python examples/streaming.py
    python examples/streaming.py llava-sp-cropping-7b --image photo.jpg --question "Describe the image in detail."
"""

import argparse
from pathlib import Path
from threading import Thread

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer

from transformers_llava_sp.tiny_models import resolve_model_name


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="tiny-cropping", help="a folder, a Hub id or a tiny model's name")
parser.add_argument("--image", default=str(Path(__file__).with_name("shapes.png")), help="a file or a URL")
parser.add_argument("--question", default="Describe the image.")
arguments = parser.parse_args()
model_name = resolve_model_name(arguments.model)

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(model_name).to(device)
processor = AutoProcessor.from_pretrained(model_name)
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


thread = Thread(target=answer)
thread.start()
for words in streamer:
    print(words, end="", flush=True)
print()
thread.join()
