"""
A first look: a trained LLaVA-SP of a few megabytes, which comes with the package, answers three questions about a
picture that it has never seen.

    make demo           the picture of seed 0
    make demo SEED=7    another one

Writes the picture, and what the six spatial tokens read of it and attend to, to build/demo.

    python examples/tiny/demo.py --seeds 50

counts instead how many of its answers are right over the pictures of fifty seeds.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from random import Random

from evaluate import answer_all, load
from PIL import Image
from scenes import SEEDS, Question, Scene, draw, make_scene
from transformers import pipeline

from transformers_llava_sp import tiny_model_path
from transformers_llava_sp.visualization import draw as draw_explanation
from transformers_llava_sp.visualization import explain, require_matplotlib, save_figure


OUTPUT = Path("build", "demo")
NUM_QUESTIONS = 3
COLUMNS = 48  # of the picture in the terminal


def kinds_of(scene: Scene) -> list[str]:
    """The kinds of questions about a scene, without captions."""
    return sorted({question.kind for question in scene.questions} - {"caption"})


def make_demo(seed: int) -> tuple[Scene, Image.Image, list[Question]]:
    """A scene of the split `test` and of this seed, its picture, and questions of different kinds."""
    # A few scenes have too much twice to be asked so much about
    scenes = (make_scene("test", number, seed) for number in count())
    scene = next(scene for scene in scenes if len(kinds_of(scene)) >= NUM_QUESTIONS)
    kinds = Random(seed).sample(kinds_of(scene), NUM_QUESTIONS)
    questions = [next(question for question in scene.questions if question.kind == kind) for kind in kinds]
    return scene, draw(scene).convert("RGB"), questions


def to_terminal(image: Image.Image, true_colour: bool = True, columns: int = COLUMNS) -> str:
    """
    A square picture in text: two pixels in each character, one above the other, by ANSI colours.

    Args:
        image (`PIL.Image.Image`): The picture.
        true_colour (`bool`, *optional*, defaults to `True`): Whether the terminal has 24-bit colours, or 256.
        columns (`int`, *optional*, defaults to 48): Its width in characters, an even number.
    """
    pixels = image.resize((columns, columns), Image.Resampling.BOX).load()

    def colour(pixel: tuple[int, int, int]) -> str:
        if true_colour:
            return "2;" + ";".join(map(str, pixel))
        red, green, blue = (round(channel / 51) for channel in pixel)
        return f"5;{16 + 36 * red + 6 * green + blue}"

    rows = []
    for row in range(0, columns, 2):
        cells = (
            f"\033[38;{colour(pixels[column, row])};48;{colour(pixels[column, row + 1])}m▀"
            for column in range(columns)
        )
        rows.append("".join(cells) + "\033[0m")
    return "\n".join(rows)


def print_picture(image: Image.Image) -> None:
    """Draw a picture in the terminal, if there is one that can."""
    true_colour = os.environ.get("COLORTERM") in ("truecolor", "24bit") or "WT_SESSION" in os.environ
    coloured = true_colour or "256color" in os.environ.get("TERM", "")
    if sys.stdout.isatty() and coloured and sys.stdout.encoding.lower().startswith("utf"):
        print(to_terminal(image, true_colour))


def show(variant: str, seed: int) -> None:
    """Ask about the picture of a seed, and draw what the spatial tokens see."""
    require_matplotlib()
    _, image, questions = make_demo(seed)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    image.save(OUTPUT / "scene.png")
    pipe = pipeline("image-text-to-text", model=tiny_model_path(variant))
    print(f"tiny-{variant}, {pipe.model.num_parameters():,} parameters. The picture of seed {seed}:")
    print_picture(image)
    for question in questions:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question.text}]
        messages = [{"role": "user", "content": content}]
        [result] = pipe(messages, return_full_text=False, max_new_tokens=32)
        answer = result["generated_text"].strip()
        verdict = "right" if answer == question.answer else f"wrong: {question.answer}"
        print(f"{question.text} {answer}. ({verdict})")
    explanation = explain(pipe.model, pipe.processor, image, questions[0].text)
    save_figure(draw_explanation(explanation), OUTPUT / "attention.png")
    print(f"The picture: {OUTPUT / 'scene.png'}")
    print(f"What the spatial tokens read and attend to: {OUTPUT / 'attention.png'}")


def count_right(variant: str, seeds: Sequence[int]) -> float:
    """The share of the demo's questions that are answered right over the pictures of some seeds."""
    asked = [
        (image, question) for seed in seeds for _, image, questions in [make_demo(seed)] for question in questions
    ]
    images, questions = zip(*asked, strict=True)
    answers = answer_all(*load(tiny_model_path(variant)), questions, images)
    right = sum(answer == question.answer for answer, question in zip(answers, questions, strict=True))
    share = right / len(questions)
    print(f"tiny-{variant}: {right} of {len(questions)} right ({share:.1%}), seeds {seeds[0]} to {seeds[-1]}")
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="cropping", choices=("cropping", "pooling"))
    parser.add_argument("--seed", type=int, default=0, help=f"from 0 to {SEEDS - 1}")
    parser.add_argument("--seeds", type=int, metavar="N", help="ask about so many pictures, from this seed on")
    arguments = parser.parse_args()
    if not 0 <= arguments.seed < arguments.seed + (arguments.seeds or 1) <= SEEDS or arguments.seeds == 0:
        parser.error(f"there are the seeds 0 to {SEEDS - 1}, of which at least one is needed")
    if arguments.seeds is not None:
        count_right(arguments.variant, range(arguments.seed, arguments.seed + arguments.seeds))
        return
    start = time.perf_counter()
    show(arguments.variant, arguments.seed)
    print(f"Loading, answering and drawing took {time.perf_counter() - start:.1f} s.")


if __name__ == "__main__":
    main()
