"""The kernel for Hopper: its sorting of lists in the interpreter, all else on such a GPU."""

from dataclasses import replace

import pytest
import torch

import mm_sparse as mms
from mm_sparse.kernels import dispatch
from tests.kernels.test_attention import assert_within
from tests.support.hopper_cases import ODD, SHAPES, need_hopper, up_to_a_short_unit
from tests.support.kernel_cases import Case, errors_and_bounds

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Fills up with what each call of the forward decided."""
    need_hopper()
    found, asked = [], dispatch.on_hopper
    monkeypatch.setattr(dispatch, "on_hopper", lambda *a: found.append(asked(*a)) or found[-1])
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gpu_equals_dense_attention_under_its_mask(
    case: Case, dtype: torch.dtype, used: list[bool]
) -> None:
    assert_within(errors_and_bounds(*case.make(dtype, device="cuda")))
    # Gradients that need no order ask as well.
    assert used
    assert all(used)


@pytest.mark.gpu
def test_gpu_strided_inputs_give_the_same(used: list[bool]) -> None:
    q, k, v, selection = SHAPES[4].make(torch.bfloat16, device="cuda")
    want = mms.attend(q, k, v, selection)
    moved = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(mms.attend(*moved, selection), want)
    assert used == [True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("units", ["regular", "short at the end", "in a table"])
def test_gpu_a_head_behind_two_billion_numbers_is_as_alone(units: str, used: list[bool]) -> None:
    tokens, heads = 1 << 20, 17
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of GPU memory")
    layout = mms.TokenLayout.text(1, tokens if units == "regular" else tokens - 5, device="cuda")
    config = mms.SparseConfig(unit=64, tile=128, tokens=256, causal=False)
    generator = torch.Generator("cuda").manual_seed(0)
    size = (1, heads, layout.length, 128)
    q, k, v = (
        torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(3)
    )
    plan = layout.plan(config, num_query_heads=heads, num_kv_heads=heads)
    one = layout.plan(config, num_query_heads=1, num_kv_heads=1)
    assert plan.unit_offset == one.unit_offset == 0
    if units == "in a table":
        plan, one = (replace(x, unit_offset=-1, tile_offset=-1) for x in (plan, one))
    index = torch.randint(
        plan.units.shape[1], (1, heads, plan.tiles.shape[1], 4), device="cuda", generator=generator
    )
    index, count = index.int().sort(-1).values, torch.full_like(index[..., 0], 4, dtype=torch.int32)
    found = mms.attend(q, k, v, mms.Selection(index, count, plan))
    for head in (0, heads - 1):
        own = slice(head, head + 1)
        alone = mms.Selection(index[:, own].contiguous(), count[:, own].contiguous(), one)
        want = mms.attend(*(x[:, own].contiguous() for x in (q, k, v)), alone)
        assert torch.equal(found[:, own], want)
    assert used == [True, True, True]


@pytest.mark.gpu
def test_gpu_nan_behind_a_short_unit_stays_where_it_is(used: list[bool]) -> None:
    """A copy of 16 keys from a unit of 5 brings keys of the next one along."""
    selection = up_to_a_short_unit(heads=2)
    units = selection.plan.units[0, :4]
    assert units.tolist() == [[0, 16], [16, 16], [32, 5], [37, 16]]
    q, k, v = torch.randn(3, 1, 2, 293, 128, device="cuda", dtype=torch.bfloat16)
    want = mms.attend(q, k, v, selection)
    k[:, :, 37:], v[:, :, 37:] = float("nan"), float("nan")
    assert torch.equal(mms.attend(q, k, v, selection), want)
    assert used == [True, True]


def sorted_lists(selection: mms.Selection, narrow: bool = False) -> tuple[torch.Tensor, ...]:
    """Lists as the kernel is given them, and for each its whole units and those before them."""
    hopper_lists = pytest.importorskip("mm_sparse.kernels.hopper.pipeline")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    plan, index, count = selection.plan, selection.index, selection.count
    order = torch.full_like(index, -1, dtype=torch.int16 if narrow else torch.int32)
    inner = torch.full((*count.shape, 2), -1, dtype=torch.int32)
    begun = torch.full((1,), 7, dtype=torch.int32)
    batch, heads, tiles, length = index.shape
    hopper_lists.sort_lists[(tiles, batch * heads)](
        order, inner, begun, plan.tiles, plan.units, plan.span, index, count, plan.num_queries,
        tiles, plan.units.shape[1], length, heads, plan.unit_offset,
        TOKENS=plan.tile_tokens, LENGTH=128, UNIT=16, WIDTH=16, EVEN=plan.unit_offset >= 0,
        REGULAR_TILES=plan.regular_tiles,
    )  # fmt: skip
    assert begun == 0
    return (order if plan.unit_offset < 0 else index), inner


@pytest.mark.parametrize("narrow", [False, True])
def test_lists_are_sorted_by_whether_a_unit_needs_a_mask(narrow: bool) -> None:
    case = Case("x", [ODD[:4], [("text", 400)]], 4, 2, 16, 16, 128, padding="left")
    *_, selection = case.make(torch.float32, backend="torch")
    order, inner = sorted_lists(selection, narrow)
    plan, index, count = selection.plan, selection.index, selection.count
    assert plan.unit_offset < 0
    batch, heads, tiles, length = index.shape
    for b in range(batch):
        for h in range(heads):
            for t in range(tiles):
                first, size = plan.tiles[b, t].tolist()
                low = plan.span[b, first : first + size, 0]
                high = plan.span[b, first : first + size, 1]
                front, back = [], []
                for unit in index[b, h, t, : count[b, h, t]].tolist():
                    start, keys = plan.units[b, unit].tolist()
                    seen = not size or (start >= low.max() and start + keys <= high.min())
                    (front if keys == 16 and seen else back).append(unit)
                found = order[b, h, t].tolist()
                assert inner[b, h, t, 0] == len(front)
                assert found[: len(front)] == front
                assert found[length - len(back) :] == back[::-1]


@pytest.mark.parametrize("prefix", [0, 5])
def test_even_lists_stay_and_what_needs_a_mask_is_before_and_behind(prefix: int) -> None:
    at = torch.arange(384)
    span = torch.stack([(at - 260).clamp(min=0), at + 1], -1)[None]
    kind = (at >= prefix).to(torch.int8)[None]
    layout = mms.TokenLayout.from_modality(kind, span=span)
    config = mms.SparseConfig(ratio=0.9, unit=16, tile=128, causal=True, sinks=0, window=0)
    plan = layout.plan(config, num_query_heads=1, num_kv_heads=1)
    shape = 1, 1, plan.tiles.shape[1], plan.units.shape[1]
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    selection = mms.select(mms.Scores(scores, plan), layout, config)
    assert plan.unit_offset == -prefix % 16
    order, inner = sorted_lists(selection)
    seen = set()
    for t in range(plan.tiles.shape[1]):
        first, size = plan.tiles[0, t].tolist()
        low, high = plan.span[0, first : first + size].unbind(-1)
        count, (whole, ahead) = int(selection.count[0, 0, t]), inner[0, 0, t].tolist()
        places = [place(slot, whole, ahead) for slot in range(count)]
        assert sorted(places) == list(range(count))
        for slot in range(count):
            start = 16 * int(order[0, 0, t, places[slot]]) - plan.unit_offset
            assert (slot < whole) == (start >= int(low.max()) and start + 16 <= int(high.min()))
        seen.add((whole > 0, ahead > 0))
    # A first unit that is short always needs a mask.
    assert seen == ({(False, True)} if prefix else {(False, False), (True, False)}) | {(True, True)}


def place(slot: int, whole: int, ahead: int) -> int:
    """`hopper_lists.place_of` of even units."""
    return slot + (ahead if slot < whole else -whole if slot < whole + ahead else 0)


@pytest.mark.gpu
def test_gpu_blocks_of_queries_behind_a_class_token_give_what_one_call_gives(
    used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = mms.TokenLayout.from_spans([("text", 1), ("image", (41, 43))], device="cuda")
    config = mms.SparseConfig(
        0.3, unit=16, tile=128, causal=False, dense_below=0, patch_order=False
    )
    q, k, v = torch.randn(3, 1, 4, layout.length, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        want = mms.sparse_attention(q, k, v, layout=layout, config=config)
        monkeypatch.setattr("mm_sparse.attention.query_chunks.MOST_SCORES", 2000)
        found = mms.sparse_attention(q, k, v, layout=layout, config=config)
    assert torch.equal(found, want)
    assert len(used) > 3
    assert all(used)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_gpu_lists_of_any_length_are_served_once_and_once_more_in_a_graph(
    dim: int, used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs draw tiles as they come free; every launch has to begin at the first."""
    layout = mms.TokenLayout.text(1, 6000, device="cuda")
    config = mms.SparseConfig(unit=16, tile=128, causal=False, sinks=0, window=0)
    plan = layout.plan(config, num_query_heads=12, num_kv_heads=12)
    generator = torch.Generator("cuda").manual_seed(0)
    size = 1, 12, plan.tiles.shape[1], plan.units.shape[1]
    share = torch.rand(*size[:3], 1, device="cuda", generator=generator) ** 4
    share[:, :, ::5] = 0
    kept = torch.rand(size, device="cuda", generator=generator) < share
    selection = mms.Selection.from_mask(kept, plan)
    q, k, v = torch.randn(3, 1, 12, 6000, dim, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        found = mms.attend(q, k, v, selection)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = mms.attend(q, k, v, selection)
        for _ in range(3):
            again.fill_(float("nan"))
            graph.replay()
            assert torch.equal(again, found)
        monkeypatch.setattr(dispatch, "on_hopper", lambda *_: False)
        want = mms.attend(q, k, v, selection)
    error = (found - want).float().norm() / want.float().norm()
    assert error < torch.finfo(torch.bfloat16).eps
    assert used == [True, True]


@pytest.mark.gpu
def test_gpu_spans_beyond_the_keys_see_what_is_there(used: list[bool]) -> None:
    at = torch.arange(1671)
    span = torch.stack([at - 300, at + 300], -1)[None].to("cuda")
    kind = (at >= 1).to(torch.int8)[None].to("cuda")
    found = []
    for seen in (span, span.clamp(0, 1671)):
        layout = mms.TokenLayout.from_modality(kind, span=seen)
        config = mms.SparseConfig(0.5, unit=16, tile=128, causal=False, dense_below=0)
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 1, 2, 1671, 128, device="cuda", dtype=torch.bfloat16)
        found.append(mms.sparse_attention(q, k, v, layout=layout, config=config))
    assert torch.equal(*found)
    assert used == [True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gpu_rows_whose_span_ends_before_it_starts_see_nothing(
    head_dim: int, used: list[bool]
) -> None:
    at = torch.arange(1671)
    span = torch.stack([at.clamp(max=0), at + 1], -1)
    span[700:1000] = torch.tensor([1000, 3])
    layout = mms.TokenLayout.from_modality(
        torch.zeros(1, 1671, dtype=torch.int8, device="cuda"), span=span[None].to("cuda")
    )
    config = mms.SparseConfig(0.5, unit=16, tile=128, dense_below=0, deterministic=False)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 1671, head_dim, device="cuda", dtype=torch.bfloat16)
    out = mms.sparse_attention(q.requires_grad_(), k, v, layout=layout, config=config)
    (grad,) = torch.autograd.grad(out.float().square().sum(), q)
    for found in (out, grad):
        assert not found[:, :, 700:1000].any()
        assert found[:, :, 1:700].any(-1).all()
    assert used
    assert all(used)
