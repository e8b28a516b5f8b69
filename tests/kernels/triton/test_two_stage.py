"""Ranking in two steps: kernels against the PyTorch path, and both against ranking every unit."""

import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import mm_sparse as mms
from mm_sparse import FineScorer, Scores, TokenLayout
from mm_sparse.kernels.triton import topk as select_kernels
from mm_sparse.kernels.triton.topk import topk_blocks
from mm_sparse.kernels.triton.two_stage_scores import share_of_runs
from mm_sparse.scorers.two_stage import describe_runs, plan_of_runs
from mm_sparse.selection.scores import Runs
from mm_sparse.selection.selection import select
from tests.kernels.triton.test_scores_and_topk import LONG, scorers_of
from tests.support.layouts import FEW, batches, configs, layout_of, random_qk, small_config

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def all_scorers(q: Tensor, k: Tensor) -> list[mms.Scorer]:
    """Also one that sees parts of units."""
    fine = FineScorer(num_query_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[-1])
    generator = torch.Generator().manual_seed(1)
    for parameter in fine.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return [*scorers_of(q, k), fine.to(q.device)]


def of_visible(scores: Scores) -> Tensor:
    """(B, K, T, C) bool: candidates that their tile sees."""
    plan, runs = scores.plan, scores.runs
    ids = runs.units(plan.units.shape[1])
    seen = torch.nn.functional.pad(plan.visible, (0, 1))[:, None]
    return seen.expand(-1, ids.shape[1], -1, -1).gather(-1, ids)


