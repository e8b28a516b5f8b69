"""The kernels that score and select, against the PyTorch path that is their law."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import mm_sparse as mms
from mm_sparse import Modality, PooledScorer, RelevanceScorer, TokenLayout
from mm_sparse.kernels.select import keep_best
from mm_sparse.plan import Plan
from mm_sparse.selection import select
from tests.mm_sparse.layouts import IDS, MIXED, batches, configs, layout_of, random_qk
from tests.mm_sparse.layouts import small_config as small

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


def assert_same_lists(values: Tensor, plan: Plan, config: mms.SparseConfig) -> None:
    """Kernel and PyTorch keep the same where no two scores tie."""
    law = select(values, plan.layout, replace(config, backend="torch"), num_query_heads=plan.group)
    floors = config.floors()
    index, count = keep_best(
        values, plan.always, plan.hull, plan.units, plan.budget, plan.max_kept,
        unit_kind=plan.unit_modality,
        floors=torch.tensor([floors.get(m, 0.0) for m in Modality]) if floors else None,
    )  # fmt: skip
    assert torch.equal(count, law.count)
    assert torch.equal(index, law.index)


@FEW
@given(batch=batches(), config=configs(mass=None), seed=st.integers(0, 99))
def test_selections_equal_the_law(batch, config: mms.SparseConfig, seed: int) -> None:
    rows, side = batch
    layout = TokenLayout.from_rows(rows, padding_side=side)
    plan = layout.plan(config, num_query_heads=1, num_kv_heads=1)
    if not plan.max_kept or not plan.tiles.shape[1]:
        return
    shape = (layout.batch, 1, plan.tiles.shape[1], plan.units.shape[1])
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(shape, generator=generator).argsort(-1).float()
    assert_same_lists(order - shape[-1] / 2, plan, config)


def test_extreme_scores_and_ties() -> None:
    layout = TokenLayout.from_spans(MIXED)
    config = small(ratio=0.5, sinks=0, window=0)
    plan = layout.plan(config, num_query_heads=1, num_kv_heads=1)
    values = torch.zeros(1, 1, plan.tiles.shape[1], plan.units.shape[1])
    index, count = keep_best(values, plan.always, plan.hull, plan.units, plan.budget, plan.max_kept)
    slot = torch.arange(index.shape[-1])
    # Ties go to the lowest ids: the lists are 0, 1, 2, ...
    assert (count > 0).all()
    assert torch.equal(index, torch.where(slot < count[..., None], slot, -1).int())
    values[..., 3], values[..., 4], values[..., 5] = float("nan"), float("inf"), -float("inf")
    values[..., :3] = torch.tensor([1e-30, -1e30, 3.0])
    values[..., 6:] = -torch.arange(values.shape[-1] - 6) - 1.0
    law = select(values, layout, replace(config, backend="torch"))
    index, count = keep_best(values, plan.always, plan.hull, plan.units, plan.budget, plan.max_kept)
    assert torch.equal(count, law.count)
    assert torch.equal(index, law.index)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4096, 16384, 131072])
def test_gpu_long_lists_equal_the_law(tokens: int) -> None:
    config = mms.SparseConfig(unit=16, ratio=0.2)
    layout = TokenLayout.text(1, tokens, device="cuda")
    plan = layout.plan(config, num_query_heads=1, num_kv_heads=1, num_queries=1024)
    shape = (1, 1, plan.tiles.shape[1], plan.units.shape[1])
    values = torch.rand(shape, device="cuda").argsort(-1).float()
    index, count = keep_best(values, plan.always, plan.hull, plan.units, plan.budget, plan.max_kept)
    kept = torch.zeros(shape, dtype=torch.bool, device="cuda")
    listed = torch.arange(index.shape[-1], device="cuda") < count[..., None]
    kept.scatter_reduce_(-1, index.clamp(min=0).long(), listed, "amax")
    ranked = values.masked_fill(~plan.visible[:, None], -1).masked_fill(plan.always[:, None], 1e9)
    least = ranked.masked_fill(~kept, 1e9).amin(-1)
    most = ranked.masked_fill(kept, -1).amax(-1)
    assert (least > most).all()
    assert (count * 16 - plan.budget[:, None]).abs().max() <= 8
