"""Attention over pages against float64 attention on keys that were copied out of them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mm_sparse.kernels import dispatch
from mm_sparse.kernels.block_lists import BlockLists
from mm_sparse.kernels.paged.pages import flat_tokens, gather_tokens, page_layout, place_units
from mm_sparse.kernels.paged.placed_lists import placed_lists
from mm_sparse.kernels.paged_attention import (
    paged_attention,
    paged_attention_reference,
    pages_of,
)
from mm_sparse.kernels.triton import attention_decode
from tests.support.paged_cases import LAYOUTS, PagedCase

CASES = {
    "decode": PagedCase((70, 33, 16, 1), 1),
    "decode-in-parts": PagedCase((1500, 900), 1, dim=64, share=0.6),
    "chunk": PagedCase((150,), 37, group=3, kv_heads=2),
    "chunk-of-all": PagedCase((64,), 64, dim=64, size=32),
    "chunks-of-a-batch": PagedCase((90, 140), 21, size=64, unit=32),
    "page-of-128-unit-64": PagedCase((300, 257), 1, group=8, size=128, unit=64, dim=80),
    "tile-of-128": PagedCase((260,), 96, tile=128, size=128, unit=128, dim=128),
}


def arguments(case: PagedCase, dtype: torch.dtype, device: str = "cpu") -> tuple:
    q, k, v, table, lists = case.make(dtype, device)
    return q, k, v, table, lists, case.dim**-0.5


def error_and_bound(
    case: PagedCase, dtype: torch.dtype, device: str, backend: str, finite: bool = False
) -> tuple:
    """Largest error against float64, and twice that of plain PyTorch plus roundings."""
    q, k, v, table, lists, scale = arguments(case, dtype, device)
    clean = [x.nan_to_num(0.0) for x in (k, v)]
    if finite:
        for x in (k, v):
            x.nan_to_num_(7.0)
    exact = paged_attention_reference(q.double(), *(x.double() for x in clean), table, lists, scale)
    plain = paged_attention_reference(q, *clean, table, lists, scale)
    out, lse = paged_attention(q, k, v, table, lists, scale, backend)
    assert out.shape == q.shape
    assert lse.isfinite().all()
    error, plain_error = ((x.double() - exact).abs().max().item() for x in (out, plain))
    return error, 2 * plain_error + 4 * torch.finfo(dtype).eps * exact.abs().max().item()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equals_attention_on_keys_out_of_their_pages(
    case: PagedCase, dtype: torch.dtype, backend: str
) -> None:
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("the interpreter is for machines without a GPU; the gpu tests run the kernel")
    error, bound = error_and_bound(case, dtype, "cpu", backend)
    assert error <= bound


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("queries", [1, 20])
def test_every_layout_of_memory(layout: str, queries: int) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU; the gpu tests run the kernel")
    case = PagedCase((75, 40), queries, size=32, layout=layout)
    error, bound = error_and_bound(case, torch.float32, "cpu", "triton")
    assert error <= bound


def test_a_decoding_step_of_long_lists_is_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    found, asked = [], attention_decode.splits_of_lists
    monkeypatch.setattr(
        attention_decode, "splits_of_lists", lambda *a: found.append(asked(*a)) or found[-1]
    )
    error_and_bound(CASES["decode-in-parts"], torch.float32, "cpu", "triton")
    assert found[0] > 1


def test_the_wrong_page_is_noticed() -> None:
    """The comparison above can fail: with two pages exchanged the numbers are others."""
    q, k, v, table, lists, scale = arguments(CASES["chunk"], torch.float32)
    k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
    right = paged_attention_reference(q, k, v, table, lists, scale)
    wrong = paged_attention(q, k, v, table.flip(1).contiguous(), lists, scale, "torch")[0]
    assert (right - wrong).abs().max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_units_are_where_place_units_says(layout: str) -> None:
    case = PagedCase((100, 70), 1, size=32, layout=layout)
    _, k, _, table, _ = case.make(torch.float32)
    k = k.nan_to_num(7.0)
    table = table.clamp(min=0)
    units = torch.arange(6).expand(2, -1)
    flat = flat_tokens(k)[0]  # (K, M, D)
    places = place_units(units, pages_of(k, table, 16))
    found = torch.stack([flat[:, p * 16 : p * 16 + 16] for p in places.flatten().tolist()])
    want = gather_tokens(k, table, 96).unflatten(2, (6, 16)).transpose(1, 2).flatten(0, 1)
    assert torch.equal(found, want)


def test_placed_lists_are_the_places_of_listed_units() -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    case = PagedCase((150,), 37, size=32, layout="stacked")
    _, k, _, table, lists = case.make(torch.float32)
    pages = pages_of(k, table, 16)
    placed = placed_lists(lists.index, lists.count, pages)
    want = place_units(lists.index.clamp(min=0), pages)
    listed = torch.arange(lists.index.shape[-1]) < lists.count[..., None]
    assert torch.equal(placed[listed].long(), want[listed])


def test_pages_must_hold_whole_units() -> None:
    with pytest.raises(ValueError, match="whole units of 32 tokens, got 16"):
        page_layout(torch.zeros(4, 2, 16, 8), 32)
    with pytest.raises(ValueError, match="apart"):
        page_layout(torch.zeros(4, 2 * 16 * 8 + 8)[:, :256].view(4, 2, 16, 8)[:, :1], 16)
    with pytest.raises(TypeError, match="int32"):
        pages_of(torch.zeros(4, 2, 16, 8), torch.zeros(1, 3), 16)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda q, k, v, table: (q[0], k, v, table), ValueError, "q must be"),
        (lambda q, k, v, table: (q[..., :8], k, v, table), ValueError, "q must have k's head dim"),
        (lambda q, k, v, table: (q[:, :3], k, v, table), ValueError, "q must have a multiple of"),
        (lambda q, k, v, table: (q.double(), k, v, table), TypeError, "k must have q's dtype"),
        (lambda q, k, v, table: (q, k, v[:, :1], table), ValueError, "v must have k's shape"),
        (lambda q, k, v, table: (q, k, v, table[:1]), ValueError, "table must have a row for"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    change: Callable[..., tuple[Tensor, ...]], kind: type[Exception], words: str
) -> None:
    q, k, v, table, lists = PagedCase((40, 70), 5).make(torch.float32)
    with pytest.raises(kind, match=words):
        paged_attention(*change(q, k, v, table), lists, 0.1, "torch")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gpu_equals_attention_on_keys_out_of_their_pages(
    case: PagedCase, dtype: torch.dtype
) -> None:
    # Full tiles of 16-bit numbers go to Hopper's kernel, which multiplies what stands behind the
    # end of a sequence by zero.
    finite = case.tile == 128 and dtype != torch.float32
    error, bound = error_and_bound(case, dtype, "cuda", "auto", finite=finite)
    assert error <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_hopper_kernel_reads_pages(size: int, dim: int, layout: str) -> None:
    """Full tiles of one sequence, which the copy engine of Hopper serves."""
    case = PagedCase((700,), 300, 4, 2, dim, size, 16, 128, layout=layout)
    q, k, v, table, lists, scale = arguments(case, torch.bfloat16, "cuda")
    # It multiplies what stands behind the end by zero.
    k, v = (x.nan_to_num_(0.0) for x in (k, v))
    out, _ = paged_attention(q, k, v, table, lists, scale)
    exact = paged_attention_reference(q.double(), k.double(), v.double(), table, lists, scale)
    plain = paged_attention_reference(q, k, v, table, lists, scale)
    bound = 2 * (plain - exact).abs().max() + 4 * torch.finfo(q.dtype).eps * exact.abs().max()
    assert (out - exact).abs().max() <= bound


@pytest.mark.gpu
def test_gpu_a_recorded_step_serves_other_lengths() -> None:
    """What a CUDA graph recorded reads lengths, lists and pages from where they are."""
    long, short = PagedCase((1500, 900), 1, dim=64), PagedCase((1500, 40), 1, dim=64)
    q, k, v, table, lists, scale = arguments(long, torch.float16, "cuda")
    paged_attention(q, k, v, table, lists, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = paged_attention(q, k, v, table, lists, scale)
    other = arguments(short, torch.float16, "cuda")
    _overwrite((q, table), (other[0], other[3]))
    for mine, theirs in ((k, other[1]), (v, other[2])):
        mine.copy_(theirs)
    _overwrite_lists(lists, other[4])
    graph.replay()
    want, _ = paged_attention(q, k, v, table, lists, scale)
    assert torch.equal(out, want)


def _overwrite(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        a.copy_(b)


def _overwrite_lists(mine: BlockLists, theirs: BlockLists) -> None:
    width = min(mine.index.shape[-1], theirs.index.shape[-1])
    mine.index[..., :width].copy_(theirs.index[..., :width])
    mine.count.copy_(theirs.count.clamp(max=width))
    _overwrite((mine.units, mine.span), (theirs.units, theirs.span))


def test_dispatch_takes_the_copy_engine_for_one_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a batch share memory, which a descriptor with a row for each cannot say."""
    asked: list[int] = []
    monkeypatch.setattr(dispatch, "on_hopper", lambda *a: asked.append(1) and False)
    for lengths in ((300,), (300, 300)):
        case = replace(CASES["tile-of-128"], lengths=lengths)
        q, k, v, table, lists, scale = arguments(case, torch.float32)
        pages = pages_of(k, table, lists.unit)
        if torch.cuda.is_available():
            pytest.skip("the interpreter is for machines without a GPU")
        dispatch.forward(q, flat_tokens(k), flat_tokens(v), lists, scale, pages)
    assert len(asked) == 1
