"""
Training on a public data set, easy-VQA: pictures of one coloured shape, and questions about it. From the tiny model
that comes with the package, which has seen none of these pictures, and not all of these words:

    pip install ".[train]" && pip install --no-deps easy-vqa   # and for --load-in-4bit the extra quantization
    python examples/train_easy_vqa.py prepare work --model tiny-cropping
    python examples/train_easy_vqa.py evaluate tiny-cropping
    llava-sp train work/lora.yaml
    llava-sp merge work/adapter work/merged
    python examples/train_easy_vqa.py evaluate work/merged

And from nothing, the language model with random weights as well as the vision tower, which is not trained:

    python examples/train_easy_vqa.py prepare work
    llava-sp train work/full.yaml
    llava-sp train work/lora.yaml

`prepare` writes the data in LLaVA's format, and recipes: for all but the vision tower, and for LoRA. `evaluate`
prints, for each type of question, how many answers are right, beside the blind baseline: the most frequent answer that
the training data have to that question.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import easy_vqa
import torch
import yaml
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from transformers_llava_sp import LlavaSPForConditionalGeneration, LlavaSPProcessor, tiny_model_path
from transformers_llava_sp.tiny_models import resolve_model_name
from transformers_llava_sp.training.train import UNQUANTIZED_MODULES


IMAGES = Path(easy_vqa.__file__).parent / "data"
# Both recipes: a model this small neither needs 16 bits nor fills a GPU
COMMON = {
    "image_folder": str(IMAGES),
    "max_length": 512,
    "bf16": False,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "train_sampling_strategy": "group_by_length",
    "eval_strategy": "epoch",
    "eval_on_start": True,
    "logging_steps": 50,
    "save_strategy": "no",
    "report_to": "none",
}
COLOURS = ("black", "gray", "red", "green", "blue", "yellow", "teal", "brown")
SHAPES = ("circle", "rectangle", "triangle")


class Score(NamedTuple):
    """How many questions there are, and which shares of them the blind baseline and the model answer right."""

    number: int
    blind_baseline: float
    exact_match: float


def question_type(question: str, answer: str) -> str:
    """One of four: what is asked for, as a word or as yes or no."""
    if answer in COLOURS:
        return "colour"
    if answer in SHAPES:
        return "shape"
    return "colour, yes or no" if any(colour in question.split() for colour in COLOURS) else "shape, yes or no"


def write_conversations(file: Path, questions: list[str], answers: list[str], images: list[str]) -> None:
    """Write LLaVA's JSON: for each image, one conversation of all questions about it, in an order drawn by lot."""
    by_image = defaultdict(list)
    for question, answer, image in zip(questions, answers, images, strict=True):
        by_image[image].append((question, answer))
    records = []
    for image, turns in by_image.items():
        order = torch.randperm(len(turns)).tolist()
        conversation = []
        for position, index in enumerate(order):
            question, answer = turns[index]
            slot = "" if position else "<image>\n"
            conversation += [{"from": "human", "value": slot + question}, {"from": "gpt", "value": answer}]
        records.append({"id": image, "image": image, "conversations": conversation})
    file.write_text(json.dumps(records))


def write_recipes(folder: Path, model: str | None, seed: int) -> None:
    """Write what `llava-sp train` reads: for all but the vision tower, and for LoRA, on `model` or on the former."""
    common = {"train_data": str(folder / "train.json"), "eval_data": str(folder / "test.json"), **COMMON, "seed": seed}
    full = {
        "method": "full",
        "model_name_or_path": model or str(folder / "model"),
        "output_dir": str(folder / "trained"),
        "learning_rate": 2e-3,
        "num_train_epochs": 4,
    }
    lora = {
        "method": "lora",
        "lora_r": 16,
        "lora_alpha": 32,
        "model_name_or_path": model or str(folder / "trained"),
        "output_dir": str(folder / "adapter"),
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
    }
    for name, recipe in (("full", full), ("lora", lora)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **recipe}, sort_keys=False))


def prepare(folder: Path, model: str | None = None, spatial_variant: str | None = None, seed: int = 0) -> None:
    """Write the data, recipes and, unless there is a model to start from, a tiny one with random weights."""
    set_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_recipes(folder, model, seed)
    questions, answers, ids = easy_vqa.get_train_questions()
    write_conversations(folder / "train.json", questions, answers, [f"train/images/{number}.png" for number in ids])
    test_questions, test_answers, test_ids = easy_vqa.get_test_questions()
    test_images = [f"test/images/{number}.png" for number in test_ids]
    write_conversations(folder / "test.json", test_questions, test_answers, test_images)
    if model is None:
        make_model(folder, spatial_variant or "cropping")


def make_model(folder: Path, spatial_variant: str) -> None:
    """Write a model with random weights. Its tokenizer is that of the tiny models, which can spell any word."""
    vision_config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    CLIPVisionModel(vision_config).save_pretrained(folder / "tower")
    size = {"height": 64, "width": 64}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder / "tower")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    tokenizer.save_pretrained(folder / "language-model")
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(text_config).save_pretrained(folder / "language-model")
    parts = folder / "tower", folder / "language-model"
    # The paper's numbers are for a grid of 24 by 24 patches: this one has 8 by 8
    model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(
        *parts,
        spatial_variant=spatial_variant,
        spatial_scales=(2, 4, 6, 8),
        spatial_hidden_size=64,
        dtype=torch.float32,
    )
    model.save_pretrained(folder / "model")
    LlavaSPProcessor.from_vision_text_pretrained(*parts, model.config).save_pretrained(folder / "model")
    print(f"{folder / 'model'} has {model.num_parameters():,} parameters.")


