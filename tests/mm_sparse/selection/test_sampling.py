"""A sample that stands for what is not kept: its lists, its weights, attention and gradients."""

import dataclasses

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import mm_sparse as mms
from mm_sparse import Modality, Selection, SparseConfig, TokenLayout
from mm_sparse.kernels.device import interpreted
from tests.support.layouts import BATCHES, FEW, GROUPS, IDS, batches, configs, random_qk
from tests.support.selections import Batch, random_scores

CONFIG = SparseConfig(0.5, tile=64, unit=16, sinks=4, window=8, sample_ratio=0.5)


def chosen(name: str, config: SparseConfig = CONFIG, heads: int = 1, group: int = 1) -> Selection:
    layout = TokenLayout.from_rows(BATCHES[name][0], padding_side=BATCHES[name][1])
    return mms.select(random_scores(layout, config, heads, group), layout, config).check()


def long(config: SparseConfig, **heads: int) -> Selection:
    layout = TokenLayout.from_spans([("image", (40, 41))])
    return mms.select(random_scores(layout, config, **heads), layout, config).check()


def weights(selection: Selection) -> Tensor:
    """(B, H, N, M): how often each key counts."""
    plan, sample = selection.plan, selection.sample
    assert sample is not None
    best = Selection(sample.best_index, sample.best_count, plan).check().to_dense_mask().double()
    other = Selection(sample.index, sample.count, plan).check().to_dense_mask().double()
    rows = torch.zeros_like(other)
    for b, tiles in enumerate(plan.tiles.tolist()):
        for t, (first, size) in enumerate(tiles):
            own = sample.weight[b, :, t].double().exp().repeat_interleave(plan.group, 0)
            rows[b, :, first : first + size] = own[:, None, None]
    assert not (best * other).any()
    assert torch.equal((best + other) > 0, selection.to_dense_mask())
    return best + other * rows


def plain(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    share = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).exp() * weight.to(q.dtype)
    return share @ v / share.sum(-1, keepdim=True).clamp(min=1e-300)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_attention_and_gradients_are_those_of_weighted_softmax(
    name: str, heads: int, kv_heads: int
) -> None:
    config = dataclasses.replace(CONFIG, tile=128)
    selection = chosen(name, config, kv_heads, heads // kv_heads)
    rows, length = selection.plan.layout.batch, selection.plan.layout.length
    torch.manual_seed(0)
    shapes = [(rows, n, length, 16) for n in (heads, kv_heads, kv_heads)]
    tensors = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    out = mms.attend(*tensors, selection)
    want = plain(*tensors, weights(selection))
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)
    dout = torch.randn_like(out)
    got, exact = (torch.autograd.grad(x, tensors, dout) for x in (out, want))
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_stays_near(dtype: torch.dtype) -> None:
    selection = long(dataclasses.replace(CONFIG, ratio=0.2, causal=False), kv_heads=2)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 1640, 32) for _ in range(3))
    want = plain(q.double(), k.double(), v.double(), weights(selection))
    out = mms.attend(q.to(dtype), k.to(dtype), v.to(dtype), selection)
    assert out.dtype == dtype
    bound = 2e-5 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
    assert (out.double() - want).abs().max() < bound * v.abs().max()


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", [pytest.param("mixed", marks=pytest.mark.slow), "packed"])
def test_kernels_give_what_the_gathers_give(name: str) -> None:
    found = []
    for backend in ("torch", "triton"):
        selection = chosen(name, dataclasses.replace(CONFIG, backend=backend), 2, 2)
        torch.manual_seed(0)
        shape = (selection.plan.layout.batch, 4, selection.plan.layout.length, 16)
        q, k, v = (torch.randn(shape)[:, :h].clone().requires_grad_() for h in (4, 2, 2))
        out = mms.attend(q, k, v, selection)
        found.append((out, *torch.autograd.grad(out, (q, k, v), out.detach().cos())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_what_a_cpu_gives(dtype: torch.dtype) -> None:
    config = dataclasses.replace(CONFIG, ratio=0.2, causal=False)
    selection = long(config, kv_heads=2)
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 1640, 64) for _ in range(3)]
    layout = selection.plan.layout.to("cuda")
    scores = mms.Scores(
        random_scores(selection.plan.layout, config, 2).values.cuda(),
        layout.plan(config, num_query_heads=2, num_kv_heads=2),
    )
    chosen_there = mms.select(scores, layout, config)
    assert torch.equal(chosen_there.to_dense_mask().cpu(), selection.to_dense_mask())
    results = []
    for own, device in ((selection, "cpu"), (chosen_there, "cuda")):
        q, k, v = (x.to(device, dtype).requires_grad_() for x in inputs)
        out = mms.attend(q, k, v, own)
        results.append((out, *torch.autograd.grad(out, (q, k, v), out.detach().cos())))
    bound = 5e-3 if dtype == torch.float32 else 4e-2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.float(), b.float().cpu(), rtol=bound, atol=bound)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
def test_it_keeps_what_the_budget_says_and_stands_for_all_the_rest(ratio: float) -> None:
    config = SparseConfig(ratio, tile=64, sinks=0, window=0, causal=False, sample_ratio=0.5)
    selection = long(config, kv_heads=2)
    assert selection.density() == pytest.approx(ratio, abs=0.012)
    totals = weights(selection).sum(-1)
    torch.testing.assert_close(totals, torch.full_like(totals, 1640.0))
    sample = selection.sample
    assert sample is not None
    # Hardly two tiles draw alike, and most units are drawn by some.
    lists = {tuple(row) for row in sample.index.flatten(0, 2).tolist()}
    assert len(lists) > 0.9 * sample.index[..., 0].numel()
    drawn = sample.index[sample.index >= 0].unique()
    assert len(drawn) > 0.7 * selection.plan.units.shape[1]


