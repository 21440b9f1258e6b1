"""
Small pictures of coloured shapes, with questions about them and their answers: the data of the tiny models.

    python examples/tiny/scenes.py work/scenes --split train --scenes 30000
    python examples/tiny/scenes.py work/scenes --split validation --scenes 500 --format datasets

Scene number n of a split is the same on every machine. No split has a scene of another, and some pairs of a colour and
a shape, and some counts, occur in the split `held_out` alone: see `HELD_OUT_PAIRS` and `HELD_OUT_COUNTS`.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise, permutations
from math import hypot
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from tqdm import tqdm


SIZE = 96  # pixels, of an image's sides
RADII = (11, 15)  # pixels, the smallest and the largest
# A square's corners reach further than its radius says
REACH = 1.15
GAP = 2  # pixels, the least between two things
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (243, 126, 28),
    "yellow": (247, 219, 50),
    "green": (40, 150, 60),
    "cyan": (50, 200, 215),
    "blue": (40, 80, 210),
    "purple": (140, 50, 165),
    "black": (35, 35, 35),
}
JITTER = 10  # how far each channel of a colour may be off
PLURALS = {"cross": "crosses"}

# What no split but `held_out` has: pairs of a colour and a shape, and exactly so many things of one shape or colour
HELD_OUT_PAIRS = (("red", "triangle"), ("green", "square"), ("blue", "cross"), ("yellow", "circle"))
HELD_OUT_COUNTS = (("triangle", 3), ("purple", 3))
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
TRAINING_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)

# The first scene of each split; each seed takes the next million of its numbers
SPLITS = {"train": 0, "validation": 10**9, "test": 2 * 10**9, "held_out": 3 * 10**9}
SEEDS, SCENES_PER_SEED = 1000, 10**6
# Beyond all of those
QUESTION_SEED = 10**12

# How many questions of each kind a scene gets where it has that many. Those answered by yes or no teach less each
QUESTIONS = {
    "colour": 1,
    "shape": 1,
    "count": 1,
    "existence": 2,
    "relation": 1,
    "yes/no relation": 2,
    "centre": 1,
    "where": 1,
    "caption": 1,
}
PHRASES = {
    "colour": (
        "What colour is the {shape}?",
        "What is the colour of the {shape}?",
        "Name the colour of the {shape}.",
    ),
    "shape": (
        "What shape is the {colour} object?",
        "What is the shape of the {colour} object?",
        "Name the shape of the {colour} object.",
    ),
    "count": ("How many {things} are there?", "How many {things} do you see?", "Count the {things}."),
    "existence": ("Is there {a_thing}?", "Do you see {a_thing}?", "Does the image show {a_thing}?"),
    "relation": (
        "What is {direction} the {thing}?",
        "Which object is {direction} the {thing}?",
        "Name the object {direction} the {thing}.",
    ),
    "yes/no relation": (
        "Is the {thing} {direction} the {other}?",
        "Do you see the {thing} {direction} the {other}?",
        "Does the {thing} lie {direction} the {other}?",
    ),
    "centre": ("What is in the centre?", "Which object is in the centre?", "What do you see in the centre?"),
    "where": ("Where is the {thing}?", "Where do you see the {thing}?", "In which part of the image is the {thing}?"),
    "caption": ("Describe the image.", "Describe what you see.", "What does the image show?"),
}
# How much rather one answer is taken than another where a scene has both, so that none is the best guess
ANSWER_WEIGHTS = {
    ("count", "2"): 4,
    ("count", "3"): 12,
    ("count", "4"): 20,
    ("where", "centre"): 0.5,
}

# How often training asks by yes or no for one direction rather than another. With all alike, neither thing's place
# alone says more often "yes" than "no", so no first step leads anywhere, and a small model never starts to learn
TRAINING_DIRECTION_WEIGHTS = {"left of": 4, "right of": 1, "above": 2, "below": 1}

# Along which axis, and towards which side
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
# In pixels between the centres of two things along an axis: from here on one is on that side of the other, ...
BESIDE = 12
# ... and up to here it is not. Nothing is asked where a thing lies between
NOT_BESIDE = 3
# In pixels from the middle of the image along an axis: up to here a thing is in the centre, ...
CENTRE = 8
# ... and from here on in a corner. Nothing is asked about the place of a thing between
CORNER = 14
# In pixels: how far things must keep from the middle of the image for nothing to be in the centre
EMPTY_CENTRE = 5
# In pixels along the horizontal axis: the least between two things for an order from left to right
ORDER = 5


@dataclass(frozen=True)
class Thing:
    """
    One coloured shape.

    Args:
        colour (`str`): A key of `COLOURS`.
        shape (`str`): One of `SHAPES`.
        x (`int`): Its centre in pixels from the image's left.
        y (`int`): Its centre in pixels from the image's top.
        radius (`int`): Its size in pixels, from centre to edge.
        rgb (`tuple[int, ...]`): The colour it is drawn in, as red, green and blue.
    """

    colour: str
    shape: str
    x: int
    y: int
    radius: int
    rgb: tuple[int, ...]

    @property
    def pair(self) -> tuple[str, str]:
        """`tuple[str, str]`: Its colour and shape."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Question:
    """
    A question with its one right answer.

    Args:
        kind (`str`): A key of `QUESTIONS`.
        text (`str`): The question.
        answer (`str`): The answer.
    """

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """
    A picture's description, and questions about it.

    Args:
        name (`str`): Its split, seed and number, which is also the name of its file.
        background (`tuple[int, ...]`): The colour behind the things, as red, green and blue.
        things (`tuple[Thing, ...]`): One to four, from left to right.
        questions (`tuple[Question, ...]`): In the order of `QUESTIONS`.
    """

    name: str
    background: tuple[int, ...]
    things: tuple[Thing, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Candidate:
    """
    A question that may be asked about a scene.

    Args:
        topic (`tuple`): What it is about. No scene gets two questions of one kind and topic.
        answer (`str`): The answer.
        words (`dict[str, str]`): What the phrase is filled with.
        held_out (`bool`): Whether it is about something that only the split `held_out` has.
    """

    topic: tuple
    answer: str
    words: dict[str, str]
    held_out: bool


def name_of(pair: tuple[str, str]) -> str:
    """A pair in words, such as "red circle"."""
    return " ".join(pair)


def with_article(name: str) -> str:
    """The words with the indefinite article in front."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def scene_seed(split: str, index: int, seed: int = 0) -> int:
    """
    The number that a scene is drawn from, which no scene of another split or seed has.

    Args:
        split (`str`): A key of `SPLITS`.
        index (`int`): The scene's number in the split, from 0.
        seed (`int`, *optional*, defaults to 0): Other seeds give other scenes.

    Raises:
        ValueError: If there is no such split, seed or scene.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}: expected one of {', '.join(SPLITS)}.")
    if not 0 <= seed < SEEDS:
        raise ValueError(f"The seed is {seed}: expected one from 0 to {SEEDS - 1}.")
    if not 0 <= index < SCENES_PER_SEED:
        raise ValueError(f"The scene's number is {index}: expected one from 0 to {SCENES_PER_SEED - 1}.")
    return SPLITS[split] + seed * SCENES_PER_SEED + index


