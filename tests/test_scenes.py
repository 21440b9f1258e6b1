"""
The tiny models' scenes: always the same, nothing of one split in another, answers that the pictures themselves give
and that cannot be guessed, and files that training reads.
"""

import hashlib
import json
import re
import runpy
import sys
from collections import Counter, namedtuple
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessor

from transformers_llava_sp.training import load_conversations


TINY = Path(__file__).parents[1] / "examples" / "tiny"
sys.path.insert(0, str(TINY))

import evaluate  # noqa: E402
import scenes  # noqa: E402


SPLITS = ("train", "validation", "test", "held_out")
# Of the pictures and texts of the first 50 scenes of each split
DIGESTS = {
    "train": "8921ba3bcc16c331a974ce44c31d16984d5cd7e309bd2a70d70334d66e495611",
    "validation": "032973966ebca549b5af268229a2858fecef0b6f1ea5ed266c534f67c8f2c0f5",
    "test": "a93cc2b5a7ef19c7b5b762a7d5a664ada011f67914eaa3646217a3a7ac80209f",
    "held_out": "e1ab37c02b7897386f018835dd654a39f36e14a954ad6be505ed37a11a981b03",
}
Seen = namedtuple("Seen", "colour shape x y")


@pytest.fixture(scope="module")
def some():
    """The first scenes of each split: enough of "train" to count answers."""
    numbers = {"train": 2500, "validation": 150, "test": 300, "held_out": 300}
    return {split: [scenes.make_scene(split, index) for index in range(numbers[split])] for split in SPLITS}


def look(picture: Image.Image) -> list[Seen]:
    """What is on a picture, from its pixels alone: places to about a pixel, from left to right."""
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    # No thing reaches the corner
    far = np.abs(pixels - pixels[0, 0]).sum(-1)
    unseen = far > 40
    found = []
    while unseen.any():
        todo = [tuple(np.argwhere(unseen)[0])]
        unseen[todo[0]] = False
        inside = []
        while todo:
            row, column = todo.pop()
            inside.append((row, column))
            for neighbour in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if max(neighbour) < 96 and min(neighbour) >= 0 and unseen[neighbour]:
                    unseen[neighbour] = False
                    todo.append(neighbour)
        rows, columns = np.array(inside).T
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        filled = len(inside) / ((bottom - top) * (right - left))
        first_row = (rows < top + 3).sum() / (3 * (right - left))
        # A square fills its box, a circle 79 % of it, a cross up to 70 %, a triangle half, and little of its top
        shape = "square" if filled > 0.9 else "circle" if filled > 0.74 else "triangle" if first_row < 0.2 else "cross"
        y = top + (bottom - top) / 1.75 if shape == "triangle" else (top + bottom) / 2
        rgb = np.median(pixels[rows, columns], axis=0)
        colour = min(scenes.COLOURS, key=lambda name: np.abs(rgb - scenes.COLOURS[name]).sum())
        found.append(Seen(colour, shape, (left + right) / 2, y))
    return sorted(found, key=lambda thing: thing.x)


def describe(scene: scenes.Scene) -> list[Seen]:
    """What the scene itself says is in it."""
    return [Seen(thing.colour, thing.shape, thing.x, thing.y) for thing in scene.things]


def side(thing: Seen, direction: str, other: Seen) -> bool:
    """Whether a thing is on that side of another. Without margins: asked only what has one, these do not matter."""
    right, down = thing.x - other.x, thing.y - other.y
    return {"left of": -right, "right of": right, "above": -down, "below": down}[direction] > 7.5


