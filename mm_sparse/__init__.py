"""Attention that computes only what matters, for transformers that read text, images and audio."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import patterns
    from .attention import attend, attention_reference, sparse_attention
    from .cache import DescriptorCache
    from .checkpoints import load_scorers, save_scorers
    from .config import SparseConfig
    from .fine import FineScorer
    from .layout import Modality, TokenLayout
    from .mass import unit_mass
    from .reporting import report
    from .retrofit import densify, sparse, sparsify
    from .scorers import PooledScorer, RelevanceScorer, Scorer, Scores
    from .selection import Selection, select

__version__ = "0.1.0"

__all__ = [
    "DescriptorCache",
    "FineScorer",
    "Modality",
    "PooledScorer",
    "RelevanceScorer",
    "Scorer",
    "Scores",
    "Selection",
    "SparseConfig",
    "TokenLayout",
    "attend",
    "attention_reference",
    "densify",
    "load_scorers",
    "patterns",
    "report",
    "save_scorers",
    "select",
    "sparse",
    "sparse_attention",
    "sparsify",
    "unit_mass",
]

# In a clone kernels/, encoders/ and recipes/ stand beside this folder, installed they are inside.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))

_HOME = {
    "Modality": "layout",
    "TokenLayout": "layout",
    "SparseConfig": "config",
    "DescriptorCache": "cache",
    "PooledScorer": "scorers",
    "RelevanceScorer": "scorers",
    "Scorer": "scorers",
    "Scores": "scorers",
    "unit_mass": "mass",
    "FineScorer": "fine",
    "Selection": "selection",
    "select": "selection",
    "attend": "attention",
    "attention_reference": "attention",
    "sparse_attention": "attention",
    "densify": "retrofit",
    "load_scorers": "checkpoints",
    "save_scorers": "checkpoints",
    "sparse": "retrofit",
    "sparsify": "retrofit",
    "report": "reporting",
}


def __getattr__(name: str) -> Any:
    if name == "patterns":
        return import_module(".patterns", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
