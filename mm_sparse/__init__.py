"""Attention that computes only what matters, for transformers that read text, images and audio."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm_sparse.analysis.layer_report import report
    from mm_sparse.attention.functional import attention_reference, sparse_attention
    from mm_sparse.attention.selected import attend
    from mm_sparse.checkpoints.api import load_scorers, save_scorers
    from mm_sparse.config import SparseConfig
    from mm_sparse.integrations.patching import densify, sparse, sparsify
    from mm_sparse.layout.token_layout import Modality, TokenLayout
    from mm_sparse.scorers import patterns
    from mm_sparse.scorers.attention_mass import unit_mass
    from mm_sparse.scorers.base import Scorer
    from mm_sparse.scorers.descriptor_cache import DescriptorCache
    from mm_sparse.scorers.fine import FineScorer
    from mm_sparse.scorers.pooled import PooledScorer
    from mm_sparse.scorers.relevance import RelevanceScorer
    from mm_sparse.selection.scores import Scores
    from mm_sparse.selection.selection import Selection, select

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
    "Modality": "layout.token_layout",
    "TokenLayout": "layout.token_layout",
    "SparseConfig": "config",
    "DescriptorCache": "scorers.descriptor_cache",
    "PooledScorer": "scorers.pooled",
    "RelevanceScorer": "scorers.pooled",
    "Scorer": "scorers.pooled",
    "Scores": "scorers.pooled",
    "unit_mass": "scorers.attention_mass",
    "FineScorer": "scorers.fine",
    "Selection": "selection.selection",
    "select": "selection.selection",
    "attend": "attention.functional",
    "attention_reference": "attention.functional",
    "sparse_attention": "attention.functional",
    "densify": "integrations.patching",
    "load_scorers": "checkpoints.api",
    "save_scorers": "checkpoints.api",
    "sparse": "integrations.patching",
    "sparsify": "integrations.patching",
    "report": "analysis.layer_report",
}


def __getattr__(name: str) -> Any:
    if name == "patterns":
        return import_module(".scorers.patterns", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
