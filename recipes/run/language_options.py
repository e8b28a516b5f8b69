"""Command line options of programs on a language model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import mm_sparse as mms
from mm_sparse import SparseConfig
from mm_sparse.bench import machine
from mm_sparse.recipes.metrics import METHODS


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
    changes = {"coarse_factor": args.coarse, "coarse_budget": args.coarse_budget}
    return changes if args.sampled is None else changes | {"sample_ratio": args.sampled}


def prepared(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The sparsified model of `add_options`, frozen, and a record without rows.

    Without scorers the method that is named after them is left out of `args.methods`.
    """
    from mm_sparse.recipes.models import LanguageConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = LanguageConfig(args.model, options={"dtype": args.dtype}).build(0)
    model.eval().requires_grad_(False).to(device)
    if args.scorers:
        mms.load_scorers(model, args.scorers)
    else:
        mms.sparsify(model, SparseConfig(bidirectional=(), dense_below=0))
        args.methods = [name for name in args.methods if name != "scorers"]
    names = {"model": args.model, "dtype": args.dtype, "scorers": args.scorers} | changes_of(args)
    facts = machine(device, getattr(torch, args.dtype))
    return model, {"machine": facts, **names, "rows": []}
