"""The static baselines: the same budgets and the same type as a learned selection."""

import re

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import mm_sparse as mms
from mm_sparse import Selection, SparseConfig, TokenLayout
from mm_sparse.recipes.evaluation.linformer import Linformer
from mm_sparse.scorers.patterns import BigBird, SlidingWindow
from tests.support.layouts import FEW, MIXED, TEXT, Row, batches, configs, random_qk

LONG: Row = [("text", 2048)]
HEADS = {"num_query_heads": 2, "num_kv_heads": 1}


def kept_of(selection: Selection, tile: int) -> list[int]:
    return selection.index[0, 0, tile, : selection.count[0, 0, tile]].tolist()


def config(**fields: object) -> SparseConfig:
    return SparseConfig(**{"tile": 128, "sinks": 32, "window": 32, "ratio": 0.2, **fields})


@pytest.mark.parametrize("pattern", [SlidingWindow(), BigBird()], ids=["window", "bigbird"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
def test_patterns_keep_the_budget(pattern: mms.Scorer, causal: bool, ratio: float) -> None:
    layout, asked = TokenLayout.from_spans(LONG), config(causal=causal, ratio=ratio)
    selection = pattern.select(layout, asked, **HEADS).check()
    plan = selection.plan
    size = plan.units[:, None, None, :, 1].expand(-1, 1, plan.tiles.shape[1], -1)
    listed = selection.index >= 0
    held = (size.gather(-1, selection.index.clamp(min=0).long()) * listed).sum(-1)[:, 0]
    budget = plan.budget.maximum((plan.always * plan.units[:, None, :, 1]).sum(-1))
    assert ((held - budget).abs() <= plan.unit / 2).all()
    assert selection.density() == pytest.approx(ratio, abs=0.03)


@given(batches(), configs(), st.sampled_from([SlidingWindow(), BigBird(seed=3)]))
@FEW
def test_patterns_keep_what_is_always_kept_and_visible_units_only(
    batch: tuple[list[Row], str], asked: SparseConfig, pattern: mms.Scorer
) -> None:
    layout = TokenLayout.from_rows(batch[0], padding_side=batch[1])
    selection = pattern.select(layout, asked, **HEADS).check()
    plan = selection.plan
    kept = torch.zeros(*selection.index.shape[:3], plan.units.shape[1] + 1, dtype=torch.bool)
    place = selection.index.masked_fill(selection.index < 0, plan.units.shape[1]).long()
    kept = kept.scatter(-1, place, True)[..., :-1]
    assert not (plan.always[:, None] & ~kept).any()
    assert not (kept & ~plan.visible[:, None]).any()


def test_a_window_keeps_the_sinks_and_the_nearest_before() -> None:
    selection = SlidingWindow().select(TokenLayout.from_spans(LONG), config(), **HEADS)
    for tile in (10, 20, 31):
        kept, last = kept_of(selection, tile), 4 * tile + 3
        assert kept[:2] == [0, 1]
        assert kept[2:] == list(range(last - len(kept) + 3, last + 1))
        assert len(kept) > 5


def test_a_window_of_an_encoder_lies_on_both_sides() -> None:
    asked = config(causal=False, sinks=0)
    selection = SlidingWindow().select(TokenLayout.from_spans(LONG), asked, **HEADS)
    kept = kept_of(selection, 16)
    assert kept == list(range(kept[0], kept[-1] + 1))
    assert abs((kept[0] + kept[-1]) / 2 - 65.5) <= 1


def test_bigbird_keeps_sinks_a_window_and_units_spread_over_the_rest() -> None:
    selection = BigBird(window=0.5).select(TokenLayout.from_spans(LONG), config(), **HEADS)
    kept = kept_of(selection, 31)
    assert kept[:2] == [0, 1]
    near = [u for u in kept if u > 127 - len(kept) // 2]
    assert near[-1] == 127
    assert len(near) >= len(kept) // 2 - 2
    spread = [u for u in kept[2:] if u not in near]
    assert len(spread) >= len(kept) // 4
    assert spread[0] < 50
    assert torch.tensor(spread).diff().max() > 1


def test_bigbird_without_a_window_is_random_and_with_all_of_it_a_window() -> None:
    layout = TokenLayout.from_spans(LONG)
    asked = config(sinks=0, window=0)
    whole = BigBird(window=1.0).select(layout, asked, **HEADS)
    nearest = SlidingWindow().select(layout, asked, **HEADS)
    common = set(kept_of(whole, 31)) & set(kept_of(nearest, 31))
    assert len(common) >= len(kept_of(nearest, 31)) - 1
    random = kept_of(BigBird(window=0.0).select(layout, asked, **HEADS), 31)
    assert min(random) < 40
    assert len(random) == len(kept_of(nearest, 31))


def test_bigbird_repeats_with_its_seed_and_differs_with_another() -> None:
    layout = TokenLayout.from_spans(LONG)

    def index(seed: int) -> Tensor:
        torch.manual_seed(torch.randint(1000, ()).item())
        return BigBird(seed=seed).select(layout, config(), **HEADS).index

    assert torch.equal(index(0), index(0))
    assert not torch.equal(index(0), index(1))


def test_bigbird_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    BigBird().select(TokenLayout.from_spans(LONG), config(), **HEADS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("pattern", [SlidingWindow(), BigBird()], ids=["window", "bigbird"])
def test_a_pattern_serves_wherever_a_scorer_does(pattern: mms.Scorer) -> None:
    layout = TokenLayout.from_rows([MIXED, TEXT], padding_side="left")
    q, k = random_qk(layout, 6, 2)
    v = torch.randn_like(k)
    asked = config(dense_below=0, ratio=0.4, window=8, sinks=4, patch_order=False)
    out = mms.sparse_attention(q, k, v, layout=layout, config=asked, scorer=pattern)
    selection = pattern.select(layout, asked, num_query_heads=6, num_kv_heads=2)
    torch.testing.assert_close(out, mms.attend(q, k, v, selection))
    torch.testing.assert_close(
        out, mms.attention_reference(q, k, v, mask=selection.to_dense_mask())
    )


@pytest.mark.parametrize("pattern", [SlidingWindow(), BigBird()], ids=["window", "bigbird"])
def test_a_pattern_serves_a_chunk_of_queries(pattern: mms.Scorer) -> None:
    layout = TokenLayout.from_spans(LONG)
    whole = pattern.select(layout, config(), **HEADS)
    part = pattern.select(layout, config(), **HEADS, num_queries=128, query_offset=1024)
    assert part.plan.query_offset == 1024
    if isinstance(pattern, SlidingWindow):
        assert kept_of(part, 0) == kept_of(whole, 16)
        assert kept_of(part, 1) == kept_of(whole, 17)


@pytest.mark.parametrize("window", [-0.1, 1.1, float("nan")])
def test_a_window_that_is_no_share_is_refused(window: float) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"window must be a share in [0, 1], got {window}")
    ):
        BigBird(window=window)


# Linformer.


def test_linformer_attends_to_projected_keys() -> None:
    torch.manual_seed(0)
    module = Linformer(50, rank=12)
    q, k, v = (torch.randn(2, h, 50, 8) for h in (6, 2, 2))
    out = module(q, k, v)
    assert out.shape == q.shape
    keys = (module.project_keys @ k).repeat_interleave(3, 1)
    values = (module.project_values @ v).repeat_interleave(3, 1)
    want = (q @ keys.transpose(-1, -2) / 8**0.5).softmax(-1) @ values
    torch.testing.assert_close(out, want)
    scaled = (q @ keys.transpose(-1, -2) * 0.1).softmax(-1) @ values
    torch.testing.assert_close(module(q, k, v, scale=0.1), scaled)


def test_linformer_learns_both_projections() -> None:
    module = Linformer(50, rank=12)
    q, k, v = (torch.randn(1, 2, 50, 8, requires_grad=True) for _ in range(3))
    module(q, k, v).square().sum().backward()
    for x in (q, k, v, *module.parameters()):
        assert x.grad.isfinite().all()
        assert (x.grad != 0).any()


def test_linformer_runs_in_the_dtype_of_its_inputs() -> None:
    q, k, v = (torch.randn(1, 2, 50, 8).bfloat16() for _ in range(3))
    assert Linformer(50, rank=12)(q, k, v).dtype == torch.bfloat16


def test_linformer_refuses_what_does_not_fit() -> None:
    q, k = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 50, 8)
    module = Linformer(50)
    for args, kind, message in (
        ((q, k[:, :, 1:], k[:, :, 1:]), ValueError, "k and v must have 50 tokens, got 49"),
        ((q, k, k[:, :, 1:]), ValueError, "v must have k's shape (1, 2, 50, 8), got (1, 2, 49, 8)"),
        ((q[0], k, k), ValueError, "q must be (batch, heads, tokens, head dim), got (4, 50, 8)"),
        ((q[:, :3], k, k), ValueError, "q must have a multiple of k's 2 heads, got 3 heads"),
        ((q, k.double(), k), TypeError, "k must have q's dtype torch.float32, got torch.float64"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            module(*args)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": 0}, "length must be a positive int, got 0"),
        ({"length": 5.0}, "length must be a positive int, got 5.0"),
        ({"rank": -1}, "rank must be a positive int, got -1"),
    ],
    ids=["zero", "float", "negative"],
)
def test_linformer_of_impossible_sizes_is_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Linformer(**{"length": 5, "rank": 2, **given})
