"""The command `mm-sparse estimate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_sparse.cli.arguments import positive, share


def estimate_parser() -> argparse.ArgumentParser:
    """Options of `mm-sparse estimate`."""
    parser = argparse.ArgumentParser(
        prog="mm-sparse estimate",
        description="Say what sparse attention would save a model on this machine: a few of its "
        "layers run with random weights, dense and sparse, and the whole is computed from them.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, its config.json, or a repository of the hub")
    add("--tokens", type=positive, required=True, metavar="N", help="of the language model")
    add("--images", type=int, default=0, metavar="K", help="images or clips that a tower reads")
    add("--ratio", type=share, default=0.2, metavar="R", help="share of keys kept (0.2)")
    add("--unit", type=int, default=64, choices=(16, 32, 64, 128), help="tokens of a unit (64)")
    add("--works", nargs="+", choices=("prefill", "decode", "train"), metavar="WORK",
        default=("prefill", "decode", "train"), help="of prefill, decode, train (all)")  # fmt: skip
    add("--out", type=Path, metavar="FILE.json", help="the results")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print what a model would take, dense and sparse."""
    parser = estimate_parser()
    args = parser.parse_args(argv)
    from mm_sparse.bench import estimate_model, estimate_table
    from mm_sparse.config import SparseConfig

    try:
        config = read_config(args.model)
        found = estimate_model(
            config, args.tokens, images=args.images, works=args.works,
            sparse=SparseConfig(ratio=args.ratio, unit=args.unit), name=Path(args.model).name,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise SystemExit(f"mm-sparse estimate: {error}") from error
    print(estimate_table(found))
    if args.out:
        args.out.write_text(json.dumps(found.as_json(), indent=1) + "\n")


def read_config(name: str) -> Any:
    """The config of a folder, of a config.json, or of a repository."""
    from transformers import AutoConfig

    path = Path(name)
    return AutoConfig.from_pretrained(str(path.parent) if path.suffix == ".json" else name)
