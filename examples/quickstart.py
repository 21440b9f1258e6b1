"""
One question about one picture, through Transformers' pipeline.

    python examples/quickstart.py
    python examples/quickstart.py llava-sp-cropping-7b --image photo.jpg --question "What is shown in this image?"
"""

import argparse
from pathlib import Path

from transformers import pipeline

from transformers_llava_sp import tiny_model_path


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default=tiny_model_path(), help="a folder or a Hub id")
parser.add_argument("--image", default=str(Path(__file__).with_name("shapes.png")), help="a file or a URL")
parser.add_argument("--question", default="Describe the image.")
arguments = parser.parse_args()

pipe = pipeline("image-text-to-text", model=arguments.model)
content = [{"type": "image", "image": arguments.image}, {"type": "text", "text": arguments.question}]
[result] = pipe([{"role": "user", "content": content}], max_new_tokens=64, return_full_text=False)
print(result["generated_text"].strip())
