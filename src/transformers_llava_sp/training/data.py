# Copyright 2026 The transformers-llava-sp authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Conversations to train on: LLaVA's JSON, and data sets of the `datasets` library with messages and images, checked
record by record
"""

import io
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import PIL.ImageOps
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers.utils import logging
from transformers.utils.logging import tqdm


if TYPE_CHECKING:
    from .collator import LlavaSPDataCollator

logger = logging.get_logger(__name__)

# Where an image stands in the text of a record, whatever the tokenizer calls it
IMAGE_SLOT = "<image>"
# A record's list of turns -> the keys of a turn's speaker and of what is said, that of the record's images, and roles
FORMS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "conversations": ("from", "value", "image", {"human": "user", "gpt": "assistant"}),
    "messages": ("role", "content", "images", {"system": "system", "user": "user", "assistant": "assistant"}),
}
# Where a part of the content has its image, in the order in which Transformers looks
IMAGE_KEYS = ("image", "url", "path")
EXIF_ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
BATCH_SIZE = 256


class TrainingDataError(ValueError):
    """Data that cannot be trained on. The message says which, what was expected, and what to do."""


class RecordError(TrainingDataError):
    """
    A record that cannot be trained on.

    Args:
        message (`str`): What was found and what was expected.
        reason (`str`, *optional*, defaults to `"bad"`): What kind of problem it is, in a few words, by which skipped
            records are counted. It has a default because PyTorch's data loader makes the error of a worker process
            anew, from its message alone.
    """

    def __init__(self, message: str, reason: str = "bad"):
        super().__init__(message)
        self.reason = reason

    def at(self, place: str) -> "RecordError":
        """The same error, with the place of the record in front."""
        return RecordError(f"{place}: {self}", self.reason)


def import_datasets() -> Any:
    """The `datasets` library, which only some sources need."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "Data other than JSON need the `datasets` library: pip install 'transformers-llava-sp[train]'."
        ) from error
    return datasets


def present(part: Mapping[str, Any]) -> dict[str, Any]:
    """What a part of the content has: a table has every key in every row, most of them empty."""
    return {key: value for key, value in part.items() if value is not None}


def split_content(content: Any) -> tuple[list[Any], str]:
    """
    What one turn shows and says.

    Args:
        content (`str` or `list[dict]`): Text with `<image>` where an image stands, or parts of Transformers' form.

    Returns:
        `tuple[list, str]`: The images, `None` for each that the record has elsewhere, and the text. Beside images it
        is stripped, as the authors do.
    """
    images: list[Any] = []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
        raise RecordError(
            f"a turn has a content of type {type(content).__name__}, expected text or parts.", reason="malformed turn"
        )
    texts = []
    for part in map(present, parts):
        kind = part.get("type")
        if kind == "image":
            found = [part[key] for key in IMAGE_KEYS if key in part]
            images.append(found[0] if found else None)
        elif kind == "text" and isinstance(part.get("text"), str):
            images += [None] * part["text"].count(IMAGE_SLOT)
            texts.append(part["text"].replace(IMAGE_SLOT, ""))
        else:
            raise RecordError(
                f"a turn has a part {shorten(part)}, expected one of type 'text' or 'image'.", reason="malformed turn"
            )
    text = "".join(texts)
    return images, text.strip() if images else text