def make_scene(split: str, index: int, seed: int = 0) -> Scene:
    """
    One scene with its questions, always the same for the same arguments.

    Args:
        split (`str`): `"train"`, `"validation"`, `"test"` or `"held_out"`.
        index (`int`): The scene's number in the split, from 0.
        seed (`int`, *optional*, defaults to 0): Other seeds give other scenes.

    Raises:
        ValueError: If there is no such split, seed or scene.
    """
    # From an integer, Python draws the same numbers everywhere. The picture's are not the questions', so that other
    # questions leave the pictures as they are
    number = scene_seed(split, index, seed)
    random, asking = Random(number), Random(QUESTION_SEED + number)
    held_out = split == "held_out"
    things: tuple[Thing, ...] = ()
    questions: tuple[Question, ...] = ()
    while not questions:
        pairs = draw_pairs(random, held_out)
        if has_held_out(pairs) == held_out:
            things = place(random, pairs) or ()
            questions = draw_questions(asking, things, split) if things else ()
    shade = random.randint(232, 246)
    background = tuple(shade + random.randint(-7, 7) for _ in range(3))
    return Scene(f"{split}-{seed}-{index:06d}", background, things, questions)


def has_held_out(pairs: list[tuple[str, str]]) -> bool:
    """Whether things of these pairs are something that only the split `held_out` has."""
    return any(pair in HELD_OUT_PAIRS for pair in pairs) or any(
        number == sum(word in pair for pair in pairs) for word, number in HELD_OUT_COUNTS
    )


