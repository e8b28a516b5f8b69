"""What sparse attention costs a vision-language model in answers, by method at equal density.

    python -m mm_sparse.recipes.evaluation.vlm_quality \\
        --config recipes/configs/vlm/digits.yaml --learn 150 \\
        --weights runs/digits/checkpoints/{sparse,dense}/last.ckpt --out results.json

The held-out samples of a recipe, each with the ratio at which the measured density is the one asked
for. More arguments go to the recipe, `--data.validation.init_args.length=256`. Linformer is left
out: it mixes all positions, so it has no causal form.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from mm_sparse import Scorer
from mm_sparse.bench import machine
from mm_sparse.integrations import override_config, override_scorers, sparse_config
from mm_sparse.recipes.data import Batch
from mm_sparse.recipes.distillation import DistillationConfig, train_jointly
from mm_sparse.recipes.evaluation.modality_ablation import (
    LEARNED,
    dense_run,
    matched_ratio,
    measure,
)
from mm_sparse.recipes.evaluation.modality_ablation_report import summary
from mm_sparse.recipes.metrics import ranking_methods
from mm_sparse.recipes.models import MultimodalTraining
from mm_sparse.recipes.run import on_device, prepare, validation_of
from mm_sparse.recipes.training import OptimizerConfig

Ranker = Callable[[], Scorer] | Mapping[str, Scorer] | None
"""As `override_scorers` takes it: None are the model's own scorers."""

METHODS = {name: make for name, make in ranking_methods.METHODS.items() if name != "one ratio"}
PATTERNS = ("window", "bigbird")
"""Methods that keep sinks, as their papers have them."""
FIGURES = ("exact_match", "loss", "kl", "kl_se_samples", "as_dense", "kept", "overlap",
           "density_by_pair")  # fmt: skip


def table(
    model: MultimodalTraining,
    held_out: Sequence[Batch],
    densities: Sequence[float],
    rankers: Mapping[str, Ranker] = METHODS,
    *,
    sinks: int = 16,
    looked_at: int = 4,
) -> Iterator[dict[str, Any]]:
    """A row for dense attention, then one for each density and method.

    Args:
        model: its language model alone runs sparse.
        densities: kept over visible query-key pairs of the layers that run sparse.
        sinks: tokens that `PATTERNS` keep at the start, within their budget.
        looked_at: batches on which density and kept attention are counted.
    """
    if list(model.sparse_configs) != ["language"]:
        raise ValueError(f"model must run sparse in language alone, got {[*model.sparse_configs]}")
    if not held_out:
        raise ValueError("held_out must have batches, got none")
    for density in densities:
        if not 0 < density <= 1:
            raise ValueError(f"densities must be in (0, 1], got {density}")
    model.eval().requires_grad_(False)
    dense, _ = dense_run(model, held_out, look=False)
    logits, labels = (torch.cat([getattr(s, name) for s in dense]) for name in ("logits", "labels"))
    exact = torch.cat([said.exact() for said in dense])
    yield {
        "method": "dense", "density": 1.0, "answers": len(exact),
        "exact_match": round(exact.float().mean().item(), 5),
        "loss": round(cross_entropy(logits, labels).item(), 5),
    }  # fmt: skip
    own, few = sparse_config(model.language).sinks, held_out[:looked_at]
    for density in densities:
        for name, make in rankers.items():
            sink_count = max(own, sinks) if name in PATTERNS else own
            with (
                override_config(model.language, sinks=sink_count),
                override_scorers(model.language, make),
            ):
                ratio = matched_ratio(model, few, density, density)
                with override_config(model.language, ratio=ratio):
                    figures = summary([measure(model, held_out, dense, len(few))])
            if abs(figures["density"] / density - 1) > 0.05:
                raise ValueError(
                    f"densities must be in reach of {name}, with {sink_count} sinks it comes to "
                    f"{figures['density']}, got {density}"
                )
            yield {
                "method": name, "asked": density, "density": figures["density"],
                "ratio": round(ratio, 5), **{figure: figures[figure] for figure in FIGURES},
            }  # fmt: skip


def rankers_for(weights: str, methods: Sequence[str] | None) -> dict[str, Ranker]:
    """The methods by name; if None all, without the scorers' where a checkpoint has none."""
    if not Path(weights).is_file():
        raise ValueError(f"weights must be checkpoints, got {weights!r}, which is no file")
    state = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    trained = any(name.startswith("scorers.") for name in state)
    if methods is None:
        methods = [name for name in METHODS if trained or name != "scorers"]
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"methods must be among {list(METHODS)}, got {name!r}")
        if name == "scorers" and not trained:
            raise ValueError(f"methods must be without 'scorers' for {weights}, which has none")
    return {name: METHODS[name] for name in methods}


def learned(model: MultimodalTraining, batches: Sequence[Batch]) -> Mapping[str, Scorer]:
    """`FineScorer`s that learn from the frozen model's attention, a step a batch."""
    model.eval().requires_grad_(False)
    optimizer = OptimizerConfig(lr=5e-3, warmup=10, final=0.0)
    made, _ = train_jointly(
        model, batches, {"blind": LEARNED["blind"]}, DistillationConfig(), optimizer
    )
    return made["blind"]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="of the recipe")
    parser.add_argument("--weights", nargs="+", required=True, help="checkpoints of the recipe")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.25, 0.15])
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="all that apply if not given")
    parser.add_argument("--learn", type=int, default=0, help="steps of scorers of the frozen model")
    parser.add_argument("--sinks", type=int, default=16, help="of window and bigbird")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args, more = parser.parse_known_args(argv)
    # LightningCLI warns of a command line beside the arguments that it is given.
    sys.argv = sys.argv[:1]
    given = {k: v for k, v in vars(args).items() if k not in ("out", "methods")}
    facts = machine("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    record = {"machine": facts, "threads": torch.get_num_threads(), **given, "options": more,
              "rows": []}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    chosen = {weights: rankers_for(weights, args.methods) for weights in args.weights}
    for weights, rankers in chosen.items():
        cli = prepare("quality", args.config, [f"--model.weights={weights}", *more])
        data, model, validation = cli.datamodule, cli.model, validation_of(cli, args.config)
        with on_device(cli) as here:
            if args.learn:
                batches = here(islice(data.loader(data.train, shuffle=True), args.learn))
                rankers["learned"] = learned(model, list(batches))
            batches = list(here(data.loader(validation)))
            for row in table(model, batches, args.densities, rankers, sinks=args.sinks):
                record["rows"].append({"weights": weights, **row})
                args.out.write_text(json.dumps(record, indent=1) + "\n")
                print(json.dumps(record["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
