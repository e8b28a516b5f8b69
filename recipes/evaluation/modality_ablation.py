"""Does it pay to know the modality? Scorers of one frozen model, with and without, at one density.

    python -m mm_sparse.recipes.evaluation.modality_ablation \\
        --config recipes/configs/vlm/digits.yaml \\
        --checkpoint runs/digits/checkpoints/dense/last.ckpt --out results.json

All variants learn from the same samples in the same order and are tried on the same held-out ones
with the layers sparse. More arguments go to the recipe, `--data.validation.init_args.length=128`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

from mm_sparse import Modality, PooledScorer, Scorer
from mm_sparse.bench import machine
from mm_sparse.integrations import (
    attention_layers,
    capture_attention,
    override_config,
    override_scorers,
    sparse_config,
)
from mm_sparse.recipes.data import Batch
from mm_sparse.recipes.distillation import DistillationConfig, OwnScorers, fresh, train_jointly
from mm_sparse.recipes.evaluation.attention_by_modality import (
    AttentionByModality,
    kl_by_row,
    mass_shares,
)
from mm_sparse.recipes.evaluation.modality_ablation_report import (
    beside_blind,
    pair_table,
    scoring_cost,
    summary,
    table,
)
from mm_sparse.recipes.evaluation.modality_budgets import named_ratios, spread_ratios
from mm_sparse.recipes.metrics import densities
from mm_sparse.recipes.models import AnswerLogits, MultimodalTraining
from mm_sparse.recipes.run import on_device, prepare, validation_of
from mm_sparse.recipes.training import OptimizerConfig
from mm_sparse.scorers import OracleScorer, SlidingWindow

LEARNED: dict[str, dict[str, Any]] = {
    "blind": {"modalities": None, "pairs": False},
    "maps": {"pairs": False},
    "bias": {"modalities": None},
    "maps and bias": {},
}
"""Options of the `FineScorer`s that are trained; `modalities` are those that occur if not given."""


@dataclass(frozen=True)
class Variant:
    """What ranks units in a row of the table, and what the config says of modalities."""

    scorer: Callable[[], Scorer] | None = None
    """What learns nothing; an untrained `FineScorer` if neither this nor `learned` is given."""
    learned: str = ""
    """A key of `LEARNED`."""
    shares: Literal["", "floor", "budget"] = ""
    """"floor": a least share of the budget for each modality. "budget": all of it is dealt out, by
    the share of attention that each modality gets in training samples."""
    spread: Literal["", "head", "query"] = ""
    """Budgets that first-order costs on training samples spread over KV heads ("head"), or over
    KV heads and modalities of the queries ("query")."""


HEADS = "blind, budgets by head"
VARIANTS: dict[str, Variant] = {
    "sliding window": Variant(SlidingWindow),
    "pooled, untrained": Variant(PooledScorer),
    "parts, untrained": Variant(),
    "blind": Variant(learned="blind"),
    "blind, floors": Variant(learned="blind", shares="floor"),
    HEADS: Variant(learned="blind", spread="head"),
    "blind, budgets by head and query": Variant(learned="blind", spread="query"),
    "maps": Variant(learned="maps"),
    "bias": Variant(learned="bias"),
    "maps and bias": Variant(learned="maps and bias"),
    "maps and bias, floors": Variant(learned="maps and bias", shares="floor"),
    "maps and bias, budgets": Variant(learned="maps and bias", shares="budget"),
    "oracle": Variant(OracleScorer),
}


@torch.no_grad()
def dense_run(
    model: MultimodalTraining, batches: Sequence[Batch], *, look: bool = True
) -> tuple[list[AnswerLogits], AttentionByModality]:
    """What the model says where it keeps everything; with `look`, also what attends to what."""
    attending = AttentionByModality()
    ranked = override_scorers(model.language, fresh(model.language))
    with override_config(model.language, backend="dense"), ranked, ExitStack() as stack:
        if look:
            stack.enter_context(capture_attention(model.language, attending.add))
        return [model.answers(batch) for batch in batches], attending


@torch.no_grad()
def density_on(model: MultimodalTraining, batches: Sequence[Batch]) -> float:
    """Density of the layers that run sparse, mean over batches."""
    densities_by_batch = []
    for batch in batches:
        model.run(batch, logits_to_keep=1)
        densities_by_batch.append(densities(model)["all"])
    return statistics.fmean(densities_by_batch)


@torch.no_grad()
def matched_ratio(
    model: MultimodalTraining, batches: Sequence[Batch], target: float, ratio: float
) -> float:
    """The ratio at which the layers' density on batches is nearest to `target`, from `ratio` on."""
    low, high, tried = 0.0, 1.0, []
    for _ in range(8):
        with override_config(model.language, ratio=ratio):
            density = density_on(model, batches)
        tried.append((abs(density / target - 1), ratio))
        if tried[-1][0] < 2e-3:
            break
        low, high = (ratio, high) if density < target else (low, ratio)
        ratio *= target / density
        if not low < ratio < high:
            ratio = (low + high) / 2
    return min(tried)[1]


