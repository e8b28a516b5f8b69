"""Draw what is lost over what is kept, one line a method, from tables of this package's recipes.

python -m mm_sparse.recipes.evaluation.plot results.json quality.png
python -m mm_sparse.recipes.evaluation.plot speech.json speech.png --figure word_error_rate
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS = {
    "kl": "KL(dense || sparse), nats", "top1": "change of top-1, points", "loss": "change of loss",
    "word_error_rate": "word error rate", "frame_cosine": "cosine of frames to dense",
    "patch_cosine": "cosine of patches to dense",
    "patch_cosine_worst_5_percent": "the same, worst 5 % of patches",
}  # fmt: skip


def rows_of(path: Path, figures: Sequence[str]) -> list[dict[str, Any]]:
    """Rows with one of `figures`: of a table, or of all in a file of `mm-sparse eval`."""
    data = json.loads(path.read_text())
    tables = [data] if "rows" in data else list(data.values())
    return [row for table in tables for row in table["rows"] if not row.keys().isdisjoint(figures)]


def panels_of(
    rows: Sequence[dict[str, Any]], figures: Sequence[str]
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by figure and by what was looked at: kind of text, or how much was sampled."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        sampled = row.get("sampled")
        title = row.get("text") or (f"{sampled:.0%} of it sampled" if sampled else "")
        for figure in figures:
            if figure in row and row["method"] != "dense":
                panels.setdefault((figure, title), []).append(row)
    return panels


def draw(rows: Sequence[dict[str, Any]], out: Path, figures: Sequence[str] = ("kl",)) -> None:
    """One panel for each figure of each kind; methods measured at one density are points."""
    from matplotlib.figure import Figure

    rows_by_panel = panels_of(rows, figures)
    if not rows_by_panel:
        raise ValueError(f"rows must hold results with one of {[*figures]}, got none")
    # Not pyplot: it would keep the image, and ask for a display.
    chart = Figure(figsize=(4.6 * len(rows_by_panel), 3.6), layout="constrained")
    share = "row" if len(figures) == 1 else False
    panels = chart.subplots(1, len(rows_by_panel), sharey=share, squeeze=False)[0]
    for panel, ((figure, title), own) in zip(panels, rows_by_panel.items(), strict=True):
        for method in dict.fromkeys(row["method"] for row in own):
            line = sorted((r for r in own if r["method"] == method), key=lambda r: r["density"])
            kept = [100 * row["density"] for row in line]
            panel.plot(kept, [row[figure] for row in line], marker="o", label=method)
        dense = [row[figure] for row in rows if row["method"] == "dense" and figure in row]
        if dense:
            panel.axhline(dense[0], color="0.4", linestyle="--", label="dense")
        panel.set(title=title, xlabel="keys kept, % of the visible", ylabel=LABELS[figure])
        panel.grid(alpha=0.3)
        if figure == "kl":
            panel.set_yscale("log")
    panels[-1].legend(fontsize=8)
    chart.savefig(out, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON of a recipe's table or of mm-sparse eval")
    parser.add_argument("out", type=Path, help="image to write")
    parser.add_argument("--figure", choices=LABELS, nargs="+", default=["kl"])
    args = parser.parse_args(argv)
    draw(rows_of(args.results, args.figure), args.out, args.figure)


if __name__ == "__main__":
    main()
