"""The command `mm-sparse`: a command's name, then its own options."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points

import mm_sparse
from mm_sparse._extras import extra_of

Command = Callable[[Sequence[str]], object]

COMMANDS: dict[str, tuple[str, str]] = {
    "bench": ("mm_sparse.cli.bench:main", "Time attention beside dense and sparse baselines."),
    "estimate": ("mm_sparse.cli.estimate:main", "Say whether it pays for a model, and how much."),
    "inspect": ("mm_sparse.cli.inspect:main", "Write an HTML page: what a model kept of a sample."),
    "generate": (
        "mm_sparse.recipes.run.generate_command:main",
        "Answer a question about texts, images, audio or a video.",
    ),
    "distill": (
        "mm_sparse.recipes.distillation.distill_command:main",
        "Train scorers for a model in a folder.",
    ),
    "eval": (
        "mm_sparse.recipes.evaluation.eval_command:main",
        "Measure the quality of shipped scorers again.",
    ),
    "recipes": ("mm_sparse.recipes.run.recipes_command:main", "List, copy and run recipes."),
}
"""Function of each command, as MODULE:NAME, and its line of help. Named, not imported: each loads
when it is called, and some stand in packages above this one."""
GROUP = "mm_sparse.commands"
"""Entry points of other packages that add commands."""


def plugins() -> dict[str, tuple[str, str]]:
    """Commands that other installed packages add; none of them is imported."""
    entries = entry_points(group=GROUP)
    return {e.name: (e.value, f"From {e.dist.name if e.dist else e.module}.") for e in entries}


def load(name: str, place: str) -> Command:
    """The function of a command.

    Raises:
        SystemExit: its module cannot be imported; the message says what is missing.
    """
    module, _, function = place.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"mm-sparse {name} cannot start: {error}{extra_of(error)}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    known = plugins() | COMMANDS
    listing = "\n".join(f"  {name:10}{about}" for name, (_, about) in known.items())
    parser = argparse.ArgumentParser(
        prog="mm-sparse",
        description=f"Learned block-sparse attention.\n\ncommands:\n{listing}",
        epilog="mm-sparse COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=mm_sparse.__version__)
    parser.add_argument("command", choices=known, metavar="COMMAND")
    args = parser.parse_args(argv[:1])
    command = load(args.command, known[args.command][0])
    try:
        command(argv[1:])
    except ImportError as error:
        if "mm-sparse[" not in f"{error}{extra_of(error)}":
            raise
        raise SystemExit(f"mm-sparse {args.command}: {error}{extra_of(error)}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
