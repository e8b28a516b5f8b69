"""Attention of values that are not finite, of nothing, and of what does not fit."""

import math
import re

import pytest
import torch

import mm_sparse as mms
from mm_sparse import TokenLayout
from mm_sparse.attention.selected import attend_selection
from tests.support.layouts import (
    inputs,
    members,
    random_qk,
    small_config,
)


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_bad_query_spoils_its_own_row_only(bad: float, dense_below: int) -> None:
    layout, q, k, v = inputs("padded-right")
    asked = small_config(ratio=1.0, dense_below=dense_below)
    spoiled = q.detach().clone()
    spoiled[0, 1, 40] = bad
    got, want = (mms.sparse_attention(x, k, v, layout=layout, config=asked) for x in (spoiled, q))
    assert got[0, 1, 40].isnan().all()
    spared = torch.ones(got.shape[:3], dtype=torch.bool)
    spared[0, 1, 40] = False
    torch.testing.assert_close(got[spared], want[spared])


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_bad_key_or_value_spoils_no_other_row_of_the_batch_and_no_earlier_tile(
    which: str, dense_below: int
) -> None:
    layout, *tensors = inputs("padded-right")
    asked = small_config(ratio=1.0, dense_below=dense_below, bidirectional=())
    want = mms.sparse_attention(*tensors, layout=layout, config=asked)
    spoiled = [x.detach().clone() for x in tensors]
    spoiled["qkv".index(which)][0, 0, 150] = math.nan
    got = mms.sparse_attention(*spoiled, layout=layout, config=asked)
    assert got[0, :, 150:].isnan().any()
    torch.testing.assert_close(got[1], want[1])
    if not dense_below:
        torch.testing.assert_close(got[0, :, :128], want[0, :, :128])


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_whatever_stands_in_padding_is_never_read(bad: float, side: str) -> None:
    layout, *tensors = inputs(f"padded-{side}")
    asked = small_config(ratio=0.4)
    padding = ~layout.valid[:, None, :, None]
    spoiled = [x.detach().masked_fill(padding, bad) for x in tensors]
    got = mms.sparse_attention(*spoiled, layout=layout, config=asked)
    want = mms.sparse_attention(*tensors, layout=layout, config=asked)
    valid = layout.valid[:, None, :, None].expand_as(got)
    assert torch.equal(got[valid], want[valid])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("which", [1, 2], ids=["key", "value"])
