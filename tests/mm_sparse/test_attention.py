"""Score, select and attend in one call, its dense path, and what both refuse."""

import math
import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import mm_sparse as mms
from mm_sparse import Modality, SparseConfig, TokenLayout
from mm_sparse.dense import BREAK_EVEN, dense_attention
from tests.mm_sparse.layouts import (
    FEW,
    HOLE,
    MIXED,
    PACKED,
    SHORT,
    TEXT,
    Row,
    batches,
    configs,
    members,
    random_qk,
    seen_batch,
)

BATCHES: dict[str, tuple[list[Row], str]] = {
    "text": ([TEXT, TEXT], "right"),
    "picture": ([[("image", (9, 11))]], "right"),
    "padded-left": ([MIXED, TEXT], "left"),
    "padded-right": ([MIXED, TEXT], "right"),
    "packed": ([PACKED], "right"),
    "hole": ([HOLE], "right"),
    "short-segments": ([SHORT], "right"),
}
GROUPS = [(1, 1), (3, 1), (8, 1), (6, 2)]


def config(**fields: object) -> SparseConfig:
    return SparseConfig(**{"tile": 64, "sinks": 4, "window": 8, "dense_below": 0, **fields})


def inputs(
    name: str, heads: int = 3, kv_heads: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[TokenLayout, Tensor, Tensor, Tensor]:
    rows, side = BATCHES[name]
    layout = TokenLayout.from_rows(rows, padding_side=side)
    q, k = random_qk(layout, heads, kv_heads)
    _, v = random_qk(layout, heads, kv_heads, seed=1)
    return layout, *(x.to(dtype).requires_grad_() for x in (q, k, v))


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

    monkeypatch.setattr("mm_sparse.attention.attend", fail)
    monkeypatch.setattr("mm_sparse.attention.select", fail)


@pytest.fixture
def no_dense_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the dense path ran")

    monkeypatch.setattr("mm_sparse.attention.dense_attention", fail)


@pytest.mark.usefixtures("no_dense_path")
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_keeping_all_is_dense_attention(name: str, heads: int, kv_heads: int, causal: bool) -> None:
    layout, *tensors = inputs(name, heads, kv_heads)
    asked = config(ratio=1.0, causal=causal)
    out = mms.sparse_attention(*tensors, layout=layout, config=asked)
    assert_equals_reference(out, tensors, seen_batch(*BATCHES[name], asked)[:, None])


@pytest.mark.usefixtures("no_sparse_path")
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_the_dense_path_is_attention_on_all_that_is_visible(
    name: str, heads: int, kv_heads: int, causal: bool
) -> None:
    layout, *tensors = inputs(name, heads, kv_heads)
    asked = config(dense_below=10**6, causal=causal)
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
        asked = config(ratio=1.0, bidirectional=kinds)
        a, b = (mms.sparse_attention(q, k, x, layout=layout, config=asked) for x in (v, other))
        assert bool((a[0, :, first] != b[0, :, first]).any()) == moves
        assert torch.equal(a[0, :, :first], b[0, :, :first])


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
@pytest.mark.parametrize("count", [1, 37])
def test_a_chunk_of_queries_equals_its_part_of_the_whole(dense_below: int, count: int) -> None:
    layout, q, k, v = inputs("padded-left")
    asked = config(ratio=1.0, dense_below=dense_below)
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
    layout, q, k, v = inputs("text")
    for causal in (True, False):
        asked = config(dense_below=10**6, causal=causal)
        whole = mms.sparse_attention(q, k, v, layout=layout, config=asked)
        part = mms.sparse_attention(q[:, :, -9:], k, v, layout=layout, config=asked)
        torch.testing.assert_close(part, whole[:, :, -9:])


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
def test_padding_does_not_change_a_row(dense_below: int) -> None:
    asked = config(ratio=0.4, dense_below=dense_below)
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
    asked = config(ratio=1.0, dense_below=dense_below)
    out = mms.sparse_attention(q, k, v, layout=layout, config=asked, scale=0.07)
    seen = seen_batch(*BATCHES["padded-right"], asked)[:, None]
    torch.testing.assert_close(out, mms.attention_reference(q, k, v, mask=seen, scale=0.07))


def test_the_scale_reaches_the_scores() -> None:
    """Sharper scores choose other units: twice the scale is twice the query."""
    layout = TokenLayout.text(1, 512)
    q, k = random_qk(layout, 3, 1)
    v = random_qk(layout, 3, 1, seed=1)[1]
    options = {"layout": layout, "config": config(mass=0.5)}
    sharp = mms.sparse_attention(q, k, v, scale=2 / math.sqrt(8), **options)
    torch.testing.assert_close(sharp, mms.sparse_attention(2 * q, k, v, **options))


# Which path runs.


@pytest.mark.usefixtures("no_sparse_path")
@pytest.mark.parametrize(
    "fields", [{"dense_below": 71}, {"backend": "dense"}, {"dense_below": None}], ids=str
)
def test_what_is_short_or_asked_for_runs_dense(fields: dict) -> None:
    layout, q, k, v = inputs("text")
    mms.sparse_attention(q, k, v, layout=layout, config=config(**fields))


@pytest.mark.usefixtures("no_dense_path")
@pytest.mark.parametrize("dense_below", [0, 70])
def test_what_is_long_enough_runs_sparse(dense_below: int) -> None:
    layout, q, k, v = inputs("text")
    mms.sparse_attention(q, k, v, layout=layout, config=config(dense_below=dense_below))


@pytest.mark.usefixtures("no_dense_path")
def test_the_measured_length_decides_by_default() -> None:
    layout = TokenLayout.text(1, BREAK_EVEN["cpu"])
    q, k = random_qk(layout, 1, 1)
    mms.sparse_attention(q, k, k, layout=layout, config=config(dense_below=None))


# Numbers that are not finite, and dtypes.


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_bad_query_spoils_its_own_row_only(bad: float, dense_below: int) -> None:
    layout, q, k, v = inputs("padded-right")
    asked = config(ratio=1.0, dense_below=dense_below)
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
    asked = config(ratio=1.0, dense_below=dense_below, bidirectional=())
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
    asked = config(ratio=0.4)
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
    plan = layout.plan(config(backend=backend), num_query_heads=1, num_kv_heads=1)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
def test_dtypes_come_out_as_they_went_in(dtype: torch.dtype, dense_below: int) -> None:
    layout, q, k, v = inputs("padded-left", dtype=dtype)
    asked = config(ratio=1.0, dense_below=dense_below)
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
            q, k, v, layout=layout, config=config(ratio=1.0, dense_below=dense_below)
        )
    assert out.dtype == torch.bfloat16


