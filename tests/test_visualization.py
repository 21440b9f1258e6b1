"""
What `llava-sp explain` shows: the regions against what the features depend on, the mapping to pixels against where a
mark in the image arrives, the attention against a plain pass, and that every kind of model can be drawn.
"""

import sys
from dataclasses import astuple
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, VARIANTS, randomize_
from PIL import Image, ImageDraw
from test_cli import assert_fails, copy_of, invoke
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaImageProcessorPil,
    MistralConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from transformers_llava_sp import (
    LlavaSPConfig,
    LlavaSPForConditionalGeneration,
    LlavaSPProcessor,
    LlavaSPProjectorConfig,
    cli,
    visualization,
)
from transformers_llava_sp.configuration_llava_sp import get_image_layout
from transformers_llava_sp.processing_llava_sp import add_image_token, make_image_processor
from transformers_llava_sp.visualization import draw, explain, input_boxes, save_figure, spread_over_patches


PHOTO = FIXTURES / "mini-cropping" / "golden" / "landscape.png"
QUESTION = "What costs $5 or $6?"
# A grid of 12, as (height, width)
SIDE, PATCH, GRID = 84, 7, 12
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def make(pinpoints=None, vision=CLIPVisionConfig, text=LlamaConfig, **projector):
    """A tiny model with random weights, and its processor."""
    tokenizer = LlamaTokenizer.from_pretrained(FIXTURES / "mini-cropping" / "base")
    add_image_token(tokenizer)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaSPConfig(
        vision_config=vision(**sizes, intermediate_size=48, image_size=SIDE, patch_size=PATCH),
        text_config=text(
            **{**sizes, "hidden_size": 64},
            intermediate_size=96,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            **({"sliding_window": 32} if text is MistralConfig else {}),
        ),
        projector_config={"spatial_hidden_size": 16, **projector},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    model = randomize_(LlavaSPForConditionalGeneration(config)).eval()
    model.generation_config.eos_token_id = None
    processor = LlavaSPProcessor(
        make_image_processor(LlavaImageProcessorPil(), SIDE, pinpoints),
        tokenizer,
        num_spatial_tokens=config.projector_config.num_spatial_tokens,
        grid_size=GRID,
        patch_downsample_factor=config.projector_config.patch_downsample_factor,
    )
    return model, processor


MODELS = {
    **VARIANTS,
    "twelve-scales": {"spatial_variant": "pooling", "spatial_scales": list(range(1, 13))},
    "three-scales": {"spatial_scales": [4, 8, 12]},
    "one-scale": {"spatial_scales": [12]},
    "gaps-between-details": {"detail_kernel_size": 2, "detail_stride": 4},
    "downsampled-patches": {"patch_downsample_factor": 2},
    "siglip": {"vision": SiglipVisionConfig},
    "tiles": {"pinpoints": PINPOINTS},
}


def patch_grid_of(model, processor) -> torch.Tensor:
    """The patch grid of the photo, by a hand-made pass through the vision tower, of shape (1, channels, 12, 12)."""
    pixel_values = processor.image_processor(Image.open(PHOTO), return_tensors="pt")["pixel_values"]
    states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer][:, -(GRID**2) :].mT.unflatten(2, (GRID, GRID)).detach()