def find_answer(question: scenes.Question, seen: list[Seen]) -> str:
    """The answer to a question from what is seen, worked out without the generator. Fails if there are several."""
    text = question.text.lower().replace("crosses", "cross")
    words = re.findall("[a-z]+", text)
    colours = [word for word in words if word in scenes.COLOURS]
    shapes = [word.removesuffix("s") if word != "cross" else word for word in words]
    shapes = [word for word in shapes if word in scenes.SHAPES]
    direction = re.search("left of|right of|above|below", text)
    matching = [[thing for thing in seen if thing[:2] == pair] for pair in zip(colours, shapes, strict=False)]
    if question.kind in ("colour", "shape"):
        [thing] = [thing for thing in seen if thing.shape in shapes or thing.colour in colours]
        return getattr(thing, question.kind)
    if question.kind == "count":
        known = {*colours, *shapes}
        return str(sum(not known or bool(known & set(thing[:2])) for thing in seen))
    if question.kind == "existence":
        return "yes" if matching[0] else "no"
    if question.kind == "relation":
        [[other]] = matching
        [thing] = [thing for thing in seen if side(thing, direction[0], other)]
        return f"{thing.colour} {thing.shape}"
    if question.kind == "yes/no relation":
        [thing], [other] = matching
        assert side(thing, direction[0], other) != side(other, direction[0], thing)
        return "yes" if side(thing, direction[0], other) else "no"
    if question.kind == "centre":
        central = [thing for thing in seen if max(abs(thing.x - 48), abs(thing.y - 48)) < 11]
        assert len(central) < 2
        return f"{central[0].colour} {central[0].shape}" if central else "nothing"
    if question.kind == "where":
        [[thing]] = matching
        right, down = thing.x - 48, thing.y - 48
        if max(abs(right), abs(down)) < 11:
            return "centre"
        assert min(abs(right), abs(down)) > 11
        return f"{'top' if down < 0 else 'bottom'} {'left' if right < 0 else 'right'}"
    names = [f"{'an' if thing.colour == 'orange' else 'a'} {thing.colour} {thing.shape}" for thing in seen]
    if len(names) == 1:
        return f"There is {names[0]}."
    return f"From left to right: {', '.join(names[:-1])} and {names[-1]}."


def test_seeds_of_splits_are_apart():
    for split, after in (("train", "validation"), ("validation", "test"), ("test", "held_out")):
        last = scenes.scene_seed(split, scenes.SCENES_PER_SEED - 1, scenes.SEEDS - 1)
        assert last < scenes.scene_seed(after, 0, 0)
    assert scenes.scene_seed("test", scenes.SCENES_PER_SEED - 1, 0) < scenes.scene_seed("test", 0, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [(("dev", 0), "no split 'dev'"), (("test", -1), "number is -1"), (("test", 0, 1000), "seed is 1000")],
    ids=["split", "number", "seed"],
)
def test_refuses_a_scene_that_is_not_there(arguments, message):
    with pytest.raises(ValueError, match=message):
        scenes.make_scene(*arguments)


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_stay_the_same(split):
    digest = hashlib.sha256()
    for index in range(50):
        scene = scenes.make_scene(split, index)
        digest.update(scenes.draw(scene).convert("RGB").tobytes())
        digest.update(repr([(turn.kind, turn.text, turn.answer) for turn in scenes.order_turns(scene)]).encode())
        digest.update(repr([(turn.kind, turn.text, turn.answer) for turn in scene.questions]).encode())
    assert digest.hexdigest() == DIGESTS[split]


def test_another_seed_gives_other_scenes():
    assert scenes.make_scene("test", 3, seed=1).things != scenes.make_scene("test", 3).things
    assert scenes.make_scene("test", 3, seed=1) == scenes.make_scene("test", 3, seed=1)


def test_no_scene_is_in_two_splits(some):
    seen = [{scene.things for scene in some[split]} for split in SPLITS]
    assert [len(things) for things in seen] == [len(some[split]) for split in SPLITS]
    for first, second in combinations(seen, 2):
        assert not first & second


