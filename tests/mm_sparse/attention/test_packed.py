import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mm_sparse.attention import PackedBounds, packed as packed_module, packed_attention


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool = False) -> Tensor:
    """(1, N, H, D), sequence after sequence."""
    outs, start = [], 0
    for length in lengths:
        q_, k_, v_ = (x[:, :, start : start + length] for x in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        outs.append(scaled_dot_product_attention(q_, k_, v_, is_causal=causal, enable_gqa=gqa))
        start += length
    return torch.cat(outs, 2).transpose(1, 2)


def tensors(tokens: int, heads: int = 4, kv_heads: int = 4, dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, h, tokens, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator, requires_grad=True) for s in shapes]


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30),
    st.booleans(),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
)
@settings(max_examples=60, deadline=None)
def test_equals_attention_of_one_sequence_after_the_other(
    lengths: list[int], causal: bool, heads: tuple[int, int]
) -> None:
    q, k, v = tensors(sum(lengths), *heads)
    out = packed_attention(q, k, v, PackedBounds.of(bounds_of(lengths)), causal=causal)
    want = one_by_one(q, k, v, [n for n in lengths if n], causal) if sum(lengths) else out
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    if not sum(lengths):
        return
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    wanted = torch.autograd.grad(want, (q, k, v), grad)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[64] * 500, [64] * 300 + [17] * 40 + [5], list(range(1, 90))])
def test_many_sequences_take_few_calls(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []

    def counted(q: Tensor, *args: object, **options: object) -> Tensor:
        calls.append(q.shape)
        return scaled_dot_product_attention(q, *args, **options)

    monkeypatch.setattr(packed_module, "scaled_dot_product_attention", counted)
    q, k, v = tensors(sum(lengths), 2, 2)
    out = packed_attention(q, k, v, PackedBounds.of(bounds_of(lengths)))
    assert len(calls) <= 17
    torch.testing.assert_close(out, one_by_one(q, k, v, lengths), rtol=1e-5, atol=1e-5)


def test_non_contiguous_tensors_and_a_scale() -> None:
    lengths = [7, 3, 7]
    q, k, v = (torch.randn(1, 17, 2, 3, 8).unbind(3)[i].transpose(1, 2) for i in range(3))
    out = packed_attention(q, k, v, PackedBounds.of(bounds_of(lengths)), scale=0.1)
    want = one_by_one(q * 0.1 * 8**0.5, k, v, lengths)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_bounds_are_read_once_until_they_are_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = bounds_of([4, 4])
    first = PackedBounds.of(bounds)
    assert PackedBounds.of(bounds) is first
    bounds[1] = 3
    assert PackedBounds.of(bounds).lengths == (3, 5)
    with torch.inference_mode():
        inside = PackedBounds.of(bounds)
    assert PackedBounds.of(bounds) is not inside


def test_sequences_are_split_by_length_and_come_back() -> None:
    packed = PackedBounds.of(bounds_of([5, 2, 9, 1, 5]))
    (long, long_bounds), (short, short_bounds), place = packed.split(5)
    assert long_bounds.tolist() == [0, 5, 14, 19]
    assert short_bounds.tolist() == [0, 2, 3]
    assert torch.cat([long, short])[place].tolist() == list(range(22))


@pytest.mark.parametrize("bounds", [[0], [1, 4], [0, 5, 3], [[0, 4]]])
def test_wrong_bounds_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="bounds of packed sequences must be"):
        PackedBounds.of(torch.tensor(bounds))


@pytest.mark.parametrize(("rows", "tokens"), [(2, 6), (1, 7)])
def test_bounds_of_other_tokens_are_refused(rows: int, tokens: int) -> None:
    q = torch.randn(rows, 2, tokens, 8)
    with pytest.raises(ValueError, match="q and k must be one row of the 6 tokens"):
        packed_attention(q, q, q, PackedBounds.of(bounds_of([4, 2])))


def test_dropout_drops_weights() -> None:
    q, k, v = tensors(12)
    packed = PackedBounds.of(bounds_of([6, 6]))
    torch.manual_seed(0)
    dropped = packed_attention(q, k, v, packed, dropout=0.5)
    assert not torch.allclose(dropped, packed_attention(q, k, v, packed))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("lengths", [[64] * 7, [64, 64, 17, 300, 1], [5476, 1024]])
def test_gpu_equals_attention_of_one_sequence_after_the_other(
    lengths: list[int], heads: tuple[int, int], causal: bool, dtype: torch.dtype
) -> None:
    exact = [x.detach() for x in tensors(sum(lengths), *heads, dim=80)]
    q, k, v = (x.to("cuda", dtype).requires_grad_() for x in exact)
    packed = PackedBounds.of(bounds_of(lengths).cuda())
    out = packed_attention(q, k, v, packed, causal=causal)
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = one_by_one(*doubles, lengths, causal)
    plain = one_by_one(q, k, v, lengths, causal)
    grad = torch.randn_like(plain)
    pairs = [(out, plain, want)]
    grads = [
        torch.autograd.grad(o, x, grad.to(o.dtype))
        for o, x in ((out, (q, k, v)), (plain, (q, k, v)), (want, doubles))
    ]
    pairs += list(zip(*grads, strict=True))
    for found, low, exact_ in pairs:
        error = (found.double() - exact_).abs().max()
        bound = 2 * (low.double() - exact_).abs().max() + 1e-5
        assert error <= bound, (error, bound)


@pytest.mark.xfail(strict=True, reason="tensors of inference mode do not tell who wrote to them")
@torch.inference_mode()
def test_bounds_that_are_written_to_in_inference_mode_are_read_anew() -> None:
    bounds = torch.tensor([0, 4, 8])
    PackedBounds.of(bounds)
    bounds[1] = 6
    assert PackedBounds.of(bounds).lengths == (6, 2)
