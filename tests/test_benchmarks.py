"""The benchmarks of speed do what they say, on tiny models, and say where a limit is not met."""

import importlib
import json
import re
import statistics
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from transformers_llava_sp import modeling_llava_sp


FOLDER = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")


@pytest.fixture(scope="module")
def load():
    """Loads a benchmark as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module


def run(module, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


# The spatial path


@pytest.fixture
def projector_benchmark(load):
    return load("projector")


def test_projector_is_measured_once_and_reported(projector_benchmark, monkeypatch, tmp_path, capsys):
    arguments = ("--size", "small", "--device", "cpu", "--batch-sizes", 1, 2, "--repeats", 3, "--output", tmp_path)
    run(projector_benchmark, monkeypatch, *arguments, "--plot")
    assert (tmp_path / "projector.png").stat().st_size > 10_000
    parts = json.loads((tmp_path / "projector.json").read_text())["parts"]
    cells = {label: part for label, part in parts.items() if "batch" in label}
    assert len(cells) == 2 * 2 * 2
    for label, cell in cells.items():
        assert {len(times) for times in cell["milliseconds"].values()} == {3}
        assert ("adaptive_avg_pool2d" in cell["milliseconds"]) == label.startswith("pooling")
        assert cell["difference"] < (1e-5 if "fp32" in label else 2e-2)
    report = (tmp_path / "projector.md").read_text()
    assert report.count("\n| cropping |") == report.count("\n| pooling |") == 4
    assert len({line.count("|") for line in report.splitlines() if line.startswith("|")}) == 1
    # Of the released shapes alone
    assert "No limits were checked." in report

    capsys.readouterr()
    run(projector_benchmark, monkeypatch, *arguments, "--minutes", 0)
    assert json.loads((tmp_path / "projector.json").read_text())["parts"] == parts


def test_projector_stops_in_time_and_says_what_is_left(projector_benchmark, monkeypatch, tmp_path):
    run(projector_benchmark, monkeypatch, "--size", "small", "--device", "cpu", "--minutes", 0, "--output", tmp_path)
    assert (tmp_path / "projector.md").read_text().count("not measured yet") == 2 * 2 * 4


def test_operations_are_those_of_the_weights(projector_benchmark):
    projector = projector_benchmark.make_projector("small", "cropping", torch.float32, CPU)
    extractor, integrator = projector.spatial_feature_extractor, projector.detail_feature_integrator
    scales, details = 6, projector.config.num_detail_tokens
    once = sum(module.weight.numel() for module in extractor.convolutions)
    queries = integrator.query_proj.weight.numel() + projector.spatial_projection.weight.numel()
    per_detail = integrator.detail_convolution.weight.numel() + 2 * integrator.key_proj.weight.numel()
    attention = 2 * scales * details * projector.config.spatial_hidden_size
    expected = 2 * (once + scales * queries + details * per_detail + attention)
    features = projector_benchmark.make_features(projector, 3)
    assert projector_benchmark.count_operations(projector, features) == 3 * expected


@pytest.mark.parametrize("variant", ["cropping", "pooling"])
def test_paths_differ_in_what_they_call_alone(projector_benchmark, monkeypatch, variant):
    projector = projector_benchmark.make_projector("small", variant, torch.float32, CPU)
    features = projector_benchmark.make_features(projector, 2)
    paths = projector_benchmark.paths_of(projector)
    monkeypatch.setattr(modeling_llava_sp, "HAS_MKL", True)
    calls = []
    for module, name in ((F, "conv2d"), (F, "linear"), (torch, "bmm"), (F, "adaptive_avg_pool2d")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, n=name, f=function, **kw: calls.append(n) or f(*args, **kw))
    called = {}
    with torch.inference_mode():
        expected = paths["llava-sp"](projector, features)
        assert expected.shape == (2, 6, 96)
        for name in paths.keys() - {"reading"}:
            calls.clear()
            torch.testing.assert_close(paths[name](projector, features), expected)
            called[name] = {call: calls.count(call) for call in set(calls)}
    # Six scales and the details; three projections in the Detail Feature Integrator and one behind it
    assert called["llava-sp"] == {"bmm": 7, "linear": 4}
    assert called["F.linear"] == {"linear": 11}
    pools = {"adaptive_avg_pool2d": 5} if variant == "pooling" else {}
    assert called["conv2d"] == {"conv2d": 7, "linear": 4, **pools}
    assert called.get("adaptive_avg_pool2d", {}) == ({"bmm": 7, "linear": 4, **pools} if pools else {})
    # All is put back
    calls.clear()
    with torch.inference_mode():
        paths["llava-sp"](projector, features)
    assert set(calls) == {"bmm", "linear"}


@pytest.mark.parametrize(
    ("on_gpu", "dtype", "batch_size", "speedup", "over_reading", "misses"),
    [
        (False, "fp32", 1, 8.0, 1.3, 0),
        (False, "fp32", 1, 7.9, 1.3, 1),
        (False, "bf16", 1, 11.9, 1.3, 1),
        (False, "bf16", 1, 11.9, 1.31, 2),
        (False, "bf16", 4, 1.0, 9.0, 0),
        (False, "bf16", 4, 0.99, 9.0, 1),
        (True, "fp16", 1, 1.0, 1.3, 0),
        (True, "fp16", 1, 1.0, 1.31, 1),
    ],
)
def test_projector_limits(projector_benchmark, on_gpu, dtype, batch_size, speedup, over_reading, misses):
    figures = {"speedup": speedup, "over_reading": over_reading}
    assert len(projector_benchmark.find_misses(on_gpu, dtype, batch_size, figures)) == misses


# Answers


@pytest.fixture
def generate_benchmark(load):
    return load("generate")


def test_answers_are_measured_and_drawn(generate_benchmark, monkeypatch, tmp_path):
    arguments = ("--size", "small", "--device", "cpu", "--batch-sizes", 1, "--eager", "--output", tmp_path)
    run(generate_benchmark, monkeypatch, *arguments, "--plot")
    results = json.loads((tmp_path / "generate.json").read_text())["parts"]
    cell = results["llava: sdpa, eager, batch 1"]
    assert cell["cropping"]["prompt_tokens"] == cell["pooling"]["prompt_tokens"] == 652
    assert cell["llava"]["prompt_tokens"] == 646
    assert cell["cropping"]["spatial_bytes"] > 0 == cell["llava"]["spatial_bytes"]
    assert min(cell["pooling"]["token_seconds"]) > 0
    assert len(cell["pooling"]["token_seconds"]) == len(cell["llava"]["ttft_seconds"]) == 3
    assert results["qwen: sdpa, eager, batch 1"]["qwen2.5-vl"]["prompt_tokens"] == 70 + 391
    assert all(min(times) > 0 for times in results["conversation"]["pooling"].values())
    assert {len(times) for times in results["masking"]["milliseconds"].values()} == {100}
    assert "Masking 64 of 32064 tokens takes" in (tmp_path / "generate.md").read_text()
    assert (tmp_path / "generate.png").stat().st_size > 10_000
    run(generate_benchmark, monkeypatch, *arguments, "--minutes", 0)
    assert json.loads((tmp_path / "generate.json").read_text())["parts"] == results


def test_attention_is_compared(generate_benchmark):
    size = generate_benchmark.SIZES["small"]
    models = {"cropping": generate_benchmark.make_model("cropping", size, CPU, torch.float32)}
    figures = generate_benchmark.measure_agreement(models, {"sdpa": "sdpa", "eager": "eager"})["cropping"]
    assert figures["sdpa"] == {"difference": 0, "same_choice": 1}
    assert 0 < figures["eager"]["difference"] < 1e-4


def test_what_cannot_be_measured_is_said(generate_benchmark, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("There is no kernel.\nDetails")

    monkeypatch.setattr(generate_benchmark, "measure_cell", fail)
    cell = generate_benchmark.Cell("llava", "sdpa", False, 1)
    results = generate_benchmark.Results(None, {"device": "CPU", "size": "scaled"})
    results.add("reading", lambda: {"bytes_per_second": 1e9})
    results.add(str(cell), lambda: generate_benchmark.try_cell({}, cell, None))
    text, misses, num_checked = generate_benchmark.report(results, [cell])
    assert f"{cell}: failed, RuntimeError: There is no kernel." in text
    assert (misses, num_checked) == ([f"{cell}: failed"], 0)
    # Another run tries again
    assert str(cell) in results
    assert not results.has_measured(str(cell))


def test_released_shapes(generate_benchmark):
    size = generate_benchmark.SIZES["7b"]
    for variant in generate_benchmark.SPATIAL:
        config = generate_benchmark.llava_sp_config(size, variant)
        projector_config = config.projector_config
        assert projector_config.spatial_variant == variant
        assert projector_config.spatial_scales == [4, 8, 12, 16, 20, 24]
        assert (projector_config.spatial_hidden_size, projector_config.num_image_tokens) == (512, 582)
        assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (4096, 32)
    counts = {}
    for name in ("llava", "qwen2-vl", "qwen2.5-vl"):
        counts[name] = generate_benchmark.make_model(name, size, torch.device("meta"), torch.bfloat16).num_parameters()
    assert {name: round(count / 1e9, 2) for name, count in counts.items()} == {
        "llava": 7.06,
        "qwen2-vl": 8.29,
        "qwen2.5-vl": 8.29,
    }


@pytest.mark.parametrize(
    ("on_gpu", "compiled", "change", "misses"),
    [
        (False, False, {}, 0),
        (False, False, {"ttft_ratio": 1.031}, 1),
        (False, False, {"token_ratio": 1.031}, 1),
        (True, False, {"ttft_ratio": 1.04}, 0),
        (True, False, {"ttft_ratio": 1.041}, 1),
        (True, False, {"token_ratio": 1.006}, 1),
        (True, False, {"share_of_limit": 0.1}, 0),
        (True, True, {"share_of_limit": 0.59}, 1),
        (True, True, {"peak_ratio": 1.021}, 1),
    ],
)
def test_answer_limits(generate_benchmark, on_gpu, compiled, change, misses):
    cell = generate_benchmark.Cell("llava", "sdpa", compiled, 1)
    figures = {"ttft_ratio": 1.0, "token_ratio": 1.0, "share_of_limit": 0.9, "peak_ratio": 1.0}
    summary = {"llava": figures, "cropping": {**figures, **change}, "pooling": figures}
    assert len(generate_benchmark.find_misses(cell, summary, on_gpu)) == misses


def test_released_shapes_need_a_gpu(generate_benchmark, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="or --size scaled"):
        run(generate_benchmark, monkeypatch, "--device", "cpu", "--output", tmp_path)


# The processor and imports


@pytest.mark.parametrize(
    ("name", "arguments", "limit", "value"),
    [("processor", ("--numbers", 1, "--turns", 5), "RATE_LIMIT", 0), ("imports", ("--turns", 1), "TIME_LIMIT", 9)],
)
def test_results_are_written_and_drawn(load, monkeypatch, tmp_path, name, arguments, limit, value):
    benchmark = load(name)
    # Whether limits are met is not what is tested
    monkeypatch.setattr(benchmark, limit, value)
    run(benchmark, monkeypatch, *arguments, "--output", tmp_path, "--plot")
    parts = json.loads((tmp_path / f"{name}.json").read_text())["parts"]
    assert all(part["ratios"] for part in parts.values())
    assert "limits of" in (tmp_path / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000


def test_results_that_cannot_be_read_are_named_and_kept(load, monkeypatch, tmp_path):
    file = tmp_path / "imports.json"
    file.write_text("{cut")
    with pytest.raises(SystemExit, match=r"imports\.json is not JSON .*: remove it, or name another folder"):
        run(load("imports"), monkeypatch, "--turns", 1, "--output", tmp_path)
    assert file.read_text() == "{cut"


def test_numbers_are_on_one_line_and_texts_as_they_were(load, tmp_path):
    results = load("_measure").Results(tmp_path / "some.json", {"device": "CPU"})
    results.content["parts"] = {"numbers": [1, -2.5e-7], "texts": ["[  1  ]", "a  b"]}
    results.write()
    written = (tmp_path / "some.json").read_text()
    assert '"numbers": [1, -2.5e-07]' in written
    assert json.loads(written) == results.content


def test_plots_need_a_folder(load, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(load("processor"), monkeypatch, "--plot")
    assert "--plot needs --output" in capsys.readouterr().err


def test_processors_differ_by_the_spatial_tokens(load):
    cell = load("processor").measure_cell("pil", 2, turns=1)
    assert cell["tokens"]["llava"] > 576
    assert {len(times) for times in cell["times"].values()} == {1}


@pytest.mark.parametrize(("slower", "misses"), [(1.03, 0), (1.04, 1)])
def test_processor_limit(load, tmp_path, slower, misses):
    processor = load("processor")
    results = processor.Results(None, {})
    times = {"llava-sp": [slower, slower, slower], "llava": [1.0, 1.0, 1.0]}
    results.content["parts"]["pil, 1"] = {"times": times, "images": 1}
    assert len(processor.report(results, ["pil, 1"])[1]) == misses


# On a GPU


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", ["projector", "generate"])
def test_is_measured_on_a_gpu(load, name, monkeypatch, tmp_path):
    arguments = ("--size", "small", "--device", "cuda", "--batch-sizes", 1, 8, "--output", tmp_path)
    run(load(name), monkeypatch, *arguments)
    report = (tmp_path / f"{name}.md").read_text()
    assert "device: NVIDIA" in report
    # Not every kind of attention takes models this small
    assert "sdpa, eager, batch 1: failed" not in report
    assert "sdpa, static cache, compiled, batch 1: failed" not in report


@pytest.mark.gpu
@needs_cuda
def test_answers_wait_for_the_gpu_no_more_often_than_llavas(generate_benchmark):
    size, device = generate_benchmark.SIZES["small"], torch.device("cuda")
    counts: dict[str, list[int]] = {}
    for name in generate_benchmark.GROUPS["llava"]:
        model = generate_benchmark.make_model(name, size, device, torch.bfloat16)
        inputs = generate_benchmark.make_inputs(name, model, 1)
        model.generate(**inputs, do_sample=False, max_new_tokens=4)  # to warm up
        counts[name] = []
        for new_tokens in (4, 8):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            counts[name].append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
    # The mask of what is never answered is made once for an answer: only what each further token waits for counts
    of_tokens = {name: more - fewer for name, (fewer, more) in counts.items()}
    assert 0 < of_tokens["cropping"] <= of_tokens["llava"]
    assert 0 < of_tokens["pooling"] <= of_tokens["llava"]


# What is said about them


def rows_of(report: str) -> dict[str, list[str]]:
    """The rows of a report's tables, those of its first table first, by their first cell or cells."""
    rows: dict[str, list[str]] = {}
    for line in report.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|"):
            rows.setdefault(cells[0], cells[1:])
    return rows


