"""
How many questions about scenes a model answers right, for each kind of question.

    python examples/tiny/evaluate.py tiny-cropping --split test
    python examples/tiny/evaluate.py work/model --split held_out --output held_out.json

The blind baseline does not look: it gives the most frequent answer that this very question has in the training scenes
or, if it has none there, the most frequent one to its kind of question. An answer is right if it is the same text.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from scenes import QUESTIONS, SPLITS, Question, draw, make_scene
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_llava_sp.conversion.checkpoint import find_model_type
from transformers_llava_sp.tiny_models import resolve_model_name


@dataclass(frozen=True)
class Score:
    """
    How many questions of one kind are answered right.

    Args:
        kind (`str`): The kind of question.
        number (`int`): How many there are.
        blind (`float`): The share that the blind baseline answers right.
        exact_match (`float`): The share that the model answers right.
    """

    kind: str
    number: int
    blind: float
    exact_match: float


class BlindBaseline:
    """
    Answers without seeing the scene.

    Args:
        questions (`Iterable[Question]`): What it knows: questions with their answers.
    """

    def __init__(self, questions: Iterable[Question]):
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for question in questions:
            # Counted under the question's text and its kind, of which none is the other
            counts[question.text][question.answer] += 1
            counts[question.kind][question.answer] += 1
        self.answers = {known: answers.most_common(1)[0][0] for known, answers in counts.items()}

    def answer(self, question: Question) -> str | None:
        """Its answer, or `None` to a kind of question that it does not know."""
        return self.answers.get(question.text, self.answers.get(question.kind))


def training_questions(scenes: int, seed: int = 0) -> list[Question]:
    """
    The questions of the training scenes, which need not be drawn for it.

    Args:
        scenes (`int`): How many scenes.
        seed (`int`, *optional*, defaults to 0): The seed of the scenes.
    """
    numbers = tqdm(range(scenes), desc="Reading the training answers", unit="scene")
    return [question for number in numbers for question in make_scene("train", number, seed).questions]


@torch.inference_mode()
def answer_all(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    images: Sequence[Image.Image],
    batch_size: int = 128,
    description: str = "Answering",
) -> list[str]:
    """
    A model's answers, each to a conversation of one question about one image, by greedy decoding.

    Args:
        model (`PreTrainedModel`): The model, in evaluation mode.
        processor (`ProcessorMixin`): Its processor.
        questions (`Sequence[Question]`): The questions. Their own answers only tell how long an answer may get: one
            token more than the longest to this kind of question, so that an answer that goes on is wrong.
        images (`Sequence[PIL.Image.Image]`): The image of each.
        batch_size (`int`, *optional*, defaults to 128): How many questions are answered at once.
        description (`str`, *optional*, defaults to `"Answering"`): What stands beside the progress bar.

    Returns:
        `list[str]`: The answer to each.
    """
    # The ends of all questions must be together where the answers begin
    processor.tokenizer.padding_side = "left"
    longest: Counter[str] = Counter()
    for question in questions:
        length = len(processor.tokenizer(question.answer, add_special_tokens=False).input_ids)
        longest[question.kind] = max(longest[question.kind], length)

    answers = [""] * len(questions)
    # Answers to one kind of question are about as long as each other: a batch lasts as long as its longest
    by_kind = sorted(range(len(questions)), key=lambda index: (questions[index].kind, len(questions[index].text)))
    with tqdm(total=len(questions), desc=description, unit="question") as bar:
        for start in range(0, len(by_kind), batch_size):
            batch = by_kind[start : start + batch_size]
            conversations = [
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": images[index]},
                            {"type": "text", "text": questions[index].text},
                        ],
                    }
                ]
                for index in batch
            ]
            inputs = processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            ).to(model.device)
            max_new_tokens = max(longest[questions[index].kind] for index in batch) + 1
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            new_ids = ids[:, inputs["input_ids"].shape[1] :]
            for index, answer_ids in zip(batch, new_ids, strict=True):
                # The same whatever else is in the batch
                answer_ids = answer_ids[: longest[questions[index].kind] + 1]
                answers[index] = processor.decode(answer_ids, skip_special_tokens=True).strip()
            bar.update(len(batch))
    return answers


def score(questions: Sequence[Question], answers: Sequence[str], baseline: BlindBaseline) -> list[Score]:
    """
    The share of right answers to each kind of question that there is, in the order of `QUESTIONS`.

    Args:
        questions (`Sequence[Question]`): The questions.
        answers (`Sequence[str]`): The model's answer to each.
        baseline ([`BlindBaseline`]): What the model's answers are compared with.
    """
    scores = []
    for kind in QUESTIONS:
        asked = [
            (question, answer) for question, answer in zip(questions, answers, strict=True) if question.kind == kind
        ]
        if asked:
            right = sum(answer == question.answer for question, answer in asked)
            blind = sum(baseline.answer(question) == question.answer for question, _ in asked)
            scores.append(Score(kind, len(asked), blind / len(asked), right / len(asked)))
    return scores


def average(scores: Sequence[Score]) -> Score:
    """The mean over the kinds of questions, each counting the same, without captions."""
    short = [kind for kind in scores if kind.kind != "caption"]
    return Score(
        "mean, without captions",
        sum(kind.number for kind in short),
        sum(kind.blind for kind in short) / len(short),
        sum(kind.exact_match for kind in short) / len(short),
    )


def load(name: str | Path, device: str = "cpu") -> tuple[Any, Any]:
    """A model, in float32 and evaluation mode, and its processor, of a folder, a Hub id or a tiny model's name."""
    name = resolve_model_name(str(name))
    find_model_type(name)  # says what there is not more plainly than Transformers does
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32)
    return model.to(device).eval(), AutoProcessor.from_pretrained(name)


