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
"""Processor class for LLaVA-SP"""

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import PIL.Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    BatchFeature,
    LlamaTokenizer,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import ImageInput, is_valid_image, load_image, make_flat_list_of_images
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils.hub import has_file

from .configuration_llava_sp import ImageLayout, LlavaSPConfig, copy_hub_modules, get_image_layout


PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_llava_sp.LlavaSPProcessor"}

# The conversation of Vicuna v1.1 as LLaVA-1.5 trains it: a system prompt, images first in their turn and each followed
# by a newline, no space between the end of an answer and the next turn. What is generated, and so learned, is the
# answer with the space in front of it and the end token.
VICUNA_V1_CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- if system is not string %}
        {%- for part in system if part['type'] != 'text' %}
            {{- raise_exception("A message of the system cannot have a part of type '" ~ part['type'] ~ "': there are text parts, and image parts in messages of the user.") }}
        {%- endfor %}
        {%- set system = system | map(attribute='text') | join('') %}
    {%- endif %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions." %}
    {%- set turns = messages %}
{%- endif %}
{%- if system %}
    {{- system + ' ' }}
{%- endif %}
{%- for message in turns %}
    {%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] %}
        {{- raise_exception("The roles must alternate, user first, after at most one system message; message " ~ loop.index0 ~ " has the role '" ~ message['role'] ~ "'.") }}
    {%- endif %}
    {%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string else message['content'] %}
    {%- for part in parts if part['type'] != 'text' and (part['type'] != 'image' or message['role'] != 'user') %}
        {{- raise_exception("A message of the " ~ message['role'] ~ " cannot have a part of type '" ~ part['type'] ~ "': there are text parts, and image parts in messages of the user.") }}
    {%- endfor %}
    {%- set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %}
    {%- if message['role'] == 'user' %}
        {{- 'USER: ' }}
        {%- for part in parts | selectattr('type', 'equalto', 'image') %}
            {{- '<image>\\n' }}
        {%- endfor %}
        {{- text }}
    {%- else %}
        {{- ' ASSISTANT:' }}
        {%- generation %}
            {{- ' ' + text + '</s>' }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ' ASSISTANT:' }}
{%- endif %}
"""  # noqa: E501

# In front of a language model's own chat template, which has strings as contents: an image for each image part in a
# message of the user, before the text and each followed by a newline, as the checkpoints are trained.
IMAGE_PARTS_CHAT_TEMPLATE = """\
{%- set flat = namespace(messages=[]) %}
{%- for message in messages %}
    {%- if message['content'] is string or not message['content'] %}
        {%- set flat.messages = flat.messages + [message] %}
    {%- else %}
        {%- for part in message['content'] if part['type'] != 'text' and (part['type'] != 'image' or message['role'] != 'user') %}
            {{- raise_exception("A message of the " ~ message['role'] ~ " cannot have a part of type '" ~ part['type'] ~ "': there are text parts, and image parts in messages of the user.") }}
        {%- endfor %}
        {%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list %}
        {%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %}
        {%- set flat.messages = flat.messages + [dict(message, content='<image>\\n' * (images | length) + text)] %}
    {%- endif %}
{%- endfor %}
{%- set messages = flat.messages %}
"""  # noqa: E501


def vicuna_v1_chat_template(tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """
    The conversation that the released checkpoints were trained with, for any tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, whose token for the end of a text ends the answers.
        image_token (`str`): The token that stands for an image.

    Returns:
        `str`: The Jinja template.
    """
    template = VICUNA_V1_CHAT_TEMPLATE.replace("<image>", image_token)
    return template if tokenizer.eos_token is None else template.replace("</s>", tokenizer.eos_token)


def make_chat_template(tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """
    The chat template of a language model's tokenizer, able to take images.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        image_token (`str`): The token that stands for an image.

    Returns:
        `str`: The tokenizer's own template where it places images by itself, and that behind one that does where it
        does not; Vicuna's where there is none.

    Raises:
        ValueError: If the tokenizer's own template cannot be rendered.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        return vicuna_v1_chat_template(tokenizer, image_token)
    content = [{"type": "image"}, {"type": "text", "text": "Hello"}]
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, tokenize=False
        )
    except Exception:  # a template that takes only strings raises anything
        rendered = ""
    if rendered.count(image_token) == 1 and rendered.count("Hello") == 1 and "{" not in rendered:
        return template
    template = IMAGE_PARTS_CHAT_TEMPLATE.replace("<image>", image_token) + template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": content}], chat_template=template, tokenize=False)
    except Exception as error:
        raise ValueError(f"The tokenizer's chat template cannot be rendered: {error}") from error
    return template


