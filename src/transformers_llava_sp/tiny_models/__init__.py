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
"""Two small trained models that come with the package, to try things on; docs/tiny.md says what they can do"""

from pathlib import Path


# What commands call them, unless there is a folder of that name
TINY_MODELS = {f"tiny-{variant}": variant for variant in ("cropping", "pooling")}


def tiny_model_path(variant: str = "cropping") -> str:
    """
    Where a trained LLaVA-SP of 1.35 million parameters lies. It answers questions about coloured shapes.

    Args:
        variant (`str`, *optional*, defaults to `"cropping"`): How its spatial tokens are made: `"cropping"` or
            `"pooling"`.

    Returns:
        `str`: A folder for `from_pretrained`.

    Raises:
        ValueError: If there is no such variant.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> from transformers_llava_sp import tiny_model_path

    >>> pipe = pipeline("image-text-to-text", model=tiny_model_path("cropping"))
    ```"""
    name = f"tiny-{variant}"
    if name not in TINY_MODELS:
        raise ValueError(f"There is no tiny model {variant!r}: expected one of {', '.join(TINY_MODELS.values())}.")
    return str(Path(__file__).with_name(name))


def resolve_model_name(name: str) -> str:
    """
    The folder that `name` stands for if it is that of a tiny model, such as `"tiny-cropping"`, and `name` otherwise.

    Args:
        name (`str`): A folder, a Hub id or the name of a tiny model. A folder comes first.

    Returns:
        `str`: The tiny model's folder, or the same name.
    """
    if name in TINY_MODELS and not Path(name).is_dir():
        return tiny_model_path(TINY_MODELS[name])
    return name
