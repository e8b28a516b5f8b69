"""The backward for Hopper that adds gradients of keys and values up in any order, on such a GPU."""

from dataclasses import replace

import pytest
import torch

import mm_sparse as mms
from mm_sparse.kernels import dispatch
from tests.kernels.test_attention import assert_within
from tests.support.hopper_cases import SHAPES, need_hopper, up_to_a_short_unit
from tests.support.kernel_cases import Case, errors_and_bounds, poison_empty

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills up with the unit of each call of the backward that adds in any order."""
    need_hopper()
    hopper_backward = pytest.importorskip("mm_sparse.kernels.hopper.backward")
    found, run = [], hopper_backward.block_sparse_attention_bwd_hopper
    monkeypatch.setattr(
        hopper_backward,
        "block_sparse_attention_bwd_hopper",
        lambda *a: found.append(a[6].unit) or run(*a),
    )
    monkeypatch.setattr(dispatch, "WIDE_UNIT", 256)
    poison_empty(monkeypatch)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gpu_gradients_added_in_any_order_are_within_bounds(
    case: Case, dtype: torch.dtype, added: list[int]
) -> None:
    case = replace(case, config={**case.config, "deterministic": False})
    assert_within(errors_and_bounds(*case.make(dtype, device="cuda")))
    assert added == [case.unit]


@pytest.mark.gpu
def test_gpu_gradients_of_a_sample_may_be_added_in_any_order(added: list[int]) -> None:
    layout = mms.TokenLayout.from_spans([("text", 1), ("image", (41, 43))], device="cuda")
    q, k, v = torch.randn(3, 1, 4, layout.length, 64, device="cuda", dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = []
    for deterministic in (True, False):
        config = mms.SparseConfig(
            0.3, sample_ratio=0.5, causal=False, dense_below=0, deterministic=deterministic
        )
        out = mms.sparse_attention(q, k, v, layout=layout, config=config)
        found.append(torch.autograd.grad(out.float().square().sum(), leaves))
    for one, other in zip(*found, strict=True):
        error = (one - other).float().norm() / other.float().norm()
        assert error < 2 * torch.finfo(torch.bfloat16).eps
    assert added == [16, 16]


@pytest.mark.gpu
@pytest.mark.parametrize("asked", ["of the config", "of torch"])
def test_gpu_deterministic_gradients_repeat_bit_for_bit(asked: str, added: list[int]) -> None:
    case = replace(SHAPES[1], config={"deterministic": asked == "of the config"})
    q, k, v, selection = case.make(torch.bfloat16, device="cuda")
    torch.use_deterministic_algorithms(asked == "of torch")
    try:
        out = mms.attend(q, k, v, selection)
        runs = [
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
            for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    assert not added


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "dim", "unit", "times"), [
    (1, 128, 64, 0), (1, 128, 32, 1), (2, 128, 64, 1), (1, 64, 128, 1),
])  # fmt: skip
def test_gpu_wide_units_of_a_head_alone_are_never_added_up_in_memory(
    group: int, dim: int, unit: int, times: int, added: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "WIDE_UNIT", 64)
    case = Case("x", [[("text", 512)]], group, 2, dim, unit, 128, config={"deterministic": False})
    q, k, v, selection = case.make(torch.bfloat16, device="cuda")
    mms.attend(q, k, v, selection).float().square().sum().backward()
    assert len(added) == times


@pytest.mark.gpu
def test_gpu_gradients_of_a_head_behind_two_billion_numbers_are_as_alone(added: list[int]) -> None:
    tokens, heads = 1 << 20, 17
    if torch.cuda.mem_get_info()[0] < 72 << 30:
        pytest.skip("needs 72 GiB of GPU memory")
    layout = mms.TokenLayout.text(1, tokens, device="cuda")
    config = mms.SparseConfig(
        unit=16, tile=128, tokens=64, causal=False, sinks=0, window=0, deterministic=False
    )
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, heads, tokens, 128, device="cuda", dtype=torch.half, generator=generator)
        for _ in range(4)
    )
    plan = layout.plan(config, num_query_heads=heads, num_kv_heads=heads)
    size, quarter = (1, heads, plan.tiles.shape[1], 4), plan.units.shape[1] // 4
    index = torch.randint(quarter, size, device="cuda", generator=generator)
    index = (index + quarter * torch.arange(4, device="cuda")).int()
    count = torch.full(size[:3], 4, device="cuda", dtype=torch.int32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = mms.attend(*leaves, mms.Selection(index, count, plan))
    found = torch.autograd.grad(out, leaves, dout)
    del out
    alone = layout.plan(replace(config, deterministic=True), num_query_heads=1, num_kv_heads=1)
    for head in (0, heads - 1):
        own = slice(head, head + 1)
        part = [x[:, own].detach().contiguous().requires_grad_() for x in leaves]
        lists = mms.Selection(index[:, own].contiguous(), count[:, own].contiguous(), alone)
        want = torch.autograd.grad(mms.attend(*part, lists), part, dout[:, own].contiguous())
        for one, other in zip(found, want, strict=True):
            error = (one[:, own] - other).float().norm() / other.float().norm()
            assert error < torch.finfo(torch.half).eps
    assert added == [16]


@pytest.mark.gpu
def test_gpu_strided_inputs_have_the_same_gradients(added: list[int]) -> None:
    case = replace(SHAPES[4], config={"deterministic": False})
    q, k, v, selection = case.make(torch.bfloat16, device="cuda")
    out = mms.attend(q, k, v, selection)
    dout = torch.randn_like(out)
    want = torch.autograd.grad(out, (q, k, v), dout)
    q, k, v, dout = (
        x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for x in (q, k, v, dout)
    )
    found = torch.autograd.grad(mms.attend(q, k, v, selection), (q, k, v), dout)
    assert torch.equal(found[0], want[0])
    for one, other in zip(found[1:], want[1:], strict=True):
        torch.testing.assert_close(one, other)
    assert added == [16, 16]


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["q", "dout"])
def test_gpu_nan_of_a_query_stays_with_the_keys_of_its_units(where: str, added: list[int]) -> None:
    selection = up_to_a_short_unit(heads=1, deterministic=False)
    q, k, v, dout = torch.randn(4, 1, 1, 293, 128, device="cuda", dtype=torch.bfloat16)
    (q if where == "q" else dout)[0, 0, 3, 5] = float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    _, dk, dv = torch.autograd.grad(mms.attend(*leaves, selection), leaves, dout)
    assert not dk[:, :, 37:].any()
    assert not dv[:, :, 37:].any()
    assert added == [16]


@pytest.mark.gpu
def test_gpu_nan_behind_a_short_unit_leaves_gradients_alone(added: list[int]) -> None:
    selection = up_to_a_short_unit(heads=2, deterministic=False)
    q, k, v, dout = torch.randn(4, 1, 2, 293, 128, device="cuda", dtype=torch.bfloat16)
    found = []
    for behind in (None, float("nan")):
        if behind is not None:
            k[:, :, 37:], v[:, :, 37:] = behind, behind
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        found.append(torch.autograd.grad(mms.attend(*leaves, selection), leaves, dout))
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(one, other)
        assert not other[:, :, 37:].any()
    assert added == [16, 16]
