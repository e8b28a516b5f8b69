"""Measure shipped scorers again: the tables of their card, beside what the card says.

mm-sparse eval smollm2-135m --corpus corpus.npz --out results.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mm_sparse.checkpoints import list_pretrained, read_card


def main(argv: Sequence[str] | None = None) -> None:
    """Measure shipped scorers and print their card's figures beside what came."""
    parser = argparse.ArgumentParser(
        prog="mm-sparse eval",
        description="Measure shipped scorers as their card says; what came stands before the "
        "card's figure. Options that are not listed go to the programs of the card.",
    )
    parser.add_argument("name", choices=list_pretrained(), help="of shipped scorers")
    parser.add_argument("--only", nargs="+", metavar="TABLE", help="tables of the card; all if not")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    args, rest = parser.parse_known_args(argv)
    card = read_card(args.name)
    unknown = sorted(set(args.only or ()) - set(card["tables"]))
    if unknown:
        parser.error(f"argument --only: must name tables of {list(card['tables'])}, got {unknown}")
    record: dict[str, Any] = {}
    for name, table in card["tables"].items():
        if args.only and name not in args.only:
            continue
        part = args.out.with_suffix(f".{name}.json")
        program = import_module(f"mm_sparse.recipes.{table['program']}")
        program.main([*table["options"], "--scorers", args.name, "--out", str(part), *rest])
        record[name] = json.loads(part.read_text())
        part.unlink()
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\n{name}: {table['about']}\n\n{beside(record[name]['rows'], table['rows'])}")


def beside(rows: Sequence[dict[str, Any]], card: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of measured rows, the card's figure of the same row in brackets."""
    published = {_place(row): row for row in card}
    figures = [key for key in rows[0] if _is_figure(key, rows[0][key])] if rows else []
    names = [key for key in rows[0] if _is_name(key, rows[0][key])] if rows else []
    lines = [[*names, *figures], ["---"] * (len(names) + len(figures))]
    for row in rows:
        old = published.get(_place(row), {})
        cells = [str(row[key]) for key in names]
        for key in figures:
            before = f" ({old[key]:g})" if isinstance(old.get(key), (int, float)) else ""
            cells.append(f"{row[key]:g}{before}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _is_name(key: str, value: Any) -> bool:
    return isinstance(value, str) or key in ("ratio", "mass", "sampled")


def _is_figure(key: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and not _is_name(key, value)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted((key, value) for key, value in row.items() if _is_name(key, value)))


if __name__ == "__main__":
    main()
