"""
Do six spatial tokens help here? Five tiny models that differ in nothing but their projector, each from three seeds:

    python examples/tiny/compare.py work/tiny

- `cropping` and `pooling`: LLaVA-SP's two variants, both with the Detail Feature Integrator
- `queries`: six learned queries that attend to the patches instead, as a Q-Former's: as many tokens, but none made by
  convolutions
- `patches`: the patch tokens alone
- `llava`: these as well, by LLaVA's MLP, which the first three have, too

All projectors but that of `llava` have as many parameters as that of `cropping`, within 5 %: what `queries` and
`patches` lack is made up by a wider MLP. They are trained on the tower and scenes that train_model.py has left in the
same folder, on fewer scenes than there, with one thread. Each model's results are written to `work/tiny/compare` when
it is trained, and not computed again. At the end, tables and, with `--plot`, a picture of all of them. It needs the
extras `train` and `demo`.
"""

import argparse
import json
import statistics
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from evaluate import BlindBaseline, average, evaluate, training_questions
from make_model import SPATIAL_HIDDEN_SIZE, make_language_model
from torch import nn
from train_model import HERE, note_of, once

from transformers_llava_sp import LlavaSPForConditionalGeneration, LlavaSPProcessor, LlavaSPProjector
from transformers_llava_sp.modeling_llava_sp import LlavaSPProjectorOutput
from transformers_llava_sp.training import LlavaSPDataCollator, drop_long_records, load_conversations, prepare_full
from transformers_llava_sp.training.trainer import LlavaSPTrainer, LlavaSPTrainingArguments
from transformers_llava_sp.visualization import check_output, require_matplotlib, save_figure


SPLITS = ("test", "held_out")
NUM_QUERIES = 6
QUERY_WIDTH, QUERY_HEADS = 128, 4


class LlavaProjector(LlavaSPProjector):
    """
    The patch tokens alone, as LLaVA makes them.

    Args:
        config ([`LlavaSPProjectorConfig`]): That of the projector it stands for.
        num_parameters (`int`): How many parameters that has; this one has fewer.
    """

    def __init__(self, config: Any, num_parameters: int):
        super().__init__(config)
        del self.spatial_feature_extractor, self.detail_feature_integrator, self.spatial_projection
        config.spatial_scales = []

    def forward(self, patch_features: torch.Tensor, **kwargs: Any) -> LlavaSPProjectorOutput:
        """From `patch_features` of shape `(images, patches, vision_hidden_size)` one token for each patch."""
        return LlavaSPProjectorOutput(last_hidden_state=self.patch_mlp(patch_features))


class PatchProjector(LlavaProjector):
    """
    The patch tokens alone, by an MLP as wide as it takes.

    Args:
        config ([`LlavaSPProjectorConfig`]): That of the projector it stands for.
        num_parameters (`int`): How many parameters it may have.
    """

    def __init__(self, config: Any, num_parameters: int):
        super().__init__(config, num_parameters)
        self.patch_mlp = make_mlp(config.vision_hidden_size, config.text_hidden_size, num_parameters)


class QueryProjector(LlavaSPProjector):
    """
    Six tokens from learned queries that attend to all patches, and the patch tokens as LLaVA-SP makes them.

    Args:
        config ([`LlavaSPProjectorConfig`]): That of the projector it stands for.
        num_parameters (`int`): How many parameters it may have.
    """

    def __init__(self, config: Any, num_parameters: int):
        super().__init__(config)
        del self.spatial_feature_extractor, self.detail_feature_integrator, self.spatial_projection
        width = config.vision_hidden_size
        self.queries = nn.Parameter(torch.randn(NUM_QUERIES, QUERY_WIDTH))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(QUERY_WIDTH, QUERY_HEADS, kdim=width, vdim=width, batch_first=True)
        left = num_parameters - sum(parameter.numel() for parameter in self.parameters())
        self.query_mlp = make_mlp(QUERY_WIDTH, config.text_hidden_size, left)

    def forward(self, patch_features: torch.Tensor, **kwargs: Any) -> LlavaSPProjectorOutput:
        """From `patch_features` of shape `(images, patches, vision_hidden_size)` six tokens and one for each patch."""
        normed = self.norm(patch_features)
        queries = self.queries.expand(len(patch_features), -1, -1)
        attended, _ = self.attention(queries, normed, normed, need_weights=False)
        tokens = [self.query_mlp(attended), self.patch_mlp(patch_features)]
        return LlavaSPProjectorOutput(last_hidden_state=torch.cat(tokens, dim=1))


def make_mlp(width_in: int, width_out: int, num_parameters: int) -> nn.Sequential:
    """Two linear layers with so many parameters, or a little fewer."""
    width = (num_parameters - width_out) // (width_in + 1 + width_out)
    return nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width_out))


PROJECTORS = {
    "cropping": None,
    "pooling": None,
    "queries": QueryProjector,
    "patches": PatchProjector,
    "llava": LlavaProjector,
}


def make_model(name: str, tower: Path, seed: int) -> tuple[LlavaSPForConditionalGeneration, LlavaSPProcessor]:
    """An untrained model, and its processor."""
    with tempfile.TemporaryDirectory() as folder:
        language_model = Path(folder)
        make_language_model(language_model, seed=seed)
        parts = (tower, language_model)
        model = LlavaSPForConditionalGeneration.from_vision_text_pretrained(
            *parts,
            spatial_variant="pooling" if name == "pooling" else "cropping",
            spatial_hidden_size=SPATIAL_HIDDEN_SIZE,
            dtype=torch.float32,
        )
        if PROJECTORS[name] is not None:
            num_parameters = model.model.multi_modal_projector.num_parameters()
            model.model.multi_modal_projector = PROJECTORS[name](model.config.projector_config, num_parameters)
        return model, LlavaSPProcessor.from_vision_text_pretrained(*parts, model.config)


