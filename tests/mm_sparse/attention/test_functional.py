"""Score, select and attend in one call, and its dense path."""

import math

import pytest
import torch
from hypothesis import assume, given, strategies as st
from torch import Tensor

import mm_sparse as mms
from mm_sparse import Modality, SparseConfig, TokenLayout
from mm_sparse.attention.dense import BREAK_EVEN, dense_attention
from tests.support.layouts import (
    BATCHES,
    FEW,
    GROUPS,
    IDS,
    MIXED,
    TEXT,
    Row,
    batches,
    configs,
    inputs,
    random_qk,
    seen_batch,
    small_config,
)


def assert_equals_reference(
    out: Tensor, tensors: tuple[Tensor, Tensor, Tensor], mask: Tensor
) -> None:
    """Outputs and gradients."""
    want = mms.attention_reference(*tensors, mask=mask)
    torch.testing.assert_close(out, want)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    got, exact = (torch.autograd.grad(x, tensors, dout) for x in (out, want))
    for a, b in zip(got, exact, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


@pytest.fixture
def no_sparse_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the sparse path ran")

    monkeypatch.setattr("mm_sparse.attention.functional.score_select_attend", fail)


@pytest.fixture
def no_dense_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the dense path ran")

    monkeypatch.setattr("mm_sparse.attention.functional.dense_attention", fail)


@pytest.mark.usefixtures("no_dense_path")
@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_keeping_all_is_dense_attention(name: str, heads: int, kv_heads: int, causal: bool) -> None:
    layout, *tensors = inputs(name, heads, kv_heads)
    asked = small_config(ratio=1.0, causal=causal)
    out = mms.sparse_attention(*tensors, layout=layout, config=asked)
    assert_equals_reference(out, tensors, seen_batch(*BATCHES[name], asked)[:, None])


@pytest.mark.usefixtures("no_sparse_path")
@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_the_dense_path_is_attention_on_all_that_is_visible(
    name: str, heads: int, kv_heads: int, causal: bool
) -> None:
    layout, *tensors = inputs(name, heads, kv_heads)
    asked = small_config(dense_below=10**6, causal=causal)
    out = mms.sparse_attention(*tensors, layout=layout, config=asked)
    seen = seen_batch(*BATCHES[name], asked)[:, None]
    assert_equals_reference(out, tensors, seen)
    blind = ~seen.any(-1).expand(out.shape[:3])
    assert (out[blind] == 0).all()


@given(batches(), configs(), st.sampled_from([(1, 1), (3, 1), (2, 2)]))
@FEW
def test_sparse_attention_is_attention_under_the_mask_of_its_selection(
    batch: tuple[list[Row], str], asked: SparseConfig, heads: tuple[int, int]
) -> None:
    layout = TokenLayout.from_rows(batch[0], padding_side=batch[1])
    assume(layout.length > 0)
    q, k = random_qk(layout, *heads)
    v = random_qk(layout, *heads, seed=1)[1]
    tensors = tuple(x.requires_grad_() for x in (q, k, v))
    out = mms.sparse_attention(*tensors, layout=layout, config=asked)
    scores = mms.PooledScorer()(q, k, layout=layout, config=asked)
    mask = mms.select(scores, layout, asked).to_dense_mask()
    assert_equals_reference(out, tensors, mask)


def test_pictures_see_themselves_in_both_directions_inside_text() -> None:
    layout, q, k, v = inputs("padded-left")
    picture = layout.modality[0] == int(Modality.IMAGE)
    first, last = picture.nonzero().flatten()[[0, -1]].tolist()
    other = v.detach().clone()
    other[0, :, last] += 1
    for kinds, moves in (((Modality.IMAGE,), True), ((), False)):
        asked = small_config(ratio=1.0, bidirectional=kinds)
        a, b = (mms.sparse_attention(q, k, x, layout=layout, config=asked) for x in (v, other))
        assert bool((a[0, :, first] != b[0, :, first]).any()) == moves
        assert torch.equal(a[0, :, :first], b[0, :, :first])


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
@pytest.mark.parametrize("count", [1, 37])
def test_a_chunk_of_queries_equals_its_part_of_the_whole(dense_below: int, count: int) -> None:
    layout, q, k, v = inputs("padded-left")
    asked = small_config(ratio=1.0, dense_below=dense_below)
    options = {"layout": layout, "config": asked}
    whole = mms.sparse_attention(q, k, v, **options)
    torch.testing.assert_close(
        mms.sparse_attention(q[:, :, -count:], k, v, **options), whole[:, :, -count:]
    )
    part = slice(50, 50 + count)
    torch.testing.assert_close(
        mms.sparse_attention(q[:, :, part], k, v, query_offset=50, **options), whole[:, :, part]
    )


def test_the_dense_path_takes_a_chunk_of_a_row_without_padding() -> None:
    layout, q, k, v = inputs("texts")
    for causal in (True, False):
        asked = small_config(dense_below=10**6, causal=causal)
        whole = mms.sparse_attention(q, k, v, layout=layout, config=asked)
        part = mms.sparse_attention(q[:, :, -9:], k, v, layout=layout, config=asked)
        torch.testing.assert_close(part, whole[:, :, -9:])


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
def test_padding_does_not_change_a_row(dense_below: int) -> None:
    asked = small_config(ratio=0.4, dense_below=dense_below)
    for side in ("left", "right"):
        layout = TokenLayout.from_rows([MIXED, TEXT], padding_side=side)
        q, k = random_qk(layout, 3, 1)
        v = random_qk(layout, 3, 1, seed=1)[1]
        out = mms.sparse_attention(q, k, v, layout=layout, config=asked)
        own = layout.valid[1]
        alone = [x[1:, :, own] for x in (q, k, v)]
        want = mms.sparse_attention(*alone, layout=TokenLayout.from_spans(TEXT), config=asked)
        torch.testing.assert_close(out[1:, :, own], want)
        assert (out[1, :, ~own] == 0).all()


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
def test_a_scale_replaces_one_over_the_root_of_the_head_dim(dense_below: int) -> None:
    layout, q, k, v = inputs("padded-right")
    asked = small_config(ratio=1.0, dense_below=dense_below)
    out = mms.sparse_attention(q, k, v, layout=layout, config=asked, scale=0.07)
    seen = seen_batch(*BATCHES["padded-right"], asked)[:, None]
    torch.testing.assert_close(out, mms.attention_reference(q, k, v, mask=seen, scale=0.07))


def test_the_scale_reaches_the_scores() -> None:
    """Sharper scores choose other units: twice the scale is twice the query."""
    layout = TokenLayout.text(1, 512)
    q, k = random_qk(layout, 3, 1)
    v = random_qk(layout, 3, 1, seed=1)[1]
    options = {"layout": layout, "config": small_config(top_p=0.5)}
    sharp = mms.sparse_attention(q, k, v, scale=2 / math.sqrt(8), **options)
    torch.testing.assert_close(sharp, mms.sparse_attention(2 * q, k, v, **options))


@pytest.mark.usefixtures("no_sparse_path")
@pytest.mark.parametrize(
    "fields", [{"dense_below": 71}, {"backend": "dense"}, {"dense_below": None}], ids=str
)
def test_what_is_short_or_asked_for_runs_dense(fields: dict) -> None:
    layout, q, k, v = inputs("texts")
    mms.sparse_attention(q, k, v, layout=layout, config=small_config(**fields))


@pytest.mark.usefixtures("no_dense_path")
@pytest.mark.parametrize("dense_below", [0, 70])
def test_what_is_long_enough_runs_sparse(dense_below: int) -> None:
    layout, q, k, v = inputs("texts")
    mms.sparse_attention(q, k, v, layout=layout, config=small_config(dense_below=dense_below))


@pytest.mark.usefixtures("no_dense_path")
def test_the_measured_length_decides_by_default() -> None:
    layout = TokenLayout.text(1, BREAK_EVEN["call"]["cpu"])
    q, k = random_qk(layout, 1, 1)
    mms.sparse_attention(q, k, k, layout=layout, config=small_config(dense_below=None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
def test_dtypes_come_out_as_they_went_in(dtype: torch.dtype, dense_below: int) -> None:
    layout, q, k, v = inputs("padded-left", dtype=dtype)
    asked = small_config(ratio=1.0, dense_below=dense_below)
    out = mms.sparse_attention(q, k, v, layout=layout, config=asked)
    assert out.dtype == dtype
    seen = seen_batch(*BATCHES["padded-left"], asked)[:, None]
    want = mms.attention_reference(*(x.double() for x in (q, k, v)), mask=seen)
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-9}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
def test_autocast_decides_the_dtype(dense_below: int) -> None:
    layout, q, k, v = inputs("padded-left")
    with torch.autocast("cpu", torch.bfloat16):
        out = mms.sparse_attention(
            q, k, v, layout=layout, config=small_config(ratio=1.0, dense_below=dense_below)
        )
    assert out.dtype == torch.bfloat16


def test_dense_attention_is_public_in_its_module() -> None:
    layout, q, k, v = inputs("hole")
    out = dense_attention(q, k, v, layout=layout, config=small_config())
    seen = seen_batch(*BATCHES["hole"], small_config())[:, None]
    torch.testing.assert_close(out, mms.attention_reference(q, k, v, mask=seen))
