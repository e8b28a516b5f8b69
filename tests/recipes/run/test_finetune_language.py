"""A language model that learns on with sparse attention."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

import mm_sparse as mms
from mm_sparse.recipes.data.text_corpus import CorpusData
from mm_sparse.recipes.models.language import LoraConfig
from mm_sparse.recipes.run.finetune_language import FinetuneLM, main
from mm_sparse.recipes.training.optimizer import OptimizerConfig
from tests.support.tiny_recipes import SPARSE, TINY, TOKENS, tiny

PARTS = {"optimizer": OptimizerConfig(lr=3e-3, warmup=2)}


@pytest.fixture
def npz(tmp_path: Path) -> str:
    """Words that always come in the same order: something to learn."""
    row = np.arange(TOKENS * 12) % 7
    path = tmp_path / "corpus.npz"
    np.savez(
        path, **{"train": row, "validation/a": row[None, :TOKENS], "test/a": row[None, :TOKENS]}
    )
    return str(path)


def fit(module: FinetuneLM, path: str, steps: int = 8) -> L.Trainer:
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=CorpusData(path, TOKENS, length=steps))
    return trainer


@pytest.mark.parametrize("sparse", [SPARSE, None], ids=["sparse", "dense"])
def test_it_learns_sparse_and_dense(sparse, npz: str) -> None:
    torch.manual_seed(0)
    module = FinetuneLM(tiny(), sparse, **PARTS)
    ids = CorpusData(npz, TOKENS).kinds("test")["a"]
    with torch.no_grad():
        before = module.losses(ids).mean().item()
    trainer = fit(module, npz, 20)
    with torch.no_grad():
        assert module.losses(ids).mean().item() < before - 0.5
    assert {"validation/loss", "validation/second_half"} <= set(trainer.logged_metrics)
    learned = [p for s in module.scorers.values() for p in s.parameters()]
    assert bool(learned) == (sparse is not None)
    assert all(p.any() for p in learned)


def test_adapters_and_scorers_learn_and_nothing_else(npz: str) -> None:
    module = FinetuneLM(tiny(), SPARSE, lora=LoraConfig(rank=2), **PARTS)
    before = {n: p.clone() for n, p in module.named_parameters()}
    fit(module, npz, 4)
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora_" in name or name.startswith("scorers.") for name in moved)
    assert any("lora_" in name for name in moved)
    assert any(name.startswith("scorers.") for name in moved)


def test_without_distillation_losses_scorers_stay(npz: str) -> None:
    module = FinetuneLM(tiny(), SPARSE, scorer_loss=0.0, **PARTS)
    fit(module, npz, 2)
    assert not any(p.any() for p in module.scorers.parameters())


def test_it_starts_from_scorers_and_writes_them(npz: str, tmp_path: Path) -> None:
    first = FinetuneLM(tiny(), SPARSE, out=str(tmp_path / "a"), **PARTS)
    fit(first, npz, 2)
    second = FinetuneLM(tiny(), scorers_from=str(tmp_path / "a"), **PARTS)
    assert mms.sparse_config(second.language) == SPARSE
    pairs = zip(first.scorers.parameters(), second.scorers.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_shipped_config_is_one_that_the_recipe_takes(
    npz: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    root = Path(__file__).parents[3]
    monkeypatch.setattr("sys.argv", ["tuning"])
    language = {"path": None, "options": TINY}
    cli = main(
        ["fit", "--config", str(root / "recipes/configs/finetune/smollm2.yaml"), "--data.path", npz,
         "--data.tokens", str(TOKENS), "--model.language", json.dumps(language),
         "--model.sparse", '{"ratio": 0.3, "tile": 64, "bidirectional": [], "dense_below": 0}',
         "--model.scorers_from", "null", "--model.out", "null", "--trainer.max_steps", "1",
         "--trainer.val_check_interval", "1", "--trainer.limit_val_batches", "1",
         "--trainer.logger", "false", "--trainer.accelerator", "cpu", "--data.length", "1",
         "--trainer.enable_checkpointing", "false"]
    )  # fmt: skip
    assert cli.trainer.global_step == 1
    assert len(cli.model.scorers) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scorer_loss": -1.0}, "scorer_loss must be at least 0, got -1.0"),
        ({"scorers_every": 0}, "scorers_every must be at least 1, got 0"),
        ({"scorer_tiles": 0}, "scorer_tiles must be at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneLM(tiny(), SPARSE, **given)