@torch.no_grad()
def both(
    scorer: mms.Scorer, layout: TokenLayout, q: Tensor, k: Tensor, config: mms.SparseConfig
) -> tuple[Scores, Scores]:
    """Scores by PyTorch and by the kernels."""
    return tuple(
        scorer(q, k, layout=layout, config=replace(config, backend=backend))
        for backend in ("torch", "triton")
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*LONG, "padded-left", "short-segments"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "reduce", "causal", "coarse"),
    [
        (1, 1, "max", True, 2),
        pytest.param(8, 1, "mean", False, 4, marks=pytest.mark.slow),
        pytest.param(6, 2, "max", False, 8, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_scores_and_lists_equal_the_law(
    name: str, heads: int, kv_heads: int, reduce: str, causal: bool, coarse: int, device: str
) -> None:
    layout = TokenLayout.from_rows([LONG[name]]) if name in LONG else layout_of(name)
    q, k = (x.to(device) for x in random_qk(layout, heads, kv_heads))
    config = small_config(
        unit=16, ratio=0.1, reduce=reduce, causal=causal, coarse_factor=coarse, coarse_budget=2.0
    )
    layout = layout.to(device)
    for scorer in all_scorers(q, k):
        law, fast = both(scorer, layout, q, k, config)
        assert torch.equal(law.runs.index, fast.runs.index)
        assert torch.equal(law.runs.count, fast.runs.count)
        seen = of_visible(law)
        torch.testing.assert_close(fast.values[seen], law.values[seen], rtol=1e-4, atol=1e-4)
        lists = [select(s, layout, s.plan.config).check() for s in (law, fast)]
        assert torch.equal(lists[0].index, lists[1].index)
        assert torch.equal(lists[0].count, lists[1].count)


@pytest.mark.parametrize("device", DEVICES)
def test_scores_in_half_precision_are_as_near_as_pytorchs(device: str) -> None:
    """One query pool and one head: shares among candidates are shares among all, to one again."""
    layout = TokenLayout.from_rows([LONG["documents"]]).to(device)
    q, k = (x.to(device, torch.float16) for x in random_qk(layout.to("cpu"), 2, 2))
    config = small_config(unit=16, ratio=0.1, query_pools=1, coarse_factor=2, coarse_budget=2.0)
    whole = replace(config, coarse_factor=1, backend="torch")
    exact = no_grad(mms.PooledScorer(), q.double(), k.double(), layout, whole).values
    errors = []
    for scores in both(mms.PooledScorer(), layout, q, k, config):
        seen = of_visible(scores)
        ids = scores.runs.units(exact.shape[-1])
        want = torch.nn.functional.pad(exact, (0, 1)).gather(-1, ids)
        want = want.masked_fill(~seen, -math.inf).log_softmax(-1)
        errors.append((scores.values - want)[seen].abs().max())
    assert errors[1] <= 2 * errors[0] + 2**-10


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("unit", [16, 64])
def test_with_all_runs_it_is_ranking_every_unit(unit: int, device: str) -> None:
    layout = TokenLayout.from_rows([LONG["documents"]]).to(device)
    q, k = (x.to(device) for x in random_qk(layout.to("cpu"), 6, 2))
    backend = "torch" if device == "cpu" else "triton"
    config = small_config(unit=unit, ratio=0.3, backend=backend)
    for scorer in all_scorers(q, k):
        want, found = (
            mms.select(both_steps, layout, both_steps.plan.config)
            for both_steps in (
                no_grad(scorer, q, k, layout, config),
                no_grad(
                    scorer, q, k, layout, replace(config, coarse_factor=2, coarse_budget=100.0)
                ),
            )
        )
        assert torch.equal(found.index, want.index)


@torch.no_grad()
def no_grad(
    scorer: mms.Scorer, q: Tensor, k: Tensor, layout: TokenLayout, config: mms.SparseConfig
) -> Scores:
    return scorer(q, k, layout=layout, config=config)


@FEW
@given(
    batch=batches(),
    config=configs(top_p=None, modality_floor=0.0, unit=16),
    coarse=st.sampled_from([2, 4, 16]),
    budget=st.floats(1, 4),
    seed=st.integers(0, 99),
)
def test_what_is_kept_comes_from_runs_with_all_that_is_always_kept(
    batch, config: mms.SparseConfig, coarse: int, budget: float, seed: int
) -> None:
    rows, side = batch
    layout = TokenLayout.from_rows(rows, padding_side=side)
    config = replace(config, coarse_factor=coarse, coarse_budget=budget)
    q, k = random_qk(layout, 2, 2, seed=seed)
    scores = no_grad(mms.PooledScorer(), q, k, layout, config)
    plan, runs = scores.plan, scores.runs
    num_units = plan.units.shape[1]
    if not plan.tiles.shape[1] or not num_units:
        return
    among = runs.among(num_units)
    assert not (plan.always[:, None] & ~among).any()
    chosen = select(scores, layout, config).check()
    kept = torch.zeros_like(among)
    listed = torch.arange(chosen.index.shape[-1]) < chosen.count[..., None]
    kept = torch.nn.functional.pad(kept, (0, 1))
    kept.scatter_(-1, torch.where(listed, chosen.index, num_units).long(), True)
    kept = kept[..., :num_units]
    assert not (kept & ~among).any()
    assert not (kept & ~plan.visible[:, None]).any()
    assert (kept | ~plan.always[:, None]).all()
    live = plan.visible.any(-1)[:, None].expand_as(chosen.count)
    assert torch.equal(chosen.count > 0, live)
    # Budgets hold as they do for `select` among all: to the nearest unit.
    size = plan.units[:, None, None, :, 1]
    most = plan.head_budget.maximum((plan.always * plan.units[:, None, :, 1]).sum(-1)[:, None])
    assert ((kept * size).sum(-1) <= most + 16).all()


def test_runs_are_described_by_the_mean_of_their_keys() -> None:
    for name in ("documents", "text"):
        layout = TokenLayout.from_rows([LONG[name]])
        _, k = random_qk(layout, 2, 2)
        plan = layout.plan(
            small_config(unit=16, coarse_factor=4), num_query_heads=2, num_kv_heads=2
        )
        unit = torch.stack([k[0, :, a : a + n].mean(1) for a, n in plan.units[0].tolist()], 1)[None]
        found, over = describe_runs(unit, plan), plan_of_runs(plan)
        assert over.unit == 64
        assert found.shape[2] == over.units.shape[1] == -(-plan.units.shape[1] // 4)
        for r in range(found.shape[2]):
            own = plan.units[0, 4 * r : 4 * r + 4].tolist()
            keys = torch.cat([k[0, :, a : a + n] for a, n in own], 1)
            torch.testing.assert_close(found[0, :, r], keys.mean(1))
            assert over.units[0, r].tolist() == [own[0][0], sum(own[-1]) - own[0][0]]


def test_candidates_of_long_rows_equal_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = TokenLayout.from_rows([LONG["documents"]])
    q, k = random_qk(layout, 2, 2)
    config = small_config(unit=16, ratio=0.1, coarse_factor=2, coarse_budget=2.0, backend="torch")
    scores = no_grad(mms.PooledScorer(), q, k, layout, config)
    plan, runs = scores.plan, scores.runs
    want = select(scores, layout, config)
    # What stands for no unit may hold anything.
    nothing = runs.units(plan.units.shape[1]) == plan.units.shape[1]
    values = scores.values.masked_fill(nothing, math.nan)
    for registers in (1 << 14, 1):
        monkeypatch.setattr(select_kernels, "IN_REGISTERS", registers)
        monkeypatch.setattr(select_kernels, "CHUNK", 4)
        index, count, _ = topk_blocks(
            values, plan.window_span, plan.sink_units, plan.tile_span, plan.units, plan.head_budget,
            plan.max_kept, unit=16, runs=(runs.index, runs.count, runs.size),
        )  # fmt: skip
        assert torch.equal(index, want.index)
        assert torch.equal(count, want.count)


@torch.no_grad()
def test_a_list_without_runs_gets_no_scores() -> None:
    layout = TokenLayout.text(1, 256)
    q, k = random_qk(layout, 1, 1)
    plan = layout.plan(small_config(unit=16, coarse_factor=2), num_query_heads=1, num_kv_heads=1)
    tiles = plan.tiles.shape[1]
    index = torch.full((1, 1, tiles, 3), -1, dtype=torch.int32)
    runs = Runs(index, torch.zeros(1, 1, tiles, dtype=torch.int32), 2)
    rows = q.unflatten(2, (tiles, -1))[:, :, :, :4].contiguous()
    keys = k.unflatten(2, (-1, 16)).mean(3)
    values = share_of_runs(
        rows, keys, torch.ones(1, tiles, 4, dtype=torch.bool), plan.tiles,
        plan.tile_span, plan.units,
        16, (runs.index, runs.count, 2),
    )  # fmt: skip
    assert values.shape == (1, 1, tiles, 6)


@pytest.mark.parametrize("device", DEVICES)
def test_attention_in_blocks_equals_attention_at_once(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = TokenLayout.text(1, 640, device=device)
    q, k = (x.to(device) for x in random_qk(layout.to("cpu"), 4, 2, dim=16))
    config = small_config(unit=16, ratio=0.3, coarse_factor=4, coarse_budget=1.0)
    want = mms.sparse_attention(q, k, k, layout=layout, config=config)
    flat = mms.sparse_attention(q, k, k, layout=layout, config=replace(config, coarse_factor=1))
    monkeypatch.setattr("mm_sparse.attention.query_chunks.MOST_SCORES", 100)
    found = mms.sparse_attention(q, k, k, layout=layout, config=config)
    torch.testing.assert_close(found, want)
    assert not torch.equal(want, flat)


def test_a_scorer_that_writes_its_own_score_ranks_every_unit() -> None:
    class Reversed(mms.PooledScorer):
        def score(self, *args) -> Tensor:
            return -super().score(*args)

    layout = TokenLayout.text(1, 320)
    q, k = random_qk(layout, 2, 2)
    config = small_config(unit=16, coarse_factor=4)
    scores = no_grad(Reversed(), q, k, layout, config)
    want = no_grad(mms.PooledScorer(), q, k, layout, replace(config, coarse_factor=1))
    assert scores.runs is None
    assert torch.equal(scores.values, -want.values)
    assert select(scores, layout, config).check().count.min() > 0


def test_training_ranks_every_unit() -> None:
    layout = TokenLayout.text(1, 320)
    q, k = random_qk(layout, 2, 2)
    config = small_config(unit=16, coarse_factor=4)
    scores = mms.RelevanceScorer(num_query_heads=2, num_kv_heads=2, head_dim=8)(
        q, k, layout=layout, config=config
    )
    assert scores.runs is None
    assert scores.values.shape[-1] == 20
    assert select(scores, layout, config).check().count.min() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coarse_factor": 3}, r"coarse_factor must be one of \(1, 2, 4, 8, 16, 32, 64\), got 3"),
        ({"coarse_factor": 2, "coarse_budget": 0.5}, "coarse_budget must be at least 1, got 0.5"),
        ({"coarse_factor": 2, "top_p": 0.9}, "coarse_factor must be 1 with top_p, got 2"),
        (
            {"coarse_factor": 2, "sample_ratio": 0.5},
            "coarse_factor must be 1 with sample_ratio, got 2",
        ),
        (
            {"coarse_factor": 2, "modality_floor": 0.1},
            "coarse_factor must be 1 with modality_floor, got 2",
        ),
    ],
)
def test_what_needs_all_units_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mms.SparseConfig(**fields)
    with pytest.raises(TypeError, match="coarse_budget must be a number"):
        mms.SparseConfig(coarse_budget="4")