def draw_pairs(random: Random, held_out: bool) -> list[tuple[str, str]]:
    """The colours and shapes of a scene. Several often share one of the two, for there to be something to count."""
    number = random.choices((1, 2, 3, 4), weights=(2, 5, 7, 7))[0]
    allowed = PAIRS if held_out else TRAINING_PAIRS
    pairs = []
    if held_out and random.random() < 0.75:
        pairs.append(random.choice(HELD_OUT_PAIRS))
        number = max(number, 2)
    elif held_out:
        word, count = random.choice(HELD_OUT_COUNTS)
        pairs += [random.choice([pair for pair in TRAINING_PAIRS if word in pair]) for _ in range(count)]
        number = max(number, count)
    # None for things that share nothing
    shared = random.choice((None, random.choice(SHAPES), random.choice(tuple(COLOURS))))
    num_shared = random.randint(2, 4) if shared else 0
    while len(pairs) < number:
        sharing = [pair for pair in allowed if len(pairs) >= num_shared or shared in pair]
        pair = random.choice(sharing)
        # Two of a pair cannot be told apart by words, so these are less frequent
        pairs.append(random.choice(sharing) if pair in pairs else pair)
    random.shuffle(pairs)
    return pairs


def place(random: Random, pairs: list[tuple[str, str]]) -> tuple[Thing, ...] | None:
    """Things of these pairs at random places that do not touch, or `None` where no place was found."""
    things: list[Thing] = []
    # Left to chance, the centre would nearly always be empty
    with_centre = random.random() < 0.4
    for pair in pairs:
        radius = random.randint(*RADII)
        low, high = radius + 1, SIZE - 1 - radius
        if with_centre and not things:
            low, high = SIZE // 2 - CENTRE, SIZE // 2 + CENTRE
        for _ in range(20):
            x, y = random.randint(low, high), random.randint(low, high)
            if all(hypot(x - other.x, y - other.y) >= REACH * (radius + other.radius) + GAP for other in things):
                break
        else:
            return None
        rgb = tuple(min(255, max(0, base + random.randint(-JITTER, JITTER))) for base in COLOURS[pair[0]])
        things.append(Thing(*pair, x, y, radius, rgb))
    return tuple(sorted(things, key=lambda thing: (thing.x, thing.y)))


def place_of(thing: Thing) -> str | None:
    """Where a thing is, or `None` where two answers could be given."""
    x, y = thing.x - SIZE // 2, thing.y - SIZE // 2
    if max(abs(x), abs(y)) <= CENTRE:
        return "centre"
    if min(abs(x), abs(y)) < CORNER:
        return None
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


def is_beside(thing: Thing, direction: str, other: Thing) -> bool | None:
    """Whether a thing is on that side of another, or `None` where two answers could be given."""
    axis, side = DIRECTIONS[direction]
    distance = side * ((thing.x, thing.y)[axis] - (other.x, other.y)[axis])
    if distance >= BESIDE:
        return True
    return False if distance <= NOT_BESIDE else None


def find_colours_and_shapes(asked: int, pairs: list[tuple[str, str]]) -> Iterator[Candidate]:
    """Questions for the colour (0) or the shape (1) of the only thing that has a shape or colour."""
    given = 1 - asked
    for pair in pairs:
        if [other[given] for other in pairs].count(pair[given]) == 1:
            words = {("colour", "shape")[given]: pair[given]}
            yield Candidate((pair[given],), pair[asked], words, pair in HELD_OUT_PAIRS)