@pytest.mark.parametrize("place", [5, 41], ids=["first-unit", "behind-a-short-unit"])
def test_a_bad_key_reaches_only_tiles_that_keep_its_unit(
    place: int, which: int, backend: str
) -> None:
    """Not those with shorter lists beside them, nor those that keep the short unit before it."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    layout = TokenLayout.from_spans([("text", 40), ("image", 24), ("text", 128)])
    q, k = random_qk(layout, 1, 1, 16)
    v = random_qk(layout, 1, 1, 16, seed=1)[1]
    plan = layout.plan(small_config(backend=backend), num_query_heads=1, num_kv_heads=1)
    bad_unit = int(((plan.units[0, :, 0] <= place) & (plan.units[0].sum(-1) > place)).nonzero())
    kept = plan.visible[:, None].clone()
    kept[..., 1:, bad_unit] = False
    kept[..., -1, 3:5] = False
    selection = mms.Selection.from_mask(kept, plan)
    keeps = kept[0, 0, :, bad_unit]
    assert keeps.any()
    spared = (members(plan.tiles, layout.length)[0] & ~keeps[:, None]).any(0)
    spoiled = [x.clone() for x in (q, k, v)]
    spoiled[which][0, 0, place] = math.nan
    tensors = [[x.requires_grad_() for x in some] for some in ([q, k, v], spoiled)]
    want, got = (mms.attend(*some, selection) for some in tensors)
    torch.testing.assert_close(got[:, :, spared], want[:, :, spared])
    want, got = (
        torch.autograd.grad(out[:, :, spared].sum(), some)
        for out, some in zip((want, got), tensors, strict=True)
    )
    torch.testing.assert_close(got[0][:, :, spared], want[0][:, :, spared])


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
def test_empty_batches_rows_and_queries_work(dense_below: int) -> None:
    asked = small_config(dense_below=dense_below)
    for layout in (TokenLayout.text(0, 10), TokenLayout.text(2, 0)):
        q, k = random_qk(layout, 4, 2)
        assert mms.sparse_attention(q, k, k, layout=layout, config=asked).shape == q.shape
    layout = TokenLayout.text(2, 70)
    q, k = random_qk(layout, 4, 2)
    assert mms.sparse_attention(q[:, :, :0], k, k, layout=layout, config=asked).numel() == 0


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
def test_padding_alone_gives_zeros_and_no_gradient(dense_below: int) -> None:
    layout = TokenLayout.from_spans([("pad", 30)])
    q, k = (x.requires_grad_() for x in random_qk(layout, 4, 2))
    out = mms.sparse_attention(q, k, k, layout=layout, config=small_config(dense_below=dense_below))
    assert (out == 0).all()
    for grad in torch.autograd.grad(out.sum(), (q, k)):
        assert (grad == 0).all()


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
def test_bad_input_is_refused_by_name_on_either_path(dense_below: int) -> None:
    layout, q, k, v = inputs("texts", 4, 2)
    twice = torch.cat([q, q], 2)
    for args, kind, message in (
        ((q[0], k, v), ValueError, "q must be (batch, heads, tokens, head dim), got (4, 70, 8)"),
        ((q, k[0], v), ValueError, "k must be (batch, heads, tokens, head dim), got (2, 70, 8)"),
        ((q, k, None), TypeError, "v must be a tensor, got NoneType"),
        ((q.int(), k, v), TypeError, "q must be floating point, got torch.int32"),
        ((q, k.half(), v), TypeError, "k must have q's dtype torch.float32, got torch.float16"),
        ((q, k, v.to("meta")), ValueError, "v must be on q's device cpu, got meta"),
        (
            (q, k[:1], v[:1]),
            ValueError,
            "k must have q's batch 2 and head dim 8, got (1, 2, 70, 8)",
        ),
        ((q, k, v[:, :1]), ValueError, "v must have k's shape (2, 2, 70, 8), got (2, 1, 70, 8)"),
        ((q[:, :3], k, v), ValueError, "q must have a multiple of k's 2 heads, got 3 heads"),
        ((q[:, :0], k, v), ValueError, "q must have a multiple of k's 2 heads, got 0 heads"),
        ((q[:1], k[:1], v[:1]), ValueError, "layout must have 1 rows as q has, got 2"),
        (
            (q, k[:, :, :9], v[:, :, :9]),
            ValueError,
            "layout must have 9 tokens as k has, got 70",
        ),
        (
            (twice, k, v),
            ValueError,
            "num_queries and query_offset must lie in a layout of 70 tokens, got 140 and -70",
        ),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            mms.sparse_attention(*args, layout=layout, config=small_config(dense_below=dense_below))


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
@pytest.mark.parametrize("offset", [-1, 62])
def test_an_offset_outside_of_the_layout_is_refused(offset: int, dense_below: int) -> None:
    layout, q, k, v = inputs("texts")
    message = f"must lie in a layout of 70 tokens, got 9 and {offset}"
    with pytest.raises(ValueError, match=message):
        mms.sparse_attention(
            q[:, :, :9],
            k,
            v,
            layout=layout,
            config=small_config(dense_below=dense_below),
            query_offset=offset,
        )


def test_attend_refuses_tensors_that_do_not_fit_the_selection() -> None:
    layout, q, k, v = inputs("texts", 4, 2)
    asked = small_config()
    scores = mms.PooledScorer()(q, k, layout=layout, config=asked)
    selection = mms.select(scores, layout, asked)
    for args, message in (
        (
            (q[:, :, 1:], k, v),
            "q must be (batch, heads, tokens, head dim) with (2, 4, 70) as the selection has, "
            "got (2, 4, 69, 8)",
        ),
        (
            (q, k[:, :, 1:], v[:, :, 1:]),
            "k must have 2 heads and 70 tokens as the selection has, got (2, 2, 69, 8)",
        ),
        (
            (q, k[:, :1], v[:, :1]),
            "k must have 2 heads and 70 tokens as the selection has, got (2, 1, 70, 8)",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            mms.attend(*args, selection)
    with pytest.raises(TypeError, match="selection must be a Selection, got NoneType"):
        mms.attend(q, k, v, None)  # type: ignore[arg-type]


def test_a_reference_refuses_a_mask_that_is_not_boolean() -> None:
    _, q, k, v = inputs("texts")
    with pytest.raises(TypeError, match="mask must be bool, True where visible, got"):
        mms.attention_reference(q, k, v, mask=torch.ones(70, 70))


def test_a_layout_or_config_of_another_kind_is_refused() -> None:
    layout, q, k, v = inputs("texts")
    with pytest.raises(TypeError, match="layout must be a TokenLayout, got NoneType"):
        mms.sparse_attention(q, k, v, layout=None, config=small_config())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be a SparseConfig, got dict"):
        mms.sparse_attention(q, k, v, layout=layout, config={})  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_queries_without_keys_get_zeros_whatever_they_hold(bad: float) -> None:
    layout = TokenLayout.text(1, 64)
    config = mms.SparseConfig(dense_below=0)
    q, k = torch.full((1, 2, 64, 8), bad), torch.randn(1, 2, 64, 8)
    selection = mms.select(mms.PooledScorer()(k, k, layout=layout, config=config), layout, config)
    q, none = q.requires_grad_(), k[:, :, :0].clone().requires_grad_()
    out = attend_selection(q, none, none, selection)
    assert out.shape == q.shape
    assert out.eq(0).all()
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.eq(0).all()