@torch.no_grad()
def measure(
    model: MultimodalTraining,
    batches: Sequence[Batch],
    dense: Sequence[AnswerLogits],
    looked_at: int,
) -> dict[str, Any]:
    """Figures of the model as it is, sparse: KL to the dense answers, loss, exact match, attention.

    What attends to what is counted in the first `looked_at` batches.
    """
    attending, kls, losses, exact, as_dense = AttentionByModality(), [], [], [], []
    for number, (batch, before) in enumerate(zip(batches, dense, strict=True)):
        with ExitStack() as stack:
            if number < looked_at:
                stack.enter_context(capture_attention(model.language, attending.add))
            said = model.answers(batch)
        kls += kl_by_row(before.logits, said.logits, said.row)
        losses.append(cross_entropy(said.logits, said.labels, reduction="none"))
        exact.append(said.exact().float())
        as_dense.append((said.logits.argmax(-1) == before.logits.argmax(-1)).float())
    return {
        **attending.figures(),
        "kl": statistics.fmean(kls),
        "loss": torch.cat(losses).mean().item(),
        "exact_match": torch.cat(exact).mean().item(),
        "as_dense": torch.cat(as_dense).mean().item(),
        "kl_by_sample": kls,
    }


def run(
    model: MultimodalTraining,
    train: Callable[[int], Sequence[Batch]],
    held_out: Sequence[Batch],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    goal: DistillationConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    floor: float = 0.2,
    looked_at: int = 4,
    spread_on: int = 8,
    variants: Mapping[str, Variant] = VARIANTS,
) -> dict[str, Any]:
    """Train and measure all variants at the density that untrained scorers have.

    Args:
        model: its language model alone runs sparse. It is frozen; floors of its config hold in
            no variant.
        train: batches of a seed, one a step.
        floor: least share of the budget of each modality in variants with floors.
        looked_at: held-out batches whose attention is counted; KL and exact match are of all.
        spread_on: training batches of a seed that budgets are spread on.
    """
    if list(model.sparse_configs) != ["language"]:
        raise ValueError(f"model must run sparse in language alone, got {[*model.sparse_configs]}")
    if not held_out or not seeds:
        raise ValueError(
            f"held_out and seeds must not be empty, got {len(held_out)} batches and {seeds}"
        )
    model.eval().requires_grad_(False)
    kinds = [Modality(m) for m in model.modality(held_out[0]).unique().tolist()]
    wanted = dict.fromkeys(v.learned for v in variants.values() if v.learned)
    options = {name: {"modalities": kinds, **LEARNED[name]} for name in wanted}
    learned: dict[str, list[OwnScorers]] = {name: [] for name in options}
    losses: list[dict[str, list[float]]] = []
    config = sparse_config(model.language)
    to_spread = {v.learned for v in variants.values() if v.spread}
    found: dict[tuple[str, str], list[dict[int | str, Any]]] = {
        (name, by): [] for name in to_spread for by in ("head", "query")
    }
    shares: dict[Modality, float] = {}
    for seed in seeds:
        torch.manual_seed(seed)
        batches = train(seed)
        if not shares:
            shares = mass_shares(dense_run(model, batches[:4])[1])
        made, own = train_jointly(
            model, batches, options, goal or DistillationConfig(), optimizer or OptimizerConfig()
        )
        losses.append({k: [round(x, 5) for x in v] for k, v in own.items()})
        for name in made:
            learned[name].append(made[name])
            if name in to_spread:
                with override_scorers(model.language, made[name]):
                    for by, own_ratios in spread_ratios(model, batches[:spread_on]).items():
                        found[name, by].append(own_ratios)
    dense, attending = dense_run(model, held_out)
    floors: dict[str, Any] = {"": 0.0, "floor": floor, "budget": shares}
    rows: dict[str, dict[str, Any]] = {}
    untrained = override_scorers(model.language, fresh(model.language))
    with override_config(model.language, modality_floor=0.0), untrained:
        target = density_on(model, held_out[:looked_at])
    for name, variant in variants.items():
        runs, ratios = [], []
        budgets = found.get((variant.learned, variant.spread), [])
        for number, ranked in enumerate(_rankings(model, variant, learned)):
            own = {"layer_ratio": budgets[number]} if budgets else {}
            changes = {"modality_floor": floors[variant.shares], **own}
            with (
                override_config(model.language, **changes),
                override_scorers(model.language, ranked),
            ):
                ratio = matched_ratio(model, held_out[:looked_at], target, config.ratio)
                with override_config(model.language, ratio=ratio):
                    runs.append(measure(model, held_out, dense, looked_at))
                ratios.append(round(ratio, 5))
                cost = _cost(model, held_out[0])
        first = learned[variant.learned][0].values() if variant.learned else ()
        size = sum(p.numel() for scorer in first for p in scorer.parameters())
        rows[name] = {"parameters": size, "cost": cost, "ratios": ratios} | summary(runs)
        if budgets:
            rows[name]["layer_ratios"] = [named_ratios(own) for own in budgets]
        if variant.spread == "query" and HEADS in rows:
            rows[name]["against_heads"] = beside_blind(rows[name], rows[HEADS])
    for row in rows.values() if "blind" in rows else ():
        row |= beside_blind(row, rows["blind"])
    exact = torch.cat([said.exact().float() for said in dense]).mean().item()
    spread = [row["density"] for row in rows.values()]
    return {
        "dense": {"exact_match": round(exact, 5), **attending.figures()},
        "answers": sum(len(said.exact()) for said in dense),
        "density_spread": round(max(spread) / min(spread) - 1, 5),
        "budgets": {kind.name: share for kind, share in shares.items()},
        "rows": rows,
        "losses": losses,
    }


