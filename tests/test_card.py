"""The model card of a converted repository says what is true, and its examples run without this package."""

import dataclasses
import importlib.metadata
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import VARIANTS, tiny_config
from huggingface_hub import ModelCard, constants
from test_remote_code import run_without_the_package
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, MistralConfig, SiglipVisionConfig

import transformers_llava_sp
from transformers_llava_sp import LlavaSPConfig
from transformers_llava_sp.conversion.card import Provenance, make_model_card, read_license
from transformers_llava_sp.conversion.original import Layout


REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

CHECKPOINT = Provenance(
    "LLaVA-SP checkpoint",
    "Levideus/llava-sp-cropping-lora",
    True,
    "5" * 40,
    "cc-by-nc-4.0",
    {"non_lora_trainables.bin": "b" * 64, "config.json": "a" * 64},
)
LANGUAGE_MODEL = Provenance(
    "language model", "lmsys/vicuna-7b-v1.5", True, "6" * 40, "llama2", {"config.json": "c" * 64}
)
TOWER = Provenance(
    "vision tower", "openai/clip-vit-large-patch14-336", True, "7" * 40, None, {"pytorch_model.bin": "d" * 64}
)
LOCAL_CHECKPOINT = Provenance("LLaVA-SP checkpoint", "my-run", False, None, None, {"config.json": "e" * 64})
ADAPTER = Provenance("adapter", "someone/my-adapter", True, "8" * 40, "mit", {"adapter_config.json": "f" * 64})
MODEL = Provenance("LLaVA-SP model", "someone/my-model", True, "9" * 40, "cc-by-nc-4.0", {"config.json": "0" * 64})

PAPER_HEADING = "## Results: the paper's, not measured with these files"


def make_card(config: LlavaSPConfig | None = None, **changes) -> ModelCard:
    """The card of the released Cropping checkpoint, but for the changes."""
    return make_model_card(
        config or LlavaSPConfig(),
        **{
            "layout": Layout.SP_LORA.value,
            "dtype": torch.float16,
            "num_parameters": 7_968_123_456,
            "sources": [CHECKPOINT, LANGUAGE_MODEL, TOWER],
            "command": "llava-sp convert Levideus/llava-sp-cropping-lora --base-model lmsys/vicuna-7b-v1.5",
            **changes,
        },
    )


def released_config(part: str, **changes) -> LlavaSPConfig:
    """The released model's configuration, but for changes in one part of it."""
    parts = {name: getattr(LlavaSPConfig(), name).to_dict() for name in ("vision_config", "text_config")}
    parts["projector_config"] = {}
    parts[part].update(changes)
    return LlavaSPConfig(**parts)