def covered_patches(box, grid_box) -> torch.Tensor:
    """Which patches of the grid have their middle in a box."""
    middles = (torch.arange(GRID) + 0.5) / GRID
    x = grid_box.left + middles * (grid_box.right - grid_box.left)
    y = grid_box.top + middles * (grid_box.bottom - grid_box.top)
    return ((box.top < y) & (y < box.bottom))[:, None] & ((box.left < x) & (x < box.right))[None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_regions_are_what_the_features_depend_on(variant):
    model, processor = make(**VARIANTS[variant])
    extractor = model.model.multi_modal_projector.spatial_feature_extractor
    patch_grid = patch_grid_of(model, processor).requires_grad_()

    [tile] = explain(model, processor, PHOTO).tiles

    for index, region in enumerate(tile.regions):
        [gradient] = torch.autograd.grad(extractor(patch_grid)[:, index].sum(), patch_grid)
        assert torch.equal(covered_patches(region, tile.grid_box), gradient[0].abs().sum(0) > 0)


@pytest.mark.parametrize("variant", ["cropping", "pooling"])
def test_a_cell_is_read_as_strongly_as_it_adds_to_the_feature(variant):
    model, processor = make(**VARIANTS[variant])
    extractor = model.model.multi_modal_projector.spatial_feature_extractor
    patch_grid = patch_grid_of(model, processor)

    [tile] = explain(model, processor, PHOTO).tiles

    maps = extractor.get_feature_maps(patch_grid)
    for feature_map, convolution, reading in zip(maps, extractor.convolutions, tile.reading, strict=True):
        size = feature_map.shape[-1]
        # The map with all cells but one set to zero, for each of them
        alone = torch.eye(size**2).view(-1, 1, size, size) * feature_map
        lengths = convolution(alone).detach().flatten(1).norm(dim=1).view(size, size)
        torch.testing.assert_close(reading, lengths / lengths.sum())


GEOMETRIES = {
    "default": (12, 8, 2),
    "released": (24, 16, 2),
    "one-detail": (12, 12, 1),
    "left-over": (12, 6, 4),
    "gaps": (13, 2, 3),
}


@pytest.mark.parametrize(("grid", "kernel", "stride"), GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_attention_is_spread_over_what_each_detail_sees(grid, kernel, stride):
    config = LlavaSPProjectorConfig(
        grid_size=grid, detail_kernel_size=kernel, detail_stride=stride, spatial_scales=[grid]
    )
    side = (grid - kernel) // stride + 1
    attention = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
    attention /= attention.sum(dim=(1, 2), keepdim=True)
    expected = torch.zeros(3, grid, grid)
    coverage = torch.zeros(grid, grid)
    for row in range(side):
        for column in range(side):
            square = slice(row * stride, row * stride + kernel), slice(column * stride, column * stride + kernel)
            expected[:, square[0], square[1]] += attention[:, row, column, None, None] / kernel**2
            coverage[square] += 1

    spread = spread_over_patches(attention, config)

    torch.testing.assert_close(spread, expected)
    torch.testing.assert_close(spread.sum(dim=(1, 2)), torch.ones(3))
    even = spread_over_patches(torch.full((side, side), side**-2.0), config)
    torch.testing.assert_close(even, coverage / coverage.sum())


def test_attention_needs_an_integrator():
    config = LlavaSPProjectorConfig(use_detail_integrator=False)
    with pytest.raises(ValueError, match="use_detail_integrator"):
        spread_over_patches(torch.ones(5, 5), config)


IMAGE_PROCESSORS = {
    "padded": make_image_processor(LlavaImageProcessorPil(), SIDE),
    "squeezed": SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
    "cropped": CLIPImageProcessorPil(size={"shortest_edge": SIDE + 20}, crop_size={"height": SIDE, "width": SIDE}),
    "padded-and-cropped": LlavaImageProcessorPil(
        size={"shortest_edge": SIDE + 20}, crop_size={"height": SIDE, "width": SIDE}, do_pad=True
    ),
    "tiles": make_image_processor(LlavaImageProcessorPil(), SIDE, PINPOINTS),
}


@pytest.mark.parametrize(
    "size", [(300, 200), (201, 300), (250, 250), (500, 120)], ids=lambda size: "{}x{}".format(*size)
)
@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_a_mark_is_where_the_boxes_say(kind, size):
    image_processor = IMAGE_PROCESSORS[kind]
    width, height = size
    # Off the middle, to the left and above; where the middle is cropped out of a wide image, it still shows
    mark = (0.4 * width, 0.1 * height + 20, 0.5 * width, 0.1 * height + 50)
    plain, marked = Image.new("RGB", size, "black"), Image.new("RGB", size, "black")
    ImageDraw.Draw(marked).rectangle([int(side) for side in mark], fill="white")
    inputs = [image_processor(image, return_tensors="pt")["pixel_values"] for image in (marked, plain)]
    difference = (inputs[0] - inputs[1]).flatten(0, -4)[:, 0]  # (tiles, height, width)
    pinpoints = getattr(image_processor, "image_grid_pinpoints", None)
    layout = get_image_layout(6, GRID, (height, width), pinpoints, SIDE)

    boxes = input_boxes(image_processor, (height, width), layout, SIDE)

    assert len(boxes) == layout.num_tiles == len(difference)
    seen = 0
    for box, changed in zip(boxes, difference, strict=True):
        pixel = max(box.right - box.left, box.bottom - box.top) / SIDE
        expected = [
            max(mark[0], box.left), max(mark[1], box.top), min(mark[2] + 1, box.right), min(mark[3] + 1, box.bottom)
        ]  # fmt: skip
        if expected[2] - expected[0] < 2 * pixel or expected[3] - expected[1] < 2 * pixel:
            continue
        seen += 1
        rows, columns = (changed > changed.max() / 2).nonzero().unbind(1)
        found = box.part(
            columns.min().item() / SIDE,
            rows.min().item() / SIDE,
            (columns.max().item() + 1) / SIDE,
            (rows.max().item() + 1) / SIDE,
        )
        for side, where in zip((found.left, found.top, found.right, found.bottom), expected, strict=True):
            assert side == pytest.approx(where, abs=1.2 * pixel)
    assert seen


def test_padding_is_outside_of_the_image():
    model, processor = make()
    [wide] = explain(model, processor, Image.new("RGB", (300, 200))).tiles
    [high] = explain(model, processor, Image.new("RGB", (200, 301))).tiles
    assert wide.box == wide.grid_box == wide.regions[-1] == visualization.Box(0, -50, 300, 250)
    assert high.box == visualization.Box(-50, 0, 251, 301)
    # The central 2 x 2 of 12 x 12 patches
    assert astuple(wide.regions[0]) == pytest.approx((125, 75, 175, 125))


def test_pixels_behind_the_last_patch_are_no_part_of_the_grid():
    config = LlavaSPConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=90, patch_size=7
        ),
        text_config=LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=128),
        image_token_id=100,
    )
    kept = {"reading": [torch.ones(1, 1, 1)] * 6}
    layout = config.get_image_layout()
    [tile] = visualization._explain_tiles(config, layout, [visualization.Box(0, 0, 900, 900)], kept)
    assert tile.grid_box == visualization.Box(0, 0, 840, 840)


