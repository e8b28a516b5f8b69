"""The command `mm-sparse`: a command's name, then its own options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path


def bench(argv: Sequence[str]) -> None:
    """Time attention beside dense and sparse peers on this machine."""
    # Help and wrong options need no torch.
    bench_parser().parse_args(argv)
    from mm_sparse.bench.runner import main

    main(argv)


def inspect(argv: Sequence[str]) -> None:
    """Write one HTML page: what the layers of a model kept on a sample."""
    inspect_parser().parse_known_args(argv)
    from mm_sparse.cli.inspect import main

    main(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"bench": bench, "inspect": inspect}
"""Each gets the options behind its name; its docstring is its line of help."""
GROUP = "mm_sparse.commands"


def commands() -> dict[str, Callable[[Sequence[str]], None]]:
    """`COMMANDS`, and what packages installed under the entry points of `GROUP`."""
    return COMMANDS | {entry.name: entry.load() for entry in entry_points(group=GROUP)}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    known = commands()
    listing = "\n".join(f"  {name:8}{run.__doc__}" for name, run in known.items())
    parser = argparse.ArgumentParser(
        prog="mm-sparse",
        description=f"Attention that computes only what matters.\n\ncommands:\n{listing}",
        epilog="mm-sparse COMMAND --help tells the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=known, metavar="COMMAND")
    args = parser.parse_args(argv[:1])
    known[args.command](argv[1:])
    return 0


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """A number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text!r}")
    return value


def seconds(text: str) -> float:
    """A number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number from 0, got {text!r}")
    return value


def head_counts(text: str) -> tuple[int, int]:
    """Query heads and KV heads, "32/8"."""
    query, _, kv = text.partition("/")
    counts = [int(x) if x.isdecimal() else 0 for x in (query, kv)]
    if min(counts) < 1 or counts[0] % counts[1]:
        raise argparse.ArgumentTypeError(
            f'must be query heads and KV heads that divide them, as in "32/8", got {text!r}'
        )
    return counts[0], counts[1]


def picture(text: str) -> Path:
    """Where a plot goes."""
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib, which is not installed")
    return Path(text)


def inspect_parser() -> argparse.ArgumentParser:
    """Options of `mm-sparse inspect`."""
    parser = argparse.ArgumentParser(
        prog="mm-sparse inspect",
        description="Write one HTML page for a model and a sample: what its layers kept, over "
        "pictures and sounds, by modality and by head.",
        epilog="mm-sparse inspect mm_sparse.recipes.run.inspection:recipe --config FILE.yaml shows "
        "a sample of a recipe's validation data; other options go to the function.",
    )
    add = parser.add_argument
    add("target", help="folder of a transformers model, or MODULE:FUNCTION that returns a Scene")
    add("--out", type=Path, default=Path("inspect.html"), metavar="FILE.html")
    add("--text", metavar="TEXT", help="a text or a file, for a model in a folder")
    add("--ratio", type=share, default=0.2, metavar="R", help="share of keys kept there (0.2)")
    return parser


def bench_parser() -> argparse.ArgumentParser:
    """Options of `mm-sparse bench`."""
    from mm_sparse.bench.results import FAMILIES

    names = ", ".join(FAMILIES)
    parser = argparse.ArgumentParser(
        prog="mm-sparse bench",
        description="Time attend, and score + select + attend, beside dense and sparse peers. "
        "Times are medians of one run on one machine; ratios count.",
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE.json", help="results; a CSV is written beside it")
    add("--plot", type=picture, metavar="FILE.png", help="time over length; needs matplotlib")
    add("--tokens", type=positive, nargs="+", metavar="N", help="lengths of a sequence")
    add("--heads", type=head_counts, nargs="+", metavar="Q/KV", help='as in "16/16 32/8"')
    add("--head-dims", type=positive, nargs="+", metavar="D", help="as in 128 64")
    add("--causal", choices=("both", "no", "yes"), help="which masks")
    add(
        "--units",
        type=int,
        nargs="+",
        choices=(16, 32, 64, 128),
        metavar="U",
        help="of 16, 32, 64, 128",
    )
    add("--ratio", type=share, metavar="R", help="share of visible keys kept (0.2; decoding 0.125)")
    add("--only", nargs="+", choices=FAMILIES, metavar="NAME", help=f"of {names}")
    add("--quick", action="store_true", help="head dim 128, units 64 and 16, 60 seconds")
    add("--seconds", type=seconds, metavar="S", help="start nothing after S seconds")
    mode = parser.add_argument_group("instead of the shapes, any of")
    mode.add_argument("--decode", action="store_true", help="one step with a long context")
    mode.add_argument("--lengths", action="store_true", help="from which length the whole pays")
    mode.add_argument("--long", action="store_true", help="a fixed budget up to 1048576 tokens")
    mode.add_argument("--memory", action="store_true", help="peak memory; needs a CUDA GPU")
    return parser


def bench_shapes(
    args: argparse.Namespace, cuda: bool, tokens: Sequence[int], head_dims: Sequence[int] = ()
) -> list[tuple[int, int, int, int, bool]]:
    """Tokens, query heads, KV heads, head dim and causal of what is asked for; else defaults."""
    masks = {"no": (False,), "yes": (True,)}.get(args.causal, (False, True))
    heads = args.heads or ([(16, 16), (32, 8)] if cuda else [(8, 8)])
    kinds = [(*h, causal) for h in heads for causal in masks]
    if cuda and not args.heads and not args.causal:
        kinds = [(16, 16, False), (32, 8, True)]
    dims = args.head_dims or ((head_dims or (128,)) if cuda else (64,))
    return [(n, q, kv, d, c) for n in args.tokens or tokens for d in dims for q, kv, c in kinds]


if __name__ == "__main__":
    sys.exit(main())
