"""
Several questions at once, each to a conversation of its own, as one batch through `generate`.

    python examples/batch.py
    python examples/batch.py llava-sp-cropping-7b --image photo.jpg --question "What is it?" --question "Where?"
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_llava_sp import tiny_model_path


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default=tiny_model_path(), help="a folder or a Hub id")
parser.add_argument("--image", default=str(Path(__file__).with_name("shapes.png")), help="a file or a URL")
parser.add_argument("--question", action="append", help="repeat for more")
arguments = parser.parse_args()
questions = arguments.question or [
    "What colour is the circle?",
    "How many objects are there?",
    "Where is the blue square?",
    "Is there a purple cross?",
]

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(arguments.model).to(device)
processor = AutoProcessor.from_pretrained(arguments.model)
conversations = [
    [{"role": "user", "content": [{"type": "image", "image": arguments.image}, {"type": "text", "text": question}]}]
    for question in questions
]
inputs = processor.apply_chat_template(
    conversations,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
    processor_kwargs={"padding": True},
).to(model.device, model.dtype)
with torch.inference_mode():
    outputs = model.generate(**inputs, do_sample=False, max_new_tokens=64)
answers = processor.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
for question, answer in zip(questions, answers, strict=True):
    print(f"{question} {answer.strip()}")