def shorten(value: Any) -> str:
    """What a message shows of a value, which may be a whole image."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def image_part(image: Any, image_folder: str | PathLike | None) -> dict[str, Any]:
    """
    An image as a part of the content. One that is stored as bytes, with or without a path, stays as it is.

    Args:
        image (`str`, `PathLike`, `dict` or `PIL.Image.Image`): A file's path, what `datasets` stores, or the image.
        image_folder (`str` or `PathLike`, *optional*): What paths are relative to.
    """
    if isinstance(image, PIL.Image.Image):
        return {"type": "image", "image": image}
    if isinstance(image, Mapping):
        if image.get("bytes") is not None:
            return {"type": "image", "image": dict(image)}
        image = image.get("path")
    if not isinstance(image, (str, PathLike)):
        raise RecordError(
            f"an image is given by {shorten(image)}, expected the path of a file, the bytes of one, or a PIL image.",
            reason="missing image",
        )
    path = os.path.join(image_folder or "", image)
    if not os.path.isfile(path):
        raise RecordError(
            f"the image {path} is missing. Check the image folder, which paths are relative to.",
            reason="missing image",
        )
    return {"type": "image", "path": path}


def stored_image(stored: Mapping[str, Any]) -> PIL.Image.Image:
    """An image that `datasets` stores as bytes, undecoded."""
    return PIL.Image.open(io.BytesIO(stored["bytes"]))


def open_image(part: Mapping[str, Any]) -> PIL.Image.Image:
    """
    The image of a part, decoded and turned upright as Transformers and `datasets` do with files.

    Args:
        part (`dict`): A part of type `"image"`.

    Raises:
        RecordError: If it cannot be decoded.
    """
    name = part.get("path", "of the record")
    try:
        if "path" in part:
            image = PIL.ImageOps.exif_transpose(PIL.Image.open(part["path"]))
        elif isinstance(part["image"], Mapping):
            name = part["image"].get("path") or name
            image = PIL.ImageOps.exif_transpose(stored_image(part["image"]))
        else:
            image = part["image"]
        image.load()
    except Exception as error:  # decoders raise anything from OSError to SyntaxError
        raise RecordError(
            f"the image {name} cannot be read, {type(error).__name__}: {shorten(str(error))}. Replace it, or leave "
            "the record out.",
            reason="broken image",
        ) from error
    return image


def image_size(part: Mapping[str, Any]) -> tuple[int, int]:
    """
    The size of an image without decoding it.

    Args:
        part (`dict`): A part of type `"image"`.

    Returns:
        `tuple[int, int]`: (height, width) in pixels, once it is turned upright.
    """
    if isinstance(part.get("image"), PIL.Image.Image):
        width, height = part["image"].size
        return height, width
    try:
        with PIL.Image.open(part["path"]) if "path" in part else stored_image(part["image"]) as image:
            width, height = image.size
            sideways = image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS
    except Exception:
        # The error that decoding gives says more
        height, width = open_image(part).size[::-1]
        sideways = False
    return (width, height) if sideways else (height, width)


def to_example(
    record: Any, image_folder: str | PathLike | None = None, open_images: bool = True, default_id: str = ""
) -> dict[str, Any]:
    """
    A record as an example to train on, checked. An example is one already and comes back the same.

    Args:
        record (`dict`): With `conversations` and `image` as in LLaVA's JSON, or with `messages` and `images`.
        image_folder (`str` or `PathLike`, *optional*): What the paths of images are relative to.
        open_images (`bool`, *optional*, defaults to `True`): Whether to decode images that are stored as bytes.
        default_id (`str`, *optional*, defaults to `""`): The id of a record that has none.

    Returns:
        `dict[str, Any]`: With `id` and `messages`, whose contents are the images first, each as `{"type": "image",
        "path": ...}` or `{"type": "image", "image": ...}`, then the text.

    Raises:
        RecordError: If the record cannot be trained on.
    """
    if not isinstance(record, Mapping):
        raise RecordError(f"it is a {type(record).__name__}, expected an object.", reason="malformed record")
    form = next((form for form in FORMS if record.get(form) is not None), None)
    if form is None:
        raise RecordError(
            f"it has neither 'conversations' nor 'messages', but {', '.join(map(repr, record)) or 'nothing'}.",
            reason="malformed record",
        )
    speaker, said, images_key, roles = FORMS[form]
    turns = record[form]
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise RecordError(
            f"{form!r} is a {type(turns).__name__}, expected a list of turns.", reason="malformed record"
        )
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not {speaker, said} <= turn.keys():
            raise RecordError(
                f"a turn is {shorten(turn)}, expected an object with {speaker!r} and {said!r}.",
                reason="malformed turn",
            )
        role = turn[speaker]
        if not isinstance(role, str) or role not in roles:
            raise RecordError(
                f"a turn is from {role!r}, expected {' or '.join(map(repr, roles))}.", reason="unknown role"
            )
        messages.append({"role": roles[role], "content": turn[said]})
    check_roles(messages)

    given = record.get(images_key)
    if not isinstance(given, (list, tuple)):
        given = [given] if given else []
    unused = iter(given)
    num_slots = 0
    for message in messages:
        images, text = split_content(message["content"])
        if images and message["role"] != "user":
            raise RecordError(
                f"the {message['role']}'s turn has an image: only questions have images. Where the text only speaks "
                f"of {IMAGE_SLOT}, write it otherwise.",
                reason="image outside a question",
            )
        if not text.strip() and not images:
            what = "answer" if message["role"] == "assistant" else "question"
            raise RecordError(f"a turn of the {message['role']} is empty: it needs a text.", reason=f"empty {what}")
        num_slots += images.count(None)
        images = [next(unused, None) if image is None else image for image in images]
        message["content"] = [*images, {"type": "text", "text": text}]
    if num_slots != len(given):
        raise RecordError(
            f"it has {num_slots} {IMAGE_SLOT} slots, but {len(given)} images. Each image needs one slot in the "
            "questions, where it belongs.",
            reason="images and slots differ",
        )
    for message in messages:
        *images, text = message["content"]
        parts = [image_part(image, image_folder) for image in images]
        if open_images:
            parts = [
                {"type": "image", "image": open_image(part)} if isinstance(part.get("image"), Mapping) else part
                for part in parts
            ]
        message["content"] = [*parts, text]
    record_id = record.get("id")
    return {"id": default_id if record_id is None else str(record_id), "messages": messages}


def check_roles(messages: list[dict[str, Any]]) -> None:
    """
    Raise a `RecordError` unless questions and answers alternate. An answer before the first question is removed from
    the messages, as the authors do.
    """
    first = 1 if messages and messages[0]["role"] == "system" else 0
    if len(messages) > first and messages[first]["role"] == "assistant":
        del messages[first]
    turns = messages[first:]
    for number, message in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if message["role"] != expected:
            raise RecordError(
                f"turn {number} is the {message['role']}'s, expected the {expected}'s: questions and answers must "
                "alternate.",
                reason="roles do not alternate",
            )
    if not turns:
        raise RecordError("it has no question with an answer, so there is nothing to learn.", reason="no answer")
    if len(turns) % 2:
        raise RecordError("its last question has no answer.", reason="no answer")


class JsonRecords:
    """
    The records of a JSON file: a list of objects, or one object on each line.

    Args:
        path (`Path`): The file.
        streaming (`bool`): Whether to read it anew each time, line by line where it has lines, instead of keeping it.
            Kept records stay encoded, in one piece of memory, which worker processes share.
    """

    def __init__(self, path: Path, streaming: bool):
        self.path = path
        self.name = str(path)
        self._encoded, self._ends = bytearray(), array("q", [0])
        if not streaming:
            for record in self._read():
                self._encoded += json.dumps(record).encode()
                self._ends.append(len(self._encoded))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        return json.loads(self._encoded[self._ends[index] : self._ends[index + 1]])

    def outlines(self) -> Iterator[Any]:
        """All records in order, without what takes long to read."""
        return map(self.__getitem__, range(len(self)))

    def stream(self) -> Iterator[tuple[int, Any]]:
        """The index of each record and the record, of those that fall to this worker process of the data loader."""
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        return islice(enumerate(self._read()), first, None, step)

    def _read(self) -> Iterator[Any]:
        place = self.name
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                is_first = True
                for number, line in enumerate(file, start=1):
                    if is_first and line.lstrip().startswith("["):
                        yield from json.loads(line + file.read())
                    elif line.strip():
                        place, is_first = f"Line {number} of {self.name}", False
                        yield json.loads(line)
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingDataError(f"{self.name} cannot be read: {error}.") from error
        except json.JSONDecodeError as error:
            raise TrainingDataError(
                f"{place} is not JSON: {error}. Expected a list of records, or one record on each line."
            ) from error


class TableRecords:
    """
    The records of a data set of the `datasets` library.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The data set.
        name (`str`): What messages call it.
        streaming (`bool`): Whether it is an iterable one.
    """

    def __init__(self, dataset: Any, name: str, streaming: bool):
        self.name = name
        columns = dataset.column_names
        # An iterable data set may not know its columns before it is read
        if columns is not None:
            form = next((form for form in FORMS if form in columns), None)
            if form is None:
                raise TrainingDataError(
                    f"{name} has the columns {', '.join(columns)}: expected 'messages' and 'images', or "
                    "'conversations' and 'image' as in LLaVA's JSON."
                )
            columns = [column for column in ("id", form, FORMS[form][2]) if column in columns]
            dataset = dataset.select_columns(columns)
        dataset = dataset.with_format(None)
        if streaming:
            # Images are decoded here, so that an error names the record
            self._rows = dataset.decode(False) if dataset.features else dataset
        else:
            images = [column for column in columns if column in ("image", "images")]
            self._rows = dataset.remove_columns(images)
            # In Arrow's form, images are neither decoded nor, unless they are looked at, read
            self._images = dataset.select_columns(images).with_format("arrow") if images else None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        images = {} if self._images is None else self._images[index].to_pylist()[0]
        return {**self._rows[index], **images}

    def outlines(self) -> Iterator[Any]:
        """All records in order, without what takes long to read: images that are stored as bytes have none."""
        if self._images is None:
            yield from self._rows
            return
        [column] = self._images.column_names
        batches = self._images.iter(BATCH_SIZE)
        images = (row for batch in batches for row in image_outlines(batch[column]))
        for row, row_images in zip(self._rows, images, strict=True):
            yield {**row, column: row_images}

    def stream(self) -> Iterator[tuple[int, Any]]:
        """The index of each record and the record, of those that fall to this worker process of the data loader."""
        return enumerate(self._rows)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle otherwise, where the data set is shuffled."""
        self._rows.set_epoch(epoch)