def find_counts(random: Random, pairs: list[tuple[str, str]]) -> Iterator[Candidate]:
    """Questions for a number: that of all things, or of those of each shape, or of each colour."""
    for word in random.choices(((None,), SHAPES, tuple(COLOURS)), weights=(1, 3, 3))[0]:
        counted = [pair for pair in pairs if word is None or word in pair]
        if word is None:
            name, held_out = "objects", False
        else:
            name = f"{word} objects" if word in COLOURS else PLURALS.get(word, f"{word}s")
            held_out = (word, len(counted)) in HELD_OUT_COUNTS or any(pair in HELD_OUT_PAIRS for pair in counted)
        yield Candidate((word,), str(len(counted)), {"things": name}, held_out)


def find_existence(random: Random, pairs: list[tuple[str, str]], held_out: bool) -> Iterator[Candidate]:
    """Questions for whether there is a pair. Those with the answer "no" mostly have its colour and shape apart."""
    colours, shapes = {colour for colour, _ in pairs}, {shape for _, shape in pairs}
    absent = [pair for pair in (HELD_OUT_PAIRS if held_out else TRAINING_PAIRS) if pair not in pairs]
    apart = [pair for pair in absent if pair[0] in colours and pair[1] in shapes]
    half = [pair for pair in absent if (pair[0] in colours) != (pair[1] in shapes)]
    absent = (apart if random.random() < 0.85 else half) or apart or half or absent
    for answer, about in (("yes", sorted(set(pairs))), ("no", absent)):
        for pair in about:
            yield Candidate((pair,), answer, {"a_thing": with_article(name_of(pair))}, pair in HELD_OUT_PAIRS)


def find_relations(things: tuple[Thing, ...], unique: list[Thing]) -> Iterator[Candidate]:
    """Questions for the only thing on one side of another."""
    for other in unique:
        for direction in DIRECTIONS:
            sides = {thing: is_beside(thing, direction, other) for thing in things if thing is not other}
            if list(sides.values()).count(True) == 1 and None not in sides.values():
                pair = next(thing.pair for thing, beside in sides.items() if beside)
                words = {"direction": direction, "thing": name_of(other.pair)}
                held_out = pair in HELD_OUT_PAIRS or other.pair in HELD_OUT_PAIRS
                yield Candidate((other.pair, direction), name_of(pair), words, held_out)


def find_yes_no_relations(unique: list[Thing]) -> Iterator[Candidate]:
    """Questions for whether one thing is on one side of another, where it is clearly on that side or the other one."""
    for thing, other in permutations(unique, 2):
        for direction, (axis, _) in DIRECTIONS.items():
            beside = is_beside(thing, direction, other)
            if beside or is_beside(other, direction, thing):
                words = {"direction": direction, "thing": name_of(thing.pair), "other": name_of(other.pair)}
                held_out = thing.pair in HELD_OUT_PAIRS or other.pair in HELD_OUT_PAIRS
                # One topic however it is asked: the second answer would follow from the first
                topic = (axis, *sorted((thing.pair, other.pair)))
                yield Candidate(topic, "yes" if beside else "no", words, held_out)


def find_centre(random: Random, things: tuple[Thing, ...]) -> Iterator[Candidate]:
    """The question for what is in the centre."""
    middle = SIZE // 2
    for thing in things:
        if place_of(thing) == "centre":
            yield Candidate((), name_of(thing.pair), {}, thing.pair in HELD_OUT_PAIRS)
    nearest = min(hypot(thing.x - middle, thing.y - middle) - REACH * thing.radius for thing in things)
    # Asked of every empty centre, "nothing" would be the best guess
    if nearest >= EMPTY_CENTRE and random.random() < 0.3:
        yield Candidate((), "nothing", {}, False)


def find_places(unique: list[Thing]) -> Iterator[Candidate]:
    """Questions for where a thing is."""
    for thing in unique:
        answer = place_of(thing)
        if answer is not None:
            yield Candidate((thing.pair,), answer, {"thing": name_of(thing.pair)}, thing.pair in HELD_OUT_PAIRS)


def find_captions(things: tuple[Thing, ...]) -> Iterator[Candidate]:
    """The request for a description, where things have a clear order."""
    names = [with_article(name_of(thing.pair)) for thing in things]
    held_out = any(thing.pair in HELD_OUT_PAIRS for thing in things)
    if len(things) == 1:
        yield Candidate((), f"There is {names[0]}.", {}, held_out)
    elif all(right.x - left.x >= ORDER for left, right in pairwise(things)):
        yield Candidate((), f"From left to right: {', '.join(names[:-1])} and {names[-1]}.", {}, held_out)


