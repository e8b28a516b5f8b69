"""What choosing costs: every part is timed, and FLOPs are counted as they are."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mm_sparse as mms
from mm_sparse.recipes.evaluation import scoring_cost
from mm_sparse.recipes.models.language import LanguageConfig
from tests.support.tiny_recipes import SPARSE, TINY, TOKENS, tiny, write_corpus


def model_of(scorer: str | None, sampled: float = 0.0) -> torch.nn.Module:
    model = tiny().build(0).eval().requires_grad_(False)
    return mms.sparsify(model, replace(SPARSE, sample_ratio=sampled), scorer=scorer)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_cost, "SECONDS", 1e-4)


@pytest.mark.parametrize("sampled", [0.0, 0.5])
def test_every_part_of_every_layer_is_timed(sampled: float) -> None:
    model = model_of("fine", sampled)
    ids = torch.randint(0, 40, (1, TOKENS))
    found = scoring_cost.costs(model, lambda: model.base_model(ids, use_cache=False))
    assert found["layers"] == 3
    assert [row["part"] for row in found["rows"]] == ["score and select", "attend", "dense sdpa"]
    assert all(row["ms"] > 0 for row in found["rows"])
    with pytest.raises(ValueError, match="model must run layers that may be sparse, got none"):
        scoring_cost.costs(model, lambda: None)


def test_flops_are_those_of_pieces_that_see_each_other() -> None:
    layout = mms.TokenLayout.text(1, 64)
    config = mms.SparseConfig(tile=64, unit=16, query_pools=2, causal=False)
    plan = layout.plan(config, num_query_heads=2, num_kv_heads=1)
    scorer = mms.FineScorer(num_query_heads=2, num_kv_heads=1, head_dim=8, parts=4)
    dense, products, maps = scoring_cost.flops_of(plan, scorer, (1, 2, 64, 8))
    tiles = plan.tiles.shape[1]
    assert dense == 4 * 8 * 2 * 64 * 64
    assert products == 2 * 8 * 2 * (tiles * 2) * (4 * 5)
    assert maps == 2 * 24 * 8 * (2 * tiles * 2 + 4 * 4)
    assert math.isnan(scoring_cost.flops_of(plan, mms.PooledScorer(), (1, 2, 64, 8))[1])


def test_the_command_writes_what_it_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mms.save_scorers(model_of("fine"), tmp_path / "scorers")
    original = LanguageConfig.build
    monkeypatch.setattr(
        LanguageConfig, "build", lambda self, size: original(LanguageConfig(options=TINY), size)
    )
    out = tmp_path / "cost.json"
    scoring_cost.main(
        ["language", "--scorers", str(tmp_path / "scorers"), "--corpus", write_corpus(tmp_path),
         "--tokens", str(TOKENS), "--out", str(out)]
    )  # fmt: skip
    record = json.loads(out.read_text())
    assert record["tokens"] == TOKENS
    assert record["flops_of_dense"]["products"] > 0
    assert len(record["rows"]) == 3
    with pytest.raises(SystemExit):
        scoring_cost.main(["piano"])
    assert "must be one of ('language', 'images', 'speech')" in capsys.readouterr().err