def is_held_out(pairs) -> bool:
    """Written out, for a change of what is held out to be seen."""
    counts = Counter(word for pair in pairs for word in pair)
    held_out = {("red", "triangle"), ("green", "square"), ("blue", "cross"), ("yellow", "circle")}
    return bool(held_out & set(pairs)) or counts["triangle"] == 3 or counts["purple"] == 3


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_held_out_combinations_are_in_no_other_split(some, split):
    mentioned = re.compile("red triangle|green square|blue cross|yellow circle")
    for scene in some[split]:
        assert not is_held_out([thing.pair for thing in scene.things])
        for question in scene.questions:
            assert not mentioned.search(f"{question.text} {question.answer}")
            assert question.answer != "3" or not re.search("triangle|purple", question.text)


def test_held_out_scenes_have_them_and_questions_are_about_them(some):
    names = [" ".join(pair) for pair in scenes.HELD_OUT_PAIRS]
    for scene in some["held_out"]:
        assert is_held_out([thing.pair for thing in scene.things])
        assert scene.questions
        held_out = [word for thing in scene.things if thing.pair in scenes.HELD_OUT_PAIRS for word in thing.pair]
        for question in scene.questions:
            if question.kind in ("colour", "shape"):
                assert question.answer in held_out
                assert any(word in question.text for word in held_out)
            elif question.kind == "count":
                three = question.answer == "3" and re.search("triangles|purple", question.text)
                assert three or any(word in question.text for word in held_out)
            else:
                assert any(name in f"{question.text} {question.answer}" for name in names)


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_the_description(some, split):
    for scene in some[split][:300]:
        for question in scene.questions:
            assert find_answer(question, describe(scene)) == question.answer, (scene.name, question)


@pytest.mark.parametrize("split", ["test", "held_out"])
def test_answers_follow_from_the_pixels(some, split):
    for scene in some[split][:40]:
        seen = look(scenes.draw(scene))
        for question in scene.questions:
            assert find_answer(question, seen) == question.answer, (scene.name, question)


def test_things_are_apart_and_within_the_picture(some):
    for scene in some["train"][:500]:
        assert 1 <= len(scene.things) <= 4
        for thing in scene.things:
            assert 11 <= thing.radius <= 15
            assert thing.radius < min(thing.x, thing.y)
            assert max(thing.x, thing.y) < 96 - thing.radius
    for scene in some["test"][:40]:
        assert len(look(scenes.draw(scene))) == len(scene.things)


def test_colours_cannot_be_taken_for_each_other():
    for (_, first), (_, second) in combinations(scenes.COLOURS.items(), 2):
        # Even when both are off towards each other
        assert sum(abs(a - b) for a, b in zip(first, second, strict=True)) > 6 * scenes.JITTER


def test_no_question_is_asked_twice_and_no_answer_gives_another_away(some):
    for scene in some["train"]:
        texts = [question.text for question in scene.questions]
        assert len(texts) == len(set(texts))
        turns = scenes.order_turns(scene)
        kinds = [turn.kind for turn in turns]
        if kinds == ["caption"]:
            continue
        assert sorted(texts) == sorted(turn.text for turn in turns)
        assert "caption" not in kinds[:-1]
        assert "existence" not in kinds[3:]
    first = Counter(scenes.order_turns(scene)[0].kind for scene in some["train"])
    assert min(first[kind] for kind in scenes.QUESTIONS) > 60


def test_answers_are_balanced(some):
    answers = {kind: Counter() for kind in scenes.QUESTIONS}
    for scene in some["train"]:
        for question in scene.questions:
            answers[question.kind][question.answer] += 1
    numbers = {kind: sum(found.values()) for kind, found in answers.items()}
    shares = {kind: {a: n / numbers[kind] for a, n in found.items()} for kind, found in answers.items()}
    assert abs(shares["existence"]["yes"] - 0.5) < 0.03
    assert abs(shares["yes/no relation"]["yes"] - 0.5) < 0.03
    assert set(answers["colour"]) == set(scenes.COLOURS)
    assert max(shares["colour"].values()) < 0.2
    assert set(answers["shape"]) == set(scenes.SHAPES)
    assert max(shares["shape"].values()) < 0.3
    assert set(answers["count"]) == {"0", "1", "2", "3", "4"}
    assert max(shares["count"].values()) < 0.3
    assert max(shares["where"].values()) < 0.27
    assert shares["centre"]["nothing"] < 0.25
    assert len(answers["relation"]) == len(scenes.TRAINING_PAIRS)
    assert max(shares["relation"].values()) < 0.07
    # Those that are hardest to learn are asked most
    assert min(numbers["existence"], numbers["yes/no relation"]) > 1.4 * max(
        number for kind, number in numbers.items() if kind not in ("existence", "yes/no relation", "count")
    )


