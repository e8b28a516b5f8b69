"""`mm-sparse inspect`: one HTML page for a model and a sample."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_sparse._extras import extra_of
from mm_sparse.cli.arguments import share

if TYPE_CHECKING:
    from mm_sparse.analysis import InspectionSample


def main(argv: Sequence[str]) -> None:
    """Write one HTML page: what the layers of a model kept on a sample."""
    parser = inspect_parser()
    args, more = parser.parse_known_args(argv)
    from mm_sparse.analysis import write_page

    if ":" in args.target:
        try:
            sample = sample_of(args.target, more)
        except ValueError as error:
            if not isinstance(error.__cause__, ImportError | AttributeError):
                raise
            parser.error(str(error))
    else:
        if more:
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        if args.text is None:
            parser.error("--text must be given for a model in a folder")
        if args.scorers is not None and args.ratio is not None:
            parser.error("--ratio must not be given with --scorers: their budgets are stored")
        sample = text_sample(args.target, args.text, args.ratio or 0.2, args.scorers, args.query)
    print(write_page(sample, args.out))


def sample_of(target: str, options: Sequence[str]) -> InspectionSample:
    """What the function "module:name" makes of the options.

    Raises:
        ValueError: there is no such function, or it returns something else.
    """
    from mm_sparse.analysis import InspectionSample

    home, _, name = target.partition(":")
    try:
        make: Any = getattr(importlib.import_module(home), name)
    except (ImportError, AttributeError) as error:
        missing = getattr(error, "name", None) or ""
        if isinstance(error, ImportError) and not home.startswith(missing.partition(".")[0] or "-"):
            # The module is there; what it imports is not.
            raise ValueError(f"{target} cannot be imported: {error}{extra_of(error)}") from error
        raise ValueError(f"target must be MODULE:FUNCTION, got {target!r}: {error}") from error
    sample = make(list(options))
    if not isinstance(sample, InspectionSample):
        raise ValueError(f"{target} must return an InspectionSample, got {type(sample).__name__}")
    return sample


def text_sample(
    folder: str, text: str, ratio: float = 0.2, scorers: str | None = None, query: int | None = None
) -> InspectionSample:
    """A causal language model of transformers that reads a text, or a file with one.

    Args:
        ratio: share of keys that untrained scores keep; scorers bring their own budgets.
        scorers: name of shipped ones or folder of saved ones; without, scores are untrained.
        query: position of the token whose keys are shown; the last one if None.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import mm_sparse as mms
    from mm_sparse.analysis import InspectionSample

    if is_file(text):
        text = Path(text).read_text(encoding="utf-8")
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    length = ids.shape[1]
    if not length:
        raise ValueError("text must hold at least one token, got none")
    at = length - 1 if query is None else query
    if not 0 <= at < length:
        raise ValueError(f"query must be a token in [0, {length}), got {query}")
    if scorers is None:
        mms.sparsify(model, mms.SparseConfig(ratio=ratio, bidirectional=()), strict=False)
    else:
        mms.load_scorers(model, scorers)

    def run() -> object:
        # A short text would run dense; here its selection is what one wants to see.
        with mms.override_config(model, dense_below=0):
            return model(ids, use_cache=False)

    words = [tokenizer.decode([int(token)]) for token in ids[0]]
    answers = {}
    with torch.no_grad():
        answers["sparse"] = words_of(tokenizer, run(), at)
        with mms.override_config(model, backend="dense"):
            answers["dense"] = words_of(tokenizer, model(ids, use_cache=False), at)
    said = f"sparse says {answers['sparse']!r}, dense {answers['dense']!r}"
    true = f"; the text goes on with {words[at + 1]!r}" if at + 1 < length else ""
    if scorers is None:
        ranking = f"untrained scores, ratio {ratio:g}"
    else:
        ranking = f"scorers {Path(scorers).name}, their budgets"
    return InspectionSample(
        title=f"{Path(folder).name}, {length} tokens, {ranking}",
        parts={"language": model},
        run=run,
        queries=[at],
        texts={
            "Query": f"token {at}, {words[at]!r}",
            "Next token": said + true,
        },
        words=words,
    )


def is_file(text: str) -> bool:
    """Whether a file has this name; no file has that of a long text."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def words_of(tokenizer: Any, output: Any, at: int) -> str:
    """The likeliest token behind position `at`."""
    return tokenizer.decode([int(output.logits[0, at].argmax())])


def inspect_parser() -> argparse.ArgumentParser:
    """Options of `mm-sparse inspect`."""
    parser = argparse.ArgumentParser(
        prog="mm-sparse inspect",
        description="Write one HTML page for a model and a sample: what its layers kept, over "
        "images and audio, by modality and by head.",
        epilog="mm-sparse inspect mm_sparse.recipes.run.inspect_recipe:recipe --config F.yaml "
        "shows a sample of a recipe's validation data; other options go to the function.",
    )
    add = parser.add_argument
    add("target", help="folder of a transformers model, or MODULE:FUNCTION of a sample")
    add("--out", type=Path, default=Path("inspect.html"), metavar="FILE.html")
    add("--text", metavar="TEXT", help="a text or a file, for a model in a folder")
    add("--scorers", metavar="NAME", help="shipped scorers or a folder of saved ones, there")
    add("--query", type=int, metavar="N", help="token whose keys are shown there (the last)")
    add("--ratio", type=share, metavar="R", help="share of keys kept there (0.2)")
    return parser
