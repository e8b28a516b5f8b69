"""Gradients travel in few flat buffers, and are those that come one by one."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from mm_sparse.integrations import sum_gradients

SIZES = [(3, 5), (7,), (4, 4), (), (2, 3, 2), (64, 64), (1,)]


class Done:
    """Work that is over."""

    def wait(self):
        return True


@pytest.fixture
def travelled(monkeypatch):
    """Sizes of what was reduced, behind the count of uses; every process has the same as this."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    sizes = []

    def reduce(x, group=None, async_op=False):
        x.mul_(3)
        sizes.append(x.numel())
        return Done()

    monkeypatch.setattr(dist, "all_reduce", reduce)
    yield sizes
    dist.destroy_process_group()


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]
    for p in made[1:]:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    # Neither is a gradient as dense and whole in memory as most are.
    made[2].grad = made[2].grad.t()
    return made


def test_few_buffers_hold_all_gradients(travelled):
    own, other = parameters(), parameters(torch.float64)
    fixed = nn.Parameter(torch.ones(3), requires_grad=False)
    before = [None if p.grad is None else p.grad.clone() for p in (*own, *other)]
    sum_gradients([*own, *other, fixed, own[1]])
    # The count of uses, and a buffer for each dtype.
    small = sum(p.numel() for p in own[1:])
    assert travelled == [14, small, small]
    for p, grad in zip((*own, *other), before, strict=True):
        assert (p.grad is None) == (grad is None)
        if grad is not None:
            assert torch.equal(p.grad, 3 * grad)
    assert fixed.grad is None


def test_a_large_gradient_travels_alone_and_sums_may_be_means(travelled):
    own = parameters()
    before = [p.grad.clone() for p in own[1:]]
    sum_gradients(own, divisor=3, bucket_bytes=100)
    assert travelled[0] == 7
    assert 64 * 64 in travelled
    assert sum(travelled[1:]) == sum(p.numel() for p in own[1:])
    for p, grad in zip(own[1:], before, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_sparse_gradients_become_dense(travelled):
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    sum_gradients(table.parameters())
    assert torch.equal(table.weight.grad.sum(1).nonzero().flatten(), torch.tensor([1, 3]))
