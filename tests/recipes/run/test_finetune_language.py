"""A language model that learns on with sparse attention."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import mm_sparse as mms
from mm_sparse.recipes.data.text_corpus import CorpusData
from mm_sparse.recipes.models.language import LoraConfig
from mm_sparse.recipes.run.finetune_language import FinetuneLM, main
from mm_sparse.recipes.run.settings_cli import SettingsError
from mm_sparse.recipes.training.optimizer import OptimizerConfig
from tests.support import language_run
from tests.support.tiny_recipes import SPARSE, TINY, TOKENS, tiny, write_corpus

ROOT = Path(__file__).resolve().parents[3]

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


def together(folder: Path, processes: int, *more: str) -> dict[str, dict]:
    """What processes have written of each case: losses, and figures of validation."""
    script = ROOT / "tests" / "support" / "language_run.py"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), str(processes), str(folder), *more], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}, capture_output=True,
        text=True, timeout=560,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: json.loads((folder / f"{name}-{processes}.json").read_text())
        for name in (language_run.RESUMED if more else language_run.CASES)
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_that_share_sequences_give_what_one_gives(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    alone = together(tmp_path, 1)
    both = together(tmp_path, 2)
    for name, found in both.items():
        wanted = alone[name]
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5), name
        assert found["validation"] == pytest.approx(wanted["validation"], rel=1e-5), name
        assert set(wanted["validation"]) == {"validation/loss", "validation/second_half"}
        assert wanted["losses"][0] != pytest.approx(wanted["losses"][-1], rel=1e-3)
        models = [
            AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-{n}").state_dict()
            for n in (1, 2)
        ]
        assert models[0].keys() == models[1].keys()
        for key, value in models[0].items():
            torch.testing.assert_close(models[1][key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert (tmp_path / "sharded-2.ckpt").is_dir()
    assert (tmp_path / "adapters-2" / "adapter" / "adapter_model.safetensors").is_file()
    # On more processes.
    resumed = together(tmp_path, 4, "--resume")
    whole = together(tmp_path, 1, "--resume")
    for name, found in resumed.items():
        assert found["losses"] == pytest.approx(
            whole[name]["losses"][language_run.STEPS :], rel=1e-5
        )


def test_a_strategy_beside_shared_sequences_is_refused(
    npz: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["tuning"])
    args = [
        "fit", "--seed_everything", "0", "--data.path", npz,
        "--model.language", json.dumps({"options": TINY}),
        "--sequence_parallel", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    with pytest.raises(SettingsError, match=r"trainer.strategy must be auto where sequence_paral"):
        main(args)
