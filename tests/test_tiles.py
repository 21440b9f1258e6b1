"""
Images in tiles: which tiles an image is cut into, how many tokens they make, and in which order. Configuration, model
and processor must agree on it, and with what the authors' code does, which is written down here a second time.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import FIXTURES, IMAGE_TOKEN_ID, randomize_
from PIL import Image
from test_modeling import assert_logits_equal, assert_same_answer, greedy, logits_of
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlamaTokenizer, LlavaImageProcessorPil

from transformers_llava_sp import LlavaSPConfig, LlavaSPForConditionalGeneration, LlavaSPProcessor
from transformers_llava_sp.configuration_llava_sp import ImageLayout, get_image_layout
from transformers_llava_sp.modeling_llava_sp import LlavaSPModel
from transformers_llava_sp.processing_llava_sp import add_image_token, make_image_processor


# The authors' list, each as (width, height), and the same as (height, width)
AUTHORS_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
PINPOINTS = [[height, width] for width, height in AUTHORS_PINPOINTS]
SINGLE_TILE = [336, 336]
SPATIAL, GRID, TILE = 6, 24, 336


def tiled_config(
    pinpoints: list | None = PINPOINTS,
    image_size: int = TILE,
    patch_size: int = 14,
    image_token_id: int = IMAGE_TOKEN_ID,
    **text_overrides,
) -> LlavaSPConfig:
    grid_size = image_size // patch_size
    return LlavaSPConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=patch_size,
        ),
        text_config=LlamaConfig(
            **{
                "vocab_size": 128,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1024,
                "pad_token_id": 0,
                **text_overrides,
            }
        ),
        projector_config={
            "spatial_hidden_size": 16,
            # Smaller grids have no six default scales
            "spatial_scales": None if grid_size > 10 else [2, 4, 6],
        },
        image_token_id=image_token_id,
        image_grid_pinpoints=pinpoints,
    )


def tiled_processor(
    pinpoints: list | None = PINPOINTS,
    image_size: int = TILE,
    num_spatial_tokens: int = SPATIAL,
    grid_size: int = GRID,
) -> LlavaSPProcessor:
    tokenizer = LlamaTokenizer.from_pretrained(FIXTURES / "mini-cropping" / "base")
    add_image_token(tokenizer)
    image_processor = make_image_processor(LlavaImageProcessorPil(), image_size, pinpoints)
    return LlavaSPProcessor(image_processor, tokenizer, num_spatial_tokens=num_spatial_tokens, grid_size=grid_size)


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# What the authors' code does, in the plainest way


def authors_best_resolution(height: int, width: int) -> tuple[int, int]:
    """
    (width, height): where the image, fitted in, keeps most of its own pixels; of those the one with the fewest pixels
    that show nothing of it; of those the first.
    """
    best, best_pixels, best_waste = None, 0, float("inf")
    for columns, rows in AUTHORS_PINPOINTS:
        scale = min(columns / width, rows / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        waste = columns * rows - pixels
        if pixels > best_pixels or (pixels == best_pixels and waste < best_waste):
            best, best_pixels, best_waste = (columns, rows), pixels, waste
    return best


def authors_unpadded(rows: int, columns: int, height: int, width: int) -> tuple[range, range]:
    """The rows and columns of the joined tiles' patches that are no padding."""
    if width / height > columns / rows:
        kept = int(height * (columns / width))
        padding = (rows - kept) // 2
        return range(padding, rows - padding), range(columns)
    kept = int(width * (rows / height))
    padding = (columns - kept) // 2
    return range(rows), range(padding, columns - padding)