def test_training_asks_for_one_direction_more_than_for_others(some):
    shares = {}
    for split in ("train", "test"):
        texts = [
            question.text
            for scene in some[split]
            for question in scene.questions
            if question.kind == "yes/no relation"
        ]
        shares[split] = {
            direction: sum(f" {direction} " in text for text in texts) / len(texts) for direction in scenes.DIRECTIONS
        }
    assert shares["train"]["left of"] > 0.4
    assert shares["train"]["above"] > 0.2
    assert all(abs(share - 0.25) < 0.06 for share in shares["test"].values())


def test_blind_baseline_is_low(some):
    baseline = evaluate.BlindBaseline(question for scene in some["train"] for question in scene.questions)
    asked = [question for scene in some["test"] for question in scene.questions]
    scores = evaluate.score(asked, [baseline.answer(question) for question in asked], baseline)
    limits = {"colour": 0.25, "shape": 0.4, "count": 0.4, "existence": 0.6, "relation": 0.2, "yes/no relation": 0.6}
    limits |= {"centre": 0.25, "where": 0.3, "caption": 0.05}
    assert [score.kind for score in scores] == list(limits)
    for score in scores:
        assert score.blind == score.exact_match <= limits[score.kind]


def test_missing_pairs_have_their_colour_and_shape_in_the_picture(some):
    apart = half = 0
    for scene in some["train"]:
        words = {word for thing in scene.things for word in thing.pair}
        for question in scene.questions:
            if (question.kind, question.answer) == ("existence", "no"):
                present = sum(word in words for word in re.findall("[a-z]+", question.text))
                apart, half = apart + (present == 2), half + (present == 1)
    assert 0.35 < apart / (apart + half) < 0.6