def image_outlines(column: Any) -> list[Any]:
    """
    A column of images without their bytes.

    Args:
        column (`pyarrow.ChunkedArray`): Images, or lists of them, each a path or a struct of `bytes` and `path`.

    Returns:
        `list`: The same as Python objects, with `b""` for all bytes.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.compute  # type: ignore[import-untyped]

    rows: list[Any] = []
    for chunk in column.chunks:
        if hasattr(chunk, "value_lengths"):
            values = iter(image_outlines(pyarrow.chunked_array([chunk.flatten()])))
            rows += [list(islice(values, length or 0)) for length in chunk.value_lengths().to_pylist()]
        elif pyarrow.types.is_struct(chunk.type):
            stored = pyarrow.compute.is_valid(pyarrow.compute.struct_field(chunk, "bytes")).to_pylist()
            paths = pyarrow.compute.struct_field(chunk, "path").to_pylist()
            rows += [{"bytes": b"" if has else None, "path": path} for has, path in zip(stored, paths, strict=True)]
        else:
            rows += chunk.to_pylist()
    return rows


Records = JsonRecords | TableRecords


def read_example(
    records: Records, index: int, record: Any, image_folder: str | PathLike | None, open_images: bool
) -> dict[str, Any]:
    """A record as an example; an error says which record it is."""
    try:
        return to_example(record, image_folder, open_images, default_id=str(index))
    except RecordError as error:
        raise error.at(describe(records, index, record)) from error


def describe(records: Records, index: int, record: Any) -> str:
    """How messages name a record."""
    record_id = record.get("id") if isinstance(record, Mapping) else None
    return f"{records.name}, record {index}" + ("" if record_id is None else f" (id {record_id!r})")


def decode_images(records: Records, index: int, example: dict[str, Any]) -> None:
    """Decode all images of an example and let them go. Raises a `RecordError` where one is broken."""
    try:
        for message in example["messages"]:
            for part in message["content"]:
                if part["type"] == "image":
                    open_image(part)
    except RecordError as error:
        raise error.at(f"{records.name}, record {index} (id {example['id']!r})") from error


def warn_skipped(name: str, skipped: Counter, num_records: int) -> None:
    """Say how many records were left out, and why."""
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        logger.warning(f"{name}: skipped {skipped.total()} of {num_records} records, which are bad: {reasons}.")


def warn_dropped(name: str, num_dropped: int, num_records: int, max_length: int) -> None:
    """Say how many records were left out as too long."""
    if num_dropped:
        logger.warning(
            f"{name}: dropped {num_dropped} of {num_records} records, which are longer than {max_length} tokens."
        )


class ConversationDataset(Dataset):
    """
    Conversations with random access. Made by [`load_conversations`]; each example is a `dict` with `id` and
    `messages`, see [`to_example`].

    Args:
        records ([`JsonRecords`] or [`TableRecords`]): The records.
        kept (`Sequence[int]`): The indices of the records that are examples, in growing order.
        image_folder (`str` or `PathLike`, *optional*): What the paths of images are relative to.
        lengths (`Sequence[int]`, *optional*): The examples' lengths in tokens, negative for those without images.
    """

    def __init__(
        self,
        records: Records,
        kept: Sequence[int],
        image_folder: str | PathLike | None = None,
        lengths: Sequence[int] | None = None,
    ):
        self.records = records
        self.image_folder = image_folder
        # One piece of memory, which worker processes share
        self._kept = array("q", kept)
        self._lengths = None if lengths is None else array("q", lengths)

    @property
    def name(self) -> str:
        """`str`: The file or data set."""
        return self.records.name

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self._kept[index]
        return read_example(self.records, number, self.records[number], self.image_folder, open_images=True)

    def outlines(self, with_images: bool = False) -> Iterator[dict[str, Any]]:
        """
        All examples in order, of which no image is decoded.

        Args:
            with_images (`bool`, *optional*, defaults to `False`): Whether images that are stored as bytes are read, so
                that their sizes can be told.
        """
        if with_images:
            numbered: Iterable[tuple[int, Any]] = ((number, self.records[number]) for number in self._kept)
        else:
            kept = set(self._kept)
            numbered = ((number, record) for number, record in enumerate(self.records.outlines()) if number in kept)
        for number, record in numbered:
            yield read_example(self.records, number, record, self.image_folder, open_images=False)

    @property
    def modality_lengths(self) -> list[int]:
        """
        `list[int]`: The length of each example in tokens, negative for those without images. Given to Transformers'
        `LengthGroupedSampler`, examples of one kind and of about one length come together.
        """
        if self._lengths is None:
            raise ValueError(f"The lengths of the records of {self.name} are not known: call drop_long_records first.")
        return self._lengths.tolist()

    def select(self, indices: Sequence[int], lengths: Sequence[int] | None = None) -> "ConversationDataset":
        """
        Some of the examples.

        Args:
            indices (`Sequence[int]`): Their indices here, in growing order.
            lengths (`Sequence[int]`, *optional*): Their lengths, as in `modality_lengths`.
        """
        if lengths is None and self._lengths is not None:
            lengths = [self._lengths[index] for index in indices]
        return ConversationDataset(self.records, [self._kept[index] for index in indices], self.image_folder, lengths)


class StreamedConversationDataset(IterableDataset):
    """
    Conversations in their own order, which are read and checked as they come. Made by [`load_conversations`]; each
    example is a `dict` with `id` and `messages`, see [`to_example`].

    Args:
        records ([`JsonRecords`] or [`TableRecords`]): The records.
        image_folder (`str` or `PathLike`, *optional*): What the paths of images are relative to.
        skip_bad_records (`bool`, *optional*, defaults to `False`): Whether to leave out records that cannot be trained
            on, with a warning at the end, instead of raising.
        check_images (`bool`, *optional*, defaults to `False`): Whether to decode images, so that broken ones are found
            here.
        collator ([`LlavaSPDataCollator`], *optional*): Leaves out the records that are too long for it.
        repeat (`bool`, *optional*, defaults to `False`): Whether to begin anew at the end, without end. Trainer, which
            does not know how long a stream is, resumes a run from its first pass only.
    """

    def __init__(
        self,
        records: Records,
        image_folder: str | PathLike | None = None,
        skip_bad_records: bool = False,
        check_images: bool = False,
        collator: "LlavaSPDataCollator | None" = None,
        repeat: bool = False,
    ):
        self.records = records
        self.image_folder = image_folder
        self.skip_bad_records = skip_bad_records
        self.check_images = check_images
        self.collator = collator
        self.repeat = repeat

    @property
    def name(self) -> str:
        """`str`: The file or data set."""
        return self.records.name

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in count(1):
            is_empty = True
            for example in self._read(with_warnings=number == 1):
                is_empty = False
                yield example
            if is_empty or not self.repeat:
                return
            self.set_epoch(number)

    def _read(self, with_warnings: bool) -> Iterator[dict[str, Any]]:
        """One pass over the records, after which a warning says what was left out."""
        skipped: Counter[str] = Counter()
        num_records = num_dropped = 0
        for index, record in self.records.stream():
            num_records += 1
            try:
                example = read_example(self.records, index, record, self.image_folder, open_images=True)
                if self.check_images:
                    decode_images(self.records, index, example)
                if self.collator is not None and self.collator.num_tokens([example])[0] > self.collator.max_length:
                    num_dropped += 1
                    continue
            except RecordError as error:
                if not self.skip_bad_records:
                    raise
                skipped[error.reason] += 1
                continue
            yield example
        if not with_warnings:
            return
        warn_skipped(self.name, skipped, num_records)
        if self.collator is not None:
            warn_dropped(self.name, num_dropped, num_records, self.collator.max_length)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle otherwise in each epoch, where the data set is shuffled at all."""
        if isinstance(self.records, TableRecords):
            self.records.set_epoch(epoch)


