"""The op inside torch: opcheck, compile, checkpoint, autocast, refusals."""

import sys
import types

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mm_sparse as mms
from mm_sparse.kernels import dispatch, ops
from mm_sparse.kernels.block_lists import BlockLists
from mm_sparse.kernels.ops import attend_op
from mm_sparse.kernels.reference import transpose_lists
from tests.support.kernel_cases import CASES, MIXED, Case

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASE = Case("x", [MIXED, [("text", 90)]], 3, 2)


def _op_args(device: str, deterministic: bool = True) -> tuple:
    q, k, v, s = CASE.make(torch.float32, device)
    p = s.plan
    lists = (p.tiles, p.units, p.span, s.index, s.count)
    return (
        q,
        k,
        v,
        *lists,
        p.tile_tokens,
        p.unit,
        p.unit_offset,
        p.tile_offset,
        0.2,
        "auto",
        deterministic,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_opcheck(deterministic: bool, device: str) -> None:
    torch.library.opcheck(attend_op, _op_args(device, deterministic))


@pytest.mark.parametrize(("group", "dim", "unit", "deterministic", "added"), [
    (1, 128, 16, False, True), (1, 128, 64, False, False), (2, 128, 64, False, True),
    (1, 64, 128, False, True), (1, 128, 16, True, False),
])  # fmt: skip
def test_which_backward_serves(
    group: int, dim: int, unit: int, deterministic: bool, added: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked, q = [], torch.empty(1, group, 256, dim)
    other = types.SimpleNamespace(block_sparse_attention_bwd_hopper=lambda *a: "any order")
    monkeypatch.setitem(sys.modules, "mm_sparse.kernels.hopper.backward", other)
    monkeypatch.setattr("mm_sparse.kernels.hopper.backward", other, raising=False)
    monkeypatch.setattr(dispatch, "on_hopper", lambda *a: asked.append(a[-1]) or True)
    monkeypatch.setattr(
        dispatch.attention_backward, "block_sparse_attention_bwd", lambda *a: "in order"
    )
    lists = BlockLists(*(q,) * 5, 128 // group, unit, 0, 0)
    args = (q, q, q[:, :1], q[:, :1], q, q[..., 0], lists, 0.2)
    found = dispatch.backward(*args, deterministic)
    assert found == ("any order" if added else "in order")
    assert asked == [128] * added


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore")
def test_compiles_without_a_graph_break(device: str) -> None:
    q, k, v, selection = CASE.make(torch.float32, device)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return mms.attend(q * 1.5, k, v, selection).square().sum()

    compiled = torch.compile(
        loss, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor"
    )
    want = torch.autograd.grad(loss(q, k, v), (q, k, v))
    got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_checkpointing(device: str) -> None:
    q, k, v, selection = CASE.make(torch.float32, device)
    want = torch.autograd.grad(mms.attend(q, k, v, selection).sum(), (q, k, v))
    again = checkpoint(mms.attend, q, k, v, selection, use_reentrant=False)
    got = torch.autograd.grad(again.sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_computes_in_its_dtype(device: str) -> None:
    q, k, v, selection = CASE.make(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        out = mms.attend(q, k, v, selection)
    assert out.dtype == torch.bfloat16
    want = mms.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), selection)
    assert torch.equal(out, want)
    out.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_transposed_lists_hold_every_kept_pair_once(case: Case) -> None:
    *_, selection = case.make(torch.float32)
    plan = selection.plan
    tiles, offsets = transpose_lists(
        plan.tiles, plan.units, plan.span, selection.index, selection.count,
        plan.tile_tokens, plan.unit,
    )  # fmt: skip
    assert int(offsets[-1]) == int(selection.count.sum())
    got = set()
    batch, heads, num_units = (
        selection.index.shape[0],
        selection.index.shape[1],
        plan.units.shape[1],
    )
    for b in range(batch):
        for h in range(heads):
            for u in range(num_units):
                i = (b * heads + h) * num_units + u
                listed = tiles[offsets[2 * i] : offsets[2 * i + 2]].tolist()
                got |= {(b, h, t, u) for t in listed}
                whole = tiles[offsets[2 * i] : offsets[2 * i + 1]].tolist()
                assert whole == sorted(whole)
                start, size = plan.units[b, u].tolist()
                for t in whole:
                    first, length = plan.tiles[b, t].tolist()
                    span = plan.span[b, first : first + length]
                    assert int(span[:, 0].max()) <= start
                    assert int(span[:, 1].min()) >= start + size
    want = {
        (b, h, t, int(u))
        for b in range(batch)
        for h in range(heads)
        for t in range(selection.index.shape[2])
        for u in selection.index[b, h, t, : selection.count[b, h, t]]
    }
    assert got == want


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_triton_builds_the_same_transposed_lists(case: Case) -> None:
    from mm_sparse.kernels.triton.transpose_lists import transpose_lists as by_triton

    *_, selection = case.make(torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    plan = selection.plan
    lists = (plan.tiles, plan.units, plan.span, selection.index, selection.count)
    tiles, offsets = transpose_lists(*lists, plan.tile_tokens, plan.unit)
    got_tiles, edges, chunks = by_triton(*lists, plan.tile_tokens, plan.unit)
    assert torch.equal(edges[::chunks], offsets)
    assert torch.equal(got_tiles[: offsets[-1]], tiles[: offsets[-1]])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda q, k, v: (q[0], k, v), ValueError, r"q must be \(batch, heads, tokens, head dim\)"),
        (lambda q, k, v: (q, k.half(), v), TypeError, "k must have q's dtype torch.float32, got"),
        (lambda q, k, v: (q, k, v[:, :, 1:]), ValueError, "v must have k's shape"),
        (lambda q, k, v: (q[:, :5], k, v), ValueError, "multiple of k's 2 heads, got 5 heads"),
        (lambda q, k, v: (q[:, :, 1:], k, v), ValueError, "q must be .* as the selection has"),
        (lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]), ValueError, "k must have 2 heads and 172"),
        (lambda q, k, v: (q, k[..., :8], v[..., :8]), ValueError, "q's batch 2 and head dim 32"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), TypeError, "q must be floating point"),
        (lambda q, k, v: (q.to("meta"), k, v), ValueError, "k must be on q's device meta, got cpu"),
        (lambda q, k, v: ("q", k, v), TypeError, "q must be a tensor, got str"),
    ],
    ids=["rank", "dtype", "v", "heads", "queries", "keys", "dim", "int", "device", "type"],
)
def test_refuses_with_the_name_of_the_argument(change, error, words) -> None:
    q, k, v, selection = CASE.make(torch.float32)
    with pytest.raises(error, match=words):
        mms.attend(*change(q.detach(), k.detach(), v.detach()), selection)


def test_refuses_a_backend_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "interpreted", lambda: False)
    q, k, v, selection = CASE.make(torch.float32, backend="triton")
    with pytest.raises(ValueError, match="backend 'triton' needs a CUDA GPU"):
        mms.attend(q, k, v, selection)