def evaluate(
    model: Any,
    processor: Any,
    split: str,
    baseline: BlindBaseline,
    scenes: int = 500,
    seed: int = 0,
    batch_size: int = 128,
) -> tuple[list[Score], list[dict[str, Any]]]:
    """
    Ask a model every question about the scenes of a split.

    Args:
        model (`PreTrainedModel`): The model, in evaluation mode.
        processor (`ProcessorMixin`): Its processor.
        split (`str`): A key of `SPLITS`.
        baseline ([`BlindBaseline`]): What the model's answers are compared with.
        scenes (`int`, *optional*, defaults to 500): How many scenes.
        seed (`int`, *optional*, defaults to 0): The seed of those scenes.
        batch_size (`int`, *optional*, defaults to 128): How many questions are answered at once.

    Returns:
        `tuple[list[Score], list[dict[str, Any]]]`: The score of each kind of question, and each question with its
        scene and answers.
    """
    asked = []
    for number in range(scenes):
        scene = make_scene(split, number, seed)
        picture = draw(scene).convert("RGB")
        asked += [(scene.name, picture, question) for question in scene.questions]
    names, images, questions = zip(*asked, strict=True)
    answers = answer_all(model, processor, questions, images, batch_size, f"Answering {split}")
    rows = [
        {
            "scene": name,
            "kind": question.kind,
            "question": question.text,
            "right": question.answer,
            "blind": baseline.answer(question),
            "answer": answer,
        }
        for name, question, answer in zip(names, questions, answers, strict=True)
    ]
    return score(questions, answers, baseline), rows


def to_markdown(scores: Sequence[Score]) -> str:
    """A table of the scores, and of their mean in its last row."""
    lines = ["| question | number | blind baseline | exact match |", "|---|---:|---:|---:|"]
    for row in (*scores, average(scores)):
        lines.append(f"| {row.kind} | {row.number} | {row.blind:.1%} | {row.exact_match:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model or an adapter: a folder, a Hub id, tiny-cropping or tiny-pooling")
    parser.add_argument("--split", default="test", choices=[split for split in SPLITS if split != "train"])
    parser.add_argument("--scenes", type=int, default=500, help="how many scenes to ask about")
    parser.add_argument("--seed", type=int, default=0, help="the seed of those scenes")
    parser.add_argument("--training-scenes", type=int, default=160_000, help="how many the blind baseline knows")
    parser.add_argument("--training-seed", type=int, default=0, help="the seed of the training scenes")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="a JSON file to write each question and answer to")
    arguments = parser.parse_args()

    if arguments.scenes < 1:
        parser.error("--scenes must be 1 or more")
    if arguments.output and not arguments.output.parent.is_dir():
        parser.error(f"there is no folder {arguments.output.parent} to write to")
    try:
        loaded = load(arguments.model, arguments.device)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    baseline = BlindBaseline(training_questions(arguments.training_scenes, arguments.training_seed))
    scores, rows = evaluate(
        *loaded,
        split=arguments.split,
        scenes=arguments.scenes,
        seed=arguments.seed,
        baseline=baseline,
        batch_size=arguments.batch_size,
    )
    print(to_markdown(scores))
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1))
