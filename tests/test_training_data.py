"""
Conversations to train on: every source gives the same examples, whether read at once or as a stream, and a record that
cannot be trained on is named or counted, never passed over in silence.
"""

import json
import logging
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_golden import FINETUNE_RECORDS, record_to_messages
from test_tiles import photo, tiled_processor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader
from transformers import AutoProcessor
from transformers.trainer_pt_utils import LengthGroupedSampler

from transformers_llava_sp.training import (
    LlavaSPDataCollator,
    RecordError,
    TrainingDataError,
    drop_long_records,
    load_conversations,
    to_example,
)


datasets = pytest.importorskip("datasets", reason="the extra `train` is not installed")
ERRORS_PAGE = (Path(__file__).parent.parent / "docs" / "training-data.md").read_text(encoding="utf-8")


def turns(*texts, first="human"):
    """LLaVA's form of turns that alternate."""
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[number % 2], "value": text} for number, text in enumerate(texts)]


def messages(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]


def record(*texts, **fields):
    return {"id": "r", "conversations": turns(*texts), **fields}


GOOD = record("<image>\nWhat?", "This.", image="a.png")
# What three kinds of records are, as text and as the images of each
RECORDS = [
    ("first", ("<image>\nWhat is this?", "Noise.", "Which?\n<image>", "More of it."), ["a.png", "folder/b.jpg"]),
    ("second", ("Name a colour.", "Blue."), []),
    ("third", ("<image><image> Compare them. ", "They differ."), ["folder/b.jpg", "a.png"]),
    ("fourth", (" Two\nlines ", "Yes, two \n"), []),
]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "folder").mkdir(parents=True)
    photo(40, 60).save(folder / "a.png")
    photo(50, 30, seed=1).save(folder / "folder" / "b.jpg")
    return folder


@pytest.fixture(scope="module")
def collator(golden):
    return LlavaSPDataCollator(AutoProcessor.from_pretrained(golden("mini-cropping").converted))


