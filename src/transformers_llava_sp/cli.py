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
"""The `llava-sp` command: one sub-command for each thing to do, the work itself elsewhere in the package."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__


app = typer.Typer(
    help="LLaVA-SP for Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Dtype(str, Enum):
    """Number formats that weights can have; `auto` is the one that they are stored in."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class SpatialVariant(str, Enum):
    """How the map of each scale is taken from the patch grid."""

    cropping = "cropping"
    pooling = "pooling"


class ChatTemplate(str, Enum):
    """The conversation that a model is trained with."""

    vicuna_v1 = "vicuna_v1"
    tokenizer = "tokenizer"


def main() -> None:
    """Run the `llava-sp` command."""
    app()


def print_version(wanted: bool) -> None:
    """Print the package's version and stop, if `wanted`."""
    if wanted:
        typer.echo(f"transformers-llava-sp {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """LLaVA-SP for Hugging Face Transformers."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """
    Turn the errors that a wrong argument or file causes into one line on stderr and exit status 1. Others keep their
    traceback: they are mistakes of the program.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (FloatingPointError, ImportError, OSError, ValueError, StrictDataclassError) as error:
        typer.echo(f"llava-sp: error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error


class Options:
    """Options that several sub-commands have."""

    Dtype = Annotated[Dtype, typer.Option(help="Number format of the weights written.")]
    MaxShardSize = Annotated[str, typer.Option(help="Size of the largest file of weights.")]
    Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the result of an earlier conversion.")]
    Verify = Annotated[bool, typer.Option(help="Read the result again and compare it with the inputs.")]
    PushToHub = Annotated[
        str | None, typer.Option(metavar="REPO", help="Push the result to this repository on the Hub, in one commit.")
    ]
    Private = Annotated[bool, typer.Option("--private", help="Make that repository private, if it is created.")]
    Revision = Annotated[str | None, typer.Option(metavar="BRANCH", help="The branch to push to.")]


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Argument(help="The authors' checkpoint: a folder or a Hub id[@revision].")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    base_model: Annotated[
        str | None,
        typer.Option(help="The language model it was trained from, likewise. The one that it names if not given."),
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="The vision tower, likewise. The one that it names if not given.")
    ] = None,
    chat_template: Annotated[
        str,
        typer.Option(
            metavar="[vicuna_v1|tokenizer]",
            help="Conversation format: the one that the authors train with, or the tokenizer's own with images added.",
        ),
    ] = "vicuna_v1",
    dtype: Options.Dtype = Dtype.auto,
    max_shard_size: Options.MaxShardSize = "5GB",
    overwrite: Options.Overwrite = False,
    verify: Options.Verify = True,
    push_to_hub: Options.PushToHub = None,
    private: Options.Private = False,
    revision: Options.Revision = None,
) -> None:
    """Convert a checkpoint of the LLaVA-SP authors into a folder that Transformers loads."""
    with one_line_errors():
        from .conversion import convert_checkpoint

        report = convert_checkpoint(
            checkpoint,
            output,
            base_model=base_model,
            vision_tower=vision_tower,
            chat_template=chat_template,
            dtype=dtype.value,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            verify=verify,
            push_to_hub=push_to_hub,
            private=private or None,
            revision=revision,
        )
    typer.echo(report)


