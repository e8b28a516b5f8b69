"""What a run of `mm-sparse distill` says on its way and at its end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from mm_sparse.recipes.distillation.scorer_trainer import ScorerTrainer, slope

Figures = dict[str, dict[str, float]]
"""By layer: divergence, kept, overlap."""
LINE_SECONDS = 30
"""Between two lines of progress where nothing can move."""
LOAD = """# Scorers for sparse attention

Written by `mm-sparse distill`; `card.json` says what they learned from.

```python
import mm_sparse as mms
{imports}

model = mms.load_scorers({model}, "{scorers}")
```
"""
LOADERS = {
    True: ("from mm_sparse.recipes.models import LanguageConfig",
           'LanguageConfig("smollm2").build(0)'),
    False: ("from mm_sparse.recipes.finetuning import load_model", 'load_model("{}")'),
}  # fmt: skip
"""What imports and what loads a model, whether it is the wheel's SmolLM2 or a folder."""


class Reporter:
    """Progress on stderr: a bar in a terminal if rich is installed, else lines."""

    def __init__(
        self, trainer: ScorerTrainer, *, every: float = LINE_SECONDS, silent: bool = False
    ) -> None:
        """
        Args:
            every: seconds between two lines.
            silent: whether nothing is said: by another process.
        """
        self.trainer, self.every, self.silent = trainer, every, silent
        self._said = -every
        self._bar: Any = None
        if not silent and sys.stderr.isatty() and find_spec("rich") is not None:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True))
            self._task = self._bar.add_task("distill", total=1.0, completed=trainer.done)

    def __enter__(self) -> Reporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._bar is not None:
            self._bar.stop()

    def step(self, loss: float) -> None:
        """After a step."""
        trainer, now = self.trainer, self.trainer.progress
        kind = "divergence" if now.step <= now.first else "dropped mass"
        text = f"step {now.step}  {now.tokens:,} tokens  {kind} {loss:.4f}"
        if self._bar is not None:
            done = min(trainer.done, 1.0)
            self._bar.update(self._task, completed=done, description=text)
        elif time.monotonic() - self._said >= self.every or trainer.done >= 1:
            self._said = time.monotonic()
            self.say(f"{100 * min(trainer.done, 1):3.0f} %  {clock(now.seconds)}  {text}")

    def measured(self, figures: Figures) -> None:
        """What was measured on the rows that were held back."""
        kl, kept, overlap = (mean(figures, name) for name in ("divergence", "kept", "overlap"))
        self.say(
            f"measured at step {self.trainer.progress.step}: KL of attention {kl:.4f}, "
            f"kept mass {kept:.4f}, overlap with the best units {overlap:.4f}"
        )

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.silent:
            return
        if self._bar is not None:
            self._bar.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)


def mean(figures: Mapping[str, Mapping[str, float]], name: str) -> float:
    """Mean of a figure over layers."""
    return sum(own[name] for own in figures.values()) / max(len(figures), 1)


def clock(seconds: float) -> str:
    """Hours, minutes, seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def figures_table(before: Figures, after: Figures) -> str:
    """A line for each layer: before and after training."""
    names = ("divergence", "kept", "overlap")
    width = max(map(len, ["layer", *after]))
    heads = "".join(f"{title:>20}" for title in ("KL of attention", "kept mass", "overlap"))
    lines = [f"{'layer':{width}}{heads}"]
    rows: Figures = {**after, "mean": {name: mean(after, name) for name in names}}
    begun: Figures = {**before, "mean": {name: mean(before, name) for name in names}}
    for layer, own in rows.items():
        cells = []
        for name in names:
            old = begun.get(layer, {}).get(name)
            was = "" if old is None else f"{old:.4f} > "
            cells.append(f"{was}{own[name]:.4f}")
        lines.append(f"{layer:{width}}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def outlook(trainer: ScorerTrainer) -> str | None:
    """What as long a run again would bring, by the slope of the loss; None of a short run."""
    now = trainer.progress
    losses = now.losses[now.first :]
    fall = slope(losses)
    if fall is None:
        return None
    last = sum(losses[-max(len(losses) // 10, 1) :]) / max(len(losses) // 10, 1)
    change = f"{abs(fall):.5f} {'less' if fall > 0 else 'more'}"
    return (
        f"another {clock(now.seconds)} would bring about {change} dropped mass, from {last:.5f}. "
        "This is an extrapolation, not a measurement: a straight line through the loss over the "
        "logarithm of the step, second half. The learning rate falls in it, which flatters."
    )


def write_card(folder: Path, card: Mapping[str, Any], model: str) -> None:
    """`card.json` and a README that says how to load, beside the scorers."""
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    imports, loader = LOADERS[model == "smollm2"]
    text = LOAD.format(imports=imports, model=loader.format(model), scorers=folder)
    (folder / "README.md").write_text(text)


def layers_of(figures: Figures, digits: int = 5) -> dict[str, dict[str, float]]:
    """Figures as a card has them."""
    return {
        layer: {name: round(x, digits) for name, x in own.items()} for layer, own in figures.items()
    }


def first_lines(items: Sequence[str], most: int = 3) -> str:
    """A few of many names."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest
