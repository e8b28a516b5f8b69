"""`mm-sparse inspect`: one HTML page for a model and a sample."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_sparse.analysis.html_page import Scene, write_page
from mm_sparse.config import SparseConfig


def main(argv: Sequence[str]) -> None:
    """Command line, behind `mm-sparse inspect`."""
    from mm_sparse.cli.main import inspect_parser

    parser = inspect_parser()
    args, more = parser.parse_known_args(argv)
    if ":" in args.target:
        scene = scene_of(args.target, more)
    else:
        if more:
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        if args.text is None:
            parser.error("--text must be given for a model in a folder")
        scene = text_scene(args.target, args.text, args.ratio)
    print(write_page(scene, args.out))


def scene_of(target: str, options: Sequence[str]) -> Scene:
    """What the function "module:name" makes of the options.

    Raises:
        ValueError: there is no such function, or it returns something else.
    """
    home, _, name = target.partition(":")
    try:
        make: Any = getattr(importlib.import_module(home), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"target must be MODULE:FUNCTION, got {target!r}: {error}") from error
    scene = make(list(options))
    if not isinstance(scene, Scene):
        raise ValueError(f"{target} must return a Scene, got {type(scene).__name__}")
    return scene


def text_scene(folder: str, text: str, ratio: float) -> Scene:
    """A causal language model of transformers that reads a text, or a file with one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import mm_sparse as mms

    if Path(text).is_file():
        text = Path(text).read_text(encoding="utf-8")
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    # A short text would run dense; here its selection is what one wants to see.
    mms.sparsify(model, SparseConfig(ratio=ratio, bidirectional=(), dense_below=0), strict=False)
    return Scene(
        title=f"{Path(folder).name}, {ids.shape[1]} tokens, ratio {ratio:g}",
        parts={"language": model},
        run=lambda: model(ids, use_cache=False),
        queries=[ids.shape[1] - 1],
        texts={"Text": text if len(text) < 2000 else text[:2000] + " ..."},
    )