def authors_tokens(height: int, width: int) -> list[tuple]:
    """What each token of an image is: ("spatial", tile, scale), ("patch", tile, row, column) or ("newline",)."""
    best_width, best_height = authors_best_resolution(height, width)
    tile_rows, tile_columns = best_height // TILE, best_width // TILE
    tokens: list[tuple] = []
    for tile in range(1 + tile_rows * tile_columns):
        tokens += [("spatial", tile, scale) for scale in range(SPATIAL)]
    tokens += [("patch", 0, row, column) for row in range(GRID) for column in range(GRID)]
    rows, columns = authors_unpadded(tile_rows * GRID, tile_columns * GRID, height, width)
    for row in rows:
        for column in columns:
            tile = 1 + (row // GRID) * tile_columns + column // GRID
            tokens.append(("patch", tile, row % GRID, column % GRID))
        tokens.append(("newline",))
    return tokens


def seeded_sizes(count: int = 300) -> list[tuple[int, int]]:
    """(height, width): camera sizes of all aspects, and extremes."""
    draw = np.random.default_rng(0)
    sizes = [tuple(size) for size in np.exp(draw.uniform(np.log(20), np.log(3000), (count, 2))).astype(int).tolist()]
    return [*sizes, (1, 2000), (2000, 1), (1, 1), (3, 1000), (1000, 3), (205, 328), (328, 205), (300, 300), (360, 360)]


SIZES = seeded_sizes()


# Layouts


@pytest.mark.parametrize(
    ("size", "expected", "num_tokens"),
    [
        # Fits into each pinpoint of two tiles in its own pixels, and into them equally well: the first, which is high.
        # 24 of 48 rows of patches remain
        ((300, 300), ImageLayout(SPATIAL, GRID, 2, 1, row_padding=12), 3 * 6 + 576 + 24 * 25),
        # Only four tiles are large enough: any order of the pinpoints gives them
        ((360, 360), ImageLayout(SPATIAL, GRID, 2, 2), 5 * 6 + 576 + 48 * 49),
        # 205 * (24 / 328) is 15 less a rounding error: 14 rows, where rounding would keep 16 of the 48
        ((205, 328), ImageLayout(SPATIAL, GRID, 2, 1, row_padding=17), 3 * 6 + 576 + 14 * 25),
        ((336, 1008), ImageLayout(SPATIAL, GRID, 1, 3), 4 * 6 + 576 + 24 * 73),
        ((1008, 336), ImageLayout(SPATIAL, GRID, 3, 1), 4 * 6 + 576 + 72 * 25),
        # 600 wide in 672x336: (24 - int(300 * (48 / 600))) = 0, all 24 rows
        ((300, 600), ImageLayout(SPATIAL, GRID, 1, 2), 3 * 6 + 576 + 24 * 49),
        # Thinner than a patch: none of its tiles' rows remains
        ((1, 2000), ImageLayout(SPATIAL, GRID, 2, 1, row_padding=24), 3 * 6 + 576),
    ],
    ids=["300x300", "360x360", "205x328", "336x1008", "1008x336", "300x600", "1x2000"],
)
def test_layouts_by_hand(size, expected, num_tokens):
    layout = tiled_config().get_image_layout(size)
    assert layout == expected
    assert layout.num_tokens == num_tokens
    assert tiled_processor().get_image_layout(size) == expected


def test_the_order_of_the_pinpoints_decides():
    """In the order of a list that is turned around pair by pair and not transposed, a square image would be wide."""
    turned = tiled_config(pinpoints=AUTHORS_PINPOINTS)
    assert turned.get_image_layout((300, 300)) == ImageLayout(SPATIAL, GRID, 1, 2, column_padding=12)
    assert turned.get_image_layout((360, 360)) == tiled_config().get_image_layout((360, 360))


def test_layouts_equal_the_authors():
    config, processor = tiled_config(), tiled_processor()
    seen = set()
    for size in SIZES:
        layout = config.get_image_layout(size)
        assert layout == processor.get_image_layout(size), size
        best_width, best_height = authors_best_resolution(*size)
        assert (layout.tile_rows * TILE, layout.tile_columns * TILE) == (best_height, best_width), size
        rows, columns = authors_unpadded(layout.tile_rows * GRID, layout.tile_columns * GRID, *size)
        assert (layout.num_rows, layout.num_columns) == (len(rows), len(columns)), size
        assert layout.num_tokens == len(authors_tokens(*size)), size
        seen.add((layout.tile_rows, layout.tile_columns))
    assert seen == {(height // TILE, width // TILE) for height, width in PINPOINTS}


def test_rounding_would_show():
    """Among the sizes are some at which rounding, as Transformers' LLaVA-NeXT does it, gives other tokens."""
    config, different = tiled_config(), []
    for height, width in SIZES:
        layout = config.get_image_layout((height, width))
        rows, columns = layout.tile_rows * GRID, layout.tile_columns * GRID
        if width / height > columns / rows:
            rounded = (rows - int(round(height * (columns / width), 7))) // 2
            different += [(height, width)] * (rounded != layout.row_padding)
        else:
            rounded = (columns - int(round(width * (rows / height), 7))) // 2
            different += [(height, width)] * (rounded != layout.column_padding)
    assert (205, 328) in different


def test_features_of_the_model_fill_the_slots_of_the_processor():
    """Over all sizes at once, with tensors that have shapes and no numbers: they would be some gigabytes."""
    processor = tiled_processor()
    num_tokens = [len(authors_tokens(*size)) for size in SIZES]
    with torch.device("meta"):
        model = LlavaSPModel(tiled_config())
        pixel_values = torch.empty(len(SIZES), 5, 3, TILE, TILE)
    features = model.get_image_features(pixel_values, image_sizes=torch.tensor(SIZES)).pooler_output
    assert [image.shape for image in features] == [(count, 64) for count in num_tokens]

    counts = processor._get_num_multimodal_tokens(image_sizes=SIZES)
    assert counts.num_image_tokens == num_tokens
    assert counts.num_image_patches == [1] * len(SIZES)
    replaced = [processor.replace_image_token({"image_sizes": SIZES}, index) for index in range(len(SIZES))]
    assert [text.count("<image>") for text in replaced] == num_tokens


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size):
    with pytest.raises(ValueError, match=f"An image of {size[0]}x{size[1]} pixels cannot be cut into tiles"):
        tiled_config().get_image_layout(size)


@pytest.mark.parametrize("as_list", [list, tuple, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_sizes_of_any_kind(as_list):
    assert tiled_config().get_image_layout(as_list((205, 328))) == tiled_config().get_image_layout((205, 328))


# The processor


@pytest.fixture(scope="module")
def processor() -> LlavaSPProcessor:
    return tiled_processor([*PINPOINTS, SINGLE_TILE])


def count_slots(processor, inputs) -> list[int]:
    return [(ids == processor.image_token_id).sum().item() for ids in inputs["input_ids"]]


@pytest.mark.parametrize(
    "size", [(205, 328), (350, 340), (1, 2000), (700, 90), (20, 30)], ids=lambda size: f"{size[0]}x{size[1]}"
)
def test_processed_image(processor, size):
    """Real pixels: the image processor cuts as many tiles as the layout has, and there is a slot for each token."""
    inputs = processor(images=photo(*size), text="USER: <image>\nHello", return_tensors="pt")
    layout = processor.get_image_layout(size)
    assert inputs["image_sizes"].tolist() == [list(size)]
    assert count_slots(processor, inputs) == [layout.num_tokens]
    # Transformers' image processor cuts the single tile too, which shows what the whole image does
    assert inputs["pixel_values"].shape == (1, max(layout.num_tiles, 2), 3, TILE, TILE)
    assert processor._get_num_multimodal_tokens(image_sizes=[size]).num_image_tokens == [layout.num_tokens]


def test_a_batch_of_images_with_different_numbers_of_tiles(processor):
    sizes = [(700, 650), (20, 30), (300, 640)]
    images = [photo(*size, seed=seed) for seed, size in enumerate(sizes)]
    inputs = processor(
        images=[[], images[:2], images[2:]],
        text=["Hello", "<image> and <image>", "<image>"],
        padding=True,
        return_tensors="pt",
    )
    layouts = [processor.get_image_layout(size) for size in sizes]
    assert [layout.num_tiles for layout in layouts] == [5, 1, 3]
    assert inputs["pixel_values"].shape == (3, 5, 3, TILE, TILE)
    expected = [layout.num_tokens for layout in layouts]
    assert count_slots(processor, inputs) == [0, expected[0] + expected[1], expected[2]]
    assert inputs["image_sizes"].tolist() == [list(size) for size in sizes]


def test_single_tile_takes_as_many_tokens_as_a_whole_image(processor):
    assert processor.get_image_layout((300, 300)) == ImageLayout(SPATIAL, GRID)
    assert processor.get_image_layout((300, 300)).num_tokens == processor.num_image_tokens == 6 + 576
    whole_images = tiled_processor(pinpoints=None)
    assert whole_images.get_image_layout((300, 300)) == whole_images.get_image_layout() == ImageLayout(SPATIAL, GRID)


def test_saved_processor_has_the_pinpoints(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.image_processor.image_grid_pinpoints == [*PINPOINTS, SINGLE_TILE]
    arguments = {"images": photo(205, 328), "text": "<image>", "return_tensors": "pt"}
    expected, actual = processor(**arguments), loaded(**arguments)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_prompt_longer_than_the_model(processor):
    inputs = processor(images=photo(205, 328), text="<image>", return_tensors="pt")
    length, limit = inputs["input_ids"].shape[1], processor.tokenizer.model_max_length
    try:
        processor.tokenizer.model_max_length = length
        processor(images=photo(205, 328), text="<image>")
        processor.tokenizer.model_max_length = length - 1
        with pytest.raises(
            ValueError,
            match=rf"Sample 0 has {length} tokens, .* at most {length - 1} .* 582 tokens, and its tiles take more",
        ):
            processor(images=photo(205, 328), text="<image>")
    finally:
        processor.tokenizer.model_max_length = limit


# The model, with tiles of 42 pixels: grids of 6x6, and three spatial tokens

SMALL_TILE = 42
SMALL_PINPOINTS = [[height // 8, width // 8] for height, width in [*PINPOINTS, SINGLE_TILE]]
# (height, width) of images with 3, 5, 1 and 4 tiles, two of them with padding
HIGH, LARGE, SINGLE, WIDE = (80, 32), (80, 75), (30, 31), (33, 120)


@pytest.fixture(scope="module")
def model() -> LlavaSPForConditionalGeneration:
    config = tiled_config(SMALL_PINPOINTS, SMALL_TILE, patch_size=7)
    model = randomize_(LlavaSPForConditionalGeneration(config)).eval()
    model.generation_config.eos_token_id = None
    return model


def tiles_of(sizes: Sequence[tuple[int, int]], seed: int = 1, num_tiles: int = 5) -> dict:
    """`pixel_values` with as many tiles for each image, whether it has them or not, and `image_sizes`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(sizes), num_tiles, 3, SMALL_TILE, SMALL_TILE)
    return {"pixel_values": torch.randn(shape, generator=generator), "image_sizes": torch.tensor(sizes)}


def prompt(model, sizes: Sequence[tuple[int, int]], text: Sequence[int] = (5, 6)) -> torch.Tensor:
    ids = [1]
    for size in sizes:
        ids += [IMAGE_TOKEN_ID] * model.config.get_image_layout(size).num_tokens + [3]
    return torch.tensor([[*ids, *text]])


def inputs_of(model, sizes: Sequence[tuple[int, int]], **kwargs) -> dict:
    return {"input_ids": prompt(model, sizes), **tiles_of(sizes, **kwargs)}


def test_sizes_have_the_tiles_that_they_are_named_for(model):
    layouts = {size: model.config.get_image_layout(size) for size in (HIGH, LARGE, SINGLE, WIDE)}
    assert [layout.num_tiles for layout in layouts.values()] == [3, 5, 1, 4]
    assert layouts[HIGH] == ImageLayout(3, 6, 2, 1, column_padding=1)
    assert layouts[LARGE] == ImageLayout(3, 6, 2, 2)
    assert layouts[WIDE] == ImageLayout(3, 6, 1, 3, row_padding=1)


@torch.no_grad()
def test_order_of_the_tokens():
    """Features that say where they are from, in the order of the authors' code."""
    model = LlavaSPModel(tiled_config()).eval()
    sizes = [(205, 328), (360, 360), (336, 900), (700, 500), (1, 2000)]
    layouts = [model.config.get_image_layout(size) for size in sizes]
    names: list[tuple] = []
    for image, layout in enumerate(layouts):
        for tile in range(layout.num_tiles):
            names += [(image, "spatial", tile, scale) for scale in range(SPATIAL)]
            names += [(image, "patch", tile, row, column) for row in range(GRID) for column in range(GRID)]
    model.image_newline.weight.fill_(len(names))
    values = torch.arange(len(names), dtype=torch.float32)
    features = values.view(-1, SPATIAL + GRID**2, 1).expand(-1, -1, model.image_newline.weight.numel())

    joined = model.join_tiles(features, layouts)
    assert len(joined) == len(sizes)
    names.append(("newline",))
    for image, (size, tokens) in enumerate(zip(sizes, joined, strict=True)):
        assert (tokens == tokens[:, :1]).all()
        actual = [names[int(value)] for value in tokens[:, 0]]
        expected = [token if token == ("newline",) else (image, *token) for token in authors_tokens(*size)]
        assert actual == expected


@torch.no_grad()
def test_features_are_those_of_each_tile_alone(model):
    """The tiles of an image in the order of `pixel_values`, the whole image first, row by row."""
    inputs = tiles_of([LARGE])
    alone = [
        model.get_image_features(tile[None]).pooler_output.squeeze(0) for tile in inputs["pixel_values"].squeeze(0)
    ]
    spatial, patches = [tile[:3] for tile in alone], [tile[3:].view(6, 6, -1) for tile in alone]
    grid = torch.cat([torch.cat(patches[1:3], dim=1), torch.cat(patches[3:5], dim=1)])
    newlines = model.model.image_newline.weight.expand(12, 1, -1)
    expected = torch.cat([*spatial, patches[0].flatten(0, 1), torch.cat([grid, newlines], dim=1).flatten(0, 1)])
    (features,) = model.get_image_features(**inputs).pooler_output
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_images_of_a_batch_have_their_own_numbers_of_tiles(model):
    sizes = [HIGH, SINGLE, LARGE, WIDE]
    inputs = tiles_of(sizes)
    num_tiles = [3, 1, 5, 4]
    expected = []
    for size, count, tiles in zip(sizes, num_tiles, inputs["pixel_values"], strict=True):
        features = model.get_image_features(tiles[None, :count], image_sizes=torch.tensor([size])).pooler_output
        expected.append(features[0])
    # What stands behind an image's last tile is nothing
    for count, tiles in zip(num_tiles, inputs["pixel_values"], strict=True):
        tiles[count:] = torch.nan
    output = model.get_image_features(**inputs)
    assert isinstance(output.pooler_output, list)
    assert output.last_hidden_state.shape[0] == sum(num_tiles)
    for actual, image in zip(output.pooler_output, expected, strict=True):
        torch.testing.assert_close(actual, image, rtol=0, atol=1e-5)
    as_tuple = model.get_image_features(**inputs, return_dict=False)
    assert all(torch.equal(*pair) for pair in zip(as_tuple[1], output.pooler_output, strict=True))
    output = model(input_ids=prompt(model, sizes), **inputs)
    assert torch.equal(output.image_hidden_states, torch.cat(as_tuple[1]))
    assert output.logits.isfinite().all()


@torch.no_grad()
def test_one_tile_is_the_whole_image_alone(model):
    """With five dimensions or four, with `image_sizes` or without, among tiles that are ignored or by itself."""
    inputs = tiles_of([SINGLE], num_tiles=2)
    whole = inputs["pixel_values"][:, 0]
    expected = model.get_image_features(whole).pooler_output
    assert expected.shape == (1, 3 + 36, 64)
    assert torch.equal(model.get_image_features(whole[:, None]).pooler_output, expected)
    assert torch.equal(model.get_image_features(whole, image_sizes=inputs["image_sizes"]).pooler_output, expected)
    (features,) = model.get_image_features(**inputs).pooler_output
    assert torch.equal(features[None], expected)

    ids = prompt(model, [SINGLE])
    expected_answer = greedy(model, {"input_ids": ids, "pixel_values": whole})
    for others in ({"pixel_values": whole[:, None]}, inputs):
        assert_same_answer(greedy(model, {"input_ids": ids, **others}), expected_answer)


@torch.no_grad()
def test_image_sizes_may_be_lists(model):
    inputs = inputs_of(model, [HIGH, LARGE])
    expected = logits_of(model, inputs)
    assert torch.equal(logits_of(model, {**inputs, "image_sizes": inputs["image_sizes"].tolist()}), expected)


def test_tower_and_projector_run_once_for_all_tiles(model):
    shapes = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, arguments, name=name: shapes.setdefault(name, []).append(len(arguments[0]))
        )
        for name, module in (
            ("tower", model.model.vision_tower),
            ("projector", model.model.multi_modal_projector),
            ("language model's layer", model.model.language_model.layers[0]),
        )
    ]
    try:
        logits_of(model, inputs_of(model, [HIGH, SINGLE, LARGE, WIDE]))
    finally:
        for hook in hooks:
            hook.remove()
    assert shapes == {"tower": [13], "projector": [13], "language model's layer": [1]}


def test_images_reach_the_answer(model):
    """Each tile and the separators: another one changes the logits."""
    inputs = inputs_of(model, [HIGH, LARGE])
    logits = logits_of(model, inputs)[:, -1]
    for image, num_tiles in enumerate((3, 5)):
        for tile in range(5):
            other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
            other["pixel_values"][image, tile] += 1
            difference = (logits_of(model, other)[:, -1] - logits).abs().max()
            assert (difference > 1e-4) if tile < num_tiles else (difference == 0)
    newline = model.model.image_newline.weight
    before = newline.detach().clone()
    try:
        with torch.no_grad():
            newline.add_(1)
        difference = (logits_of(model, inputs)[:, -1] - logits).abs().max()
    finally:
        newline.data.copy_(before)
    assert difference > 1e-4


def test_separator_starts_as_long_as_an_embedding_of_unit_length():
    torch.manual_seed(0)
    config = tiled_config(SMALL_PINPOINTS, SMALL_TILE, 7, hidden_size=1024, num_hidden_layers=1)
    newline = LlavaSPModel(config).image_newline.weight
    assert newline.shape == (1024,)
    assert 0.9 < newline.norm() < 1.1
    without = LlavaSPModel(tiled_config(None, SMALL_TILE, 7))
    assert not hasattr(without, "image_newline")


# Beams and samples


def batch_of(model, samples: list[list[tuple[int, int]]]) -> tuple[dict, list[dict]]:
    """A left-padded batch, and its samples alone."""
    images = tiles_of([size for sizes in samples for size in sizes])
    rows = [prompt(model, sizes, text=range(5, 7 + index)) for index, sizes in enumerate(samples)]
    longest = max(row.shape[1] for row in rows)
    batch = {
        "input_ids": torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - row.shape[1]) + [1] * row.shape[1] for row in rows]),
        **images,
    }
    alone, start = [], 0
    for row, sizes in zip(rows, samples, strict=True):
        of_sample = slice(start, start + len(sizes))
        alone.append(
            {
                "input_ids": row,
                "attention_mask": torch.ones_like(row),
                **({name: tensor[of_sample] for name, tensor in images.items()} if sizes else {}),
            }
        )
        start += len(sizes)
    return batch, alone


SAMPLES = [[HIGH], [LARGE, SINGLE], [], [WIDE, HIGH]]


def test_beams_equal_each_alone(model):
    def search(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        output = model.generate(
            **inputs,
            max_new_tokens=6,
            num_beams=3,
            num_return_sequences=2,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return output.sequences[:, -6:], output.sequences_scores

    batch, alone = batch_of(model, SAMPLES)
    sequences, scores = search(batch)
    for row, sample in enumerate(alone):
        # Features that stand in the embeddings already need no order of images: a wrong one cannot hide in both
        embedded = dict(sample)
        input_ids = embedded.pop("input_ids")
        with torch.no_grad():
            embeddings = model.get_input_embeddings()(input_ids)
            if "pixel_values" in embedded:
                images = {name: embedded.pop(name) for name in ("pixel_values", "image_sizes")}
                embeddings[input_ids == IMAGE_TOKEN_ID] = torch.cat(model.get_image_features(**images).pooler_output)
        alone_sequences, alone_scores = search({**embedded, "inputs_embeds": embeddings})
        assert torch.equal(sequences[2 * row : 2 * row + 2], alone_sequences)
        torch.testing.assert_close(scores[2 * row : 2 * row + 2], alone_scores, rtol=0, atol=2e-5)


def test_copies_of_a_sample_see_its_own_images(model):
    batch, alone = batch_of(model, SAMPLES)
    expected = torch.stack([logits_of(model, sample)[0, -1] for sample in alone])
    torch.manual_seed(0)
    output = model.generate(
        **batch,
        max_new_tokens=2,
        do_sample=True,
        num_return_sequences=3,
        output_logits=True,
        return_dict_in_generate=True,
    )
    copies = output.logits[0].unflatten(0, (-1, 3))
    assert_logits_equal(copies, expected[:, None].expand(-1, 3, -1))


# Bad input


MISMATCH = "Image features and image tokens do not match"


def without(inputs: dict, name: str) -> dict:
    return {key: value for key, value in inputs.items() if key != name}


@pytest.mark.parametrize("call", ["forward", "generate", "beams"])
def test_missing_image_sizes(model, call):
    inputs = without(inputs_of(model, [HIGH, LARGE]), "image_sizes")
    with pytest.raises(ValueError, match="`pixel_values` has 2 images in tiles, but `image_sizes` is missing"):
        logits_of(model, inputs) if call == "forward" else greedy(model, inputs, num_beams=1 + (call == "beams"))


@pytest.mark.parametrize("count", [1, 3])
def test_wrong_number_of_image_sizes(model, count):
    inputs = inputs_of(model, [HIGH, LARGE])
    inputs["image_sizes"] = torch.tensor([HIGH] * count)
    with pytest.raises(ValueError, match=f"has 2 images in tiles, but `image_sizes` is that of {count}"):
        model(**inputs)


def test_fewer_tiles_than_the_model_needs(model):
    inputs = inputs_of(model, [LARGE])
    inputs["pixel_values"] = inputs["pixel_values"][:, :3]
    with pytest.raises(
        ValueError, match=r"image of 80x75 pixels .* has 5 tiles .* only has 3 .*the same `image_grid_"
    ):
        model(**inputs)


def test_processor_with_other_pinpoints():
    """Its slots are not the features of the model, which has more tiles in one case and fewer in the other."""
    image = photo(80, 75)
    several = tiled_processor(SMALL_PINPOINTS, SMALL_TILE, 3, 6)
    two = tiled_processor([[84, 42], [42, 84]], SMALL_TILE, 3, 6)
    for model_pinpoints, processor, message in (
        (SMALL_PINPOINTS, two, r"has 5 tiles .* only has 3 .* Model and processor must have the same"),
        ([[84, 42], [42, 84]], several, MISMATCH),
    ):
        config = tiled_config(
            model_pinpoints, SMALL_TILE, 7, processor.image_token_id, vocab_size=len(processor.tokenizer)
        )
        model = LlavaSPForConditionalGeneration(config).eval()
        inputs = processor(images=image, text="<image>", return_tensors="pt")
        for function in (logits_of, greedy):
            with pytest.raises(ValueError, match=message):
                function(model, inputs)


def test_tiles_for_a_model_without():
    model = LlavaSPForConditionalGeneration(tiled_config(None, SMALL_TILE, 7)).eval()
    with pytest.raises(ValueError, match=r"shape \(1, 5, 3, 42, 42\), expected \(images, channels, 42, 42\)"):
        model.get_image_features(**tiles_of([LARGE]))


@pytest.mark.parametrize("shape", [(2, 3, 3, 42, 49), (2, 3, 3, 84, 84), (1, 3, 84, 84), (3, 42, 42), (42, 42)])
def test_wrong_size_of_pixels(model, shape):
    expected = r"\(images, channels, 42, 42\) or \(images, tiles, channels, 42, 42\)"
    size = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"shape \({size}\), expected {expected}.*`image_grid_pinpoints` is \[\["):
        model.get_image_features(torch.zeros(shape), image_sizes=torch.tensor([HIGH] * shape[0]))


@pytest.mark.parametrize("call", ["forward", "generate", "beams"])
def test_wrong_number_of_slots(model, call):
    inputs = {"input_ids": prompt(model, [HIGH]), **tiles_of([HIGH, LARGE])}
    slots, features = [
        [model.config.get_image_layout(size).num_tokens for size in sizes] for sizes in ([HIGH], [HIGH, LARGE])
    ]
    message = rf"{MISMATCH}: {slots[0]} image tokens .* {sum(features)} features, \[{features[0]}, {features[1]}\]"
    with pytest.raises(ValueError, match=message):
        logits_of(model, inputs) if call == "forward" else greedy(model, inputs, num_beams=1 + (call == "beams"))


def test_slots_of_one_sample_in_another_do_not_generate_beams(model):
    batch, _ = batch_of(model, [[HIGH], [LARGE]])
    counts = [model.config.get_image_layout(size).num_tokens for size in (HIGH, LARGE)]
    row = batch["input_ids"][0]
    row[(row == IMAGE_TOKEN_ID).nonzero()[0]] = 9
    batch["input_ids"][1, -1] = IMAGE_TOKEN_ID
    message = rf"{MISMATCH}: the samples have \[{counts[0] - 1}, {counts[1] + 1}\].*take \[{counts[0]}, {counts[1]}\]"
    with pytest.raises(ValueError, match=message):
        greedy(model, batch, num_beams=2)


def test_prompt_longer_than_the_language_model():
    config = tiled_config(SMALL_PINPOINTS, SMALL_TILE, 7, max_position_embeddings=100)
    model = LlavaSPForConditionalGeneration(config).eval()
    inputs = inputs_of(model, [LARGE])
    length = inputs["input_ids"].shape[1]
    with pytest.raises(
        ValueError, match=rf"{length} tokens long.* 100 positions.* each takes 39 tokens, and its tiles take more"
    ):
        greedy(model, inputs)
    assert logits_of(model, inputs).shape[1] == length


# Configuration


@pytest.mark.parametrize(
    ("pinpoints", "message"),
    [
        ([], "`image_grid_pinpoints` is empty: list resolutions, or leave it out"),
        ([[672, 336], [672, 400]], r"has \[672, 400\], which is no multiple of the 336 pixels"),
        ([[168, 336]], r"has \[168, 336\], which is no multiple of the 336 pixels"),
        ([[336, 672, 3]], r"has \[336, 672, 3\], expected \(height, width\) in pixels"),
        ([[672]], r"has \[672\], expected \(height, width\)"),
        ([[336.0, 672]], r"has \[336\.0, 672\], expected \(height, width\)"),
        ([[336, True]], r"has \[336, True\], expected \(height, width\)"),
        ([[0, 336]], r"has \[0, 336\], expected \(height, width\)"),
        ([[-336, 336]], r"has \[-336, 336\], expected \(height, width\)"),
        ([["336", "672"]], r"has \['336', '672'\], expected \(height, width\)"),
        ([336, 672], "`image_grid_pinpoints`"),
    ],
    ids=["empty", "no-multiple", "smaller", "three", "one", "float", "bool", "zero", "negative", "strings", "flat"],
)
def test_pinpoints_that_are_refused(pinpoints, message):
    with pytest.raises(ValueError, match=message):
        tiled_config(pinpoints)


def test_pinpoints_round_trip(tmp_path):
    config = tiled_config([tuple(pinpoint) for pinpoint in PINPOINTS])
    assert config.image_grid_pinpoints == PINPOINTS
    config.save_pretrained(tmp_path)
    loaded = LlavaSPConfig.from_pretrained(tmp_path)
    assert loaded.image_grid_pinpoints == PINPOINTS
    assert loaded.get_image_layout((205, 328)) == config.get_image_layout((205, 328))
    assert loaded.tile_size == TILE


def test_layout_without_pinpoints_or_size():
    whole = ImageLayout(SPATIAL, GRID)
    assert get_image_layout(SPATIAL, GRID) == get_image_layout(SPATIAL, GRID, (205, 328)) == whole
    assert get_image_layout(SPATIAL, GRID, None, PINPOINTS, TILE) == whole
    assert (whole.num_tiles, whole.num_tokens) == (1, 582)
