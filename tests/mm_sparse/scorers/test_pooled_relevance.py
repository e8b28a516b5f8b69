"""Scores against slow loops, and the learned scorer against the training-free one."""

import math

import pytest
import torch
from torch import Tensor

import mm_sparse as mms
from mm_sparse import Modality, PooledScorer, RelevanceScorer, TokenLayout
from mm_sparse.layout.plan import Plan
from mm_sparse.scorers.descriptors import tile_query_pools
from tests.support.layouts import (
    GROUPS,
    IDS,
    MIXED,
    Row,
    assert_equal_where_visible,
    layout_of,
    random_qk,
    small_config,
)


def pooled_by_hand(q: Tensor, k: Tensor, plan: Plan) -> Tensor:
    """(B, K, T, U) float64, -inf where nothing is visible, one tile at a time."""
    batch, kv_heads = k.shape[:2]
    tile_tokens, query_pools = plan.tile_tokens, min(plan.config.query_pools, plan.tile_tokens)
    width = math.ceil(tile_tokens / query_pools)
    shape = (batch, kv_heads, plan.tiles.shape[1], plan.units.shape[1])
    values = torch.full(shape, -math.inf, dtype=torch.float64)
    for b in range(batch):
        for t, (start, size) in enumerate(plan.tiles[b].tolist()):
            units = plan.visible[b, t].nonzero().flatten().tolist()
            if not units:
                continue
            for h in range(kv_heads):
                shares = []
                for at in range(start, start + size, width):
                    end = min(at + width, start + size)
                    for g in range(plan.group):
                        query = q[b, h * plan.group + g, at:end].double().mean(0)
                        logits = []
                        for u in units:
                            first, count = plan.units[b, u].tolist()
                            key = k[b, h, first : first + count].double().mean(0)
                            logits.append(query @ key / math.sqrt(q.shape[-1]) + math.log(count))
                        shares.append(torch.stack(logits).softmax(0))
                stacked = torch.stack(shares)
                best = plan.config.reduce == "max"
                values[b, h, t, units] = (stacked.amax(0) if best else stacked.mean(0)).log()
    return values


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS, ids=lambda x: str(x))
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_pooled_scores_equal_a_loop_over_tiles_and_units(
    name: str, heads: int, kv_heads: int, reduce: str
) -> None:
    layout = layout_of(name)
    q, k = random_qk(layout, heads, kv_heads)
    scores = PooledScorer()(q, k, layout=layout, config=small_config(reduce=reduce))
    assert (
        scores.values.shape
        == scores.shape
        == (layout.batch, kv_heads, *scores.plan.visible.shape[1:])
    )
    assert_equal_where_visible(scores.values, pooled_by_hand(q, k, scores.plan), scores.plan, 1e-4)


@pytest.mark.parametrize("query_pools", [1, 3, 5, 200])
def test_any_number_of_subpools_is_served(query_pools: int) -> None:
    layout = layout_of("mixed")
    q, k = random_qk(layout, 3, 1)
    scores = PooledScorer()(q, k, layout=layout, config=small_config(query_pools=query_pools))
    assert_equal_where_visible(scores.values, pooled_by_hand(q, k, scores.plan), scores.plan, 1e-4)


