"""Vision towers of all libraries with tiles and units that are patches of the grid."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch

import mm_sparse as mms
from mm_sparse.analysis.overlays import kept_share
from mm_sparse.integrations import context, state
from mm_sparse.integrations.towers.sdpa_redirect import CALLS_IN_PATCH_ORDER
from mm_sparse.layout import patch_order as ordering
from mm_sparse.layout.patch_order import patch_order, restore
from tests.support.encoder_cases import VISIONS, build

for needed in ("timm", "open_clip", "transformers"):
    pytest.importorskip(needed)

GRID = mms.SparseConfig(ratio=0.3, tile=64, dense_below=0, sinks=0, window=0)
RASTER = mms.SparseConfig(ratio=0.3, tile=64, dense_below=0, sinks=0, window=0, patch_order=False)


def calls_of(encoder: Any, batch: Any, config: mms.SparseConfig) -> list[context.AttentionCall]:
    found: list[context.AttentionCall] = []
    mms.sparsify(encoder, config)
    with context.capture_attention(encoder, found.append), torch.no_grad():
        encoder(*batch)
    return found


@pytest.mark.parametrize("backend", ["auto", "dense"])
@pytest.mark.parametrize("name", VISIONS)
def test_a_watcher_gets_tokens_as_the_plan_has_them(name: str, backend: str) -> None:
    _, _, changes, prefix, (height, width) = VISIONS[name]
    patch = changes.get("patch_size", 16)
    encoder, batch = build(name)
    raster = calls_of(encoder, batch, mms.SparseConfig(
        0.3, tile=64, dense_below=0, patch_order=False, backend=backend))[0]  # fmt: skip
    call = calls_of(encoder, batch, mms.SparseConfig(
        0.3, tile=64, dense_below=0, backend=backend))[0]  # fmt: skip
    assert call.layout is call.plan().layout
    assert call.layout is not None
    assert call.layout.order is not None
    if call.scores is not None:
        assert call.scores.plan is call.plan()
    order = torch.arange(call.k.shape[2])
    order[prefix:] = prefix + torch.tensor(patch_order(height // patch, width // patch))
    assert call.layout.order[0].equal(order)
    for mine, theirs in ((call.q, raster.q), (call.k, raster.k), (call.v, raster.v)):
        assert mine.equal(theirs[:, :, order])
        assert restore(mine, call.layout, call.first).equal(theirs)


@pytest.mark.parametrize("name", VISIONS)
def test_gradients_of_the_whole_are_those_of_stock(name: str) -> None:
    encoder, batch = build(name)

    def gradients() -> list[torch.Tensor]:
        encoder.zero_grad()
        tokens, _ = encoder(*batch)
        (tokens * torch.linspace(-1, 1, tokens.numel()).view_as(tokens)).sum().backward()
        return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    want = gradients()
    with mms.sparse(encoder, mms.SparseConfig(1.0, tile=64, dense_below=0)):
        found = gradients()
    assert len(want) == len(found) > 4
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-5)


@torch.no_grad()
def test_a_layer_gives_what_its_selection_says_in_raster_order() -> None:
    encoder, batch = build("timm-dinov2")
    stock = calls_of(encoder, batch, RASTER)[0]
    call = calls_of(encoder, batch, GRID)[0]
    assert call.layout is not None
    assert call.layout.order is not None
    assert call.selection is not None
    heads, count = stock.q.shape[1:3]
    mask = torch.zeros(len(stock.q), heads, count, count, dtype=torch.bool)
    order = call.layout.order[0]
    mask[:, :, order[:, None], order[None]] = call.selection.to_dense_mask()
    tokens = {}
    module = call.module
    hook: Any = module.proj.register_forward_pre_hook(lambda m, args: tokens.update(x=args[0]))
    encoder(*batch)
    hook.remove()
    want = mms.attention_reference(stock.q, stock.k, stock.v, mask=mask)
    torch.testing.assert_close(tokens["x"], want.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-4)
    # Drawings are of raster positions too.
    for token in range(0, count, 7):
        share = kept_share(call.selection, [token])
        torch.testing.assert_close(share, mask[0, :, token].float().mean(0))


@torch.no_grad()
def test_copies_attend_as_the_original_and_raster_differs() -> None:
    encoder, batch = build("timm-dinov2")
    mms.sparsify(encoder, GRID)
    want, _ = encoder(*batch)
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert twin(*batch)[0].equal(want)
    mms.sparsify(encoder, RASTER)
    assert not encoder(*batch)[0].equal(want)


@torch.no_grad()
def test_report_counts_the_same_pairs() -> None:
    encoder, batch = build("timm-dinov2")
    mms.sparsify(encoder, GRID)
    rows = mms.report(encoder, {"images": batch[0]}, mass=True).rows
    for row in rows:
        assert row.density == pytest.approx(0.3, abs=0.1)
        assert row.mass is not None
        assert row.density is not None
        assert row.mass > row.density
        assert row.pair_density == {(mms.Modality.IMAGE, mms.Modality.IMAGE): row.density}


@torch.no_grad()
def test_tokens_put_in_order_once_give_what_q_k_v_and_output_give_one_by_one() -> None:
    encoder, batch = build("timm-dinov2")
    tokens = torch.randn(1, calls_of(encoder, batch, GRID)[0].q.shape[2], encoder.width)
    layers = state.attention_layers(encoder)
    assert all(layer.layout_in_patch_order(tokens) is not None for layer in layers.values())
    once, _ = encoder(*batch)
    # Who looks into the module sees tokens as they are, and so it takes the other way.
    handles = [layer.module.qkv.register_forward_hook(lambda *_: None) for layer in layers.values()]
    assert all(layer.layout_in_patch_order(tokens) is None for layer in layers.values())
    one_by_one, _ = encoder(*batch)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(once, one_by_one, rtol=1e-5, atol=1e-5)
    raster, _ = mms.sparsify(encoder, RASTER)(*batch)
    assert not torch.allclose(once, raster, atol=1e-3)


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every move of tokens into or out of patch order."""
    moved: list[int] = []
    take = ordering._take

    def counted(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
        moved.append(dim)
        return take(x, index, dim)

    monkeypatch.setattr(ordering, "_take", counted)
    return moved


@torch.no_grad()
def test_all_blocks_of_a_vit_share_two_moves(takes: list[int]) -> None:
    encoder, batch = build("timm-dinov2")
    mms.sparsify(encoder, GRID)
    blocks, depth = encoder.backbone.blocks, len(encoder.backbone.blocks)
    together, _ = encoder(*batch)
    assert len(takes) == 2
    del takes[:], vars(blocks)["forward"]
    each, _ = encoder(*batch)
    assert len(takes) == 2 * depth
    torch.testing.assert_close(together, each, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_who_looks_into_the_blocks_sees_tokens_as_they_are(takes: list[int]) -> None:
    encoder, batch = build("timm-dinov2")
    mms.sparsify(encoder, GRID)
    blocks = encoder.backbone.blocks
    want, _ = encoder(*batch)
    del takes[:]
    outside: list[torch.Tensor] = []
    inside: list[torch.Tensor] = []
    with (
        blocks.register_forward_pre_hook(lambda _, args: outside.append(args[0])),
        blocks[0].register_forward_pre_hook(lambda _, args: inside.append(args[0])),
    ):
        found, _ = encoder(*batch)
    assert len(takes) == 2 * len(blocks)
    assert inside[0].equal(outside[0])
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    # One by one, as for features of some blocks, each layer moves its own.
    backbone, images = encoder.backbone, (batch[0] - encoder.mean) / encoder.std
    last = len(blocks) - 1
    features = backbone.forward_intermediates(
        images, [last], norm=True, output_fmt="NLC", intermediates_only=True
    )
    want = backbone.forward_features(images)[:, backbone.num_prefix_tokens :]
    torch.testing.assert_close(features[0], want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_blocks_of_another_make_move_layer_by_layer(takes: list[int]) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    encoder, batch = build("timm-dinov2")
    mms.sparsify(encoder, GRID)
    blocks = encoder.backbone.blocks
    old = blocks[-1].mlp.fc2
    blocks[-1].mlp.fc2 = Doubled(old.in_features, old.out_features)
    encoder(*batch)
    assert len(takes) == 2 * len(blocks)
    blocks[-1].mlp.fc2 = old
    del takes[:]
    encoder(*batch)
    assert len(takes) == 2


@torch.no_grad()
def test_blocks_that_fail_leave_no_order_behind() -> None:
    encoder, batch = build("timm-dinov2")
    mms.sparsify(encoder, GRID)
    blocks = encoder.backbone.blocks
    want, _ = encoder(*batch)
    width = blocks[-1].mlp.fc1.in_features
    kept, blocks[-1].mlp.fc1 = blocks[-1].mlp.fc1, torch.nn.Linear(width + 1, 4)
    with pytest.raises(RuntimeError):
        encoder(*batch)
    blocks[-1].mlp.fc1 = kept
    assert CALLS_IN_PATCH_ORDER.get() is None
    assert encoder(*batch)[0].equal(want)
    mms.densify(encoder)
    assert "forward" not in vars(blocks)


@torch.no_grad()
def test_dense_layers_among_sparse_ones_take_tokens_in_order(takes: list[int]) -> None:
    encoder, batch = build("timm-dinov2")
    mms.sparsify(encoder, GRID)
    name = next(iter(state.attention_layers(encoder)))
    mms.sparsify(encoder, dataclasses.replace(GRID, dense_layers=(name,)))
    together, _ = encoder(*batch)
    assert len(takes) == 2
    del vars(encoder.backbone.blocks)["forward"]
    each, _ = encoder(*batch)
    torch.testing.assert_close(together, each, rtol=1e-5, atol=1e-5)
