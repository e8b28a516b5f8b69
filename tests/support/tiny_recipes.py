"""A language model, a corpus and a recipe small enough for tests."""

from pathlib import Path

import numpy as np
import torch

import mm_sparse as mms
from mm_sparse.recipes.distillation.language import Distill
from mm_sparse.recipes.models.language import LanguageConfig
from mm_sparse.recipes.training.optimizer import OptimizerConfig

SPARSE = mms.SparseConfig(
    ratio=0.3, tile=64, unit=16, sinks=16, window=16, query_pools=2, bidirectional=(), dense_below=0
)
TINY = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
TOKENS = 320


def tiny() -> LanguageConfig:
    return LanguageConfig(options=TINY)


def write_corpus(folder: Path) -> str:
    """A file as text_corpus makes it; words come back later, so attention can find them."""
    generator = np.random.default_rng(0)
    row = np.concatenate([np.tile(generator.integers(0, 40, 50), 4) for _ in range(40)])
    rows = np.stack([row[i * 400 : i * 400 + TOKENS] for i in range(4)])
    path = folder / "corpus.npz"
    np.savez(path, **{"train": row, "validation/a": rows[:2], "test/a": rows[2:]})
    return str(path)


def make(**options) -> Distill:
    torch.manual_seed(0)
    module = Distill(tiny(), SPARSE, optimizer=OptimizerConfig(lr=3e-3, warmup=2), **options)
    sharpen(module.language)
    return module


def sharpen(model: torch.nn.Module) -> None:
    """Fresh weights attend to everything alike; these do not."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(12)


def mean(found: dict[str, dict[str, float]]) -> dict[str, float]:
    return {k: sum(f[k] for f in found.values()) / len(found) for k in next(iter(found.values()))}
