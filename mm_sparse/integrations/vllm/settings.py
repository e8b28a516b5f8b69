"""What an engine is told: where scorers are, and what layers keep."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mm_sparse.checkpoints import StoredScorers, read_scorers, scorers_folder
from mm_sparse.config import SparseConfig

FOLDER = "MM_SPARSE_SCORERS"
"""Environment variable: a folder of `save_scorers`, or the name of scorers that ship."""
SECTION = "mm_sparse"
"""Key of the engine's `additional_config`."""
_KEYS = {"scorers", "ratio", "config"}


@dataclass(frozen=True)
class ServingSettings:
    """Scorers and budgets of an engine."""

    stored: StoredScorers | None
    """None: all layers rank by the score without training."""
    config: SparseConfig


def serving_settings(additional: Any) -> ServingSettings:
    """Scorers and config, of the engine's `additional_config` or of the environment.

    Args:
        additional: {"mm_sparse": {"scorers": folder, "ratio": share of the keys, "config": fields
            of `SparseConfig` that differ}}, each of them optional; `MM_SPARSE_SCORERS` names the
            folder where it does not.
    Raises:
        ValueError: neither a folder nor anything else is given, or a key is unknown.
        TypeError: the section is no mapping.
    """
    section = additional.get(SECTION, {}) if isinstance(additional, Mapping) else {}
    if not isinstance(section, Mapping):
        raise TypeError(f"additional_config[{SECTION!r}] must be a mapping, got {section!r}")
    unknown = sorted(set(section) - _KEYS)
    if unknown:
        raise ValueError(
            f"additional_config[{SECTION!r}] must hold {sorted(_KEYS)}, got also {unknown}"
        )
    folder = section.get("scorers") or os.environ.get(FOLDER)
    if not folder and not section:
        raise ValueError(
            f"the backend needs scorers: set {FOLDER} to a folder of save_scorers, or "
            f"additional_config to {{{SECTION!r}: {{'scorers': folder}}}}; without trained ones, "
            f"{{{SECTION!r}: {{'ratio': 0.2}}}}"
        )
    stored = _read(str(scorers_folder(folder))) if folder else None
    config = SparseConfig.preset("text") if stored is None else stored.config
    ratio = section.get("ratio")
    if ratio is not None:
        config = config.scaled(ratio)
    # Which tokens see each other is the engine's to say: to it all is causal.
    config = replace(config, **{"bidirectional": (), **section.get("config", {})})
    return ServingSettings(stored, config)


@lru_cache(maxsize=4)
def _read(folder: str) -> StoredScorers:
    return read_scorers(Path(folder))
