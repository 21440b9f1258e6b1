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
"""Batches to train on, of conversations: only the answers are learned"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import PIL.Image
import torch
from torch.nn.utils.rnn import pad_sequence

from ..processing_llava_sp import LlavaSPProcessor
from .data import RecordError, image_size, to_example


STAGES = ("pretrain", "finetune")
IGNORED = -100
IMAGE_INPUTS = ("pixel_values", "image_sizes")
# A caption follows its image and ends with a newline, and there is nothing else: LLaVA's pre-training, `plain` in the
# authors' code
CAPTION_CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- for part in message['content'] if part['type'] == 'image' %}
        {{- '<image>' }}
    {%- endfor %}
    {%- if message['role'] == 'assistant' %}
        {{- message['content'] | map(attribute='text') | join('') + '\\n' }}
    {%- endif %}
{%- endfor %}
"""
GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Of an image that only keeps the vision tower busy. It takes the fewest tokens where there are tiles.
DUMMY_IMAGE_SIZE = (16, 16)


class LlavaSPDataCollator:
    """
    Makes batches for training: text and images processed, padded on the right whatever side the tokenizer pads, and
    labels that leave out all but the answers and their end tokens.

    Args:
        processor ([`LlavaSPProcessor`]):
            The model's processor.
        max_length (`int`, *optional*):
            The longest example in tokens. Longer ones raise: leave them out with [`drop_long_records`] before.
            Defaults to `tokenizer.model_max_length`.
        stage (`str`, *optional*, defaults to `"finetune"`):
            `"finetune"` for conversations in the format of the chat template, or `"pretrain"` for captions: an image,
            its caption and a newline, of which the question is ignored and all behind the image learned.
        pad_to_multiple_of (`int`, *optional*):
            Pad the length of batches to a multiple of this, in tokens.
        chat_template (`str`, *optional*):
            The template of conversations, with `{% generation %}` and `{% endgeneration %}` around what is learned.
            Defaults to the processor's.
        dummy_image (`bool`, *optional*, defaults to `False`):
            Whether a batch without any image gets one, whose tokens stand in the padding, where nothing sees them.
            The loss stays as it is, and the gradients of tower and projector are zero instead of missing. Processes
            that train together need it, as each waits for all others in every module.
        return_ids (`bool`, *optional*, defaults to `False`):
            Whether batches have the examples' `ids`, which no model takes.

    Raises:
        ValueError: If the stage is unknown, the chat template does not mark what is learned, there is no padding
            token, or `max_length` is more than the tokenizer allows.

    Example:

    ```python
    >>> from transformers import AutoProcessor
    >>> from transformers_llava_sp.training import LlavaSPDataCollator, load_conversations

    >>> dataset = load_conversations("conversations.json", image_folder="images")
    >>> collator = LlavaSPDataCollator(AutoProcessor.from_pretrained("path/to/llava-sp"))
    >>> batch = collator([dataset[0], dataset[1]])
    ```"""

    def __init__(
        self,
        processor: LlavaSPProcessor,
        max_length: int | None = None,
        stage: str = "finetune",
        pad_to_multiple_of: int | None = None,
        chat_template: str | None = None,
        dummy_image: bool = False,
        return_ids: bool = False,
    ):
        tokenizer = processor.tokenizer
        if stage not in STAGES:
            raise ValueError(f"Unknown stage {stage!r}: expected one of {', '.join(STAGES)}.")
        if max_length is None:
            max_length = tokenizer.model_max_length
        elif max_length > tokenizer.model_max_length:
            raise ValueError(
                f"`max_length` is {max_length}, but the model takes at most {tokenizer.model_max_length} tokens "
                "(tokenizer.model_max_length)."
            )
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no padding token: set tokenizer.pad_token, to its unk_token for example."
            )
        if stage == "pretrain":
            chat_template = CAPTION_CHAT_TEMPLATE.replace("<image>", processor.image_token)
        elif chat_template is None:
            chat_template = processor.chat_template
            if isinstance(chat_template, Mapping):
                chat_template = chat_template.get("default")
        if stage == "finetune" and (chat_template is None or not GENERATION_MARK.search(chat_template)):
            raise ValueError(
                "The chat template does not say which tokens are the answers: it has no {% generation %}. Write "
                "{% generation %} and {% endgeneration %} around an answer and its end token, and pass the template "
                "as `chat_template`; or train on the conversations of Vicuna, with "
                "chat_template=VICUNA_V1_CHAT_TEMPLATE of transformers_llava_sp.processing_llava_sp."
            )
        self.processor = processor
        self.max_length = max_length
        self.stage = stage
        self.pad_to_multiple_of = pad_to_multiple_of
        self.chat_template = chat_template
        self.dummy_image = dummy_image
        self.return_ids = return_ids
        # Between an image and its caption, such as InternVL's `</img>`. A space is part of the caption.
        suffix = processor.image_suffix.strip()
        self._num_suffix_tokens = len(tokenizer(suffix, add_special_tokens=False)["input_ids"]) if suffix else 0
        self._dummy: dict[str, Any] | None = None

    @property
    def has_tiles(self) -> bool:
        """`bool`: Whether an image's number of tokens depends on its size."""
        return hasattr(self.processor.image_processor, "image_grid_pinpoints")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Make a batch.

        Args:
            examples (`Sequence[dict]`): Examples as [`load_conversations`] gives them, or raw records with
                `messages` and `images`, or `conversations` and `image`.

        Returns:
            `dict[str, Any]`: `input_ids`, `attention_mask` and `labels` of shape `(examples, longest)`; where there
            are images, `pixel_values` of shape `(images, channels, height, width)`, or with tiles `(images, tiles,
            channels, height, width)` and `image_sizes` of shape `(images, 2)`; `position_ids` beside a dummy image;
            `ids` if asked for.

        Raises:
            RecordError: If an example cannot be trained on, or is longer than `max_length`.
        """
        rows = [self._encode(self._check(example, open_images=True)) for example in examples]
        dummy = self._make_dummy() if self.dummy_image and not any("pixel_values" in row for row in rows) else None
        lengths = [len(row["input_ids"]) for row in rows]
        longest = max(lengths)
        if dummy is not None:
            longest = max(longest, math.ceil((sum(lengths) + dummy["num_tokens"]) / len(rows)))
        longest += -longest % (self.pad_to_multiple_of or 1)
        batch: dict[str, Any] = {
            "input_ids": pad([row["input_ids"] for row in rows], longest, self.processor.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(row["input_ids"]) for row in rows], longest, 0),
            "labels": pad([row["labels"] for row in rows], longest, IGNORED),
        }
        if dummy is not None:
            padding = (batch["attention_mask"] == 0).flatten().nonzero().flatten()
            batch["input_ids"].view(-1)[padding[: dummy["num_tokens"]]] = self.processor.image_token_id
            # The padding must not look like a text of more positions than the model has
            batch["position_ids"] = batch["attention_mask"].cumsum(-1) - 1
            rows = [dummy]
        with_images = [row for row in rows if "pixel_values" in row]
        if with_images:
            batch["pixel_values"] = stack_images([image for row in with_images for image in row["pixel_values"]])
            if "image_sizes" in with_images[0]:
                batch["image_sizes"] = torch.cat([row["image_sizes"] for row in with_images])
        if self.return_ids:
            batch["ids"] = [str(example.get("id", "")) for example in examples]
        return batch

    def num_tokens(self, examples: Iterable[Mapping[str, Any]]) -> list[int]:
        """
        How long examples are, without opening their images. Only with tiles, images are opened to read their sizes.

        Args:
            examples (`Iterable[dict]`): The examples.

        Returns:
            `list[int]`: The length of each in tokens, those of images included.

        Raises:
            RecordError: If an example cannot be trained on in this stage.
        """
        processor = self.processor
        frame = processor.image_prefix + processor.image_token + processor.image_suffix
        texts, num_more = [], []
        for example in examples:
            messages = self._check(example, open_images=False)["messages"]
            images = [part for turn in messages for part in turn["content"] if part["type"] == "image"]
            sizes = [image_size(part) if self.has_tiles else None for part in images]
            num_more.append(sum(processor.get_image_layout(size).num_tokens - 1 for size in sizes))
            bare = [
                {
                    "role": turn["role"],
                    "content": [{"type": "image"} if part["type"] == "image" else part for part in turn["content"]],
                }
                for turn in messages
            ]
            text = processor.apply_chat_template(bare, chat_template=self.chat_template)
            texts.append(text.replace(processor.image_token, frame))
        bos_token = processor.tokenizer.bos_token
        # As the processor does with messages
        add_special_tokens = bos_token is None or not all(text.startswith(bos_token) for text in texts)
        encoded = processor.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return [len(input_ids) + more for input_ids, more in zip(encoded, num_more, strict=True)]

    def _check(self, example: Mapping[str, Any], open_images: bool) -> dict[str, Any]:
        """The example, made of the record where it is one, once it is found to fit the stage."""
        if not {"messages", "conversations"} & example.keys():
            raise ValueError(
                f"An example has only {', '.join(map(repr, example)) or 'nothing'}, expected 'messages'. Trainer "
                "removes what the model does not take: pass remove_unused_columns=False in TrainingArguments."
            )
        name = f"Example {str(example.get('id', ''))!r}"
        try:
            example = to_example(example, open_images=open_images)
        except RecordError as error:
            raise error.at(name) from error
        if self.stage == "pretrain":
            roles = [turn["role"] for turn in example["messages"]]
            num_images = sum(part["type"] == "image" for turn in example["messages"] for part in turn["content"])
            if roles != ["user", "assistant"] or num_images != 1:
                raise RecordError(
                    f"{name} has {len(roles)} turns and {num_images} images. The pre-training stage learns "
                    "captions: expected one image with one answer.",
                    reason="no caption",
                )
        return example

    def _encode(self, example: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The model's inputs and the labels of one example, without a dimension for the batch."""
        processor, name = self.processor, f"Example {example['id']!r}"
        try:
            # Without any padding, which would stay behind in the tokenizer
            inputs = processor.apply_chat_template(
                example["messages"],
                chat_template=self.chat_template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=self.stage == "finetune",
            )
        except Exception as error:  # of images, templates and lengths
            raise RecordError(f"{name}: {error}") from error
        input_ids = torch.tensor(inputs["input_ids"][0])
        if len(input_ids) > self.max_length:
            raise RecordError(
                f"{name} has {len(input_ids)} tokens, but `max_length` is {self.max_length}. Leave out long "
                "records with drop_long_records, or raise `max_length`.",
                reason="too long",
            )
        is_image = input_ids == processor.image_token_id
        if self.stage == "finetune":
            is_learned = torch.tensor(inputs["assistant_masks"][0]).bool()
        else:
            is_learned = torch.arange(len(input_ids)) > is_image.nonzero().max() + self._num_suffix_tokens
        if not is_learned[1:].any():
            raise RecordError(
                f"{name} has no token to learn: the chat template marks none of it.", reason="empty answer"
            )
        row = {"input_ids": input_ids, "labels": torch.where(is_learned, input_ids, IGNORED)}
        for key in IMAGE_INPUTS:
            if key in inputs:
                row[key] = torch.stack([torch.as_tensor(image) for image in inputs[key]])
        return row

    def _make_dummy(self) -> dict[str, Any]:
        """An image's inputs and number of tokens."""
        if self._dummy is None:
            inputs = self.processor(
                text=self.processor.image_token, images=PIL.Image.new("RGB", DUMMY_IMAGE_SIZE), return_tensors="pt"
            )
            self._dummy = {
                "num_tokens": int((inputs["input_ids"] == self.processor.image_token_id).sum()),
                **{key: inputs[key] for key in IMAGE_INPUTS if key in inputs},
            }
        return self._dummy


def pad(rows: list[torch.Tensor], length: int, value: int) -> torch.Tensor:
    """Rows of token ids in one tensor of shape `(rows, length)`, with the value behind shorter ones."""
    return torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=value) for row in rows])


def stack_images(images: list[torch.Tensor]) -> torch.Tensor:
    """
    Images in one tensor. Those in tiles get empty ones behind theirs, up to the most of any, as Transformers does.

    Args:
        images (`list[torch.Tensor]`): Each of shape `(channels, height, width)` or `(tiles, channels, height, width)`.

    Returns:
        `torch.Tensor`: The images, stacked.
    """
    return pad_sequence(images, batch_first=True) if images[0].ndim == 4 else torch.stack(images)