@torch.no_grad()
def answer_all(
    name: str, questions: list[str], images: list[Path], load_in_4bit: bool = False, batch_size: int = 64
) -> list[str]:
    """A model's answers to questions, each about one image."""
    quantization = None
    if load_in_4bit:
        quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=UNQUANTIZED_MODULES)
    name = resolve_model_name(name)
    device_map = "cuda" if torch.cuda.is_available() else None
    model = AutoModelForImageTextToText.from_pretrained(
        name, quantization_config=quantization, device_map=device_map
    ).eval()
    processor = AutoProcessor.from_pretrained(name)
    found = []
    for start in tqdm(range(0, len(questions), batch_size), desc="Answering"):
        batch = zip(questions[start : start + batch_size], images[start : start + batch_size], strict=True)
        conversations = [
            [{"role": "user", "content": [{"type": "image", "path": str(image)}, {"type": "text", "text": question}]}]
            for question, image in batch
        ]
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        ids = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=8)
        found += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in found]


def score(
    name: str, kind: str | None = None, limit: int | None = None, load_in_4bit: bool = False
) -> tuple[dict[str, Score], list[str]]:
    """A model's answers to the test questions, of one kind if it is given, and how good they are for each kind."""
    counts = defaultdict(Counter)
    for question, answer, _ in zip(*easy_vqa.get_train_questions(), strict=True):
        counts[question][answer] += 1
    asked = [
        (question, answer, IMAGES / "test" / "images" / f"{number}.png")
        for question, answer, number in zip(*easy_vqa.get_test_questions(), strict=True)
        if kind in (None, question_type(question, answer))
    ][:limit]
    questions, answers, images = map(list, zip(*asked, strict=True))
    found = answer_all(name, questions, images, load_in_4bit)
    right, blind, total = Counter(), Counter(), Counter()
    for question, answer, ours in zip(questions, answers, found, strict=True):
        likeliest = max(counts[question], key=counts[question].get, default=None)
        for group in (question_type(question, answer), "all"):
            total[group] += 1
            right[group] += ours == answer
            blind[group] += likeliest == answer
    return {group: Score(n, blind[group] / n, right[group] / n) for group, n in sorted(total.items())}, found


def evaluate(name: str, load_in_4bit: bool, answers_file: Path | None, others: list[Path]) -> None:
    """Print the share of right answers to the test questions, for each type, and of answers that other runs gave."""
    num_questions = len(easy_vqa.get_test_questions()[0])
    answers = {other: json.loads(other.read_text()) for other in others}
    for other, theirs in answers.items():
        if len(theirs) != num_questions:
            raise SystemExit(f"{other} has {len(theirs)} answers, and there are {num_questions} questions.")
    if answers_file is not None and not answers_file.parent.is_dir():
        raise SystemExit(f"There is no folder {answers_file.parent} to write {answers_file.name} to.")
    scores, found = score(name, load_in_4bit=load_in_4bit)
    print("| questions | number | blind baseline | exact match |\n|---|---:|---:|---:|")
    for group, (number, blind_baseline, exact_match) in scores.items():
        print(f"| {group} | {number} | {blind_baseline:.1%} | {exact_match:.1%} |")
    for other, theirs in answers.items():
        equal = sum(one == another for one, another in zip(found, theirs, strict=True))
        print(f"{equal / len(found):.2%} of the answers are those in {other}.")
    if answers_file is not None:
        answers_file.write_text(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_parser = commands.add_parser("prepare", help="write the data, recipes and, from nothing, a model")
    prepare_parser.add_argument("folder", type=Path, help="the folder to write to")
    prepare_parser.add_argument("--model", help="a model to start from, such as tiny-cropping, and not from nothing")
    prepare_parser.add_argument("--spatial-variant", choices=("cropping", "pooling"), help="cropping if not given")
    prepare_parser.add_argument("--seed", type=int, default=0)
    evaluate_parser = commands.add_parser("evaluate", help="print a model's exact match for each type of question")
    evaluate_parser.add_argument("model", help="a model or an adapter: a folder, or tiny-cropping")
    evaluate_parser.add_argument("--load-in-4bit", action="store_true", help="quantize the language model")
    evaluate_parser.add_argument("--answers", type=Path, help="a file to write the answers to")
    evaluate_parser.add_argument(
        "--compare", type=Path, nargs="*", default=[], help="files of answers to compare these with"
    )
    arguments = parser.parse_args()
    if arguments.command == "prepare" and arguments.model is not None and arguments.spatial_variant is not None:
        parser.error("--spatial-variant is for a model from nothing: the model that --model names has one")
    if arguments.command == "prepare":
        prepare(arguments.folder, arguments.model, arguments.spatial_variant, arguments.seed)
    else:
        evaluate(arguments.model, arguments.load_in_4bit, arguments.answers, arguments.compare)