def load_conversations(
    source: Any,
    image_folder: str | PathLike | None = None,
    split: str = "train",
    streaming: bool = False,
    skip_bad_records: bool = False,
    check_images: bool = False,
) -> ConversationDataset | StreamedConversationDataset:
    """
    Load conversations to train on, and check each record.

    Args:
        source (`str`, `PathLike`, `datasets.Dataset` or `datasets.IterableDataset`):
            A JSON file, as a list or with one record on each line; a folder that `save_to_disk` of `datasets` wrote;
            any file, folder or Hub id that `datasets.load_dataset` takes; or a data set. Records have `conversations`
            and `image` as in LLaVA's JSON, or `messages` and `images`.
        image_folder (`str` or `PathLike`, *optional*):
            What the paths of images are relative to.
        split (`str`, *optional*, defaults to `"train"`):
            Which part of a data set to take. JSON files have only one.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read and check records as they are needed. A JSON file that is a list is still read whole.
        skip_bad_records (`bool`, *optional*, defaults to `False`):
            Whether to leave out records that cannot be trained on, with a warning that counts them by reason, instead
            of raising.
        check_images (`bool`, *optional*, defaults to `False`):
            Whether to decode all images now. Otherwise it is only checked that they exist, and a broken one is found
            when it is trained on, which ends the training.

    Returns:
        [`ConversationDataset`] or, with `streaming=True`, [`StreamedConversationDataset`].

    Raises:
        TrainingDataError: If the source cannot be read or has no record to train on.
        RecordError: If a record cannot be trained on, unless `skip_bad_records=True`. With `streaming=True` it is
            raised when the record's turn comes.
    """
    records, streaming = open_source(source, split, streaming)
    if streaming:
        return StreamedConversationDataset(records, image_folder, skip_bad_records, check_images)

    kept: list[int] = []
    skipped: Counter[str] = Counter()
    bar = tqdm(records.outlines(), total=len(records), desc="Checking the records", unit="record")
    for index, outline in enumerate(bar):
        try:
            example = read_example(records, index, outline, image_folder, open_images=False)
            if check_images:
                record = records[index] if isinstance(records, TableRecords) else outline
                example = read_example(records, index, record, image_folder, open_images=False)
                decode_images(records, index, example)
        except RecordError as error:
            if not skip_bad_records:
                raise
            skipped[error.reason] += 1
            continue
        kept.append(index)
    warn_skipped(records.name, skipped, len(records))
    if not kept:
        raise TrainingDataError(f"{records.name} has no record to train on, of {len(records)}.")
    return ConversationDataset(records, kept, image_folder)


