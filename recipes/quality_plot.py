"""Draw what is lost over what is kept, one line a method, from results of `recipes.quality`.

python -m mm_sparse.recipes.quality_plot results.json quality.png
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS = {
    "kl": "KL(dense || sparse), nats", "top1": "change of top-1, points", "loss": "change of loss",
}  # fmt: skip


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of `recipes.quality`, or of all such tables in one of `mm-sparse eval`."""
    found = json.loads(path.read_text())
    tables = [found] if "rows" in found else list(found.values())
    return [row for table in tables for row in table["rows"] if "text" in row]


def draw(rows: Sequence[dict[str, Any]], out: Path, figure: str = "kl") -> None:
    """One panel for each kind of text; methods that were measured at one density are points."""
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("rows must hold results of recipes.quality, got none")
    kinds = list(dict.fromkeys(row["text"] for row in rows))
    # Not pyplot: it would keep the picture, and ask for a display.
    picture = Figure(figsize=(4.6 * len(kinds), 3.6), layout="constrained")
    panels = picture.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [r for r in rows if (r["text"], r["method"]) == (kind, method)]
            own.sort(key=lambda row: row["density"])
            kept = [100 * row["density"] for row in own]
            panel.plot(kept, [row[figure] for row in own], marker="o", label=method)
        panel.set_title(kind)
        panel.set_xlabel("keys kept, % of the visible")
        panel.grid(alpha=0.3)
    if figure == "kl":
        panels[0].set_yscale("log")
    panels[0].set_ylabel(LABELS[figure])
    panels[-1].legend(fontsize=8)
    picture.savefig(out, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON of recipes.quality or mm-sparse eval")
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("--figure", choices=LABELS, default="kl")
    args = parser.parse_args(argv)
    draw(rows_of(args.results), args.out, args.figure)


if __name__ == "__main__":
    main()
