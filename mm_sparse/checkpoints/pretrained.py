"""Trained scorers that come with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mm_sparse.checkpoints.hub import fetch_folder, is_hub_name

CHECKPOINTS = Path(__file__).parent / "weights"
CARD = "card.json"


def list_pretrained() -> list[str]:
    """Names that `load_scorers` takes."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob(f"*/{CARD}"))


def scorers_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder that is called so, or that of shipped scorers, or one fetched from the hub.

    Raises:
        ValueError: there is none of these.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if str(name) in list_pretrained():
        return CHECKPOINTS / str(name)
    if isinstance(name, str) and is_hub_name(name):
        return fetch_folder(name, revision)
    raise ValueError(
        f"folder must be one of save_scorers, among the shipped {list_pretrained()} or "
        f'a repository of the hub ("owner/name"), got {str(name)!r}'
    )


def read_card(name: str) -> dict[str, Any]:
    """What shipped scorers are for, what they learned from, and their figures."""
    if name not in list_pretrained():
        raise ValueError(f"name must be among {list_pretrained()}, got {name!r}")
    return json.loads((CHECKPOINTS / name / CARD).read_text())
