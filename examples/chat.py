"""
A conversation of several turns about a picture, which is encoded in the first turn only: the key-value cache is kept.

    python examples/chat.py
    python examples/chat.py llava-sp-cropping-7b --image photo.jpg --question "What is it?" --question "And behind?"
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from transformers_llava_sp import tiny_model_path


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default=tiny_model_path(), help="a folder or a Hub id")
parser.add_argument("--image", default=str(Path(__file__).with_name("shapes.png")), help="a file or a URL")
parser.add_argument("--question", action="append", help="the turns, one after the other")
arguments = parser.parse_args()
questions = arguments.question or ["How many objects are there?", "Where is the circle?", "Describe the image."]

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(arguments.model).to(device)
processor = AutoProcessor.from_pretrained(arguments.model)
read = None
messages = []
for question in questions:
    image = [] if messages else [{"type": "image", "image": arguments.image}]
    messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device, model.dtype)
    # The cache has all that has been read, the picture included, and the answers. Where an answer becomes other tokens
    # as a text than those it was made of, everything is read again
    if read is not None and torch.equal(inputs["input_ids"][:, : read.shape[1]], read):
        del inputs["pixel_values"]
    else:
        cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        outputs = model.generate(**inputs, cache=cache, do_sample=False, max_new_tokens=64)
    read = outputs[:, : cache.get_seq_length()]
    answer = processor.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    print(f"{question} {answer}")
