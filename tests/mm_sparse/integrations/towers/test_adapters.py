"""Attention classes that no library knows: by a name of a class, or by an adapter."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import mm_sparse as mms
from mm_sparse.integrations import TowerTokens, is_sparsified
from mm_sparse.integrations.towers import adapters

WHOLE = mms.SparseConfig(ratio=1.0, dense_below=0, causal=False)
SPARSE = mms.SparseConfig(ratio=0.3, tile=64, unit=16, dense_below=0, sinks=0, window=0)


class OwnAttention(nn.Module):
    """Self-attention as people write it."""

    def __init__(self, width: int = 32, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Unfused(OwnAttention):
    """Attention in which nothing can be replaced."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Own(nn.Module):
    def __init__(self, kind: type[OwnAttention] = OwnAttention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class OwnTower(mms.TowerAdapter):
    name = "own"

    def matches(self, name: str, module: nn.Module, parents: Sequence[nn.Module]) -> bool:
        return isinstance(module, OwnAttention) and isinstance(parents[0], Own)

    def tokens(self, name: str, module: nn.Module, parents: Sequence[nn.Module]) -> TowerTokens:
        return TowerTokens(mms.Modality.IMAGE, prefix=1)


@pytest.fixture(autouse=True)
def own_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters that are registered here are gone afterwards."""
    monkeypatch.setattr(adapters, "_ADAPTERS", [])


@pytest.fixture
def model() -> Own:
    torch.manual_seed(0)
    return Own()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 200, 32, generator=torch.Generator().manual_seed(1))


def registered() -> dict:
    mms.register_adapter(OwnTower())
    return {}


WAYS = [lambda: {"modules": [OwnAttention]}, registered]


@pytest.mark.parametrize("way", WAYS, ids=["modules", "adapter"])
def test_own_attention_runs_sparse_and_is_put_back(way, model: Own, x: Tensor) -> None:
    dense = model(x).detach()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    options = way()
    mms.sparsify(model, WHOLE, **options)
    torch.testing.assert_close(model(x).detach(), dense)
    assert {row.mode for row in mms.report(model).rows} == {"sparse"}
    mms.sparsify(model, SPARSE, **options)
    out = model(x)
    assert not out.allclose(dense, atol=1e-3)
    rows = mms.report(model).rows
    assert [row.mode for row in rows] == ["sparse"] * 2
    mms.densify(model)
    for name, module in model.named_modules():
        assert dict(vars(module)) == before[name]
    assert model(x).equal(dense)


@pytest.mark.parametrize("way", WAYS, ids=["modules", "adapter"])
def test_gradients_of_own_attention_are_dense_ones_at_ratio_1(way, model: Own, x: Tensor) -> None:
    twin = copy.deepcopy(model)
    mms.sparsify(model, WHOLE, **way())
    model(x).square().mean().backward()
    twin(x).square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    model.zero_grad()
    mms.sparsify(model, SPARSE, modules=[OwnAttention])
    model(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_scorers_of_own_attention_train(model: Own, x: Tensor) -> None:
    mms.sparsify(model, SPARSE, modules=[OwnAttention], scorer="relevance")
    with mms.distillation_losses(model) as losses:
        model(x)
    losses.mean().backward()
    learned = list(mms.scorer_parameters(model))
    assert learned
    assert all(p.grad is not None for p in learned)


def test_an_adapter_says_what_the_tokens_are(model: Own, x: Tensor) -> None:
    mms.register_adapter(OwnTower())
    mms.sparsify(model, SPARSE)
    calls: list[mms.AttentionCall] = []
    with mms.capture_attention(model, calls.append):
        model(x)
    for call in calls:
        assert call.layout is not None
        assert call.layout.modality.eq(int(mms.Modality.IMAGE)).all()
        # The token in front is kept by every tile.
        assert call.selection is not None
        assert call.selection.to_dense_mask()[..., 0].all()


def test_below_dense_below_own_attention_runs_as_before(model: Own, x: Tensor) -> None:
    dense = model(x)
    config = dataclasses.replace(SPARSE, dense_below=201)
    mms.sparsify(model, config, modules=[OwnAttention])
    assert model(x).equal(dense)
    assert {row.mode for row in mms.report(model).rows} == {"dense"}


def test_what_calls_no_fused_attention_is_refused(x: Tensor) -> None:
    model = Own(Unfused)
    with pytest.raises(ValueError, match=r"layers.0 \(Unfused\) cannot run sparse: .*not call"):
        mms.sparsify(model, SPARSE, modules=[Unfused])
    assert not is_sparsified(model)
    mms.sparsify(model, SPARSE, modules=[Unfused], strict=False)
    model(x)
    assert {row.mode for row in mms.report(model).rows} == {"refused"}


def test_a_model_without_known_attention_is_told_of_modules(model: Own) -> None:
    with pytest.raises(ValueError, match=r"name classes of your own with modules="):
        mms.sparsify(model, SPARSE)
    with pytest.raises(TypeError, match=r"modules must hold classes of torch\.nn.Module"):
        mms.sparsify(model, SPARSE, modules=[model.layers[0]])  # pyright: ignore


def test_adapters_are_objects_with_a_name() -> None:
    with pytest.raises(TypeError, match="adapter must be a TowerAdapter, got type"):
        mms.register_adapter(OwnTower)  # pyright: ignore
    with pytest.raises(ValueError, match="adapter must have a name, TowerAdapter has none"):
        mms.register_adapter(mms.TowerAdapter())
    first, second = OwnTower(), OwnTower()
    mms.register_adapter(first)
    mms.register_adapter(second)
    assert adapters.registered_adapters() == (second,)


@torch.no_grad()
def test_scorers_of_own_attention_go_through_files(model: Own, x: Tensor, tmp_path) -> None:
    other = copy.deepcopy(model)
    mms.sparsify(model, SPARSE, modules=[OwnAttention], scorer="relevance")
    for parameter in mms.scorer_parameters(model):
        parameter.normal_(std=0.3)
    mms.save_scorers(model, tmp_path)
    mms.sparsify(other, SPARSE, modules=[OwnAttention])
    mms.load_scorers(other, tmp_path)
    assert other(x).equal(model(x))


def test_what_cannot_be_found_again_stays_sparse(model: Own, x: Tensor) -> None:
    mms.register_adapter(OwnTower())
    mms.sparsify(model, SPARSE)
    want = model(x)
    adapters._ADAPTERS.clear()
    with pytest.raises(ValueError, match=r"modules="):
        mms.sparsify(model, WHOLE)
    assert mms.sparse_config(model) == SPARSE
    assert model(x).equal(want)


def test_modules_are_remembered_and_their_scorers_load(
    model: Own, x: Tensor, tmp_path: Path
) -> None:
    mms.sparsify(model, SPARSE, modules=[OwnAttention], scorer="relevance")
    mms.sparsify(model, dataclasses.replace(SPARSE, ratio=0.4))
    model(x)
    assert {row.mode for row in mms.report(model).rows} == {"sparse"}
    mms.save_scorers(model, tmp_path)
    want = model(x)
    other = Own()
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="model must have attention layers"):
        mms.load_scorers(other, tmp_path)
    mms.load_scorers(other, tmp_path, modules=[OwnAttention])
    assert other(x).equal(want)