def test_documents_say_what_was_measured(projector_benchmark):
    """The tables of docs/performance.md, and what was tried and kept, are those of the committed results."""
    results = Path(__file__).parents[1] / "docs" / "benchmarks" / "cpu"
    document = (results.parents[1] / "performance.md").read_text()
    answers, images, loading, imports = (
        (results / f"{name}.md").read_text() for name in ("generate", "processor", "load", "imports")
    )
    expected = []
    for variant in ("cropping", "pooling"):
        _, _, first, _, further, *_ = rows_of(answers)[variant]
        expected.append(f"\n| {variant.capitalize()} | {first} | {further} |\n")
    expected += [f"\n| {number} | {' | '.join(rows_of(images)[f'pil, {number}'])} |\n" for number in (1, 64)]
    expected += re.search(r"both over Transformers alone (.+), at most", imports).groups()
    expected += re.findall(r"in pairs (.+), at most", loading)
    ours, theirs = re.search(r"is answered, (\S+) .* ms; .* processor (\S+) .* ms", answers).groups()
    expected.append(f"| {ours} ms for a token, in place of {theirs} ms, ")

    parts = json.loads((results / "projector.json").read_text())["parts"]
    cells = {
        label: projector_benchmark.summarise(part, parts[f"products, {label.split(', ')[1]}"]["operations_per_second"])
        for label, part in parts.items()
        if "batch" in label
    }
    gains: dict[str, list[str]] = {}
    for dtype, name in (("fp32", "float32"), ("bf16", "bfloat16")):
        for variant in ("cropping", "pooling"):
            of_batch = {size: cells[f"{variant}, {dtype}, batch {size}"] for size in (1, 4, 16, 64)}
            one, start = of_batch.pop(1), f"\n| {variant.capitalize()} | {name} | "
            row = f"{one['llava-sp']:.0f} | {one['conv2d']:.0f} | {one['speedup']:.1f} | {one['reading']:.0f} | "
            expected.append(f"{start}{row}{one['over_reading']:.2f} |\n")
            expected.append(start + " | ".join(f"{more['speedup']:.1f}" for more in of_batch.values()) + " |\n")
            gains.setdefault("conv2d", []).append(f"{one['speedup']:.1f}")
            for other, ratios in one["gains"].items():
                gains.setdefault(other, []).append(f"{statistics.median(ratios):.2f}")
    for other in ("conv2d", "F.linear"):
        expected.append("{} and {} x (float32), {} and {} x (bfloat16)".format(*gains[other]))
    expected.append("{} x (float32) and {} x (bfloat16)".format(*gains["adaptive_avg_pool2d"]))
    assert [figure for figure in expected if figure not in document] == []