def open_source(source: Any, split: str, streaming: bool) -> tuple[Records, bool]:
    """The records of a source, and whether they can only be streamed."""
    if not isinstance(source, (str, PathLike)):
        datasets = import_datasets()
        if not isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
            raise TrainingDataError(
                f"The data are a {type(source).__name__}, expected a path, a Hub id, or a data set with one split of "
                "the `datasets` library."
            )
        if streaming and isinstance(source, datasets.Dataset):
            source = source.to_iterable_dataset()
        streaming = isinstance(source, datasets.IterableDataset)
        return TableRecords(source, "the data set", streaming), streaming

    name, path = fspath(source), Path(source)
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise TrainingDataError(f"{name} is missing: expected a JSON file with conversations.")
        return JsonRecords(path, streaming), streaming
    datasets = import_datasets()
    try:
        if path.is_dir() and any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            dataset = datasets.load_from_disk(name)
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset[split]
            if streaming:
                dataset = dataset.to_iterable_dataset()
        elif path.is_file():
            builder = path.suffix.removeprefix(".")
            dataset = datasets.load_dataset(builder, data_files=name, split="train", streaming=streaming)
        else:
            dataset = datasets.load_dataset(name, split=split, streaming=streaming)
    except Exception as error:  # of files, formats, names and networks, each library has its own
        raise TrainingDataError(
            f"{name} cannot be loaded, {type(error).__name__}: {error} Expected a JSON file, or a data set on this "
            f"machine or on the Hub that has the split {split!r}."
        ) from error
    return TableRecords(dataset, name, streaming), streaming