def find_candidates(kind: str, random: Random, things: tuple[Thing, ...], held_out: bool) -> list[Candidate]:
    """
    All questions of a kind that have one clear answer.

    Args:
        kind (`str`): A key of `QUESTIONS`.
        random (`Random`): The scene's random numbers.
        things (`tuple[Thing, ...]`): What is in the scene, from left to right.
        held_out (`bool`): Whether to find those about what only the split `held_out` has, or all others.
    """
    pairs = [thing.pair for thing in things]
    # What can be told by its colour and shape
    unique = [thing for thing in things if pairs.count(thing.pair) == 1]
    found = {
        "colour": lambda: find_colours_and_shapes(0, pairs),
        "shape": lambda: find_colours_and_shapes(1, pairs),
        "count": lambda: find_counts(random, pairs),
        "existence": lambda: find_existence(random, pairs, held_out),
        "relation": lambda: find_relations(things, unique),
        "yes/no relation": lambda: find_yes_no_relations(unique),
        "centre": lambda: find_centre(random, things),
        "where": lambda: find_places(unique),
        "caption": lambda: find_captions(things),
    }[kind]()
    return [candidate for candidate in found if candidate.held_out == held_out]


def draw_questions(random: Random, things: tuple[Thing, ...], split: str) -> tuple[Question, ...]:
    """
    Questions about a scene, as many of each kind as `QUESTIONS` has, less where there are no more with a clear answer.

    Args:
        random (`Random`): The scene's random numbers.
        things (`tuple[Thing, ...]`): What is in the scene, from left to right.
        split (`str`): A key of `SPLITS`: `"held_out"` asks only about what no other split has, others about all else.
    """
    held_out = split == "held_out"
    direction_weights = TRAINING_DIRECTION_WEIGHTS if split == "train" else dict.fromkeys(DIRECTIONS, 1)
    questions = []
    for kind, number in QUESTIONS.items():
        topics: set[tuple] = set()
        if kind == "existence":
            # With fewer things to say "yes" about, the second answer would mostly be "no"
            number = min(number, len({thing.pair for thing in things if (thing.pair in HELD_OUT_PAIRS) == held_out}))
        for _ in range(number):
            candidates = find_candidates(kind, random, things, held_out)
            candidates = [candidate for candidate in candidates if candidate.topic not in topics]
            answers = sorted({candidate.answer for candidate in candidates})
            if kind in ("existence", "yes/no relation"):
                drawn = random.choice(("yes", "no"))
                answers = [answer for answer in answers if answer == drawn]
            if not answers:
                continue
            weights = [ANSWER_WEIGHTS.get((kind, answer), 1) for answer in answers]
            answer = random.choices(answers, weights)[0]
            candidates = [candidate for candidate in candidates if candidate.answer == answer]
            weights = [1] * len(candidates)
            if kind == "yes/no relation":
                weights = [direction_weights[candidate.words["direction"]] for candidate in candidates]
            candidate = random.choices(candidates, weights)[0]
            topics.add(candidate.topic)
            questions.append(Question(kind, random.choice(PHRASES[kind]).format(**candidate.words), answer))
    return tuple(questions)


def is_inside(shape: str, x: float, y: float, radius: int) -> bool:
    """
    Whether a shape covers a point. Exact: all numbers here are small multiples of powers of two.

    Args:
        shape (`str`): One of `SHAPES`.
        x (`float`): The point, in pixels to the right of the shape's centre.
        y (`float`): The point, in pixels below the shape's centre.
        radius (`int`): The shape's size in pixels.
    """
    x = abs(x)
    if shape == "circle":
        return x * x + y * y <= radius * radius
    if shape == "square":
        return max(x, abs(y)) <= 0.8125 * radius
    if shape == "triangle":
        return y <= 0.75 * radius and x <= 0.5625 * (y + radius)
    longer, shorter = max(x, abs(y)), min(x, abs(y))
    return longer <= radius and shorter <= 0.375 * radius


