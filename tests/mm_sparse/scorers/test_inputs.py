"""Scores of values that are not finite, of nothing, and of what does not fit."""

import math
import re

import pytest
import torch

import mm_sparse as mms
from mm_sparse import PooledScorer, RelevanceScorer, TokenLayout
from tests.support.layouts import (
    layout_of,
    random_qk,
    small_config,
)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_bad_key_counts_as_zero_and_spoils_no_other_score(bad: float) -> None:
    layout = layout_of("mixed")
    q, k = random_qk(layout, 3, 1)
    zeroed, spoiled = k.clone(), k.clone()
    zeroed[0, 0, 40], spoiled[0, 0, 40] = 0.0, bad
    for scorer in (
        PooledScorer(),
        RelevanceScorer(num_query_heads=3, num_kv_heads=1, head_dim=8, rank=5),
    ):
        got = scorer(q, spoiled, layout=layout, config=small_config()).values
        assert torch.equal(got, scorer(q, zeroed, layout=layout, config=small_config()).values)
        clean = scorer(q, k, layout=layout, config=small_config()).values
        assert torch.equal(got[1], clean[1]), "another row of the batch"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_bad_query_spoils_no_other_tile(bad: float) -> None:
    layout = layout_of("mixed")
    q, k = random_qk(layout, 3, 1)
    spoiled = q.clone()
    spoiled[0, 1, 40] = bad
    got = PooledScorer()(spoiled, k, layout=layout, config=small_config())
    want = PooledScorer()(q, k, layout=layout, config=small_config()).values
    start, size = got.plan.tiles[0].unbind(-1)
    others = ~((start <= 40) & (start + size > 40))
    assert torch.equal(got.values[0, :, others], want[0, :, others])
    assert not got.values.isnan().any()


def test_keys_of_padding_do_not_matter() -> None:
    layout = layout_of("padded-left")
    q, k = random_qk(layout, 3, 1)
    spoiled = k.masked_fill(~layout.valid[:, None, :, None], math.nan)
    for scorer in (
        PooledScorer(),
        RelevanceScorer(num_query_heads=3, num_kv_heads=1, head_dim=8, rank=5),
    ):
        got, want = (
            scorer(q, x, layout=layout, config=small_config()).values for x in (spoiled, k)
        )
        assert torch.equal(got, want)


def test_heads_that_a_scorer_was_not_made_for_are_refused() -> None:
    layout = layout_of("text")
    scorer = RelevanceScorer(num_query_heads=4, num_kv_heads=2, head_dim=8)
    for heads, kv_heads, dim in ((2, 2, 8), (4, 1, 8), (4, 2, 16)):
        message = f"q and k must have 4 and 2 heads of 8, got {heads} and {kv_heads} heads of {dim}"
        q, k = random_qk(layout, heads, kv_heads, dim)
        with pytest.raises(ValueError, match=re.escape(message)):
            scorer(q, k, layout=layout, config=small_config())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_query_heads": 0}, "num_query_heads must be a positive int, got 0"),
        ({"num_kv_heads": 2.0}, "num_kv_heads must be a positive int, got 2.0"),
        ({"head_dim": -8}, "head_dim must be a positive int, got -8"),
        ({"rank": 0}, "rank must be a positive int, got 0"),
        (
            {"num_query_heads": 3},
            "num_query_heads must be a multiple of num_kv_heads (2), got 3",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_a_scorer_of_impossible_sizes_is_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RelevanceScorer(**{"num_query_heads": 4, "num_kv_heads": 2, "head_dim": 8, **given})


def test_tensors_that_do_not_fit_the_layout_are_refused() -> None:
    layout = layout_of("text")
    q, k = random_qk(layout, 4, 2)
    for args, kind, message in (
        ((q[0], k), ValueError, "q must be (batch, heads, tokens, head dim), got (4, 70, 8)"),
        ((q, k[..., :1]), ValueError, "k must have q's batch 1 and head dim 8, got (1, 2, 70, 1)"),
        ((q, k.double()), TypeError, "k must have q's dtype torch.float32, got torch.float64"),
        ((q.long(), k.long()), TypeError, "q must be floating point, got torch.int64"),
        ((q, None), TypeError, "k must be a tensor, got NoneType"),
        ((q[:, :3], k), ValueError, "q must have a multiple of k's 2 heads, got 3 heads"),
        ((q, k[:, :, 1:]), ValueError, "layout must have 69 tokens as k has, got 70"),
        (
            (q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1)),
            ValueError,
            "layout must have 2 rows as q has, got 1",
        ),
        ((q.to("meta"), k.to("meta")), ValueError, "layout must be on meta as q is, got cpu"),
        (
            (torch.cat([q, q], 2), k),
            ValueError,
            "num_queries and query_offset must lie in a layout of 70 tokens, got 140 and -70",
        ),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            PooledScorer()(*args, layout=layout, config=small_config())


def test_empty_batches_and_rows_score_nothing() -> None:
    for layout in (TokenLayout.text(0, 10), TokenLayout.text(2, 0)):
        q, k = random_qk(layout, 4, 2)
        scores = PooledScorer()(q, k, layout=layout, config=small_config())
        assert scores.values.numel() == 0
        assert mms.unit_mass(q, k, scores.plan).numel() == 0