def make_image_processor(
    image_processor: BaseImageProcessor, image_size: int, image_grid_pinpoints: list | tuple | None = None
) -> BaseImageProcessor:
    """
    An image processor that makes images as LLaVA-SP is trained with, from that of a vision tower.

    Args:
        image_processor (`BaseImageProcessor`): The vision tower's, whose colours are taken over.
        image_size (`int`): Side of the images that the vision tower takes, in pixels.
        image_grid_pinpoints (`list[list[int]]`, *optional*): The resolutions to cut images into tiles at, each as
            (height, width) in pixels. Without them images are padded to squares.

    Returns:
        `BaseImageProcessor`: A [`LlavaNextImageProcessor`] or [`LlavaImageProcessor`].
    """
    size = {"height": image_size, "width": image_size}
    settings = {
        name: getattr(image_processor, name)
        for name in ("image_mean", "image_std", "rescale_factor", "resample")
        if getattr(image_processor, name, None) is not None
    }
    settings.update(size=size, crop_size=size, do_center_crop=False, do_pad=True)
    if image_grid_pinpoints is not None:
        return LlavaNextImageProcessorPil(**settings, image_grid_pinpoints=image_grid_pinpoints)
    return LlavaImageProcessorPil(**settings)


def add_image_token(tokenizer: PreTrainedTokenizerBase, image_token: str = "<image>") -> None:
    """
    Make a language model's tokenizer that of a LLaVA-SP model: with the image token, padding, and padding on the left.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, which is changed.
        image_token (`str`, *optional*, defaults to `"<image>"`): The token that stands for an image.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token if tokenizer.unk_token is None else tokenizer.unk_token
    tokenizer.padding_side = "left"
    # What is saved: the attribute alone is not, where the tokenizer was loaded without it
    tokenizer.init_kwargs["padding_side"] = "left"


def load_tokenizer(name_or_path: str | PathLike, **kwargs: Any) -> PreTrainedTokenizerBase:
    """
    Load a language model's tokenizer. For a sentencepiece model without tokenizer.json, AutoTokenizer may take a class
    that drops the `▁` in front of a text: where nothing says which class reads it, and for Mistral whatever does.

    Args:
        name_or_path (`str` or `PathLike`): Folder or Hub id of the language model.
        kwargs (`dict[str, Any]`, *optional*): Arguments of `from_pretrained`.

    Returns:
        `PreTrainedTokenizerBase`: The tokenizer.
    """
    if "gguf_file" not in kwargs:
        places = {key: kwargs[key] for key in ("cache_dir", "local_files_only", "revision", "token") if key in kwargs}
        if not has_file(name_or_path, "tokenizer.json", **places):
            stated = get_tokenizer_config(name_or_path, **places)
            if stated.get("tokenizer_class") in (None, "LlamaTokenizer", "LlamaTokenizerFast") and has_file(
                name_or_path, "tokenizer.model", **places
            ):
                # The other way to read a sentencepiece model adds a space behind every special token
                settings = {"legacy": False, **({} if stated else {"add_bos_token": True})}
                return LlamaTokenizer.from_pretrained(name_or_path, **settings, **kwargs)
    return AutoTokenizer.from_pretrained(name_or_path, **kwargs)


def is_rgb_array(image: Any) -> bool:
    """Whether an array or tensor holds one RGB image, or several, as uint8: no other needs a guess what it means."""
    return (
        image.ndim in (3, 4)
        and 3 in (image.shape[-1], image.shape[-3])
        and str(image.dtype).removeprefix("torch.") == "uint8"
    )


class LlavaSPProcessor(ProcessorMixin):
    """
    Turns text and images into the inputs of a LLaVA-SP model: an image processor of Transformers, a tokenizer, and
    the run of `<image>` tokens that each image takes.

    Args:
        image_processor (`BaseImageProcessor`):
            Processes the images. [`LlavaImageProcessor`] with `do_pad=True` gives the authors' pixels, and
            [`LlavaNextImageProcessor`] theirs of images in tiles.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizes the text; it has the image token as one added token.
        num_spatial_tokens (`int`):
            Number of spatial tokens per image, `config.projector_config.num_spatial_tokens`.
        grid_size (`int`):
            Side of the vision tower's patch grid in patches, `config.projector_config.grid_size`.
        patch_downsample_factor (`int`, *optional*, defaults to 1):
            How many patches in each direction make one patch token, `config.projector_config.patch_downsample_factor`.
        chat_template (`str`, *optional*):
            Jinja template for messages. Defaults to the tokenizer's own with images added where it has one, else to
            the conversation the released checkpoints were trained with (`vicuna_v1` in the authors' code).
        image_token (`str`, *optional*, defaults to `"<image>"`):
            The token that stands for an image in the text.
        image_prefix (`str`, *optional*, defaults to `""`):
            What stands in front of an image's tokens, such as InternVL's `"<img>"`.
        image_suffix (`str`, *optional*):
            What stands behind an image's tokens. Defaults to a space for tokenizers that begin a text with
            sentencepiece's `▁`, and to nothing for others.

    Raises:
        ValueError: If the tokenizer does not have the image token as one token.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        num_spatial_tokens: int,
        grid_size: int,
        patch_downsample_factor: int = 1,
        chat_template: str | None = None,
        image_token: str = "<image>",
        image_prefix: str = "",
        image_suffix: str | None = None,
    ):
        self.num_spatial_tokens = num_spatial_tokens
        self.grid_size = grid_size
        self.patch_downsample_factor = patch_downsample_factor
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer does not know the image token {image_token!r}. Add it, and resize the model's "
                f"embeddings: tokenizer.add_tokens({image_token!r}, special_tokens=True)."
            )
        self.image_prefix = image_prefix
        if image_suffix is None:
            # The authors tokenize the text behind an image as a string of its own, which puts sentencepiece's `▁` in
            # front of it. The space does the same, for prompts and messages alike.
            image_suffix = " " if tokenizer.tokenize("a")[0].startswith("▁") else ""
        self.image_suffix = image_suffix
        if chat_template is None:
            chat_template = make_chat_template(tokenizer, image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | PathLike,
        text_model_name_or_path: str | PathLike,
        config: LlavaSPConfig,
        *,
        chat_template: str | None = None,
        image_token: str = "<image>",
        vision_kwargs: dict[str, Any] | None = None,
        text_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "LlavaSPProcessor":
        """
        The processor of a model that [`LlavaSPForConditionalGeneration.from_vision_text_pretrained`] made. Images are
        padded to squares, or cut into tiles where the model has `image_grid_pinpoints`.

        Args:
            vision_model_name_or_path (`str` or `PathLike`): Folder or Hub id of the vision tower, whose image
                processor says how colours are scaled.
            text_model_name_or_path (`str` or `PathLike`): Folder or Hub id of the language model, for its tokenizer.
            config ([`LlavaSPConfig`]): The model's configuration.
            chat_template (`str`, *optional*): Jinja template for messages, or `"vicuna_v1"` for the conversation of
                the released checkpoints. See [`LlavaSPProcessor`] for the default.
            image_token (`str`, *optional*, defaults to `"<image>"`): The token that stands for an image.
            vision_kwargs (`dict[str, Any]`, *optional*): Arguments for loading the image processor alone.
            text_kwargs (`dict[str, Any]`, *optional*): Arguments for loading the tokenizer alone.
            kwargs (`dict[str, Any]`, *optional*): Arguments of `from_pretrained` for both, such as `token`.

        Returns:
            [`LlavaSPProcessor`]: The processor.

        Raises:
            ValueError: If the tokenizer gives the image token another id than the model has.
        """
        image_processor = AutoImageProcessor.from_pretrained(
            vision_model_name_or_path, **{"backend": "pil", **kwargs, **(vision_kwargs or {})}
        )
        tokenizer = load_tokenizer(text_model_name_or_path, **{**kwargs, **(text_kwargs or {})})
        add_image_token(tokenizer, image_token)
        return cls._from_parts(
            image_processor, tokenizer, config, chat_template=chat_template, image_token=image_token
        )

    @classmethod
    def from_llava(
        cls,
        pretrained_model_name_or_path: str | PathLike,
        config: LlavaSPConfig,
        *,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> "LlavaSPProcessor":
        """
        The processor of a model that [`LlavaSPForConditionalGeneration.from_llava`] made, with the image token of that
        checkpoint.

        Args:
            pretrained_model_name_or_path (`str` or `PathLike`): Folder or Hub id of the LLaVA, LLaVA-NeXT or InternVL.
            config ([`LlavaSPConfig`]): The model's configuration.
            chat_template (`str`, *optional*): Jinja template for messages, or `"vicuna_v1"` for the conversation of
                the released checkpoints. Defaults to the checkpoint's own where it has one.
            kwargs (`dict[str, Any]`, *optional*): Arguments of `from_pretrained`.

        Returns:
            [`LlavaSPProcessor`]: The processor.

        Raises:
            ValueError: If the tokenizer gives the image token another id than the model has.
        """
        image_processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, backend="pil", **kwargs)
        tokenizer = load_tokenizer(pretrained_model_name_or_path, **kwargs)
        if tokenizer.chat_template is None:
            # In a file that only processors read
            tokenizer.chat_template = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)[0].get(
                "chat_template"
            )
        # InternVL's tokenizer calls it otherwise, and puts it between two more
        image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
        if image_token is None:
            raise ValueError(
                f"The tokenizer of {pretrained_model_name_or_path} has no token of the id {config.image_token_id}, "
                "which is the image token by config.json."
            )
        add_image_token(tokenizer, image_token)
        frame = {}
        if hasattr(tokenizer, "start_image_token"):
            frame = {"image_prefix": tokenizer.start_image_token, "image_suffix": tokenizer.end_image_token}
        return cls._from_parts(
            image_processor, tokenizer, config, chat_template=chat_template, image_token=image_token, **frame
        )

    @classmethod
    def _from_parts(
        cls,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        config: LlavaSPConfig,
        *,
        chat_template: str | None,
        image_token: str,
        **kwargs: Any,
    ) -> "LlavaSPProcessor":
        """A processor with what follows from the model's configuration."""
        if chat_template == "vicuna_v1":
            chat_template = vicuna_v1_chat_template(tokenizer, image_token)
        projector: Any = config.projector_config
        text_config: Any = config.text_config
        tokenizer.model_max_length = text_config.max_position_embeddings
        processor = cls(
            make_image_processor(image_processor, config.tile_size, config.image_grid_pinpoints),
            tokenizer,
            num_spatial_tokens=projector.num_spatial_tokens,
            grid_size=projector.grid_size,
            patch_downsample_factor=projector.patch_downsample_factor,
            chat_template=chat_template,
            image_token=image_token,
            **kwargs,
        )
        if processor.image_token_id != config.image_token_id:
            raise ValueError(
                f"The tokenizer gives {processor.image_token!r} the id {processor.image_token_id}, but the model has "
                f"`image_token_id` {config.image_token_id}: pass the model's own language model."
            )
        return processor

    @property
    def num_image_tokens(self) -> int:
        """`int`: Number of tokens that one image takes without tiles."""
        return self.get_image_layout().num_tokens

    def get_image_layout(self, image_size: Sequence[int] | None = None) -> ImageLayout:
        """
        How an image's tokens stand in the sequence.

        Args:
            image_size (`Sequence[int]`, *optional*): (height, width) of the image in pixels. Without it, the layout
                is that of a whole image without tiles.

        Returns:
            [`ImageLayout`]: The layout.
        """
        image_processor = self.image_processor
        pinpoints = getattr(image_processor, "image_grid_pinpoints", None)
        return get_image_layout(
            self.num_spatial_tokens,
            self.grid_size // self.patch_downsample_factor,
            image_size,
            pinpoints,
            0 if pinpoints is None else image_processor.crop_size["height"],
        )

    @property
    def _tiles_hint(self) -> str:
        return ", and its tiles take more" if hasattr(self.image_processor, "image_grid_pinpoints") else ""

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike, processor_dict: dict | None = None, **kwargs: Any
    ) -> list:
        # The authors resize with PIL, which torchvision does not reproduce, so PIL is the default even where
        # torchvision is installed. The choice is the image processor's alone: a tokenizer would save it.
        backend = kwargs.pop("backend", "pil")
        subfolder = kwargs.pop("subfolder", "")
        image_processor = AutoImageProcessor.from_pretrained(
            pretrained_model_name_or_path, backend=backend, subfolder=subfolder, **kwargs
        )
        tokenizer = cls._load_tokenizer_from_pretrained(
            "tokenizer", pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        return [image_processor, tokenizer]

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> list:
        """
        Save image processor, tokenizer, chat template and the Hub modules to a folder.

        Args:
            save_directory (`str` or `PathLike`): The folder, created if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to push them to the Hub as well.
            kwargs (`dict[str, Any]`, *optional*): `repo_id` (the folder's name by default) and the other arguments of
                [`~utils.PushToHubMixin.push_to_hub`].

        Returns:
            `list[str]`: The processor's own configuration file.
        """
        self.auto_map = dict(PROCESSOR_AUTO_MAP)
        saved = super().save_pretrained(save_directory)
        copy_hub_modules(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return saved

    def _load_images(self, images: Any, position: str = "images") -> Any:
        """
        Open images given by path, URL, data URI or base64 string, and convert them and PIL images to RGB as PIL does.
        Arrays and tensors are returned as they are.

        Args:
            images: An image or a list of them, nested or not.
            position (`str`): Where it stands in the argument, for the error message.

        Raises:
            ValueError: If an image cannot be read or has no pixels; the message says which.
        """
        if isinstance(images, (list, tuple)):
            return [self._load_images(image, f"{position}[{index}]") for index, image in enumerate(images)]
        expected = "expected an image as a path, URL, data URI, base64 string, PIL image, array or tensor"
        name, image = position, images
        if isinstance(images, (str, PathLike)):
            image = fspath(images)
            name = f"{position} ({image if len(image) <= 200 else image[:60] + '...'})"
        elif isinstance(images, PIL.Image.Image):
            name = f"{position} (a PIL image of size {images.size} and mode {images.mode})"
        elif not is_valid_image(images):
            raise ValueError(f"Cannot use {position}: {expected}, got {type(images).__name__}.")
        try:
            if isinstance(image, str):
                image = load_image(image)
            elif isinstance(image, PIL.Image.Image):
                image.load()
                if image.mode != "RGB" or "transparency" in image.info:
                    image = image.convert("RGB")
        except Exception as error:  # decoders raise anything from OSError to SyntaxError
            reason = str(error) if len(str(error)) <= 300 else f"{str(error)[:300]}..."
            raise ValueError(f"Cannot read {name}: {expected}. {type(error).__name__}: {reason}") from error
        if isinstance(image, PIL.Image.Image):
            # A transparent colour outlives PIL's conversion as a note, for which Transformers would blend the image
            image.info.pop("transparency", None)
        if 0 in (image.size if isinstance(image, PIL.Image.Image) else image.shape):
            raise ValueError(f"Cannot use {name}: it has no pixels.")
        if not isinstance(image, PIL.Image.Image) and not is_rgb_array(image):
            raise ValueError(
                f"Cannot use {name}: an array of shape {tuple(image.shape)} and type {image.dtype}, expected levels "
                "from 0 to 255 as uint8 with three channels, first or last. For others, PIL.Image.fromarray(array)."
            )
        return image

    def prepare_inputs_layout(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, Any, Any]:
        """Load the images and wrap a single text in a list. Lists without any image count as no images."""
        if images is not None:
            images = self._load_images(images)
        if isinstance(images, list) and all(isinstance(image, list) and not image for image in images):
            images = None
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> None:
        """
        Raise a `ValueError` where images and `<image>` slots do not agree, sample by sample if `images` is a nested
        list, or where the arguments ask for something the model cannot do.
        """
        if videos is not None or audio is not None:
            raise ValueError("LLaVA-SP takes text and images, but `videos` or `audio` was passed.")
        text_kwargs = {**kwargs, **kwargs.get("text_kwargs", {})}
        truncation, padding, max_length = (text_kwargs.get(key) for key in ("truncation", "padding", "max_length"))
        refused = None
        if truncation not in (None, False, "do_not_truncate"):
            refused = f"truncation={truncation!r}"
        elif truncation is None and max_length is not None and not padding:
            refused = f"max_length={max_length!r}"  # which makes the tokenizer truncate, by its own default
        if refused is not None:
            raise ValueError(
                f"`{refused}` is refused: it could cut through an image's {self.num_image_tokens} tokens or cut the "
                "question off. Shorten the text or pass fewer images instead."
            )
        if text is not None:
            self._validate_slots(images, [text] if isinstance(text, str) else text)
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _validate_slots(self, images: ImageInput | None, text: list[str]) -> None:
        slots = [sample.count(self.image_token) if isinstance(sample, str) else 0 for sample in text]
        hint = (
            f"Each image needs one {self.image_token} in the text, where it belongs; a text that only speaks of "
            f"{self.image_token} must be written otherwise."
        )
        if images is None:
            if any(slots):
                sample = next(index for index, count in enumerate(slots) if count)
                raise ValueError(
                    f"Sample {sample} has {slots[sample]} {self.image_token} slots, but no images were passed. {hint}"
                )
        elif isinstance(images, list) and all(isinstance(sample, list) for sample in images):
            if len(images) != len(text):
                raise ValueError(
                    f"`images` is a list of {len(images)} lists, but there are {len(text)} texts: pass one list per "
                    "text."
                )
            for index, (count, sample) in enumerate(zip(slots, images, strict=True)):
                if count != len(sample):
                    raise ValueError(
                        f"Sample {index} has {count} {self.image_token} slots, but {len(sample)} images. {hint}"
                    )
        elif sum(slots) != (num_images := len(make_flat_list_of_images(images))):
            where = f"The {len(text)} samples have" if len(text) > 1 else "The text has"
            raise ValueError(
                f"{where} {sum(slots)} {self.image_token} slots, but {num_images} images were passed. {hint}"
            )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that replaces one `<image>`: the image's tokens between `image_prefix` and `image_suffix`."""
        image_sizes = image_inputs.get("image_sizes")
        layout = self.get_image_layout(None if image_sizes is None else image_sizes[image_idx])
        return self.image_prefix + self.image_token * layout.num_tokens + self.image_suffix

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        """
        Args:
            image_sizes (`list[tuple[int, int]]`, *optional*): (height, width) of each image in pixels.

        Returns:
            `MultiModalData`: The number of tokens and of vision tower inputs of each image.
        """
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.get_image_layout(size).num_tokens for size in image_sizes],
            # Rows of `pixel_values`: an image's tiles are in one
            num_image_patches=[1] * len(image_sizes),
        )

    def _check_special_mm_tokens(self, text: list[str], text_inputs: BatchFeature, modalities: list[str]) -> None:
        # The first place that sees the tokenized text
        super()._check_special_mm_tokens(text, text_inputs, modalities)
        max_length = self.tokenizer.model_max_length
        for sample, input_ids in enumerate(text_inputs["input_ids"]):
            # Padding does not count, but summing the mask takes time: only where it can matter
            length = len(input_ids)
            if length > max_length and "attention_mask" in text_inputs:
                length = sum(text_inputs["attention_mask"][sample])
            if length > max_length:
                raise ValueError(
                    f"Sample {sample} has {int(length)} tokens, but the model takes at most {max_length} "
                    f"(tokenizer.model_max_length). Shorten the text or pass fewer images: each takes "
                    f"{self.num_image_tokens} tokens{self._tiles_hint}."
                )


__all__ = ["LlavaSPProcessor"]
