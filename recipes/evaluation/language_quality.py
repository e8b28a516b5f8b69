"""What sparse attention costs a language model in accuracy, by method and density.

    python -m mm_sparse.recipes.evaluation.language_quality --scorers FOLDER \\
        --corpus corpus.npz --out results.json

Each method ranks units; budgets, sinks and window are the same for all.
B rows, N tokens, K KV heads, T tiles, U units, V vocabulary
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mm_sparse as mms
from mm_sparse import PooledScorer, Scorer, SparseConfig, select, unit_mass
from mm_sparse.distillation.losses import divergence
from mm_sparse.integrations.call import Call
from mm_sparse.integrations.patching import config_of, keeping, layers, watch
from mm_sparse.layout.plan import Plan
from mm_sparse.recipes.run.sparse_vs_dense import machine
from mm_sparse.scorers.pooled import Scores
from mm_sparse.selection.block_lists import units_of_lists


class Nearest(Scorer):
    """A sliding window: the nearest units."""

    def score(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Tensor:
        near = -plan.distance.abs().float()[:, None]
        return near.expand(-1, k.shape[1], -1, -1).contiguous()


class NearestAndRandom(Scorer):
    """As BigBird (Zaheer et al., 2020): window and sinks, half of the budget at random."""

    def score(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Tensor:
        shape = (len(q), k.shape[1], *plan.distance.shape[1:])
        generator = torch.Generator(q.device).manual_seed(plan.num_queries)
        chance = torch.rand(shape, generator=generator, device=q.device)
        near = plan.distance.abs()[:, None] < plan.budget[:, None, :, None] // 2
        return chance + near


class Perfect(Scorer):
    """The true mass, which costs as much as dense attention: what no scorer can beat by it."""

    def score(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Tensor:
        return unit_mass(q, k, plan, scale).clamp(min=1e-20).log()


METHODS: dict[str, Callable[[], Scorer] | None] = {
    "window": Nearest,
    "bigbird": NearestAndRandom,
    "pooled": PooledScorer,
    "scorers": None,
    "one ratio": None,
    "perfect": Perfect,
}
"""None stands for the model's own scorers, with its budgets of layers and heads or without."""


@contextmanager
def ranked_by(
    model: nn.Module, make: Callable[[], Scorer] | Mapping[str, Scorer] | None
) -> Iterator[None]:
    """The layers of a sparsified model with other scorers, around a block.

    Args:
        make: called once a layer, or scorers by name of the layer; None changes nothing.
    """
    served = layers(model)
    before = {name: layer.scorer for name, layer in served.items()}
    try:
        if isinstance(make, Mapping):
            for name, scorer in make.items():
                served[name].scorer = scorer
        elif make is not None:
            for layer in served.values():
                layer.scorer = make()
        yield
    finally:
        for name, layer in served.items():
            layer.scorer = before[name]


@torch.no_grad()
def predictions(model: Any, ids: Tensor, **changes: Any) -> Tensor:
    """(N / 2, V) log probabilities of the second half of a sequence (1, N)."""
    half = ids.shape[1] // 2
    with keeping(model, **{"dense_below": 0} | changes):
        logits = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - half).logits
    return logits[0].float().log_softmax(-1)


def change_of(dense: Tensor, sparse: Tensor, ids: Tensor) -> dict[str, float]:
    """KL(dense || sparse) in nats, change of the loss, and of the top-1 accuracy in points."""
    target = ids[0, ids.shape[1] - len(dense) + 1 :]
    loss = [cross_entropy(x[:-1], target).item() for x in (dense, sparse)]
    right = [(x[:-1].argmax(-1) == target).float().mean().item() for x in (dense, sparse)]
    kl = (dense.exp() * (dense - sparse)).sum(-1).mean().item()
    return {"kl": kl, "loss": loss[1] - loss[0], "top1": 100 * (right[1] - right[0])}


def logit_change(model: nn.Module, ids: Tensor) -> dict[str, float]:
    """`change_of` a sparsified model's second half against its own dense run."""
    return change_of(predictions(model, ids, backend="dense"), predictions(model, ids), ids)


@torch.no_grad()
def layer_figures(
    model: nn.Module, ids: Any, run: Callable[[Any], Any] | None = None
) -> dict[str, dict[str, float]]:
    """By layer of a dense run: divergence, kept mass of what is open, overlap with the perfect.

    `run` is a forward pass on `ids`, that of a language model if None.
    Kept mass and overlap also by pair of modalities, query first, where more than one is there.
    """
    served = layers(model)
    found: dict[str, dict[str, float]] = {}

    def measure(call: Call) -> None:
        scorer = served[call.name].scorer or PooledScorer()
        if call.layout is None:
            return
        plan = call.plan()
        values = scorer.score(call.q, call.k, plan, call.scale)
        mass = unit_mass(call.q, call.k, plan, call.scale)
        kept, best = (kept_units(x, plan) for x in (values, mass.clamp(min=1e-20).log()))
        open_units = (plan.visible & ~plan.always)[:, None]
        figures = {"divergence": divergence(values, mass, plan).item()}
        kinds = plan.unit_modality.unique().tolist()
        pairs = [(a, b) for a in kinds for b in kinds if a >= 0 and b >= 0]
        for pair in [None, *(pairs if len(pairs) > 1 else [])]:
            here = open_units
            if pair is not None:
                here = here & (plan.tile_modality == pair[0])[:, None, :, None]
                here = here & (plan.unit_modality == pair[1])[:, None, None]
            name = "" if pair is None else "/" + ">".join(mms.Modality(m).name for m in pair)
            whole = (mass * here).sum().clamp(min=1e-12)
            figures[f"kept{name}"] = ((mass * (kept & here)).sum() / whole).item()
            both, all_best = (kept & best & here).sum(), (best & here).sum()
            figures[f"overlap{name}"] = (both / all_best.clamp(min=1)).item()
        found[call.name] = figures

    with keeping(model, backend="dense"), watch(model, measure):
        if run is not None:
            run(ids)
        else:
            model.base_model(ids, use_cache=False)  # type: ignore[operator]
    return found


