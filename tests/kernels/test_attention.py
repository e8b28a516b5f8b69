"""Every implementation of `attend` against float64 attention under the selection's dense mask."""

import pytest
import torch

import mm_sparse as mms
from mm_sparse.kernels.triton import attention_backward
from tests.support.kernel_cases import CASES, MIXED, Case, errors_and_bounds, poison_empty

IDS = [c.name for c in CASES]
ON_CPU = [("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.float32)]
ON_CPU += [("triton", torch.float16)]


def assert_within(rows: list[tuple[str, float, float]]) -> None:
    for name, error, bound in rows:
        assert error <= bound, f"{name}: error {error:.3g} above {bound:.3g}"


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize(("backend", "dtype"), ON_CPU, ids=lambda x: str(x).split(".")[-1])
@pytest.mark.thinned(4)
def test_equals_dense_attention_under_its_mask(
    case: Case, backend: str, dtype: torch.dtype
) -> None:
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("the interpreter is for machines without a GPU; the gpu tests run the kernel")
    assert_within(errors_and_bounds(*case.make(dtype, backend=backend)))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gpu_equals_dense_attention_under_its_mask(case: Case, dtype: torch.dtype) -> None:
    assert_within(errors_and_bounds(*case.make(dtype, device="cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize("unit", [16, 32, 64, 128])
@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 192, 256])
def test_gpu_every_unit_tile_and_head_dim(unit: int, tile: int, dim: int) -> None:
    rows = [
        [("text", 301), ("image", (13, 17)), ("text", 190)],
        [("text", 333, 0), ("text", 99, 1)],
    ]
    group = (
        {16: 1, 32: 3, 64: 8, 128: 4}[unit] if tile == 128 else {16: 8, 32: 1, 64: 3, 128: 2}[unit]
    )
    case = Case("x", rows, group, 2, dim, unit, tile, padding="left")
    assert_within(errors_and_bounds(*case.make(torch.bfloat16, device="cuda")))


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.thinned(4)
def test_gradients_of_the_first_units_may_be_made_in_pieces(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there are many tiles; a piece may be of a part of a tile, and of none."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU; a gpu test runs the kernel")
    monkeypatch.setattr(attention_backward, "pieces_of", lambda _: 3)
    assert_within(errors_and_bounds(*case.make(torch.float32, backend="triton")))


@pytest.mark.gpu
@pytest.mark.parametrize("unit", [16, 64, 128])
def test_gpu_gradients_in_pieces_repeat_bit_for_bit(unit: int) -> None:
    rows, config = [[("text", 4099), ("image", (41, 43)), ("text", 77)]], {"deterministic": True}
    case = Case("x", rows, 4, 2, 128, unit, 128, config=config)
    q, k, v, selection = case.make(torch.bfloat16, device="cuda")
    assert attention_backward.pieces_of(selection.plan.tiles.shape[1]) > 1
    assert_within(errors_and_bounds(q, k, v, selection))
    out = mms.attend(q, k, v, selection)
    runs = [
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
        for _ in range(3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.gpu
def test_gpu_long_and_odd() -> None:
    case = Case("x", [[("text", 4099), ("image", (41, 43)), ("text", 77)]], 4, 2, 128, tile=128)
    assert_within(errors_and_bounds(*case.make(torch.bfloat16, device="cuda")))


@pytest.mark.gpu
def test_gpu_memory_grows_with_kept_units_only() -> None:
    """No tensor of queries times keys: at 64k tokens such a mask alone takes 4 GiB a head."""
    case = Case("x", [[("text", 65536)]], 1, 2, 64, 64, 128, config={"tokens": 2048})
    q, k, v, selection = case.make(torch.bfloat16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mms.attend(q, k, v, selection).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2**29, f"{peak / 2**20:.0f} MiB"


def _devices() -> list:
    return [("cpu", "torch"), pytest.param(("cuda", "auto"), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("where", _devices(), ids=["cpu", "cuda"])
def test_gradients_repeat_bit_for_bit(where: tuple[str, str]) -> None:
    q, k, v, selection = Case("x", [MIXED] * 2, 3, 2).make(torch.float32, *where)
    runs = []
    for _ in range(3):
        out = mms.attend(q, k, v, selection)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("where", _devices(), ids=["cpu", "cuda"])
def test_non_contiguous_inputs(where: tuple[str, str]) -> None:
    q, k, v, selection = Case("x", [MIXED], 3, 2).make(torch.float32, *where)
    want = mms.attend(q, k, v, selection)
    moved = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(mms.attend(*moved, selection), want)
    strided = [torch.stack([x.detach()] * 2, -1)[..., 0] for x in (q, k, v)]
    assert strided[0].stride(-1) == 2
    assert torch.equal(mms.attend(*strided, selection), want)


@pytest.mark.parametrize("where", _devices(), ids=["cpu", "cuda"])
def test_a_query_that_sees_nothing_gives_zeros_and_zero_gradients(where: tuple[str, str]) -> None:
    case = Case("x", [MIXED, [("text", 20)]], 2, 1, padding="left")
    q, k, v, selection = case.make(torch.float32, *where)
    out = mms.attend(q, k, v, selection)
    padding = ~selection.plan.layout.valid
    assert padding.any()
    at = padding[:, None].expand(-1, 2, -1)
    assert (out[at] == 0).all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert (dq[at] == 0).all()
    assert (dk[padding[:, None]] == 0).all()
    assert (dv[padding[:, None]] == 0).all()


@pytest.mark.parametrize("where", _devices(), ids=["cpu", "cuda"])
def test_a_nan_query_spoils_its_own_row_only(where: tuple[str, str]) -> None:
    q, k, v, selection = Case("x", [[("text", 100)]]).make(torch.float32, *where)
    want = mms.attend(q, k, v, selection)
    bad = q.detach().clone()
    bad[0, 0, 17] = float("nan")
    got = mms.attend(bad, k, v, selection)
    assert got[0, 0, 17].isnan().all()
    others = torch.arange(100, device=q.device) != 17
    assert torch.equal(got[0, 0, others], want[0, 0, others])


@pytest.mark.parametrize("where", _devices(), ids=["cpu", "cuda"])
def test_a_nan_key_reaches_only_tiles_that_keep_its_unit(where: tuple[str, str]) -> None:
    q, k, v, selection = Case("x", [[("text", 300)]] * 2).make(torch.float32, *where)
    want = mms.attend(q, k, v, selection)
    bad = v.detach().clone()
    bad[0, 0, 250] = float("nan")
    got = mms.attend(q, k, bad, selection)
    assert torch.equal(got[1], want[1])
    unit = int((selection.plan.units[0, :, 0] <= 250).sum()) - 1
    kept = (selection.index[0, 0] == unit).any(-1)
    tile = torch.arange(300, device=q.device) // 64
    untouched = ~kept[tile]
    assert untouched.any()
    assert torch.equal(got[0, 0, untouched], want[0, 0, untouched])
    sees = selection.to_dense_mask()[0, 0, :, 250]
    assert got[0, 0, sees].isnan().all()


@pytest.mark.parametrize("where", _devices(), ids=["cpu", "cuda"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no-rows", "no-tokens"])
def test_empty_batches_and_sequences(where: tuple[str, str], shape: tuple[int, int]) -> None:
    batch, length = shape
    device, backend = where
    layout = mms.TokenLayout.text(batch, length, device=device)
    config = mms.SparseConfig(backend=backend, dense_below=0)
    q, k, v = (torch.randn(batch, 2, length, 32, device=device, requires_grad=True) for _ in "qkv")
    out = mms.sparse_attention(q, k, v, layout=layout, config=config)
    assert out.shape == q.shape
    out.sum().backward()


@pytest.mark.parametrize("queries", [1, 7, 64, 100])
def test_chunks_equal_the_whole_at_full_density(queries: int) -> None:
    layout = mms.TokenLayout.from_spans([("text", 50), ("image", (8, 8)), ("text", 86)])
    config = mms.SparseConfig(ratio=1.0, dense_below=0, bidirectional=())
    q, k, v = torch.randn(3, 1, 4, 200, 32)
    k, v = k[:, :2], v[:, :2]
    whole = mms.sparse_attention(q, k, v, layout=layout, config=config)
    part = mms.sparse_attention(q[:, :, -queries:], k, v, layout=layout, config=config)
    torch.testing.assert_close(part, whole[:, :, -queries:])
    middle = mms.sparse_attention(
        q[:, :, 30 : 30 + queries], k, v, layout=layout, config=config, query_offset=30
    )
    torch.testing.assert_close(middle, whole[:, :, 30 : 30 + queries])


@pytest.mark.slow
def test_float64_gradcheck() -> None:
    case = Case("x", [[("text", 20), ("image", 20)]], 2, 1, 8, config={"ratio": 0.5})
    q, k, v, selection = case.make(torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v: mms.attend(q, k, v, selection), (q, k, v), nondet_tol=0.0, atol=1e-4
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("regular", [True, False])
@pytest.mark.parametrize("dim", [32, pytest.param(128, marks=pytest.mark.slow)])
def test_lists_of_32_bits_give_what_those_of_16_give(dim: int, regular: bool, device: str) -> None:
    rows = [[("text", 256)]] if regular else [MIXED]
    backend = "auto" if torch.cuda.is_available() and device == "cpu" else "triton"
    q, k, v, selection = Case("x", rows, 2, 2, dim, 16, 128).make(torch.float16, device, backend)
    assert selection.index.dtype == torch.int16
    wide = mms.Selection(selection.index.int(), selection.count, selection.plan)
    found = []
    for lists in (selection, wide):
        out = mms.attend(q, k, v, lists)
        found.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