@pytest.mark.parametrize("grid", [12, 6])
def test_patch_labels_are_those_of_the_pixels(some, grid):
    patch = 96 // grid
    for scene in some["test"][:20]:
        shapes, colours = scenes.label_patches(scene, grid)
        pixels = np.asarray(scenes.draw(scene).convert("RGB")).astype(int)
        for row in range(grid):
            for column in range(grid):
                area = pixels[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                candidates = [scene.background, *(thing.rgb for thing in scene.things)]
                distances = np.abs(area[:, :, None] - np.array(candidates)).sum(-1)
                shares = np.bincount(distances.argmin(-1).ravel(), minlength=len(candidates)) / patch**2
                best = shares.argmax()
                if shares[best] < 0.6:
                    continue
                thing = scene.things[best - 1] if best else None
                assert shapes[row][column] == (scenes.SHAPES.index(thing.shape) + 1 if thing else 0)
                assert colours[row][column] == (list(scenes.COLOURS).index(thing.colour) + 1 if thing else 0)


def test_every_thing_has_labelled_patches(some):
    for scene in some["train"][:300]:
        shapes, colours = scenes.label_patches(scene)
        labels = {pair for rows in zip(shapes, colours, strict=True) for pair in zip(*rows, strict=True)} - {(0, 0)}
        names = list(scenes.COLOURS)
        assert {(names[colour - 1], scenes.SHAPES[shape - 1]) for shape, colour in labels} == {
            thing.pair for thing in scene.things
        }


def test_refuses_a_grid_that_does_not_fit():
    with pytest.raises(ValueError, match="grid of 7 does not divide 96"):
        scenes.label_patches(scenes.make_scene("test", 0), grid=7)


@pytest.mark.parametrize("form", ["llava", "datasets"])
def test_training_reads_what_is_written(form, tmp_path):
    write = scenes.write_llava if form == "llava" else scenes.write_dataset
    # The second time over what is there
    for _ in range(2):
        output = write(tmp_path, "validation", 5, seed=2)
    dataset = load_conversations(output, image_folder=tmp_path, check_images=True)
    assert len(dataset) == 5
    for index in range(5):
        scene, example = scenes.make_scene("validation", index, seed=2), dataset[index]
        assert example["id"] == scene.name
        [image, _] = example["messages"][0]["content"]
        picture = image["image"] if "image" in image else Image.open(image["path"])
        assert picture.convert("RGB").tobytes() == scenes.draw(scene).convert("RGB").tobytes()
        texts = [part["text"] for turn in example["messages"] for part in turn["content"] if part["type"] == "text"]
        assert texts == [text for turn in scenes.order_turns(scene) for text in (turn.text, turn.answer)]


def test_palette_of_the_files_changes_no_pixel(tmp_path):
    scene = scenes.make_scene("test", 0)
    file = tmp_path / "scene.png"
    file.write_bytes(scenes.encode(scene))
    processor = CLIPImageProcessor(size={"height": 96, "width": 96}, crop_size={"height": 96, "width": 96})
    pictures = [Image.open(file), scenes.draw(scene).convert("RGB")]
    stored, drawn = processor(pictures, return_tensors="pt").pixel_values
    assert stored.equal(drawn)
    assert file.stat().st_size < 1500


def test_score_is_the_share_of_equal_answers():
    known = [scenes.Question("count", "How many?", answer) for answer in "1223"]
    known += [scenes.Question("where", "Where is it?", "centre")]
    baseline = evaluate.BlindBaseline(known)
    asked = [*known, scenes.Question("count", "How many there?", "2"), scenes.Question("caption", "Describe.", "A")]
    scores = evaluate.score(asked, ["1", "2", "2", "3 ", "nowhere", "2", "A"], baseline)
    assert scores == [
        evaluate.Score("count", 5, 3 / 5, 4 / 5),
        evaluate.Score("where", 1, 1.0, 0.0),
        evaluate.Score("caption", 1, 0.0, 1.0),
    ]
    assert evaluate.average(scores) == evaluate.Score("mean, without captions", 6, 0.8, 0.4)
    assert "| count | 5 | 60.0% | 80.0% |" in evaluate.to_markdown(scores)


def test_batches_of_questions_are_answered_as_single_ones(workspace):
    model = AutoModelForImageTextToText.from_pretrained(workspace / "model").eval()
    processor = AutoProcessor.from_pretrained(workspace / "model")
    made = [scenes.make_scene("test", index) for index in range(3)]
    asked = [(question, scenes.draw(scene).convert("RGB")) for scene in made for question in scene.questions[::3]]
    questions, images = zip(*asked, strict=True)
    answers = evaluate.answer_all(model, processor, questions, images, batch_size=4)
    assert answers == evaluate.answer_all(model, processor, questions, images, batch_size=1)
    assert len(set(answers)) > 1


def test_evaluation_from_the_command_line(workspace, tmp_path, monkeypatch, capsys):
    output = tmp_path / "answers.json"
    arguments = ["--split", "held_out", "--scenes", "2", "--training-scenes", "50", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(workspace / "model"), *arguments])
    runpy.run_path(str(TINY / "evaluate.py"), run_name="__main__")
    rows = json.loads(output.read_text())
    expected = [question for index in range(2) for question in scenes.make_scene("held_out", index).questions]
    assert [(row["question"], row["right"]) for row in rows] == [(turn.text, turn.answer) for turn in expected]
    assert (
        f"| mean, without captions | {sum(turn.kind != 'caption' for turn in expected)} |" in capsys.readouterr().out
    )