def test_an_unknown_size_is_refused():
    image_processor = SiglipImageProcessorPil(size={"shortest_edge": 10, "longest_edge": 20})
    with pytest.raises(ValueError, match="longest_edge"):
        input_boxes(image_processor, (10, 10), get_image_layout(6, GRID), SIDE)


@pytest.mark.parametrize("name", ["cropping-dfi", "tiles"])
def test_detail_attention_is_the_models(name):
    model, processor = make(**MODELS[name])
    pixels = processor.image_processor(Image.open(PHOTO), return_tensors="pt")

    tiles = explain(model, processor, PHOTO).tiles

    expected = model.get_image_features(**pixels, output_attentions=True).detail_attentions
    assert len(tiles) == len(expected) == (1 if name == "cropping-dfi" else 5)
    for tile, attention in zip(tiles, expected, strict=True):
        torch.testing.assert_close(tile.detail_attention.flatten(1), attention)
        torch.testing.assert_close(tile.patch_attention.sum(dim=(1, 2)), torch.ones(6))


def test_weights_in_16_bits_add_up_to_one():
    model, processor = make()
    [tile] = explain(model.to(torch.bfloat16), processor, PHOTO).tiles
    assert tile.patch_attention.dtype == tile.reading[0].dtype == torch.float32
    torch.testing.assert_close(tile.patch_attention.sum(dim=(1, 2)), torch.ones(6))


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"patch_downsample_factor": 2}, {"pinpoints": PINPOINTS}, {"text": MistralConfig}],
    ids=["whole", "downsampled", "tiles", "sliding-window"],
)
def test_answer_attention_is_that_of_one_plain_pass(kwargs):
    model, processor = make(**kwargs)
    content = [{"type": "image", "image": str(PHOTO)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    prompt_length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=5)

    explanation = explain(model, processor, PHOTO, QUESTION, max_new_tokens=5)

    assert explanation.answer == processor.decode(ids[0, prompt_length:], skip_special_tokens=True).strip()
    assert model.model.language_model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    attentions = model(input_ids=ids[:, :-1], **images, output_attentions=True).attentions
    weights = torch.stack(attentions)[:, 0, :, prompt_length - 1 :].detach().mean(dim=(0, 1, 2))
    image_weights = weights[ids[0, :-1] == model.config.image_token_id]
    found = explanation.answer_attention
    assert float(weights.sum() - image_weights.sum()) == pytest.approx(found.text, abs=1e-5)
    num_tiles, num_spatial = found.spatial_tokens.shape
    patches = explanation.config.patch_grid_size**2
    spatial, rest = image_weights.split([num_tiles * num_spatial, len(image_weights) - num_tiles * num_spatial])
    torch.testing.assert_close(found.spatial_tokens.flatten(), spatial)
    torch.testing.assert_close(found.patch_tokens[0].flatten(), rest[:patches])
    if num_tiles == 1:
        assert len(rest) == patches
        assert found.separators == 0
    else:
        # Two by two tiles, joined; each row that is kept ends with a separator
        joined = found.patch_tokens[1:].view(2, 2, GRID, GRID).transpose(1, 2).reshape(2 * GRID, 2 * GRID)
        rows = rest[patches:].view(-1, 2 * GRID + 1)
        assert 0 < joined.isnan().sum() == (2 * GRID - len(rows)) * 2 * GRID
        torch.testing.assert_close(joined[~joined.isnan()], rows[:, :-1].flatten())
        assert found.separators == pytest.approx(rows[:, -1].sum().item(), abs=1e-6)


def test_the_end_token_is_no_part_of_the_answer():
    model, processor = make()
    longer = explain(model, processor, PHOTO, QUESTION, max_new_tokens=3)
    content = [{"type": "image", "image": str(PHOTO)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    fourth = model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, -1].item()
    model.generation_config.eos_token_id = [fourth]

    ended = explain(model, processor, PHOTO, QUESTION, max_new_tokens=9)

    assert ended.answer == longer.answer
    torch.testing.assert_close(ended.answer_attention.spatial_tokens, longer.answer_attention.spatial_tokens)


def test_other_models_and_arrays_are_refused():
    model, processor = make()
    with pytest.raises(ValueError, match="CLIPVisionModel, whose model_type is 'clip_vision_model'"):
        explain(model.model.vision_tower, processor, PHOTO)
    with pytest.raises(ValueError, match="fromarray"):
        explain(model, processor, torch.zeros(10, 10, 3, dtype=torch.uint8))


@pytest.fixture
def matplotlib(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed (extras demo and dev)")
    # Others may have imported it
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    return matplotlib


def heat_maps(figure) -> list:
    """The images of a figure that are no pictures."""
    from matplotlib.colors import LogNorm

    return [image for axes in figure.get_axes() for image in axes.get_images() if isinstance(image.norm, LogNorm)]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_drawn(matplotlib, name, tmp_path):
    model, processor = make(**MODELS[name])
    question = None if name in ("pooling", "three-scales") else QUESTION
    explanation = explain(model, processor, PHOTO, question, max_new_tokens=3)

    figure = draw(explanation)
    save_figure(figure, tmp_path / "explanation.png")

    maps_per_token = 2 if explanation.config.use_detail_integrator else 1
    expected = len(explanation.tiles) * len(explanation.scales) * maps_per_token + (question is not None)
    assert len(heat_maps(figure)) == expected
    with Image.open(tmp_path / "explanation.png") as picture:
        picture.load()
        assert picture.width == 1400
        assert "Software" not in picture.info
    assert "matplotlib.pyplot" not in sys.modules
    panels = [axes.get_position() for axes in figure.get_axes()]
    assert not any(one.overlaps(other) for one, other in combinations(panels, 2))
    # With their titles and labels, within the figure
    sides = [axes.get_tightbbox() for axes in figure.get_axes()]
    assert all((box.min >= 0).all() and (box.max <= figure.bbox.max).all() for box in sides)
    if question:
        texts = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
        assert any(QUESTION in text for text in texts)


def test_even_attention_has_one_colour(matplotlib):
    model, processor = make()
    integrator = model.model.multi_modal_projector.detail_feature_integrator
    torch.nn.init.zeros_(integrator.query_proj.weight)
    torch.nn.init.zeros_(integrator.query_proj.bias)
    explanation = explain(model, processor, PHOTO)
    for heat_map in heat_maps(draw(explanation))[6:]:
        assert abs(heat_map.get_array() - 1).max() < 1e-5


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg", ".PNG"])
def test_the_same_is_drawn_the_same(matplotlib, suffix, tmp_path):
    model, processor = make(spatial_scales=[4, 12], detail_kernel_size=6)
    files = [tmp_path / f"{index}{suffix}" for index in range(2)]
    for file in files:
        save_figure(draw(explain(model, processor, PHOTO)), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files


def test_a_file_is_written_whole_or_not_at_all(matplotlib, tmp_path, monkeypatch):
    file = tmp_path / "explanation.png"
    file.write_text("earlier")
    figure = matplotlib.figure.Figure()

    def fail(path, *arguments):
        path.open("wb").write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        save_figure(figure, file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_text() == "earlier"


@pytest.mark.parametrize("name", ["mini-cropping", "mini-pooling"])
def test_the_command_draws_and_answers(matplotlib, golden, name, tmp_path):
    mini = golden(name)
    output = tmp_path / "explanation.png"
    arguments = ("explain", mini.converted, mini.image_files["landscape"], "--output", output, "--device", "cpu")

    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Wrote {output}\n"
    without = output.read_bytes()

    result = invoke(*arguments, "--question", "What is shown in this image?", "--max-new-tokens", 16)
    assert result.exit_code == 0, result.output
    answer = mini.samples["single"]["generated_text"].strip()
    assert result.stdout == f"{answer}\nWrote {output}\n"
    assert output.read_bytes() != without
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


BAD_OUTPUTS = {
    "suffix": ("explanation.jpg", "explanation.jpg ends in '.jpg': expected one of .png, .pdf, .svg"),
    "no-suffix": ("explanation", "ends in '': expected one of .png"),
    "no-folder": ("missing/explanation.png", "there is no folder"),
    "folder": ("folder.png", "is a folder: name a file"),
    "the-image": ("photo.png", "photo.png is the image itself"),
}


@pytest.mark.parametrize(("name", "message"), BAD_OUTPUTS.values(), ids=list(BAD_OUTPUTS))
def test_a_bad_output_fails_first(matplotlib, golden, name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "load_model", lambda *args, **kwargs: pytest.fail("the weights were loaded"))
    (tmp_path / "folder.png").mkdir()
    photo = tmp_path / "photo.png"
    photo.symlink_to(PHOTO)
    result = invoke("explain", golden("mini-cropping").converted, photo, "--output", tmp_path / name)
    assert_fails(result, message)
    assert PHOTO.stat().st_size > 1000


def test_a_folder_that_allows_no_files_is_refused(matplotlib, golden, tmp_path, monkeypatch):
    monkeypatch.setattr(visualization.os, "access", lambda path, mode: path != tmp_path)
    result = invoke("explain", golden("mini-cropping").converted, PHOTO, "--output", tmp_path / "explanation.png")
    assert_fails(result, f"the folder {tmp_path} allows no new files")


def test_an_unreadable_image_fails_before_the_weights(matplotlib, golden, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "load_model", lambda *args, **kwargs: pytest.fail("the weights were loaded"))
    image = tmp_path / "broken.png"
    image.write_bytes(PHOTO.read_bytes()[:500])
    result = invoke("explain", golden("mini-cropping").converted, image, "--output", tmp_path / "explanation.png")
    assert_fails(result, "Cannot read the image", "broken.png")
    assert not (tmp_path / "explanation.png").exists()


def test_another_model_is_refused(matplotlib, golden, tmp_path):
    llava = copy_of(golden("mini-cropping").converted, tmp_path / "llava", model_type="llava")
    result = invoke("explain", llava, PHOTO, "--output", tmp_path / "explanation.png")
    assert_fails(result, "is not a LLaVA-SP model", "'llava'")


def test_missing_matplotlib_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(visualization, "find_spec", lambda name: None)
    result = invoke("explain", "no-model", "no-image", "--output", tmp_path / "explanation.png")
    assert_fails(result, "matplotlib", "pip install 'transformers-llava-sp[demo]'")
