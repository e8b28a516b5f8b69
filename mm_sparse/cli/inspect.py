"""`mm-sparse inspect`: one HTML page for a model and a sample."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_sparse.cli.arguments import share

if TYPE_CHECKING:
    from mm_sparse.analysis import InspectionSample


def main(argv: Sequence[str]) -> None:
    """Write one HTML page: what the layers of a model kept on a sample."""
    parser = inspect_parser()
    args, more = parser.parse_known_args(argv)
    from mm_sparse.analysis import write_page

    if ":" in args.target:
        scene = scene_of(args.target, more)
    else:
        if more:
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        if args.text is None:
            parser.error("--text must be given for a model in a folder")
        scene = text_scene(args.target, args.text, args.ratio)
    print(write_page(scene, args.out))


def scene_of(target: str, options: Sequence[str]) -> InspectionSample:
    """What the function "module:name" makes of the options.

    Raises:
        ValueError: there is no such function, or it returns something else.
    """
    from mm_sparse.analysis import InspectionSample

    home, _, name = target.partition(":")
    try:
        make: Any = getattr(importlib.import_module(home), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"target must be MODULE:FUNCTION, got {target!r}: {error}") from error
    scene = make(list(options))
    if not isinstance(scene, InspectionSample):
        raise ValueError(f"{target} must return a Scene, got {type(scene).__name__}")
    return scene


def text_scene(folder: str, text: str, ratio: float) -> InspectionSample:
    """A causal language model of transformers that reads a text, or a file with one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import mm_sparse as mms
    from mm_sparse.analysis import InspectionSample

    if Path(text).is_file():
        text = Path(text).read_text(encoding="utf-8")
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    # A short text would run dense; here its selection is what one wants to see.
    mms.sparsify(
        model, mms.SparseConfig(ratio=ratio, bidirectional=(), dense_below=0), strict=False
    )
    return InspectionSample(
        title=f"{Path(folder).name}, {ids.shape[1]} tokens, ratio {ratio:g}",
        parts={"language": model},
        run=lambda: model(ids, use_cache=False),
        queries=[ids.shape[1] - 1],
        texts={"Text": text if len(text) < 2000 else text[:2000] + " ..."},
    )


def inspect_parser() -> argparse.ArgumentParser:
    """Options of `mm-sparse inspect`."""
    parser = argparse.ArgumentParser(
        prog="mm-sparse inspect",
        description="Write one HTML page for a model and a sample: what its layers kept, over "
        "pictures and sounds, by modality and by head.",
        epilog="mm-sparse inspect mm_sparse.recipes.run.inspect_recipe:recipe --config F.yaml "
        "shows a sample of a recipe's validation data; other options go to the function.",
    )
    add = parser.add_argument
    add("target", help="folder of a transformers model, or MODULE:FUNCTION that returns a Scene")
    add("--out", type=Path, default=Path("inspect.html"), metavar="FILE.html")
    add("--text", metavar="TEXT", help="a text or a file, for a model in a folder")
    add("--ratio", type=share, default=0.2, metavar="R", help="share of keys kept there (0.2)")
    return parser