@app.command()
def create(
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    vision_tower: Annotated[
        str | None, typer.Option(help="The vision tower: a folder or a Hub id[@revision].")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="The language model, likewise.")] = None,
    from_llava: Annotated[
        str | None,
        typer.Option(help="Instead of the two, a LLaVA, LLaVA-NeXT or InternVL in Transformers' format, likewise."),
    ] = None,
    spatial_variant: Annotated[SpatialVariant, typer.Option(help="How maps are taken from the patch grid.")] = (
        SpatialVariant.cropping
    ),
    detail_integrator: Annotated[bool, typer.Option(help="Attend to detail features.")] = True,
    image_tiles: Annotated[bool, typer.Option("--image-tiles", help="Cut images into tiles, as the paper does.")] = (
        False
    ),
    vision_feature_layer: Annotated[
        int | None, typer.Option(help="Which hidden state of the vision tower to read.", show_default="-2")
    ] = None,
    chat_template: Annotated[
        ChatTemplate | None,
        typer.Option(help="The conversation. The language model's own if not given, vicuna_v1 where it has none."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    dtype: Options.Dtype = Dtype.auto,
    max_shard_size: Options.MaxShardSize = "5GB",
    overwrite: Options.Overwrite = False,
    push_to_hub: Options.PushToHub = None,
    private: Options.Private = False,
    revision: Options.Revision = None,
) -> None:
    """Make a model to train, of a vision tower and a language model, or of a LLaVA or InternVL."""
    with one_line_errors():
        from .conversion import create_model

        report = create_model(
            output,
            vision_tower=vision_tower,
            base_model=base_model,
            from_llava=from_llava,
            spatial_variant=spatial_variant.value,
            detail_integrator=detail_integrator,
            image_tiles=image_tiles,
            vision_feature_layer=vision_feature_layer,
            chat_template=chat_template and chat_template.value,
            seed=seed,
            dtype=dtype.value,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            push_to_hub=push_to_hub,
            private=private or None,
            revision=revision,
        )
    typer.echo(report)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder or a Hub id[@revision].")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    base_model: Annotated[
        str | None,
        typer.Option(help="The converted model it was trained on, likewise. The one that it names if not given."),
    ] = None,
    dtype: Options.Dtype = Dtype.auto,
    max_shard_size: Options.MaxShardSize = "5GB",
    overwrite: Options.Overwrite = False,
    verify: Options.Verify = True,
    push_to_hub: Options.PushToHub = None,
    private: Options.Private = False,
    revision: Options.Revision = None,
) -> None:
    """Merge a LoRA adapter into the converted LLaVA-SP model that it was trained on."""
    with one_line_errors():
        from .conversion import merge_adapter

        report = merge_adapter(
            adapter,
            output,
            base_model=base_model,
            dtype=dtype.value,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            verify=verify,
            push_to_hub=push_to_hub,
            private=private or None,
            revision=revision,
        )
    typer.echo(report)


@app.command()
def export_original(
    adapter: Annotated[
        str, typer.Argument(help="The adapter, or the projector of the first stage: a folder or a Hub id[@revision].")
    ],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    base_model: Annotated[
        str | None,
        typer.Option(help="The LLaVA-SP model it was trained on, likewise. The one that it names if not given."),
    ] = None,
    language_model: Annotated[
        str | None, typer.Option(help="That model's language model by itself, for the authors' code, likewise.")
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="Its vision tower by itself, which the authors' code needs, likewise.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the result of an earlier export.")] = False,
    verify: Annotated[
        bool, typer.Option(help="Compare both parts with the model's, and read the result again.")
    ] = True,
) -> None:
    """Write an adapter that was trained with this package as a LoRA release of the authors' code."""
    with one_line_errors():
        from .conversion import export_original as export

        report = export(
            adapter,
            output,
            base_model=base_model,
            language_model=language_model,
            vision_tower=vision_tower,
            overwrite=overwrite,
            verify=verify,
        )
    typer.echo(report)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A YAML file, or one of pretrain, lora, qlora and full.")],
) -> None:
    """
    Train a model as a recipe says. Options override its keys, and are those of Transformers' TrainingArguments and of
    docs/training.md: --model_name_or_path MODEL --train_data DATA --image_folder IMAGES --output_dir OUTPUT.
    """
    with one_line_errors():
        from .training.train import train as run_training

        run_training(recipe, context.args)


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint: a folder or a Hub id[@revision].")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what a checkpoint is, without loading its weights. The exit status is 1 if it cannot be converted."""
    with one_line_errors():
        from .conversion import inspect_checkpoint

        inspection = inspect_checkpoint(checkpoint)
    typer.echo(json.dumps(inspection.to_dict(), indent=2) if as_json else inspection)
    if inspection.problems:
        raise typer.Exit(1)