def test_pooled_shares_of_a_tile_add_up_to_one() -> None:
    layout = layout_of("padded-left")
    q, k = random_qk(layout, 6, 2)
    scores = PooledScorer()(q, k, layout=layout, config=small_config())
    seen = scores.plan.visible[:, None]
    total = scores.values.exp().masked_fill(~seen, 0).sum(-1)
    live = seen.any(-1).expand_as(total)
    torch.testing.assert_close(total[live], torch.ones_like(total[live]))


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS, ids=lambda x: str(x))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_untrained_scorer_equals_the_training_free_one(
    name: str, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    layout = layout_of(name)
    q, k = (x.to(dtype) for x in random_qk(layout, heads, kv_heads))
    learned = RelevanceScorer(num_query_heads=heads, num_kv_heads=kv_heads, head_dim=8, rank=5)
    got = learned(q, k, layout=layout, config=small_config())
    want = PooledScorer()(q, k, layout=layout, config=small_config())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_equal_where_visible(got.values, want.values, want.plan, tolerance)
    if dtype == torch.float32:
        pick = [mms.select(s, layout, small_config()).index for s in (got, want)]
        assert torch.equal(*pick)


def test_queries_of_a_chunk_are_scored_as_in_the_whole() -> None:
    layout = TokenLayout.text(2, 256)
    q, k = random_qk(layout, 3, 1)
    options = {"layout": layout, "config": small_config(tile=128, query_pools=2)}
    for scorer in (
        PooledScorer(),
        RelevanceScorer(num_query_heads=3, num_kv_heads=1, head_dim=8, rank=5),
    ):
        whole = scorer(q, k, **options)
        width = whole.plan.tile_tokens
        part = scorer(q[:, :, 2 * width : 4 * width], k, query_offset=2 * width, **options)
        assert_equal_where_visible(part.values, whole.values[:, :, 2:4], part.plan, 1e-5)
        last = scorer(q[:, :, -width:], k, **options)
        assert last.plan.query_offset == 256 - width


def trained_step(rows: list[Row]) -> RelevanceScorer:
    """A scorer with the gradients of its second step."""
    layout = TokenLayout.from_rows(rows)
    q, k = random_qk(layout, 6, 2)
    torch.manual_seed(0)
    scorer = RelevanceScorer(num_query_heads=6, num_kv_heads=2, head_dim=8, rank=5)
    step = torch.optim.SGD(scorer.parameters(), lr=0.5)
    for turn in range(2):
        scores = scorer(q, k, layout=layout, config=small_config())
        seen = scores.plan.visible[:, None].expand(-1, 2, -1, -1)
        truth = mms.unit_mass(q, k, scores.plan)
        loss = -(truth * scores.values.masked_fill(~seen, -math.inf).log_softmax(-1))[seen].sum()
        step.zero_grad()
        loss.backward()
        if turn == 0:
            step.step()
    return scorer


def test_gradients_reach_every_tower_of_the_modalities_that_are_there() -> None:
    scorer = trained_step([[*MIXED, ("video", (2, 4, 5)), ("text", 9)]])
    for name in ("query_tower", "key_tower"):
        grad = getattr(scorer, name).grad
        assert grad.isfinite().all()
        assert (grad != 0).float().mean((1, 2, 3)).min() > 0.95, name
    assert scorer.pair_bias.grad.isfinite().all()
    by_pair = scorer.pair_bias.grad.abs().sum((0, 3))
    # Text stands everywhere; the others see what comes before them.
    order = [Modality.IMAGE, Modality.AUDIO, Modality.VIDEO]
    later = {(a, b) for i, a in enumerate(order) for b in order[: i + 1]}
    later |= {(a, Modality.TEXT) for a in Modality} | {(Modality.TEXT, b) for b in Modality}
    assert all(by_pair[a, b] > 0 for a, b in later)


def test_towers_of_absent_modalities_stay_as_they_are() -> None:
    scorer = trained_step([[("text", 100), ("image", 40), ("text", 40)]])
    audio = int(Modality.AUDIO)
    assert (scorer.query_tower.grad[audio] == 0).all()
    assert (scorer.key_tower.grad[audio] == 0).all()
    assert (scorer.pair_bias.grad[:, audio] == 0).all()
    assert (scorer.pair_bias.grad[:, :, audio] == 0).all()


def test_gradients_are_finite_with_padding_and_empty_tiles() -> None:
    scorer = trained_step([MIXED, [("text", 3)], [("pad", 5)]])
    assert all(p.grad.isfinite().all() for p in scorer.parameters())


def test_a_bias_moves_the_pair_of_modalities_that_it_belongs_to() -> None:
    layout = layout_of("mixed")
    q, k = random_qk(layout)
    scorer = RelevanceScorer(num_query_heads=1, num_kv_heads=1, head_dim=8)
    before = scorer(q, k, layout=layout, config=small_config())
    with torch.no_grad():
        scorer.pair_bias[:, Modality.AUDIO, Modality.IMAGE] += 2.0
    after = scorer(q, k, layout=layout, config=small_config())
    plan = before.plan
    pair = (plan.tile_modality == 2)[:, :, None] & (plan.unit_modality == 1)[:, None]
    assert (pair & plan.visible).any()
    moved = torch.where(pair[:, None], 2.0, 0.0)
    torch.testing.assert_close(after.values - before.values, moved, atol=1e-5, rtol=0)


def test_a_bias_knows_distance_and_side() -> None:
    layout = TokenLayout.text(1, 1024)
    q, k = random_qk(layout)
    scorer = RelevanceScorer(num_query_heads=1, num_kv_heads=1, head_dim=8)
    with torch.no_grad():
        scorer.pair_bias.copy_(torch.arange(scorer.pair_bias.numel()).view_as(scorer.pair_bias))
    options = {"layout": layout, "config": small_config(causal=False)}
    moved = scorer(q, k, **options).values - PooledScorer()(q, k, **options).values
    moved, distance = moved.round()[0, 0], PooledScorer()(q, k, **options).plan.distance[0]
    for d in (8, -8, 24, 500, -500):
        same = moved[distance == d]
        assert same.numel() == 0 or same.unique().numel() == 1
    ahead, behind = moved[distance < 0], moved[distance > 0]
    assert not set(ahead.tolist()) & set(behind.tolist())


def test_scorers_keep_their_parameters_in_a_state_dict() -> None:
    scorer = trained_step([MIXED])
    other = RelevanceScorer(num_query_heads=6, num_kv_heads=2, head_dim=8, rank=5)
    other.load_state_dict(scorer.state_dict())
    layout = layout_of("mixed")
    q, k = random_qk(layout, 6, 2)
    a, b = (s(q, k, layout=layout, config=small_config()).values for s in (scorer, other))
    assert torch.equal(a, b)


def test_a_scorer_of_five_lines_works() -> None:
    class Peak(mms.Scorer):
        def score(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Tensor:
            weight = mms.unit_mass(q, k, plan, scale)
            return weight.clamp(min=1e-9).log()

    layout = layout_of("padded-left")
    q, k = random_qk(layout, 6, 2)
    v = torch.randn_like(k)
    config = small_config(ratio=0.4, patch_order=False)
    out = mms.sparse_attention(q, k, v, layout=layout, config=config, scorer=Peak())
    scores = Peak()(q, k, layout=layout, config=config)
    mask = mms.select(scores, layout, scores.plan.config).to_dense_mask()
    torch.testing.assert_close(out, mms.attention_reference(q, k, v, mask=mask))


@pytest.mark.parametrize("query_pools", [1, 4, 5, 100])
def test_a_plan_knows_which_subpools_hold_a_token(query_pools: int) -> None:
    layout = mms.TokenLayout.from_spans([("text", 37), ("image", (9, 9)), ("text", 3)], batch=2)
    config = mms.SparseConfig(tile=64, query_pools=query_pools)
    plan = layout.plan(config, num_query_heads=4, num_kv_heads=2)
    q = torch.randn(2, 4, layout.length, 8)
    _, exists = tile_query_pools(q, plan.tiles, plan.tile_tokens, query_pools, plan.regular_tiles)
    assert torch.equal(plan.live_query_pools, exists)