def section(card: ModelCard, heading: str) -> str:
    """What stands under a heading of the second level, up to the next."""
    [text] = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", card.text, re.MULTILINE | re.DOTALL)
    return text


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def table_rows(text: str) -> dict[str, list[str]]:
    """The rows of all tables in a text, by their first cell."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells if not set(row[0]) <= {"-"}}


# Metadata


def test_metadata_of_a_release():
    card = make_card()
    _, metadata, _ = str(card).split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "base_model": [
            "Levideus/llava-sp-cropping-lora",
            "lmsys/vicuna-7b-v1.5",
            "openai/clip-vit-large-patch14-336",
        ],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "cc-by-nc-4.0",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "llava-sp", "multimodal", "vision", "custom_code", "arxiv:2507.00505"],
    }


@pytest.mark.parametrize(
    "sources, base_models, relation",
    [
        ([LOCAL_CHECKPOINT, LANGUAGE_MODEL, TOWER], [LANGUAGE_MODEL.name, TOWER.name], "merge"),
        ([LOCAL_CHECKPOINT, TOWER], [TOWER.name], None),
        ([LOCAL_CHECKPOINT], None, None),
        ([CHECKPOINT, dataclasses.replace(TOWER, name=CHECKPOINT.name)], [CHECKPOINT.name], None),
        ([MODEL, ADAPTER], [MODEL.name, ADAPTER.name], "merge"),
    ],
    ids=["local-checkpoint", "one-hub-id", "all-local", "one-repository-twice", "merge"],
)
def test_base_models_are_the_hub_ids(sources, base_models, relation):
    data = make_card(sources=sources).data.to_dict()
    assert data.get("base_model") == base_models
    assert data.get("base_model_relation") == relation


@pytest.mark.parametrize(
    "licenses, license, license_name",
    [
        (["cc-by-nc-4.0", "llama2", None], "cc-by-nc-4.0", None),
        ([None, "cc-by-nc-4.0"], "cc-by-nc-4.0", None),
        (["llama2", "llama2"], "llama2", None),
        (["llama2", None], "other", "see-model-card"),
        (["llama2", "mit"], "other", "see-model-card"),
        (["apache-2.0"], "apache-2.0", None),
        (["my own licence"], "other", "see-model-card"),
        ([None, None], "unknown", None),
    ],
    ids=lambda value: "+".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_license_of_all_together(licenses, license, license_name):
    sources = [dataclasses.replace(TOWER, license=each) for each in licenses]
    card = make_card(sources=sources)
    assert card.data.license == license
    assert card.data.get("license_name") == license_name
    assert ("non-commercial use only" in card.text) == ("cc-by-nc-4.0" in licenses)


@pytest.mark.parametrize("repo_id", [None, "someone/llava-sp"])
def test_card_survives_loading_and_saving(tmp_path, repo_id):
    card = make_card(repo_id=repo_id, notes=["One tensor was drawn afresh."])
    card.save(tmp_path / "README.md")
    content = (tmp_path / "README.md").read_bytes()
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.to_dict() == card.data.to_dict()
    assert str(loaded).encode() == content
    assert content.endswith(b"```\n")
    assert b"\r" not in content
    assert not re.search(r"\n\n\n|[ \t]\n|\{[%#]|[%#]\}", content.decode())


# Text


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_of_each_variant(variant):
    spatial, has_details = variant.partition("-")[0], variant.endswith("-dfi")
    card = make_card(tiny_config(variant), num_parameters=1_234_567, dtype=torch.bfloat16)
    assert card.text.lstrip().startswith(f"# LLaVA-SP-{spatial.capitalize()}\n")
    words = {"cropping": "from the central region to the global image", "pooling": "from abstract to specific"}
    for name, text in words.items():
        assert (text in card.text) == (name == spatial)
    assert ("attention over the features" in card.text) == has_details
    sizes = table_rows(card.text)
    assert sizes == {
        "part": ["sizes"],
        "vision tower": [
            "`clip_vision_model`, 3 layers, width 32; images of 84 x 84 pixels, a grid of 12 x 12 patches"
        ],
        "spatial tokens": ["6, one for each scale: 2, 4, 6, 8, 10, 12"],
        "detail features": ["9 (kernel 8 x 8, stride 2)" if has_details else "none"],
        "tokens per image": ["150: 6 spatial, 144 patch"],
        "language model": ["`llama`, 2 layers, width 64, 128 embeddings, 1024 tokens of context"],
        "parameters": ["1,234,567 in bfloat16"],
    }
    assert "at most 1024 tokens" in section(card, "Limits")


def test_prompt_is_the_chat_templates(golden):
    processor = AutoProcessor.from_pretrained(golden("mini-cropping").converted)
    question = {"type": "text", "text": "What is shown in this image?"}
    messages = [{"role": "user", "content": [{"type": "image", "image": "photo.jpg"}, question]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert code_blocks(section(make_card(), "Prompt"), "text") == [f"{prompt}\n"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_image_tiles_are_described(variant):
    config = tiny_config(variant)
    config.image_grid_pinpoints = [[84, 168], [252, 84]]
    card = make_card(config)
    rows = table_rows(card.text)
    assert rows["image tiles"] == ["of 84 x 84 pixels, in the best-fitting of 84 x 168, 252 x 84 (height x width)"]
    # Of 252 x 84 pixels, 4 x 6 spatial tokens, the patches of the whole image, and 36 rows of 12 and a separator
    assert rows["tokens per image"] == [
        "150: 6 spatial, 144 patch for the whole image; 6 and its patches for each tile, and 1 for each row of "
        "patches; up to 636 in all"
    ]
    assert "\n- An image is seen as a whole and in tiles, and takes up to 636 of these tokens.\n" in card.text
    assert not re.search(r"\n\n\n|[ \t]\n", card.text)


def test_own_chat_template_is_not_called_the_authors():
    prompt = section(make_card(own_chat_template=True), "Prompt")
    assert "The chat template in this repository is the language model's own, made to take images." in prompt
    assert "ASSISTANT" not in prompt
    assert "\n\nThey evaluate in float16" in prompt
    assert "language model's own" not in make_card().text


def test_pretraining():
    card = make_card(layout=Layout.SP_PRETRAINING.value)
    assert card.text.lstrip().startswith("# LLaVA-SP-Cropping, pre-trained only\n")
    assert "writes short captions" in card.text
    assert r"`<image>` + `\n`" in section(card, "Prompt")
    assert "USER:" not in card.text
    assert "apply_chat_template" not in card.text
    fine_tuned = make_card().text
    assert "pre-trained only" not in fine_tuned
    assert "captions" not in fine_tuned


@pytest.mark.parametrize("layout", [Layout.SP_LORA, Layout.SP_FULL, Layout.SP_PRETRAINING])
def test_layout_is_named(layout):
    assert f"converted for Hugging Face Transformers from {layout.value}." in make_card(layout=layout.value).text


def test_merged_adapter_is_named():
    card = make_card(layout=Layout.OUR_ADAPTER.value, sources=[MODEL, ADAPTER])
    assert "\nIt is a LLaVA-SP model in the format of Hugging Face Transformers, with an adapter merged" in card.text
    assert "\n- Merging trains nothing. The adapter was merged into the weights that it adapts" in card.text
    assert "converted" not in card.text
    assert "Converting" not in card.text
    assert "merged into it" not in make_card().text
    assert "\n- Converting trains nothing. " in make_card().text


# Licences


def test_licenses_of_all_parts():
    text = section(make_card(), "Licences")
    lines = dict(re.findall(r"^- \*\*(.+?)\*\*(.*)$", text, re.MULTILINE))
    assert list(lines) == ["LLaVA-SP checkpoint", "language model", "vision tower", "The Python files"]
    assert "(Levideus/llava-sp-cropping-lora): [CC BY-NC 4.0]" in lines["LLaVA-SP checkpoint"]
    assert "(lmsys/vicuna-7b-v1.5): the [Llama 2 Community License]" in lines["language model"]
    assert "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta" in lines["language model"]
    assert lines["vision tower"] == (
        " (openai/clip-vit-large-patch14-336): not stated by its source. "
        "OpenAI publishes CLIP's code under the MIT licence."
    )
    assert lines["The Python files"] == ": Apache-2.0, from transformers-llava-sp."
    assert "came inside" not in text


@pytest.mark.parametrize(
    "source, text",
    [
        (LOCAL_CHECKPOINT, "(my-run): not stated by its source.\n"),
        (dataclasses.replace(LOCAL_CHECKPOINT, name="openai/clip-x"), "(openai/clip-x): not stated by its source.\n"),
        (dataclasses.replace(LOCAL_CHECKPOINT, license="my-1.0"), "(my-run): `my-1.0`, as its source states.\n"),
    ],
    ids=["unknown", "local-folder-like-an-id", "another"],
)
def test_licenses_that_are_not_known(source, text):
    assert text in section(make_card(sources=[source]), "Licences")


@pytest.mark.parametrize(
    "sources, parts",
    [
        ([CHECKPOINT], "language model and the vision tower"),
        ([CHECKPOINT, TOWER], "language model"),
        ([CHECKPOINT, LANGUAGE_MODEL], "vision tower"),
    ],
    ids=["full", "full-with-tower", "with-base"],
)
def test_parts_inside_a_checkpoint_keep_their_licenses(sources, parts):
    text = section(make_card(sources=sources, layout=Layout.SP_FULL.value), "Licences")
    assert f"The weights of the {parts} came inside one of these." in text


@pytest.mark.parametrize(
    "readme, license",
    [
        ("---\nlicense: mit\n---\n# Mine\n", "mit"),
        ("\ufeff---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: my-licence-1.0\n---\n", "my-licence-1.0"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: |\n  my\n  own\n---\n", "my own"),
        ("---\nlicense: [mit, llama2]\n---\n", "llama2"),
        ("---\nlicense: ' '\n---\n", "llama2"),
        ("---\ntags: [llama]\n---\n", "llama2"),
        ("---\n---\n", "llama2"),
        ("# No metadata\n", "llama2"),
        ("---\n{ broken\n---\n", "llama2"),
        ("---\n- a list\n---\n", "llama2"),
        (b"\xff\xfe---", "llama2"),
        (None, "llama2"),
    ],
    ids=[
        *("stated", "byte-order-mark", "named", "other", "two-lines", "list", "blank", "unstated", "empty"),
        *("no-metadata", "broken-yaml", "no-mapping", "not-utf-8", "no-readme"),
    ],
)
def test_read_license(tmp_path, readme, license):
    if readme is not None:
        (tmp_path / "README.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    assert read_license(tmp_path, "lmsys/vicuna-7b-v1.5") == license


@pytest.mark.parametrize(
    "name, license",
    [
        ("Levideus/llava-sp-cropping-lora", "cc-by-nc-4.0"),
        ("Levideus/llava-sp-pooling-lora", "cc-by-nc-4.0"),
        ("lmsys/vicuna-7b-v1.5", "llama2"),
        ("lmsys/vicuna-13b-v1.5", "llama2"),
        ("google/siglip-large-patch16-384", "apache-2.0"),
        ("openai/clip-vit-large-patch14-336", None),
        ("vicuna-7b-v1.5", None),
    ],
)
def test_licenses_known_by_name(tmp_path, name, license):
    assert read_license(tmp_path, name) == license


def test_license_of_a_converted_model_is_its_cards(tmp_path):
    make_card().save(tmp_path / "README.md")
    assert read_license(tmp_path, "my-model") == "cc-by-nc-4.0"


# Provenance


def test_provenance():
    notes = ["Dropped 3 tensors without use.", "`image_newline` was drawn afresh."]
    card = make_card(sources=[CHECKPOINT, LANGUAGE_MODEL, LOCAL_CHECKPOINT], notes=notes)
    text = section(card, "Where the weights come from")
    assert code_blocks(text, "bash") == [
        "llava-sp convert Levideus/llava-sp-cropping-lora --base-model lmsys/vicuna-7b-v1.5\n"
    ]
    assert re.findall(r"^- (.*)$", text, re.MULTILINE)[1:] == notes
    assert "cast to\n  float16." in text
    for source in (CHECKPOINT, LANGUAGE_MODEL):
        link = f"[{source.name}](https://huggingface.co/{source.name}) at revision `{source.revision}`."
        assert f"**{source.role}**: {link}" in text
    assert f"**{LOCAL_CHECKPOINT.role}**: a local folder named `my-run`." in text
    # As sha256sum writes and checks them, sorted by name
    assert code_blocks(text, "text") == [
        f"{'a' * 64}  config.json\n{'b' * 64}  non_lora_trainables.bin\n",
        f"{'c' * 64}  config.json\n",
        f"{'e' * 64}  config.json\n",
    ]


def test_no_revision_is_made_up():
    text = section(make_card(sources=[dataclasses.replace(CHECKPOINT, revision=None)]), "Where the weights come from")
    assert f"({constants.ENDPOINT}/{CHECKPOINT.name}). SHA-256" in text
    assert "revision" not in text


def test_versions():
    text = section(make_card(), "Where the weights come from")
    [versions] = re.findall(r"^Versions: (.*)\.$", text, re.MULTILINE)
    assert versions.split(", ") == [f"transformers-llava-sp {transformers_llava_sp.__version__}"] + [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("transformers", "torch", "huggingface_hub", "safetensors", "tokenizers")
    ]


def test_needed_version_is_the_packages_own():
    [lower, upper] = re.findall(r'"transformers>=([\d.]+),<(\d+)"', (REPOSITORY / "pyproject.toml").read_text())[0]
    assert f"It needs Transformers {lower} or newer, below {upper}," in make_card().text


@pytest.mark.parametrize("order", [1, -1], ids=["same", "files-in-other-order"])
def test_same_bytes_on_every_run(tmp_path, monkeypatch, order):
    first = str(make_card())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setattr(time, "time", lambda: 2_000_000_000.0)
    checkpoint = dataclasses.replace(CHECKPOINT, sha256=dict(list(CHECKPOINT.sha256.items())[::order]))
    assert str(make_card(sources=[checkpoint, LANGUAGE_MODEL, TOWER])) == first


def test_nothing_about_time_or_machine():
    text = str(make_card(sources=[LOCAL_CHECKPOINT, LANGUAGE_MODEL, TOWER]))
    assert not re.search(r"\d{4}-\d{2}-\d{2}|\d{2}:\d{2}", text)
    assert set(re.findall(r"\b20[2-9]\d\b", text)) == {"2025"}
    without_links = re.sub(r"https://[^\s)]+", "", text)
    assert not re.search(r"(?<![\w<.>-])/\w|[A-Z]:\\|~/|file:", without_links)


# The paper's numbers


def benchmark_table(text: str) -> dict[str, list[str]]:
    return {name: row for name, row in table_rows(text).items() if len(row) == 11}


@pytest.mark.parametrize("layout", [Layout.SP_LORA, Layout.SP_FULL])
@pytest.mark.parametrize("variant, name", [("cropping", "LLaVA-SP-Cropping"), ("pooling", "LLaVA-SP-Pooling")])
def test_numbers_are_those_of_the_readme(variant, name, layout):
    config = released_config(
        "projector_config", spatial_variant=variant, spatial_projection_bias=variant == "cropping"
    )
    card = make_card(config, layout=layout.value)
    expected = benchmark_table(README)
    assert len(expected) == 4
    assert benchmark_table(section(card, PAPER_HEADING[3:])) == {
        row: expected[row] for row in ("model", "LLaVA-1.5 (LoRA)", name)
    }
    assert benchmark_table(card.text) == benchmark_table(section(card, PAPER_HEADING[3:]))


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": Layout.SP_PRETRAINING.value},
        {"layout": Layout.OUR_ADAPTER.value, "sources": [MODEL]},
        {"sources": [MODEL, ADAPTER]},
    ],
    ids=["pre-training", "no-adapter-named", "adapter-of-a-release"],
)
def test_no_numbers_for_other_weights(changes):
    card = make_card(**changes)
    assert "## Results" not in card.text
    assert benchmark_table(card.text) == {}


SIGLIP = SiglipVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
MISTRAL = MistralConfig(num_key_value_heads=32, intermediate_size=11008, vocab_size=32064)


@pytest.mark.parametrize(
    "part, changes",
    [
        ("vision_config", {"image_size": 340}),
        ("vision_config", {"image_size": 384, "patch_size": 16}),
        ("vision_config", {"num_hidden_layers": 23}),
        ("vision_config", {"hidden_size": 512}),
        ("vision_config", {"intermediate_size": 2048}),
        ("vision_config", {"num_attention_heads": 8}),
        ("vision_config", SIGLIP.to_dict()),
        ("text_config", {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 40}),
        ("text_config", {"hidden_size": 2048}),
        ("text_config", {"num_hidden_layers": 40}),
        ("text_config", {"intermediate_size": 13824}),
        ("text_config", {"num_attention_heads": 16}),
        ("text_config", {"num_key_value_heads": 8}),
        ("text_config", MISTRAL.to_dict()),
        ("projector_config", {"use_detail_integrator": False}),
        ("projector_config", {"use_detail_integrator": False, "detail_kernel_size": 16}),
        ("projector_config", {"detail_kernel_size": 12}),
        ("projector_config", {"detail_stride": 4}),
        ("projector_config", {"spatial_scales": [8, 16, 24]}),
        ("projector_config", {"spatial_hidden_size": 256}),
        ("projector_config", {"num_patch_layers": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("model_type") or "-".join(map(str, value)),
)
def test_no_numbers_for_other_architectures(part, changes):
    card = make_card(released_config(part, **changes))
    assert "## Results" not in card.text
    assert benchmark_table(card.text) == {}


def test_no_numbers_for_another_layer_of_the_tower():
    assert "## Results" not in make_card(LlavaSPConfig(vision_feature_layer=-1)).text


def test_no_numbers_for_image_tiles():
    assert "## Results" not in make_card(LlavaSPConfig(image_grid_pinpoints=[[336, 672]])).text


def test_other_vocabularies_and_contexts_have_the_numbers():
    config = LlavaSPConfig(
        vision_config=CLIPVisionConfig(**LlavaSPConfig().vision_config.to_dict()),
        text_config=LlamaConfig(vocab_size=32128, max_position_embeddings=2048),
    )
    assert PAPER_HEADING in make_card(config).text


def test_citation_is_that_of_the_readme():
    assert code_blocks(section(make_card(), "Citation"), "bibtex") == code_blocks(README, "bibtex")


# Usage


@pytest.fixture(params=[None, "someone/llava-sp"], ids=["in-the-folder", "by-id"])
def published(request, golden, tmp_path):
    """
    `published(layout)`: the model with its card, and where to stand so that the names of its examples exist: the
    model's folder, or one in which its id is the path to it.
    """
    case = golden("mini-cropping")

    def publish(layout: Layout) -> tuple[Path, ModelCard]:
        folder = tmp_path / "here" / (request.param or ".")
        shutil.copytree(case.converted, folder)
        shutil.copyfile(case.image_files["landscape"], tmp_path / "here" / "photo.jpg")
        config = LlavaSPConfig.from_pretrained(folder)
        make_card(config, layout=layout.value, repo_id=request.param).save(folder / "README.md")
        return tmp_path / "here", ModelCard.load(folder / "README.md")

    return publish


def report(code: str) -> str:
    """The code, and a last line that says where the model's class comes from."""
    return f"{code}\nprint('from', type(pipe.model if 'pipe' in globals() else model).__module__.partition('.')[0])"