@app.command()
def ask(
    model_name: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A LLaVA-SP model: a folder, a Hub id, tiny-cropping or tiny-pooling."),
    ],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[
        list[str] | None, typer.Option(help="An image the question is about: a file or a URL. Repeat for more.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    dtype: Annotated[Dtype, typer.Option(help="Number format to compute in.")] = Dtype.auto,
    device: Annotated[
        str | None, typer.Option(help="Where to compute, such as cpu or cuda:0. A GPU if there is one.")
    ] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="Attention, such as sdpa, eager or flash_attention_2.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token; higher values sample.")
    ] = 0.0,
) -> None:
    """Ask a LLaVA-SP model a question, about images or without any, and print its answer as it comes."""
    with one_line_errors():
        from transformers import AutoProcessor, TextStreamer

        from .conversion.checkpoint import require_llava_sp
        from .tiny_models import resolve_model_name

        model_name = resolve_model_name(model_name)
        require_llava_sp(model_name)
        processor = AutoProcessor.from_pretrained(model_name)
        content = [{"type": "image", "image": source} for source in image or []] + [{"type": "text", "text": question}]
        # Before the weights: a wrong image or a long question should not have to wait for them
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        model = load_model(model_name, dtype=dtype.value, device=device, attention=attn_implementation)
        inputs = inputs.to(model.device, model.dtype)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, streamer=streamer)


@app.command()
def explain(
    model_name: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A LLaVA-SP model: a folder, a Hub id, tiny-cropping or tiny-pooling."),
    ],
    image: Annotated[str, typer.Argument(help="The image: a file or a URL.")],
    output: Annotated[Path, typer.Option(help="The picture to write, ending in .png, .pdf or .svg.")],
    question: Annotated[
        str | None, typer.Option(help="A question about the image, to see what its answer attends to as well.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    dtype: Annotated[Dtype, typer.Option(help="Number format to compute in.")] = Dtype.auto,
    device: Annotated[
        str | None, typer.Option(help="Where to compute, such as cpu or cuda:0. A GPU if there is one.")
    ] = None,
) -> None:
    """Draw what each spatial token of an image reads and attends to."""
    with one_line_errors():
        from transformers import AutoProcessor

        from .conversion.checkpoint import require_llava_sp
        from .tiny_models import resolve_model_name
        from .visualization import check_output, draw, load_rgb_image, require_matplotlib, save_figure
        from .visualization import explain as explain_image

        # Before the weights: nothing that is wrong here should have to wait for them
        require_matplotlib()
        check_output(output)
        if output.exists() and os.path.exists(image) and output.samefile(image):
            raise ValueError(f"The output {output} is the image itself: choose another.")
        model_name = resolve_model_name(model_name)
        require_llava_sp(model_name)
        processor = AutoProcessor.from_pretrained(model_name)
        loaded = load_rgb_image(processor, image)
        model = load_model(model_name, dtype=dtype.value, device=device, attention=None)
        explanation = explain_image(model, processor, loaded, question, max_new_tokens)
        save_figure(draw(explanation), output)
    if explanation.answer is not None:
        typer.echo(explanation.answer)
    typer.echo(f"Wrote {output}")


def load_model(name: str, dtype: str, device: str | None, attention: str | None) -> Any:
    """
    Load a LLaVA-SP model, whole.

    Args:
        name (`str`): A folder or a Hub id.
        dtype (`str`): Number format to load the weights in, `"auto"` for the one they are stored in.
        device (`str`, *optional*): Where to put it. Defaults to the first GPU, or the CPU where there is none.
        attention (`str`, *optional*): The attention implementation. Defaults to Transformers' choice.

    Returns:
        [`LlavaSPForConditionalGeneration`]: The model.

    Raises:
        ValueError: If weights are damaged, missing or of another shape, or `device` cannot be used.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    from .conversion.checkpoint import require_all_weights

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"The device {device!r} cannot be used: {error}") from error
    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation=attention,
            # Refused below, by name: on its own, Transformers would fill in what is missing at random
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(f"The weights of {name!r} are damaged ({error}). Convert or download it again.") from error
    require_all_weights(name, loading)
    return model.to(device)


if __name__ == "__main__":
    main()
