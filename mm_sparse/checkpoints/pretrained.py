"""Trained scorers that come with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHECKPOINTS = Path(__file__).parent / "weights"
CARD = "card.json"


def list_pretrained() -> list[str]:
    """Names that `load_scorers` takes."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob(f"*/{CARD}"))


def scorers_folder(name: str | Path) -> Path:
    """The folder that is called so, or that of shipped scorers.

    Raises:
        ValueError: there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if str(name) in list_pretrained():
        return CHECKPOINTS / str(name)
    raise ValueError(
        f"folder must be one of save_scorers or among the shipped {list_pretrained()}, got {name!r}"
    )


def read_card(name: str) -> dict[str, Any]:
    """What shipped scorers are for, what they learned from, and their figures."""
    if name not in list_pretrained():
        raise ValueError(f"name must be among {list_pretrained()}, got {name!r}")
    return json.loads((CHECKPOINTS / name / CARD).read_text())