def kept_units(values: Tensor, plan: Plan) -> Tensor:
    """(B, K, T, U) bool: what `select` keeps."""
    chosen = select(Scores(values, plan), plan.layout, plan.config)
    return units_of_lists(chosen.index, chosen.count, values.shape[-1])


def scaled_budgets(config: SparseConfig, ratio: float) -> dict[str, Any]:
    """Fields that make a config keep `ratio`, its budgets of layers and heads scaled alike."""
    part = ratio / config.ratio

    def scaled(own: Any) -> Any:
        return tuple(map(scaled, own)) if isinstance(own, tuple) else min(own * part, 1.0)

    own = {layer: scaled(ratios) for layer, ratios in config.layer_ratio.items()}
    return {"ratio": ratio, "layer_ratio": own}


def budgets_of(config: SparseConfig, method: str, ratio: float) -> dict[str, Any]:
    """Fields that make a config keep `ratio`, with its own budgets only for its own scorers."""
    if method != "scorers":
        return {"ratio": ratio, "layer_ratio": {}}
    return scaled_budgets(config, ratio)


def tables(
    model: nn.Module,
    sequences: dict[str, Tensor],
    methods: Sequence[str],
    ratios: Sequence[float],
    masses: Sequence[float] = (),
    **changes: Any,
) -> Iterator[list[dict[str, Any]]]:
    """`change_of` by kind of text, method and budget, after every sequence of each kind.

    Rows hold means over the sequences so far, and the single KLs. The budgets of layers and heads
    belong to the model's own scorers: with other methods all layers have one ratio.

    Args:
        masses: budgets besides ratios, thresholds on the predicted mass.
    """
    rows: dict[Row, list[dict[str, float]]] = {}
    densities: dict[Row, float] = {}
    budgets = [*(("ratio", r) for r in ratios), *(("mass", m) for m in masses)]
    config = config_of(model)
    for batches in zip_longest(*sequences.values()):
        for kind, row in zip(sequences, batches, strict=True):
            if row is None:
                continue
            ids = row[None]
            dense = predictions(model, ids, backend="dense")
            for name, (budget, value) in product(methods, budgets):
                own = {"mass": value} if budget == "mass" else budgets_of(config, name, value)
                own |= changes
                with ranked_by(model, METHODS[name]):
                    sparse = predictions(model, ids, **own)
                key = kind, name, budget, value
                if key not in densities:
                    densities[key] = mms.report(model).density or 1.0
                rows.setdefault(key, []).append(change_of(dense, sparse, ids))
        yield [_row(*key, densities[key], found) for key, found in rows.items()]


Row = tuple[str, str, str, float]
"""Kind of text, method, field of the budget and its value."""


def _row(
    kind: str, method: str, budget: str, value: float, density: float,
    found: list[dict[str, float]],
) -> dict[str, Any]:  # fmt: skip
    means = {f: round(statistics.fmean(x[f] for x in found), 5) for f in found[0]}
    kls = [round(x["kl"], 5) for x in found]
    return {"text": kind, "method": method, budget: value, "density": round(density, 4)} | {
        **means, "kls": kls,
    }  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of programs that compare methods on a language model and a corpus."""
    parser.add_argument("--model", default="smollm2", help='"smollm2", a folder or a name')
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scorers", help="folder of save_scorers, or the name of shipped ones")
    parser.add_argument("--corpus", required=True, help="file of recipes.data.text_corpus")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sampled", type=float, help="share of the budget, else the config's")
    parser.add_argument("--coarse", type=int, default=1, help="units that are ranked as one first")
    parser.add_argument(
        "--coarse-budget", type=float, default=4.0, help="of candidates, in budgets"
    )
    parser.add_argument("--out", type=Path, required=True)


def changes_of(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the config that `add_options` change for all methods."""
    changes = {"coarse": args.coarse, "coarse_budget": args.coarse_budget}
    return changes if args.sampled is None else changes | {"sampled": args.sampled}


def prepared(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The sparsified model of `add_options`, frozen, and a record without rows.

    Without scorers the method that is named after them is left out of `args.methods`.
    """
    from mm_sparse.recipes.models.vision import LanguagePart

    model: Any = LanguagePart(args.model, options={"dtype": args.dtype}).build(0)
    model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    if args.scorers:
        mms.load_scorers(model, args.scorers)
    else:
        mms.sparsify(model, SparseConfig(bidirectional=(), dense_below=0))
        args.methods = [name for name in args.methods if name != "scorers"]
    names = {"model": args.model, "dtype": args.dtype, "scorers": args.scorers} | changes_of(args)
    return model, {"machine": machine(), **names, "rows": []}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    from mm_sparse.recipes.data.text_corpus import CorpusData

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--count", type=int, default=8, help="sequences of each kind")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.2])
    parser.add_argument("--masses", type=float, nargs="+", default=[], help="thresholds, too")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    args = parser.parse_args(argv)
    model, record = prepared(args)
    data = CorpusData(args.corpus, args.tokens).kinds(args.split)
    data = {kind: rows[: args.count].to(model.device) for kind, rows in data.items()}
    for rows in tables(model, data, args.methods, args.ratios, args.masses, **changes_of(args)):
        record["rows"] = rows
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in record["rows"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
