"""The kernels that score and select, against the PyTorch path that is their law."""

import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import mm_sparse as mms
from mm_sparse import Modality, PooledScorer, RelevanceScorer, TokenLayout
from mm_sparse.kernels.triton import block_scores as score_kernels, topk as select_kernels
from mm_sparse.kernels.triton.pooling import pool, pool_both
from mm_sparse.kernels.triton.topk import topk_blocks
from mm_sparse.layout.plan import Plan
from mm_sparse.selection.selection import select
from mm_sparse.selection.topk import MOST_UNITS
from tests.support.layouts import (
    IDS,
    MIXED,
    batches,
    configs,
    layout_of,
    random_qk,
    small_config as small,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FEW = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def scorers_of(q: Tensor, k: Tensor) -> list[mms.Scorer]:
    """The training-free one, and a learned one whose every parameter matters."""
    learned = RelevanceScorer(
        num_query_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[-1], rank=8
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in learned.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return [PooledScorer(), learned.to(q.device)]


def both_ways(
    scorer: mms.Scorer, q: Tensor, k: Tensor, layout: TokenLayout, config: mms.SparseConfig
) -> tuple[Tensor, mms.Scores]:
    """Scores in float64 on the CPU by PyTorch, which autograd asks for, and by the kernels."""
    with torch.no_grad():
        scores = scorer(q, k, layout=layout, config=config)
    law = layout.to("cpu") if q.device.type != "cpu" else layout
    exact = scorer.to("cpu", torch.float64)(
        q.cpu().double(), k.cpu().double(), layout=law, config=replace(config, backend="torch")
    )
    scorer.to(q.device, torch.float32)
    return exact.values.detach().double(), scores


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "reduce"), [(1, 1, "max"), (8, 1, "mean"), (6, 2, "max")], ids=str
)
@pytest.mark.thinned(4)
def test_scores_equal_the_law(
    name: str, heads: int, kv_heads: int, reduce: str, device: str
) -> None:
    layout = layout_of(name).to(device)
    q, k = (x.to(device) for x in random_qk(layout_of(name), heads, kv_heads))
    for scorer in scorers_of(q, k):
        exact, scores = both_ways(scorer, q, k, layout, small(reduce=reduce, backend="triton"))
        seen = scores.plan.visible[:, None].expand_as(scores.values)
        torch.testing.assert_close(
            scores.values[seen].cpu().double(), exact[seen.cpu()], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("device", DEVICES)
def test_scores_in_half_precision_are_as_near_as_pytorchs(device: str) -> None:
    layout = layout_of("mixed").to(device)
    q, k = (x.to(device, torch.float16) for x in random_qk(layout_of("mixed"), 6, 2))
    for scorer in scorers_of(q, k):
        exact, scores = both_ways(scorer, q, k, layout, small(backend="triton"))
        with torch.no_grad():
            plain = scorer(q, k, layout=layout, config=small(backend="torch"))
        seen = scores.plan.visible[:, None].expand_as(exact)
        exact = exact.to(device)
        bound = 2 * (plain.values - exact)[seen].abs().max() + 2**-10
        assert (scores.values - exact)[seen].abs().max() <= bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_shares_of_next_to_nothing_rank_behind_all_others(reduce: str, device: str) -> None:
    """Kernels add up powers as they are: below 2^-126 of the attention they become zero."""
    cpu = layout_of("mixed")
    layout, (q, k) = cpu.to(device), (x.to(device) for x in random_qk(cpu, 6, 2))
    exact, scores = both_ways(
        PooledScorer(), q * 1000, k, layout, small(reduce=reduce, backend="triton")
    )
    seen = scores.plan.visible[:, None].expand_as(exact).cpu()
    found, exact = scores.values.cpu().double()[seen], exact[seen]
    counts, tiny = exact > -85, exact < -90
    assert counts.any()
    assert tiny.any()
    torch.testing.assert_close(found[counts], exact[counts], rtol=1e-4, atol=1e-3)
    assert found[tiny].max() < found[counts].min()


@pytest.mark.parametrize("device", DEVICES)
def test_bad_tokens_and_strided_inputs(device: str) -> None:
    layout = layout_of("mixed").to(device)
    q, k = (x.to(device) for x in random_qk(layout_of("mixed"), 3, 1))
    q[0, 0, 5], k[0, 0, 7] = float("nan"), float("inf")
    for x in (q, q.transpose(1, 2).contiguous().transpose(1, 2), q.mT.contiguous().mT):
        exact, scores = both_ways(PooledScorer(), x, k, layout, small(backend="triton"))
        seen = scores.plan.visible[:, None].expand_as(exact)
        assert scores.values[seen].isfinite().all()
        torch.testing.assert_close(
            scores.values[seen].cpu().double(), exact[seen.cpu()], rtol=1e-4, atol=1e-4
        )


LONG = {
    "text": [("text", 640)],
    "short last unit": [("text", 650)],
    "class token": [("text", 1), ("image", (23, 27))],
    "documents": [("text", 200, 0), ("text", 21, 1), ("image", (11, 13), 1), ("text", 190, 2)],
    "hole": [("text", 300), ("pad", 40), ("audio", 90), ("text", 170)],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize(
    ("heads", "reduce"),
    [(1, "mean"), (2, "max"), pytest.param(6, "mean", marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.thinned(4)
def test_scores_over_many_blocks_equal_the_law(
    heads: int, reduce: str, name: str, causal: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that all, some or none of the tiles see, in chunks of two blocks."""

    def small_blocks(tile_rows: int, *_):
        return score_kernels.row_order(tile_rows, max(16, tile_rows)), 16, 2

    def small_chunks(blocks: int, num_units: int, cols: int, _: int) -> tuple[int, int]:
        return -(-num_units // (2 * cols)), 2 * cols

    monkeypatch.setattr(score_kernels, "share_blocks", small_blocks)
    monkeypatch.setattr(score_kernels, "unit_chunks", small_chunks)
    cpu = TokenLayout.from_rows([LONG[name]])
    layout, (q, k) = cpu.to(device), (x.to(device) for x in random_qk(cpu, heads, 1))
    config = small(reduce=reduce, backend="triton", unit=16, causal=causal)
    for scorer in scorers_of(q, k):
        exact, scores = both_ways(scorer, q, k, layout, config)
        leads = {"text": 0, "short last unit": 0, "class token": 15}
        assert scores.plan.unit_offset == leads.get(name, -1)
        seen = scores.plan.visible[:, None].expand_as(scores.values)
        torch.testing.assert_close(
            scores.values[seen].cpu().double(), exact[seen.cpu()], rtol=1e-4, atol=1e-4
        )
        assert (scores.values[~seen] < -1e29).all()


@pytest.mark.parametrize("tile_rows", [1, 2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("rows", [16, 64, 128])
def test_row_order_has_every_row(rows: int, tile_rows: int) -> None:
    outer, high, pair, low, lanes = score_kernels.row_order(tile_rows, rows)
    assert outer * pair * lanes == tile_rows
    assert high * low == max(rows // tile_rows, 1)


@pytest.mark.parametrize(
    ("blocks", "units"), [(1, 1), (1, 100), (64, 1024), (256, 4096), (9999, 4097)], ids=str
)
def test_chunks_cover_all_units(blocks: int, units: int) -> None:
    splits, chunk = score_kernels.unit_chunks(blocks, units, 64, 396)
    assert chunk % 64 == 0
    assert (splits - 1) * chunk < units <= splits * chunk


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("regular", [True, False], ids=["regular", "ragged"])
@pytest.mark.parametrize(
    ("size", "parts", "dim"),
    [(16, 1, 8), (16, 4, 80), (50, 4, 8), (128, 1, 16), (3, 3, 5)],
    ids=str,
)
def test_pools_are_means_and_extremes(
    size: int, parts: int, dim: int, regular: bool, device: str
) -> None:
    pieces, batch, heads = 37, 2, 3
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, heads, pieces * size, dim, generator=generator)
    x[0, 0, 1, 2], x[1, 1, 3, 0] = float("nan"), -float("inf")
    lengths = torch.full((batch, pieces), size)
    if not regular:
        lengths = torch.randint(0, size + 1, (batch, pieces), generator=generator)
    table = torch.stack([torch.arange(pieces).expand(batch, -1) * size, lengths], -1).int()
    found = pool(x.to(device), table.to(device), size, parts, extremes=True, regular=regular)
    finite = torch.where(x.isfinite(), x, 0.0)
    width = -(-size // parts)
    for b in range(batch):
        for p in range(pieces):
            start, end = int(table[b, p, 0]), int(table[b, p].sum())
            for i in range(parts):
                part = finite[b, :, min(start + i * width, end) : min(start + (i + 1) * width, end)]
                want = torch.zeros(3, heads, dim)
                if part.shape[1]:
                    want = torch.stack([part.mean(1), part.amax(1), part.amin(1)])
                torch.testing.assert_close(
                    found[b, :, p, i].unflatten(-1, (3, dim)).transpose(0, 1).cpu(), want
                )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["text", "documents", "hole"])
@pytest.mark.parametrize(("heads", "dim", "query_pools"), [(1, 8, 4), (6, 80, 3)], ids=str)
@pytest.mark.thinned(4)
def test_pools_of_tiles_and_units_in_one_launch_are_those_of_two(
    heads: int, dim: int, query_pools: int, name: str, device: str
) -> None:
    cpu = TokenLayout.from_rows([LONG[name], LONG["documents"]])
    layout, (q, k) = cpu.to(device), (x.to(device) for x in random_qk(cpu, heads, 1, dim))
    for unit in (16, 64):
        config = small(unit=unit, query_pools=query_pools)
        plan = layout.plan(config, num_query_heads=heads, num_kv_heads=1)
        regular = {"regular_tiles": plan.regular_tiles, "regular": plan.regular}
        tile, keys = pool_both(
            q, k, plan.tiles, plan.units, plan.tile_tokens, unit, query_pools, 0.5, **regular
        )
        assert torch.equal(tile, pool(q, plan.tiles, plan.tile_tokens, query_pools, scale=0.5))
        assert torch.equal(keys, pool(k, plan.units, unit).squeeze(3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "reduce"), [("hole", "mean"), ("padded-left", "max")])
def test_true_mass_equals_the_law(name: str, reduce: str, device: str) -> None:
    layout = layout_of(name)
    q, k = random_qk(layout, 6, 2)
    law = layout.plan(small(reduce=reduce, backend="torch"), num_query_heads=6, num_kv_heads=2)
    config = small(reduce=reduce, backend="triton")
    plan = layout.to(device).plan(config, num_query_heads=6, num_kv_heads=2)
    mass = mms.unit_mass(q.to(device), k.to(device), plan)
    torch.testing.assert_close(mass.cpu(), mms.unit_mass(q, k, law), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("dim", [8, 80])
@pytest.mark.parametrize(("name", "causal"), [("documents", True), ("hole", False)])
@pytest.mark.thinned(4)
def test_true_mass_of_drawn_tiles_equals_the_law(
    name: str, causal: bool, dim: int, group: int, device: str
) -> None:
    cpu = TokenLayout.from_rows([LONG[name], LONG["documents"]])
    q, k = random_qk(cpu, 2 * group, 2, dim)
    heads = {"num_query_heads": 2 * group, "num_kv_heads": 2}
    law = cpu.plan(small(causal=causal, backend="torch"), **heads)
    plan = cpu.to(device).plan(small(causal=causal, backend="triton"), **heads)
    # In any order, and a tile may be drawn twice.
    index = torch.tensor([[3, 0, 1, 3], [2, 2, 1, 0]])
    mass = mms.unit_mass(q.to(device), k.to(device), plan.of_tiles(index.to(device)))
    exact = mms.unit_mass(q.double(), k.double(), law)
    exact = exact.gather(2, index[:, None, :, None].expand(-1, 2, -1, exact.shape[-1]))
    torch.testing.assert_close(mass.cpu(), exact.float(), rtol=1e-4, atol=1e-6)


def of_plan(plan: Plan) -> tuple[Any, ...]:
    """What `topk_blocks` wants of a plan."""
    return (
        plan.window_span,
        plan.sink_units,
        plan.tile_span,
        plan.units,
        plan.head_budget,
        plan.max_kept,
    )


def assert_same_lists(values: Tensor, plan: Plan, config: mms.SparseConfig) -> None:
    """Kernel and PyTorch keep the same where no two scores tie."""
    heads = values.shape[1]
    law = select(
        values, plan.layout, replace(config, backend="torch"), num_query_heads=heads * plan.group
    )
    floors = config.floors()
    for lead in {-1, plan.unit_offset}:
        index, count, _ = topk_blocks(
            values, *of_plan(plan), unit=plan.unit, lead=lead, num_keys=plan.layout.length,
            unit_kind=plan.unit_modality,
            floors=torch.tensor([floors.get(m, 0.0) for m in Modality]) if floors else None,
        )  # fmt: skip
        assert torch.equal(count, law.count)
        assert torch.equal(index, law.index)


def ranked(batch, config: mms.SparseConfig, seed: int) -> tuple[Tensor, Plan] | None:
    """Scores of two heads without ties, and a plan in which each head has its own budget."""
    rows, side = batch
    layout = TokenLayout.from_rows(rows, padding_side=side)
    config = replace(config, head_ratio=(config.ratio, 0.4), query_ratio={"IMAGE": (0.7, 0.05)})
    plan = layout.plan(config, num_query_heads=2, num_kv_heads=2)
    if not plan.max_kept or not plan.tiles.shape[1]:
        return None
    shape = (layout.batch, 2, plan.tiles.shape[1], plan.units.shape[1])
    order = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).argsort(-1).float()
    return order - shape[-1] / 2, plan


def test_budgets_may_lie_in_any_order() -> None:
    made = ranked(
        ([[("text", 1), ("pad", 1), ("text", 1)]], "left"), small(ratio=1.0, causal=False), 0
    )
    assert made is not None
    values, plan = made
    given = [*of_plan(plan)]
    given[4] = given[4].mT.contiguous().mT
    assert not given[4].is_contiguous()
    sizes = {"unit": plan.unit, "lead": -1, "num_keys": plan.layout.length}
    _, count, _ = topk_blocks(values, *given, **sizes, unit_kind=plan.unit_modality, floors=None)
    want = topk_blocks(values, *of_plan(plan), **sizes, unit_kind=plan.unit_modality, floors=None)
    assert torch.equal(count, want[1])


@FEW
@given(batch=batches(), config=configs(top_p=None), seed=st.integers(0, 99))
def test_selections_equal_the_law(batch, config: mms.SparseConfig, seed: int) -> None:
    if (made := ranked(batch, config, seed)) is not None:
        assert_same_lists(*made, made[1].config)


@FEW
@given(batch=batches(), config=configs(top_p=None, modality_floor=0.0), seed=st.integers(0, 99))
@pytest.mark.slow
def test_selections_of_long_rows_equal_the_law(batch, config: mms.SparseConfig, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_kernels, "IN_REGISTERS", 1)
        patch.setattr(select_kernels, "CHUNK", 4)
        if (made := ranked(batch, config, seed)) is not None:
            assert_same_lists(*made, made[1].config)


@pytest.mark.parametrize(
    ("length", "prefix"),
    [
        (640, 0),
        (257, 1),
        (257, 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(645, 0), (643, 1), (640, 11), (513, 1)]
        ),
    ],
)
@pytest.mark.thinned(4)
def test_even_rows_equal_the_law_whatever_the_scores(length: int, prefix: int) -> None:
    """Log shares as scorers give them, -1e30 where nothing is seen, and few distinct ones."""
    row = [("text", prefix), ("image", length - prefix)] if prefix else [("text", length)]
    layout = TokenLayout.from_rows([row])
    for ratio in (0.13, 0.6):
        config = small(unit=16, ratio=ratio)
        plan = layout.plan(config, num_query_heads=1, num_kv_heads=1)
        assert plan.unit_offset == -prefix % 16
        generator = torch.Generator().manual_seed(0)
        shape = (1, 1, plan.tiles.shape[1], plan.units.shape[1])
        values = torch.randn(shape, generator=generator) * 3 - 8
        values = values.masked_fill(~plan.visible[:, None], -1e30)
        assert_same_lists(values, plan, config)
        assert_same_lists(values * 1e30, plan, config)
        args = of_plan(plan)
        few = values.round()
        tied = topk_blocks(few, *args, unit=16, lead=plan.unit_offset, num_keys=length)
        # The law's own ties go anywhere: make them go to the lowest id.
        unit = torch.arange(shape[-1]) * 1e-3
        law = select(few - unit, layout, replace(config, backend="torch"))
        assert torch.equal(tied[1], law.count)
        assert torch.equal(tied[0], law.index)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(select_kernels, "IN_REGISTERS", 1)
            patch.setattr(select_kernels, "CHUNK", 32)
            for lead in (plan.unit_offset, -1):
                long = topk_blocks(few, *args, unit=16, lead=lead, num_keys=length)
                assert torch.equal(tied[0], long[0])
                assert torch.equal(tied[1], long[1])


@pytest.mark.parametrize(
    ("length", "prefix"), [(257, 1), pytest.param(513, 0, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("changes", [{"sample_ratio": 0.5}, {"modality_floor": 0.3}], ids=str)
def test_the_unit_behind_the_block_counts_like_others(
    length: int, prefix: int, changes: dict
) -> None:
    """17 and 33 units, in rows that are longer than these, NaN behind."""
    row = [("text", prefix), ("image", length - prefix)] if prefix else [("text", length)]
    layout = TokenLayout.from_rows([row, row])
    config = small(unit=16, ratio=0.4, **changes)
    plan = layout.plan(config, num_query_heads=2, num_kv_heads=2)
    units = plan.units.shape[1]
    last = 0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        size = (2, 2, plan.tiles.shape[1], units)
        order = torch.rand(size, generator=generator).argsort(-1).float()
        values = torch.full((*size[:3], units + 15), math.nan)[..., :units].copy_(order)
        found = select(values, layout, replace(config, backend="triton"), num_query_heads=2)
        law = select(order, layout, replace(config, backend="torch"), num_query_heads=2)
        assert torch.equal(found.index, law.index)
        assert torch.equal(found.count, law.count)
        last += int((found.index == units - 1).sum())
        if law.sample is not None:
            for name in ("index", "count", "best_index", "best_count"):
                assert torch.equal(getattr(found.sample, name), getattr(law.sample, name)), name
            torch.testing.assert_close(found.sample.weight, law.sample.weight)
    assert last > 0


def test_long_rows_refuse_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_kernels.IN_REGISTERS + 1 == MOST_UNITS
    monkeypatch.setattr(select_kernels, "IN_REGISTERS", 8)
    layout = TokenLayout.from_spans(MIXED)
    plan = layout.plan(small(unit=16, modality_floor=0.25), num_query_heads=1, num_kv_heads=1)
    num_units = plan.units.shape[1]
    values = torch.zeros(1, 1, plan.tiles.shape[1], num_units)
    with pytest.raises(ValueError, match=f"units must be at most 9 with floors, got {num_units}"):
        topk_blocks(
            values, *of_plan(plan), unit=16, unit_kind=plan.unit_modality, floors=torch.ones(3) / 4,
        )  # fmt: skip


def test_extreme_scores_and_ties() -> None:
    layout = TokenLayout.from_spans(MIXED)
    config = small(ratio=0.5, sinks=0, window=0)
    plan = layout.plan(config, num_query_heads=1, num_kv_heads=1)
    values = torch.zeros(1, 1, plan.tiles.shape[1], plan.units.shape[1])
    index, count, _ = topk_blocks(values, *of_plan(plan), unit=plan.unit)
    slot = torch.arange(index.shape[-1])
    # Ties go to the lowest ids: the lists are 0, 1, 2, ...
    assert (count > 0).all()
    assert torch.equal(index, torch.where(slot < count[..., None], slot, -1).int())
    values[..., 3], values[..., 4], values[..., 5] = float("nan"), float("inf"), -float("inf")
    values[..., :3] = torch.tensor([1e-30, -1e30, 3.0])
    values[..., 6:] = -torch.arange(values.shape[-1] - 6) - 1.0
    law = select(values, layout, replace(config, backend="torch"))
    index, count, _ = topk_blocks(values, *of_plan(plan), unit=plan.unit)
    assert torch.equal(count, law.count)
    assert torch.equal(index, law.index)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4096, 16384, 131072])
def test_gpu_long_lists_equal_the_law(tokens: int) -> None:
    config = mms.SparseConfig(unit=16, head_ratio=(0.2, 0.05))
    layout = TokenLayout.text(1, tokens, device="cuda")
    plan = layout.plan(config, num_query_heads=2, num_kv_heads=2, num_queries=1024)
    shape = (1, 2, plan.tiles.shape[1], plan.units.shape[1])
    values = torch.rand(shape, device="cuda").argsort(-1).float()
    index, count, _ = topk_blocks(values, *of_plan(plan), unit=plan.unit)
    kept = torch.zeros(shape, dtype=torch.int32, device="cuda")
    listed = torch.arange(index.shape[-1], device="cuda") < count[..., None]
    kept.scatter_reduce_(-1, index.clamp(min=0).long(), listed.int(), "amax")
    kept = kept.bool()
    ranked = values.masked_fill(~plan.visible[:, None], -1).masked_fill(plan.always[:, None], 1e9)
    least = ranked.masked_fill(~kept, 1e9).amin(-1)
    most = ranked.masked_fill(kept, -1).amax(-1)
    assert (least > most).all()
    least = (plan.always * 16).sum(-1)[:, None]
    assert (count * 16 - plan.head_budget.maximum(least)).abs().max() <= 8
