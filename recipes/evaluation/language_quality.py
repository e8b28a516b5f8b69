"""What sparse attention costs a language model in accuracy, by method and density.

    python -m mm_sparse.recipes.evaluation.language_quality --scorers FOLDER \\
        --corpus corpus.npz --out results.json

Each method ranks units; budgets, sinks and window are the same for all.
B rows, N tokens, K KV heads, T tiles, U units, V vocabulary
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from itertools import product, zip_longest
from typing import Any

from torch import Tensor, nn

import mm_sparse as mms
from mm_sparse.integrations import override_scorers, sparse_config
from mm_sparse.recipes.metrics import METHODS, budgets_of, change_of, predictions
from mm_sparse.recipes.run import add_options, changes_of, prepared


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
    config = sparse_config(model)
    for batches in zip_longest(*sequences.values()):
        for kind, row in zip(sequences, batches, strict=True):
            if row is None:
                continue
            ids = row[None]
            dense = predictions(model, ids, backend="dense")
            for name, (budget, value) in product(methods, budgets):
                own = {"top_p": value} if budget == "mass" else budgets_of(config, name, value)
                own |= changes
                with override_scorers(model, METHODS[name]):
                    sparse = predictions(model, ids, **own)
                key = kind, name, budget, value
                if key not in densities:
                    densities[key] = mms.report(model).density or 1.0
                rows.setdefault(key, []).append(change_of(dense, sparse, ids))
        yield [_row(*key, densities[key], figures) for key, figures in rows.items()]


Row = tuple[str, str, str, float]
"""Kind of text, method, field of the budget and its value."""


def _row(
    kind: str, method: str, budget: str, value: float, density: float,
    figures: list[dict[str, float]],
) -> dict[str, Any]:  # fmt: skip
    means = {f: round(statistics.fmean(x[f] for x in figures), 5) for f in figures[0]}
    kls = [round(x["kl"], 5) for x in figures]
    return {"text": kind, "method": method, budget: value, "density": round(density, 4)} | {
        **means, "kls": kls,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    from mm_sparse.recipes.data import CorpusData

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