def drop_long_records(
    dataset: ConversationDataset | StreamedConversationDataset, collator: "LlavaSPDataCollator"
) -> ConversationDataset | StreamedConversationDataset:
    """
    Leave out the records that are too long for training, with a warning that counts them: cut off, they would teach
    something else. Nothing is decoded for it, but with image tiles the header of every image is read.

    Args:
        dataset ([`ConversationDataset`] or [`StreamedConversationDataset`]): The records.
        collator ([`LlavaSPDataCollator`]): What makes batches of them; its `max_length` counts.

    Returns:
        [`ConversationDataset`] or [`StreamedConversationDataset`]: The others. The former knows its
        `modality_lengths`; the latter drops and counts records as they come.

    Raises:
        TrainingDataError: If all are too long.
        RecordError: If one is no record for the collator's stage.
    """
    if isinstance(dataset, StreamedConversationDataset):
        return StreamedConversationDataset(
            dataset.records,
            dataset.image_folder,
            dataset.skip_bad_records,
            dataset.check_images,
            collator,
            dataset.repeat,
        )
    lengths: list[int] = []
    outlines = dataset.outlines(with_images=collator.has_tiles)
    with tqdm(total=len(dataset), desc="Measuring the records", unit="record") as bar:
        while batch := list(islice(outlines, BATCH_SIZE)):
            try:
                batch_lengths = collator.num_tokens(batch)
            except RecordError as error:
                raise error.at(dataset.name) from error
            for example, length in zip(batch, batch_lengths, strict=True):
                has_image = any(part["type"] == "image" for turn in example["messages"] for part in turn["content"])
                lengths.append(length if has_image else -length)
            bar.update(len(batch))
    kept = [index for index, length in enumerate(lengths) if abs(length) <= collator.max_length]
    warn_dropped(dataset.name, len(lengths) - len(kept), len(lengths), collator.max_length)
    if not kept:
        raise TrainingDataError(
            f"{dataset.name} has no record of at most {collator.max_length} tokens; the shortest has "
            f"{min(map(abs, lengths))}. Raise the maximum length."
        )
    return dataset.select(kept, [lengths[index] for index in kept])