def _rankings(
    model: MultimodalTraining, variant: Variant, learned: Mapping[str, list[OwnScorers]]
) -> list[Mapping[str, Scorer]]:
    """The scorers of a variant by layer, one for each seed if they learned."""
    if variant.learned:
        return list(learned[variant.learned])
    own = fresh(model.language, modalities=None, pairs=False)
    return [own if variant.scorer is None else {name: variant.scorer() for name in own}]


def _cost(model: MultimodalTraining, batch: Batch) -> float:
    """Cost of scoring in % of dense attention, mean over layers."""
    costs, served = [], attention_layers(model.language)

    def count(call: Any) -> None:
        if call.selection is not None:
            shape = call.selection.plan, call.q.shape[1], call.q.shape[3]
            costs.append(scoring_cost(served[call.name].scorer, *shape))

    with capture_attention(model.language, count), torch.no_grad():
        model.run(batch, logits_to_keep=1)
    return round(statistics.fmean(costs), 2)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="of the recipe")
    parser.add_argument("--checkpoint", required=True, help="of the recipe, trained dense")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=150, help="of the scorers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--tiles", type=int, default=24, help="of a sample that a step looks at")
    parser.add_argument("--floor", type=float, default=0.2, help="least share of each modality")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    parser.add_argument("--looked-at", type=int, default=4, help="batches for attention's figures")
    args, more = parser.parse_known_args(argv)
    # LightningCLI warns of a command line beside the arguments that it is given.
    sys.argv = sys.argv[:1]
    cli = prepare("ablation", args.config, [f"--model.weights={args.checkpoint}", *more])
    data, validation = cli.datamodule, validation_of(cli, args.config)
    start = time.perf_counter()
    with on_device(cli) as here:

        def train(seed: int) -> list[Batch]:
            return list(here(islice(data.loader(data.train, shuffle=True), args.steps)))

        outcome = run(
            cli.model, train, list(here(data.loader(validation))), seeds=args.seeds,
            floor=args.floor, looked_at=args.looked_at,
            variants={name: VARIANTS[name] for name in args.variants},
            goal=DistillationConfig(tiles=args.tiles),
            optimizer=OptimizerConfig(lr=args.lr, warmup=10, final=0.0),
        )  # fmt: skip
    given = {k: v for k, v in vars(args).items() if k not in ("out", "checkpoint")}
    facts = machine("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    record = {"machine": facts, "threads": torch.get_num_threads(), **given, "options": more,
              "seconds": round(time.perf_counter() - start), **outcome}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    rows = outcome["rows"]
    shown = [table(rows), *(pair_table(rows, name) for name in ("density", "kept"))]
    print("\n\n".join(shown))


if __name__ == "__main__":
    main()