# Nothing there, and bad input.


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
def test_empty_batches_rows_and_queries_work(dense_below: int) -> None:
    asked = config(dense_below=dense_below)
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
    out = mms.sparse_attention(q, k, k, layout=layout, config=config(dense_below=dense_below))
    assert (out == 0).all()
    for grad in torch.autograd.grad(out.sum(), (q, k)):
        assert (grad == 0).all()


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
def test_bad_input_is_refused_by_name_on_either_path(dense_below: int) -> None:
    layout, q, k, v = inputs("text", 4, 2)
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
            mms.sparse_attention(*args, layout=layout, config=config(dense_below=dense_below))


@pytest.mark.parametrize("dense_below", [0, 10**6], ids=["sparse", "dense"])
@pytest.mark.parametrize("offset", [-1, 62])
def test_an_offset_outside_of_the_layout_is_refused(offset: int, dense_below: int) -> None:
    layout, q, k, v = inputs("text")
    message = f"must lie in a layout of 70 tokens, got 9 and {offset}"
    with pytest.raises(ValueError, match=message):
        mms.sparse_attention(
            q[:, :, :9],
            k,
            v,
            layout=layout,
            config=config(dense_below=dense_below),
            query_offset=offset,
        )


def test_attend_refuses_tensors_that_do_not_fit_the_selection() -> None:
    layout, q, k, v = inputs("text", 4, 2)
    asked = config()
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
    _, q, k, v = inputs("text")
    with pytest.raises(TypeError, match="mask must be bool, True where visible, got"):
        mms.attention_reference(q, k, v, mask=torch.ones(70, 70))


def test_a_layout_or_config_of_another_kind_is_refused() -> None:
    layout, q, k, v = inputs("text")
    with pytest.raises(TypeError, match="layout must be a TokenLayout, got NoneType"):
        mms.sparse_attention(q, k, v, layout=None, config=config())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be a SparseConfig, got dict"):
        mms.sparse_attention(q, k, v, layout=layout, config={})  # type: ignore[arg-type]


def test_dense_attention_is_public_in_its_module() -> None:
    layout, q, k, v = inputs("hole")
    out = dense_attention(q, k, v, layout=layout, config=config())
    seen = seen_batch(*BATCHES["hole"], config())[:, None]
    torch.testing.assert_close(out, mms.attention_reference(q, k, v, mask=seen))