@pytest.fixture
def warnings_of(caplog):
    """`warnings_of()`: what was logged as a warning since."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: [log.getMessage() for log in caplog.records if log.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)


def write_json(path, records, lines=False):
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records), encoding="utf-8")
    return path


def llava_records():
    return [
        {"id": name, "conversations": turns(*texts), **({"image": paths} if paths else {})}
        for name, texts, paths in RECORDS
    ]


def parts(text):
    """The parts that some data sets have in place of text; a table has every key in every row."""
    pieces = [
        {"type": "image", "text": None} if piece == "<image>" else {"type": "text", "text": piece}
        for piece in re.split("(<image>)", text)
        if piece
    ]
    return pieces


def table(images_of, content=lambda text: text):
    return {
        "id": [name for name, _, _ in RECORDS],
        "messages": [
            [{**message, "content": content(message["content"])} for message in messages(*texts)]
            for _, texts, _ in RECORDS
        ],
        "images": [[images_of(path) for path in paths] for _, _, paths in RECORDS],
    }


def image_table(images):
    """A data set of image files. Its format is for the eyes of its user and must not matter."""
    dataset = datasets.Dataset.from_dict(table(lambda path: (images / path).as_posix()))
    return dataset.cast_column("images", datasets.List(datasets.Image())).with_format("numpy")


def embed(images):
    """`images_of` for a table whose images are bytes."""
    return lambda path: {"bytes": (images / path).read_bytes(), "path": None}


def bytes_table(images, **kwargs):
    dataset = datasets.Dataset.from_dict(table(embed(images), **kwargs))
    return dataset.cast_column("images", datasets.List(datasets.Image()))


def saved(dataset, folder):
    dataset.save_to_disk(folder)
    return folder


def saved_splits(dataset, folder):
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(folder)
    return folder


def parquet(dataset, path):
    dataset.to_parquet(path)
    return path


# All of them the same records
SOURCES = {
    "LLaVA JSON": lambda images, tmp: write_json(tmp / "llava.json", llava_records()),
    "LLaVA JSON lines": lambda images, tmp: write_json(tmp / "llava.jsonl", llava_records(), lines=True),
    "messages in JSON": lambda images, tmp: write_json(
        tmp / "messages.json", datasets.Dataset.from_dict(table(str)).to_list()
    ),
    "messages in JSON lines": lambda images, tmp: write_json(
        tmp / "messages.json", datasets.Dataset.from_dict(table(str)).to_list(), lines=True
    ),
    "table with paths": lambda images, tmp: datasets.Dataset.from_dict(table(str)),
    "table with image paths": lambda images, tmp: image_table(images),
    "table with bytes": lambda images, tmp: bytes_table(images),
    "table with parts": lambda images, tmp: bytes_table(images, content=parts),
    "shuffled table": lambda images, tmp: bytes_table(images).select([3, 2, 1, 0]).select([3, 2, 1, 0]),
    "LLaVA table": lambda images, tmp: datasets.Dataset.from_list(llava_records()),
    "saved table": lambda images, tmp: saved(bytes_table(images), tmp / "saved"),
    "saved splits": lambda images, tmp: saved_splits(bytes_table(images), tmp / "splits"),
    "parquet": lambda images, tmp: parquet(bytes_table(images), tmp / "table.parquet"),
    "folder of parquet": lambda images, tmp: parquet(bytes_table(images), tmp / "hub" / "train.parquet").parent,
    "iterable of PIL images": lambda images, tmp: datasets.IterableDataset.from_generator(
        lambda: (
            {**row, "images": [Image.open(images / path) for path in row["images"]]}
            for row in datasets.Dataset.from_dict(table(str)).to_list()
        )
    ),
}


def batches_of(dataset, collator):
    return [collator([example]) for example in dataset]


def assert_batches_equal(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("source", SOURCES)
def test_sources_give_the_same_batches(images, tmp_path, monkeypatch, collator, source, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    reference = load_conversations(write_json(tmp_path / "reference.json", llava_records()), images)
    dataset = load_conversations(SOURCES[source](images, tmp_path), images, streaming=streaming)
    examples = list(dataset)
    assert [example["id"] for example in examples] == [name for name, _, _ in RECORDS]
    assert_batches_equal(batches_of(dataset, collator), batches_of(reference, collator))
    # An example is a record as well
    assert [to_example(example) for example in examples] == examples
    if hasattr(dataset, "__len__"):
        assert len(dataset) == len(RECORDS)
        assert [example["id"] for example in dataset.outlines()] == [name for name, _, _ in RECORDS]


@pytest.mark.parametrize("record", FINETUNE_RECORDS, ids=[record["name"] for record in FINETUNE_RECORDS])
def test_llava_records_become_the_messages_of_the_golden_tests(images, record):
    image = "a.png" if record["has_image"] else None
    example = to_example({"conversations": record["conversations"], "image": image}, images)
    assert example["messages"] == record_to_messages(record, images / "a.png")


def test_text_beside_images_is_stripped_and_other_text_is_not(images):
    example = to_example(record(" <image>\n a ", " b ", " c ", "d\n", image="a.png"), images)
    texts = [message["content"][-1]["text"] for message in example["messages"]]
    assert texts == ["a", " b ", " c ", "d\n"]


def test_system_message_and_parts_with_images_of_their_own(images):
    image = Image.new("RGB", (4, 4))
    content = [
        {"type": "text", "text": "Between "},
        {"type": "image", "image": image, "path": None},
        {"type": "text", "text": "them."},
        {"type": "image", "path": "a.png"},
    ]
    example = to_example(
        {"id": 3, "messages": [{"role": "system", "content": "Be brief."}, *messages(content, "Yes.")]}, images
    )
    assert example == {
        "id": "3",
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": image},
                    {"type": "image", "path": str(images / "a.png")},
                    {"type": "text", "text": "Between them."},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        ],
    }


def test_records_without_an_id_are_called_by_their_index(tmp_path):
    path = write_json(tmp_path / "data.json", [{"conversations": turns("a", "b")}] * 2)
    assert [example["id"] for example in load_conversations(path)] == ["0", "1"]


# Records that cannot be trained on

IMAGE_IN_ANSWER = record("What?", "<image>", image="a.png")
BAD_RECORDS = {
    "no object": ([1, 2], "malformed record", "it is a list, expected an object"),
    "no conversation": ({"id": "r", "text": "a"}, "malformed record", "it has neither 'conversations' nor 'messages'"),
    "conversation is text": (
        {"id": "r", "conversations": "a"},
        "malformed record",
        "'conversations' is a str, expected a list of turns",
    ),
    "turn without value": (
        {"id": "r", "conversations": [{"from": "human"}]},
        "malformed turn",
        "a turn is {'from': 'human'}, expected an object with 'from' and 'value'",
    ),
    "turn is text": (
        {"id": "r", "messages": ["a"]},
        "malformed turn",
        "a turn is 'a', expected an object with 'role' and 'content'",
    ),
    "content is a number": (record("a", 5), "malformed turn", "a turn has a content of type int"),
    "content is null": (
        {"id": "r", "messages": messages("a", None)},
        "malformed turn",
        "a turn has a content of type NoneType",
    ),
    "video": (
        {"id": "r", "messages": messages([{"type": "video", "path": "a.mp4"}], "b")},
        "malformed turn",
        "a turn has a part {'type': 'video', 'path': 'a.mp4'}, expected one of type 'text' or 'image'",
    ),
    "unknown role": (
        {"id": "r", "conversations": [{"from": "bot", "value": "a"}]},
        "unknown role",
        "a turn is from 'bot', expected 'human' or 'gpt'",
    ),
    "role is a list": (
        {"id": "r", "messages": [{"role": ["user"], "content": "a"}]},
        "unknown role",
        "a turn is from ['user'], expected 'system' or 'user' or 'assistant'",
    ),
    "two questions": (
        {"id": "r", "conversations": turns("a", "b") + turns("c", "d")[1:]},
        "roles do not alternate",
        "turn 2 is the assistant's, expected the user's",
    ),
    "two answers first": (
        {"id": "r", "conversations": turns("a", "b", first="gpt")[:1] * 2 + turns("a", "b")},
        "roles do not alternate",
        "turn 0 is the assistant's, expected the user's",
    ),
    "late system message": (
        {"id": "r", "messages": [*messages("a", "b"), {"role": "system", "content": "c"}]},
        "roles do not alternate",
        "turn 2 is the system's, expected the user's",
    ),
    "no turns": (record(), "no answer", "it has no question with an answer"),
    "answer alone": (
        {"id": "r", "conversations": turns("a", first="gpt")},
        "no answer",
        "it has no question with an answer",
    ),
    "question alone": (record("a"), "no answer", "its last question has no answer"),
    "question at the end": (record("a", "b", "c"), "no answer", "its last question has no answer"),
    "empty answer": (record("a", " \n"), "empty answer", "a turn of the assistant is empty"),
    "empty later answer": (record("a", "b", "c", ""), "empty answer", "a turn of the assistant is empty"),
    "empty question": (record("", "b"), "empty question", "a turn of the user is empty"),
    "slot without image": (
        record("<image>\na", "b"),
        "images and slots differ",
        "it has 1 <image> slots, but 0 images",
    ),
    "slot with empty image": (
        record("<image>\na", "b", image=""),
        "images and slots differ",
        "it has 1 <image> slots, but 0 images",
    ),
    "image without slot": (
        record("a", "b", image="a.png"),
        "images and slots differ",
        "it has 0 <image> slots, but 1 images",
    ),
    "two slots for one image": (
        record("<image>a", "b", "<image>c", "d", image="a.png"),
        "images and slots differ",
        "it has 2 <image> slots, but 1 images",
    ),
    "two images for one slot": (
        record("<image>a", "b", image=["a.png", "a.png"]),
        "images and slots differ",
        "it has 1 <image> slots, but 2 images",
    ),
    "image in an answer": (IMAGE_IN_ANSWER, "image outside a question", "the assistant's turn has an image"),
    "missing image": (record("<image>a", "b", image="no.png"), "missing image", "images/no.png is missing"),
    "folder as image": (record("<image>a", "b", image="folder"), "missing image", "images/folder is missing"),
    "number as image": (record("<image>a", "b", image=7), "missing image", "an image is given by 7, expected"),
    "null as image": (record("<image>a", "b", image=[None]), "missing image", "an image is given by None, expected"),
    "broken image": (record("<image>a", "b", image="cut.png"), "broken image", "images/cut.png cannot be read, "),
    "text as image": (record("<image>a", "b", image="text.png"), "broken image", "UnidentifiedImageError"),
}


@pytest.fixture
def more_images(images):
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:300])
    (images / "text.png").write_text("no image")
    return images


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("bad", BAD_RECORDS)
def test_bad_record_is_named(more_images, tmp_path, bad, streaming):
    bad_record, reason, message = BAD_RECORDS[bad]
    path = write_json(tmp_path / "data.json", [GOOD, bad_record, GOOD])
    name = f"{path}, record 1 (id 'r'): " if isinstance(bad_record, dict) else f"{path}, record 1: "
    with pytest.raises(RecordError) as raised:
        list(load_conversations(path, more_images, streaming=streaming, check_images=True))
    assert str(raised.value).startswith(name)
    assert message in str(raised.value)
    assert raised.value.reason == reason


@pytest.mark.parametrize("bad", BAD_RECORDS)
def test_bad_record_is_explained_in_the_documentation(more_images, tmp_path, bad):
    path = write_json(tmp_path / "data.json", [BAD_RECORDS[bad][0]])
    with pytest.raises(RecordError) as raised:
        load_conversations(path, more_images, check_images=True)
    entries = re.findall(r"^\| `…: ([^`]+)` \| ([^|]+) \|", ERRORS_PAGE, re.MULTILINE)
    assert len(entries) > 10
    text = str(raised.value).split(": ", 1)[1]
    matching = [
        reason.strip() for entry, reason in entries if re.match(".*".join(map(re.escape, entry.split("…"))), text)
    ]
    assert matching == [raised.value.reason]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_bad_records_are_skipped_and_counted(more_images, tmp_path, warnings_of, streaming):
    bad = [bad_record for bad_record, _, _ in BAD_RECORDS.values()]
    mixed = [{**GOOD, "id": 0}, *bad[:10], {**GOOD, "id": 1}, *bad[10:], {**GOOD, "id": 2}]
    path = write_json(tmp_path / "data.jsonl", mixed, lines=True)
    dataset = load_conversations(path, more_images, streaming=streaming, skip_bad_records=True, check_images=True)
    assert [example["id"] for example in dataset] == ["0", "1", "2"]
    [warning] = warnings_of()
    reasons = sorted(reason for _, reason, _ in BAD_RECORDS.values())
    counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons)))
    assert warning == f"{path}: skipped {len(bad)} of {len(mixed)} records, which are bad: {counts}."


def test_no_warning_without_bad_records(images, tmp_path, warnings_of):
    path = write_json(tmp_path / "data.json", [GOOD])
    assert len(load_conversations(path, images, skip_bad_records=True)) == 1
    assert list(load_conversations(path, images, skip_bad_records=True, streaming=True))
    assert warnings_of() == []


def test_images_are_decoded_only_where_that_is_asked_for(more_images, tmp_path, collator):
    path = write_json(tmp_path / "data.json", [{**GOOD, "id": "cut", "image": "cut.png"}])
    dataset = load_conversations(path, more_images)
    with pytest.raises(RecordError, match=r"Example 'cut': .*cut\.png"):
        collator([dataset[0]])
    with pytest.raises(RecordError, match=r"record 0 \(id 'cut'\): the image .*cut\.png cannot be read"):
        load_conversations(path, more_images, check_images=True)


def test_all_records_bad(tmp_path):
    path = write_json(tmp_path / "data.json", [record("a")])
    with pytest.raises(TrainingDataError, match=r"data\.json has no record to train on, of 1\."):
        load_conversations(path, skip_bad_records=True)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_broken_bytes_of_a_table_are_named(more_images, streaming):
    rows = table(embed(more_images))
    rows["images"][2][1]["bytes"] = (more_images / "cut.png").read_bytes()
    dataset = datasets.Dataset.from_dict(rows).cast_column("images", datasets.List(datasets.Image()))
    message = r"the data set, record 2 \(id 'third'\): the image of the record cannot be read"
    with pytest.raises(RecordError, match=message):
        list(load_conversations(dataset, streaming=streaming))
    if not streaming:
        kept = load_conversations(dataset, skip_bad_records=True, check_images=True)
        assert [example["id"] for example in kept] == ["first", "second", "fourth"]


def test_missing_images_of_a_table_are_named(images):
    rows = table(lambda path: {"bytes": None, "path": str(images / path)})
    rows["images"][0][1]["path"] = "no.png"
    dataset = datasets.Dataset.from_dict(rows).cast_column("images", datasets.List(datasets.Image()))
    with pytest.raises(RecordError, match=r"the data set, record 0 \(id 'first'\): the image no\.png is missing"):
        load_conversations(dataset)


def test_checks_do_not_read_images(images):
    dataset = load_conversations(bytes_table(images))
    stored = [
        part["image"]
        for example in dataset.outlines()
        for message in example["messages"]
        for part in message["content"]
        if part["type"] == "image"
    ]
    assert stored == [{"bytes": b"", "path": None}] * 4


# Sources that cannot be read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1}', r"data\.json is not JSON"),
        ('{"id": 1}\n{"id": ', r"Line 2 of .*data\.json is not JSON"),
        ("\udcff", r"data\.json cannot be read: .*utf-8"),
        ("", r"data\.json has no record to train on, of 0"),
        ("[]", r"data\.json has no record to train on, of 0"),
        ("5", r"data\.json, record 0: it is a int, expected an object"),
    ],
    ids=["list that is cut off", "line that is cut off", "no text", "empty file", "empty list", "number"],
)
def test_json_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(TrainingDataError, match=message):
        load_conversations(tmp_path / "data.json")


def test_missing_file(tmp_path):
    with pytest.raises(TrainingDataError, match=r"no\.json is missing: expected a JSON file"):
        load_conversations(tmp_path / "no.json")


def test_byte_order_mark_and_empty_lines(tmp_path):
    text = "\n\n" + "\n\n".join(json.dumps({"conversations": turns(text, "b")}) for text in "ab") + "\n\n"
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8-sig")
    assert len(load_conversations(tmp_path / "data.jsonl")) == 2
    assert len(list(load_conversations(tmp_path / "data.jsonl", streaming=True))) == 2


def test_other_objects_are_refused(images):
    splits = datasets.DatasetDict({"train": bytes_table(images)})
    with pytest.raises(TrainingDataError, match="The data are a DatasetDict, expected a path"):
        load_conversations(splits)


def test_columns_that_are_missing(tmp_path):
    with pytest.raises(TrainingDataError, match="the data set has the columns question, answer: expected 'messages'"):
        load_conversations(datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"]}))


def test_split_is_chosen_or_named(images, tmp_path):
    folder = saved_splits(bytes_table(images), tmp_path / "splits")
    assert [example["id"] for example in load_conversations(folder, split="test")] == ["second"]
    with pytest.raises(TrainingDataError, match=r"splits cannot be loaded, KeyError.*has the split 'validation'"):
        load_conversations(folder, split="validation")


def test_json_needs_no_library_and_other_data_name_the_extra(images, tmp_path, monkeypatch):
    path = write_json(tmp_path / "data.json", [GOOD])
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(load_conversations(path, images)) == 1
    with pytest.raises(
        ImportError, match=r"need the `datasets` library: pip install 'transformers-llava-sp\[train\]'"
    ):
        load_conversations(tmp_path / "table.parquet")


def test_importing_the_package_does_not_import_datasets():
    code = "import sys, transformers_llava_sp.training; print('datasets' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# Worker processes


def ids_of(batch):
    return [example["id"] for example in batch]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_workers_give_every_record_once(tmp_path, num_workers, streaming):
    path = write_json(tmp_path / "data.jsonl", [{"id": i, "conversations": turns("a", "b")} for i in range(20)], True)
    dataset = load_conversations(path, streaming=streaming)
    loader = DataLoader(dataset, batch_size=3, num_workers=num_workers, collate_fn=ids_of)
    assert sorted(chain.from_iterable(loader), key=int) == [str(i) for i in range(20)]


def test_workers_share_the_shards_of_a_stream():
    rows = {"id": list(range(20)), "messages": [messages("a", "b")] * 20}
    source = datasets.Dataset.from_dict(rows).to_iterable_dataset(num_shards=4)
    loader = DataLoader(load_conversations(source), batch_size=3, num_workers=2, collate_fn=ids_of)
    assert sorted(chain.from_iterable(loader), key=int) == [str(i) for i in range(20)]


def test_error_of_a_worker_is_the_same(more_images, tmp_path, collator):
    """Which the data loader makes anew, of the class and the text. (A real worker takes five seconds to end then.)"""
    path = write_json(tmp_path / "data.json", [{**GOOD, "id": "cut", "image": "cut.png"}])
    dataset = load_conversations(path, more_images)
    try:
        collator([dataset[0]])
    except RecordError:
        raised = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(RecordError, match=r"Example 'cut': .*cut\.png"):
        raised.reraise()


def test_stream_shuffles_anew_in_each_epoch():
    rows = {"id": list(range(50)), "messages": [messages("a", "b")] * 50}
    source = datasets.Dataset.from_dict(rows).to_iterable_dataset().shuffle(seed=0, buffer_size=50)
    dataset = load_conversations(source)
    first = ids_of(dataset)
    assert ids_of(dataset) == first
    dataset.set_epoch(1)
    second = ids_of(dataset)
    assert second != first
    assert sorted(second) == sorted(first)


# Lengths


def text_records(lengths):
    return [{"id": i, "conversations": turns("a " * length, "b")} for i, length in enumerate(lengths)]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_long_records_are_dropped_and_counted(images, tmp_path, collator, warnings_of, streaming):
    records = [*text_records([5, 50, 20]), {**GOOD, "id": "image"}]
    path = write_json(tmp_path / "data.json", records)
    lengths = collator.num_tokens([to_example(record, images) for record in records])
    short = LlavaSPDataCollator(collator.processor, max_length=lengths[2])
    dataset = drop_long_records(load_conversations(path, images, streaming=streaming), short)
    assert ids_of(dataset) == ["0", "2"]
    assert warnings_of() == [f"{path}: dropped 2 of 4 records, which are longer than {lengths[2]} tokens."]
    assert short(list(dataset))["input_ids"].shape == (2, lengths[2])
    if not streaming:
        assert dataset.modality_lengths == [-lengths[0], -lengths[2]]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_nothing_is_said_where_nothing_is_dropped(images, tmp_path, collator, warnings_of, streaming):
    path = write_json(tmp_path / "data.json", llava_records())
    dataset = drop_long_records(load_conversations(path, images, streaming=streaming), collator)
    assert ids_of(dataset) == [name for name, _, _ in RECORDS]
    assert warnings_of() == []


def test_all_records_too_long(tmp_path, collator):
    path = write_json(tmp_path / "data.json", text_records([10]))
    with pytest.raises(TrainingDataError, match=r"has no record of at most 9 tokens; the shortest has \d+\. Raise"):
        drop_long_records(load_conversations(path), LlavaSPDataCollator(collator.processor, max_length=9))


def test_record_of_another_stage_is_named(tmp_path, collator):
    path = write_json(tmp_path / "data.json", text_records([10]))
    pretrain = LlavaSPDataCollator(collator.processor, stage="pretrain")
    with pytest.raises(RecordError, match=r"data\.json: Example '0' has 2 turns and 0 images"):
        drop_long_records(load_conversations(path), pretrain)


@pytest.mark.parametrize("source", ["LLaVA JSON", "table with bytes", "table with image paths", "shuffled table"])
@pytest.mark.parametrize("tiles", [False, True], ids=["one image", "tiles"])
def test_lengths_are_those_of_the_batches(images, tmp_path, collator, source, tiles):
    if tiles:
        processor = tiled_processor()
        processor.tokenizer.model_max_length = 8192
        collator = LlavaSPDataCollator(processor)
    dataset = drop_long_records(load_conversations(SOURCES[source](images, tmp_path), images), collator)
    lengths = [collator([example])["input_ids"].shape[1] for example in dataset]
    signs = [1 if paths else -1 for _, _, paths in RECORDS]
    assert dataset.modality_lengths == [length * sign for length, sign in zip(lengths, signs, strict=True)]
    assert dataset.select([1, 2]).modality_lengths == dataset.modality_lengths[1:3]
    assert ids_of(dataset.select([1, 2])) == ["second", "third"]


def test_lengths_are_unknown_before_they_are_measured(tmp_path):
    dataset = load_conversations(write_json(tmp_path / "data.json", text_records([1])))
    with pytest.raises(ValueError, match="call drop_long_records first"):
        dataset.modality_lengths  # noqa: B018


def test_trainers_sampler_groups_by_modality_and_length(images, tmp_path, collator):
    records = text_records(range(1, 33))
    records += [{**record(f"<image>{'a ' * i}", "b", image="a.png"), "id": 100 + i} for i in range(32)]
    path = write_json(tmp_path / "data.json", records)
    dataset = drop_long_records(load_conversations(path, images), collator)
    lengths, batch_size = dataset.modality_lengths, 4
    sampler = LengthGroupedSampler(batch_size, lengths=lengths, generator=torch.Generator().manual_seed(0))
    order = list(sampler)
    assert sorted(order) == list(range(64))
    batches = [order[start : start + batch_size] for start in range(0, 64, batch_size)]
    mixed = [batch for batch in batches if len({lengths[index] > 0 for index in batch}) > 1]
    # Four mega-batches of 16: within each, images come first. One step from images to text in each, one back between
    # two, and the longest example, which is taken to the front.
    assert len(mixed) <= 4 + 1
    spread = [max(abs(lengths[i]) for i in batch) - min(abs(lengths[i]) for i in batch) for batch in batches]
    unmixed = [width for width, batch in zip(spread, batches, strict=True) if batch not in mixed]
    assert sum(unmixed) / len(unmixed) < 32