def test_it_is_closer_to_dense_where_attention_is_diffuse() -> None:
    torch.manual_seed(0)
    layout = TokenLayout.from_spans([("image", (40, 40))])
    # Neighbours are alike, and what is looked for is what is found.
    q = torch.randn(1, 2, 1, 32).expand(-1, -1, 1600, -1)
    k = torch.randn(1, 2, 100, 32).repeat_interleave(16, 2) / 2
    v = torch.randn(1, 2, 1600, 32) / 2 + (q * k).sum(-1, keepdim=True)
    base = SparseConfig(0.2, tile=64, sinks=0, window=0, causal=False, dense_below=0)
    dense = mms.attention_reference(q, k, v, mask=torch.ones(1, dtype=torch.bool))
    lost = []
    for share in (0.0, 0.5):
        config = dataclasses.replace(base, sample_ratio=share)
        out = mms.sparse_attention(q, k, v, layout=layout, config=config)
        lost.append((out - dense).pow(2).mean().item())
    assert lost[1] < 0.5 * lost[0]


def test_all_kept_is_dense_attention() -> None:
    config = dataclasses.replace(CONFIG, ratio=1.0)
    selection = chosen("mixed", config, 2)
    assert selection.density() == 1.0
    q, k = random_qk(selection.plan.layout, heads=2, kv_heads=2)
    plainly = dataclasses.replace(config, sample_ratio=0.0)
    want = mms.attend(q, k, k, chosen("mixed", plainly, 2))
    torch.testing.assert_close(mms.attend(q, k, k, selection), want)


def test_nobody_sees_the_future_or_another_document() -> None:
    selection = chosen("packed", CONFIG, 1)
    layout = selection.plan.layout
    seen = layout.visible_span(CONFIG.causal, CONFIG.bidirectional)
    key = torch.arange(layout.length)
    allowed = (key >= seen[..., :1]) & (key < seen[..., 1:])
    assert not (selection.to_dense_mask() & ~allowed[:, None]).any()
    assert not ((weights(selection) > 0) & ~allowed[:, None]).any()


def test_without_a_sample_nothing_changes() -> None:
    selection = chosen("mixed", dataclasses.replace(CONFIG, sample_ratio=0.0))
    assert selection.sample is None
    assert selection.plan.without_sample is selection.plan


def test_floors_and_sinks_are_not_left_to_the_sample() -> None:
    config = dataclasses.replace(CONFIG, modality_floor={Modality.AUDIO: 0.3})
    selection = chosen("mixed", config)
    sample, plan = selection.sample, selection.plan
    assert sample is not None
    drawn = Selection(sample.index, sample.count, plan).to_dense_mask()
    best = Selection(sample.best_index, sample.best_count, plan).to_dense_mask()
    assert best[..., :4].any()
    assert not drawn[..., :4].any()


def test_a_block_mask_cannot_weigh_keys() -> None:
    with pytest.raises(ValueError, match="to_block_mask cannot weigh keys"):
        chosen("text").to_block_mask()


@pytest.mark.slow
@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
@given(batches(), configs(top_p=None), st.sampled_from([0.25, 0.5, 0.9]), st.booleans())
@FEW
def test_the_kernel_draws_what_the_law_draws(
    batch: Batch, config: SparseConfig, share: float, by_head: bool
) -> None:
    layout = TokenLayout.from_rows(batch[0], padding_side=batch[1])
    heads = (config.ratio, 0.3) if by_head else ()
    found = []
    for backend in ("torch", "triton"):
        own = dataclasses.replace(config, sample_ratio=share, head_ratio=heads, backend=backend)
        found.append(mms.select(random_scores(layout, own, 2), layout, own))
    law, kernel = found
    assert law.sample is not None
    if kernel.sample is None:
        return
    assert torch.equal(law.count, kernel.count)
    assert torch.equal(law.to_dense_mask(), kernel.to_dense_mask())
    for name in ("best_count", "count"):
        assert torch.equal(getattr(law.sample, name), getattr(kernel.sample, name))
    for name in ("best_index", "index"):
        a, b = getattr(law.sample, name), getattr(kernel.sample, name)
        width = min(a.shape[-1], b.shape[-1])
        assert torch.equal(a[..., :width], b[..., :width])
        assert not (a[..., width:] >= 0).any()
        assert not (b[..., width:] >= 0).any()
    torch.testing.assert_close(law.sample.weight, kernel.sample.weight)


def test_kernel_and_law_start_to_count_at_one_place() -> None:
    from mm_sparse.kernels.triton import topk
    from mm_sparse.selection import sampling

    for name in ("STEP_TILE", "STEP_HEAD", "TURN"):
        assert getattr(topk, name).value == getattr(sampling, name)


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [32, 80])
def test_merged_outputs_are_those_of_both_lists(dtype: torch.dtype, dim: int) -> None:
    from mm_sparse.kernels.triton.merge_outputs import merge_outputs

    torch.manual_seed(0)
    out, other = (torch.randn(2, 3, 77, dim).to(dtype) for _ in range(2))
    log, other_log, weight = (torch.randn(2, 3, 77) * 3 for _ in range(3))
    log[0, 0, :5], other_log[0, 0, 3:9] = -torch.inf, -torch.inf
    out[0, 0, :5], other[0, 0, 3:9] = 0, 0
    one, two = (x.double().exp()[..., None] for x in (log, other_log + weight))
    want = (out * one + other * two) / (one + two).clamp(min=1e-300)
    got, whole = merge_outputs(out.clone(), other, log, other_log, weight)
    # Half a unit in the last place of the output's own precision.
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(whole.double(), (one + two).log()[..., 0], rtol=1e-5, atol=1e-5)