def train_model(name: str, seed: int, tower: Path, data: Path, scenes: int, test_scenes: int) -> dict[str, Any]:
    """Train one model, and say what it answers right."""
    model, processor = make_model(name, tower, seed)
    recipe = yaml.safe_load((HERE / "train.yaml").read_text())
    recipe.pop("method")
    collator = LlavaSPDataCollator(processor, max_length=recipe.pop("max_length"), return_ids=True)
    with tempfile.TemporaryDirectory() as folder:
        records = json.loads((data / "train.json").read_text())[:scenes]
        if len(records) < scenes:
            raise SystemExit(f"{data / 'train.json'} has {len(records)} scenes, fewer than {scenes}.")
        (Path(folder) / "train.json").write_text(json.dumps(records))
        trainer = LlavaSPTrainer(
            model=prepare_full(model),
            args=LlavaSPTrainingArguments(output_dir=folder, seed=seed, **recipe),
            data_collator=collator,
            train_dataset=drop_long_records(load_conversations(Path(folder) / "train.json", data), collator),
            processing_class=processor,
        )
        loss = trainer.train().training_loss
    baseline = BlindBaseline(training_questions(scenes))
    model.eval()
    results = {
        split: evaluate(model, processor, split=split, scenes=test_scenes, baseline=baseline)[0] for split in SPLITS
    }
    return {
        "name": name,
        "seed": seed,
        "scenes": scenes,
        "test_scenes": test_scenes,
        "projector_parameters": model.model.multi_modal_projector.num_parameters(),
        "parameters": model.num_parameters(),
        "training_loss": loss,
        "blind": {
            split: {score.kind: score.blind for score in (*scores, average(scores))}
            for split, scores in results.items()
        },
        "exact_match": {
            split: {score.kind: score.exact_match for score in (*scores, average(scores))}
            for split, scores in results.items()
        },
    }


def to_table(results: list[dict[str, Any]], split: str) -> str:
    """Of each kind of question and projector, the mean over the seeds and, of several, each of them."""
    names = list(dict.fromkeys(result["name"] for result in results))
    lines = [f"| {split} | blind | {' | '.join(names)} |", f"|---|---:{'|---:' * len(names)}|"]
    for kind, blind in results[0]["blind"][split].items():
        cells = []
        for name in names:
            shares = [result["exact_match"][split][kind] for result in results if result["name"] == name]
            each = f" ({', '.join(f'{100 * share:.1f}' for share in shares)})" if len(shares) > 1 else ""
            cells.append(f"{statistics.mean(shares):.1%}{each}")
        lines.append(f"| {kind} | {blind:.1%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Draw the exact match of each kind of question and projector, a dot for each seed."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(result["name"] for result in results))
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, split in zip(figure.subplots(len(SPLITS), sharex=True), SPLITS, strict=True):
        kinds = list(results[0]["exact_match"][SPLITS[0]])
        for number, name in enumerate(names):
            places = [place + 0.15 * (number - (len(names) - 1) / 2) for place in range(len(kinds))]
            for index, result in enumerate(result for result in results if result["name"] == name):
                shares = [100 * result["exact_match"][split].get(kind, float("nan")) for kind in kinds]
                axes.plot(places, shares, ".", color=f"C{number}", label=name if index == 0 else None)
        blind = [100 * results[0]["blind"][split].get(kind, float("nan")) for kind in kinds]
        axes.plot(range(len(kinds)), blind, "_", color="grey", markersize=30, label="blind baseline")
        axes.set(title=split, ylabel="exact match, %", ylim=(0, 101), xticks=range(len(kinds)))
        axes.set_xticklabels([kind.replace(", ", ",\n") for kind in kinds])
        axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower left", ncols=len(names) + 1)
    save_figure(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder of train_model.py")
    parser.add_argument("--projectors", nargs="+", choices=PROJECTORS, default=list(PROJECTORS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=30_000, help="to train on")
    parser.add_argument("--test-scenes", type=int, default=500, help="of each split")
    parser.add_argument("--plot", type=Path, help="a picture to draw")
    arguments = parser.parse_args()
    if min(arguments.scenes, arguments.test_scenes) < 1:
        parser.error("--scenes and --test-scenes must be 1 or more")
    if arguments.plot is not None:
        require_matplotlib()
        check_output(arguments.plot)
    tower, data = arguments.output / "tower", arguments.output / "scenes"
    for folder in (tower, data):
        if not (folder.is_dir() and note_of(folder).is_file()):
            parser.error(
                f"there is no {folder} with its note {note_of(folder)}: python {HERE / 'train_model.py'} cropping "
                f"{arguments.output} makes both"
            )
    # Small matrices: more threads would only wait for each other
    torch.set_num_threads(1)
    output = arguments.output / "compare"
    output.mkdir(exist_ok=True)
    options = {"scenes": arguments.scenes, "test_scenes": arguments.test_scenes}
    sources = [tower, data, HERE / "train.yaml"]
    results = []
    for seed, name in product(arguments.seeds, arguments.projectors):

        def make(unfinished: Path, name: str = name, seed: int = seed) -> None:
            result = train_model(name, seed, tower, data, **options)
            unfinished.write_text(json.dumps(result, indent=1) + "\n")

        file = once(output / f"{name}-{seed}.json", make, sources, **options)
        results.append(json.loads(file.read_text()))
    for split in SPLITS:
        print(to_table(results, split), end="\n\n")
    if arguments.plot is not None:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