@cache
def coverage(shape: str, radius: int) -> Image.Image:
    """
    How much of each pixel a shape covers, in sixteenths: four by four points of each are looked at, which makes the
    edges smooth. The image is twice the radius wide and high.
    """
    points = [(2 * step + 1) / 8 for step in range(4)]
    levels = [
        sum(is_inside(shape, column + x, row + y, radius) for y in points for x in points)
        for row in range(-radius, radius)
        for column in range(-radius, radius)
    ]
    return Image.frombytes("L", (2 * radius, 2 * radius), bytes(levels))


def draw(scene: Scene) -> Image.Image:
    """
    A scene's picture.

    Returns:
        `PIL.Image.Image`: 96 by 96 pixels, of mode "P": its few colours make small files, and
        `.convert("RGB")` gives the same as any other image.
    """
    image = Image.new("P", (SIZE, SIZE), 0)
    palette = list(scene.background)
    for number, thing in enumerate(scene.things):
        levels = coverage(thing.shape, thing.radius)
        # One colour for each level of coverage, from a sixteenth to all
        colours = levels.point([level + 16 * number for level in range(256)])
        image.paste(colours, (thing.x - thing.radius, thing.y - thing.radius), levels.point([0] + [255] * 255))
        for level in range(1, 17):
            palette += [
                (behind * (16 - level) + own * level + 8) // 16
                for behind, own in zip(scene.background, thing.rgb, strict=True)
            ]
    image.putpalette(palette)
    return image


def encode(scene: Scene) -> bytes:
    """A scene's picture as a PNG file."""
    file = io.BytesIO()
    draw(scene).save(file, "PNG", optimize=True)
    return file.getvalue()