@pytest.mark.parametrize("layout", [Layout.SP_LORA, Layout.SP_PRETRAINING], ids=["fine-tuned", "pre-training"])
def test_examples_run_without_the_package(published, golden, tmp_path, layout):
    here, card = published(layout)
    blocks = code_blocks(card.text, "python")
    assert len(blocks) == 2
    code = f"""
import os

os.chdir({str(here)!r})
for block in {[report(block) for block in blocks]!r}:
    exec(block, {{"__name__": "__main__"}})
"""
    process = run_without_the_package(code, tmp_path)
    assert process.returncode == 0, process.stderr
    *answers, end = process.stdout.split("\nfrom transformers_modules\n")
    # The pipeline keeps the space in front of the answer
    by_pipeline, by_model = (answer.strip() for answer in answers)
    assert end == ""
    assert by_pipeline == by_model != ""
    # As the authors' code, asked the same about the same photo, which stops after 16 tokens
    expected = golden("mini-cropping").samples["single"]["generated_text"]
    assert by_model.startswith(expected.strip()) == (layout is Layout.SP_LORA)


def test_the_package_takes_the_place_of_trust(published, capsys, monkeypatch):
    here, card = published(Layout.SP_LORA)
    sentence = "`import transformers_llava_sp` takes its place"
    assert sentence in " ".join(section(card, "Use").split())
    monkeypatch.chdir(here)
    for block in code_blocks(card.text, "python"):
        untrusting = block.replace(", trust_remote_code=True", "")
        assert untrusting != block
        exec(f"import transformers_llava_sp\n{report(untrusting)}", {"__name__": "__main__"})
        assert capsys.readouterr().out.rstrip().endswith("\nfrom transformers_llava_sp")