def label_patches(scene: Scene, grid: int = 12) -> tuple[list[list[int]], list[list[int]]]:
    """
    What the patches of a vision tower show: a patch is a thing's where at least half of it is covered by it.

    Args:
        scene ([`Scene`]): The scene.
        grid (`int`, *optional*, defaults to 12): The number of patches in each row and column.

    Returns:
        `tuple[list[list[int]], list[list[int]]]`: The shape and the colour of each patch, by row and column: 0 for the
        background, otherwise one more than its place in `SHAPES` and `COLOURS`.

    Raises:
        ValueError: If the image cannot be divided so.
    """
    if SIZE % grid:
        raise ValueError(f"A grid of {grid} does not divide {SIZE} pixels: take one of 6, 8, 12, 16, 24, 32 or 48.")
    shapes = [[0] * grid for _ in range(grid)]
    colours = [[0] * grid for _ in range(grid)]
    colour_names = tuple(COLOURS)
    for thing in scene.things:
        covered = Image.new("L", (SIZE, SIZE))
        levels = coverage(thing.shape, thing.radius).point([15 * min(level, 16) for level in range(256)])
        covered.paste(levels, (thing.x - thing.radius, thing.y - thing.radius))
        for number, share in enumerate(covered.reduce(SIZE // grid).tobytes()):
            if share >= 120:
                row, column = divmod(number, grid)
                shapes[row][column] = SHAPES.index(thing.shape) + 1
                colours[row][column] = colour_names.index(thing.colour) + 1
    return shapes, colours


def order_turns(scene: Scene) -> list[Question]:
    """
    A scene's questions in the order of a conversation, always the same for the same scene.

    Earlier turns tell about later ones: a caption all, and any question about a red circle that there is one. So those
    that ask whether there is one come first, with at most one other among them, and the caption is last. In one scene
    of eight it is the only turn instead, so that each kind of question is learned as a first one too.
    """
    random = Random(scene.name)
    captions = [question for question in scene.questions if question.kind == "caption"]
    if captions and random.random() < 0.125:
        return captions
    existence = [question for question in scene.questions if question.kind == "existence"]
    others = [question for question in scene.questions if question.kind not in ("existence", "caption")]
    random.shuffle(others)
    first = existence + others[:1]
    random.shuffle(first)
    return first + others[1:] + captions


def llava_record(scene: Scene, image: str) -> dict[str, Any]:
    """
    A scene as a record of LLaVA's JSON.

    Args:
        scene ([`Scene`]): The scene.
        image (`str`): The path of its picture.
    """
    turns = []
    for number, question in enumerate(order_turns(scene)):
        slot = "" if number else "<image>\n"
        turns += [{"from": "human", "value": slot + question.text}, {"from": "gpt", "value": question.answer}]
    return {"id": scene.name, "image": image, "conversations": turns}


def dataset_record(scene: Scene) -> dict[str, Any]:
    """A scene as a row of a data set with messages and images."""
    messages = []
    for number, question in enumerate(order_turns(scene)):
        parts = [] if number else [{"type": "image", "text": None}]
        for role, text in (("user", question.text), ("assistant", question.answer)):
            messages.append({"role": role, "content": [*parts, {"type": "text", "text": text}]})
            parts = []
    return {"id": scene.name, "messages": messages, "images": [{"path": None, "bytes": encode(scene)}]}


def write_image(index: int, split: str, seed: int, folder: Path) -> dict[str, Any]:
    """Write the picture of one scene; returns its record."""
    scene = make_scene(split, index, seed)
    image = f"{split}/{scene.name}.png"
    (folder / image).write_bytes(encode(scene))
    return llava_record(scene, image)


def make_row(index: int, split: str, seed: int) -> dict[str, Any]:
    """One scene as a row of a data set."""
    return dataset_record(make_scene(split, index, seed))


def in_parallel(function: Any, scenes: int, description: str) -> Iterator[Any]:
    """The function's results for the scenes' numbers, in order, from one process for each processor."""
    # Not forked: the caller may have threads, of PyTorch for example, which a fork would leave in an unknown state
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        results = pool.imap(function, range(scenes), chunksize=64)
        yield from tqdm(results, total=scenes, desc=description, unit="scene")


def write_llava(folder: Path, split: str, scenes: int, seed: int = 0) -> Path:
    """
    Write scenes as LLaVA's JSON, and their pictures in a folder of the split's name beside it.

    Args:
        folder (`Path`): Where to; the paths of the images are relative to it.
        split (`str`): A key of `SPLITS`.
        scenes (`int`): How many.
        seed (`int`, *optional*, defaults to 0): Other seeds give other scenes.

    Returns:
        `Path`: The JSON file.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    write = partial(write_image, split=split, seed=seed, folder=folder)
    records = list(in_parallel(write, scenes, f"Writing {split}"))
    file = folder / f"{split}.json"
    file.write_text(json.dumps(records))
    return file


def write_dataset(folder: Path, split: str, scenes: int, seed: int = 0) -> Path:
    """
    Write scenes as a data set of the `datasets` library, in a folder of the split's name.

    Args:
        folder (`Path`): Where to.
        split (`str`): A key of `SPLITS`.
        scenes (`int`): How many.
        seed (`int`, *optional*, defaults to 0): Other seeds give other scenes.

    Returns:
        `Path`: The folder, for `datasets.load_from_disk`.
    """
    from datasets import Dataset, Features, Image, List, Value

    part = {"type": Value("string"), "text": Value("string")}
    features = Features(
        {
            "id": Value("string"),
            "messages": List({"role": Value("string"), "content": List(part)}),
            "images": List(Image()),
        }
    )
    output = folder / split
    if output.exists():
        if not (output / "dataset_info.json").is_file():
            raise SystemExit(f"{output} is there, and no data set: name another folder to write to.")
        # A data set cannot be written over the files that a previous one was read from
        shutil.rmtree(output)
    with tempfile.TemporaryDirectory() as cache_dir:
        dataset = Dataset.from_generator(
            in_parallel,
            features=features,
            cache_dir=cache_dir,
            gen_kwargs={
                "function": partial(make_row, split=split, seed=seed),
                "scenes": scenes,
                "description": f"Writing {split}",
            },
        )
        dataset.save_to_disk(output)
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder to write to")
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--scenes", type=int, help="how many, by default 30000 of train and 500 of another split")
    parser.add_argument("--format", default="llava", choices=("llava", "datasets"))
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other scenes")
    arguments = parser.parse_args()
    if arguments.scenes is None:
        arguments.scenes = 30_000 if arguments.split == "train" else 500
    if arguments.scenes < 1:
        parser.error("--scenes must be 1 or more")
    try:
        scene_seed(arguments.split, arguments.scenes - 1, arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    write = write_llava if arguments.format == "llava" else write_dataset
    print(write(arguments.output, arguments.split, arguments.scenes, arguments.seed))
