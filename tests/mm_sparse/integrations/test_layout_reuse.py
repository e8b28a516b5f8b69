"""What a tower makes once and finds again, in the next layer or in the next forward."""

from typing import Any

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mm_sparse as mms
from mm_sparse.integrations import context, state
from mm_sparse.integrations.layout_cache import COMPARED, LayoutCache, one_for_all
from mm_sparse.integrations.towers import call_layout, sdpa_redirect
from mm_sparse.layout import patch_order

SPARSE = mms.SparseConfig(0.3, tile=64, causal=False, sinks=0, window=0, dense_below=100)
SMALL, LARGE = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 176, 176)


def tower(config: mms.SparseConfig = SPARSE) -> Any:
    torch.manual_seed(0)
    options = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
    made = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **options)
    return mms.sparsify(made.eval(), config)


def modes(model: Any) -> list[str]:
    return [row.mode for row in mms.report(model).rows]


@pytest.fixture
def listened(monkeypatch):
    """Layers whose functions were listened to."""
    heard: list[str] = []

    class Counting(sdpa_redirect._Redirect):
        def __init__(self, layer: Any, ordered: Any) -> None:
            super().__init__(layer, ordered)
            heard.append(layer.name)

    monkeypatch.setattr(sdpa_redirect, "_Redirect", Counting)
    return heard


def test_a_dense_call_of_a_known_size_is_not_listened_to(listened) -> None:
    model = tower()
    with torch.no_grad():
        first = model(SMALL)
        assert len(listened) == 2
        report = str(mms.report(model))
        assert "17 tokens < dense_below (100)" in report
        assert torch.equal(model(SMALL), first)
        assert (len(listened), str(mms.report(model))) == (2, report)
        model(LARGE)
        assert (len(listened), modes(model)) == (4, ["sparse"] * 2)
        assert torch.equal(model(SMALL), first)
        assert (len(listened), modes(model)) == (6, ["dense"] * 2)


def test_a_sparse_call_is_always_listened_to(listened) -> None:
    model = tower()
    with torch.no_grad():
        for count in (2, 4):
            model(LARGE)
            assert (len(listened), modes(model)) == (count, ["sparse"] * 2)


def test_watchers_and_other_configs_are_not_missed(listened) -> None:
    model, seen = tower(), []
    with torch.no_grad():
        model(SMALL)
        with context.capture_attention(model, seen.append):
            model(SMALL)
        assert [call.reason for call in seen] == ["17 tokens < dense_below (100)"] * 2
        with context.override_config(model, dense_below=0):
            model(SMALL)
            assert modes(model) == ["sparse"] * 2
        model(SMALL)
        assert modes(model) == ["dense"] * 2


def test_a_call_with_a_mask_of_its_own_is_another(listened) -> None:
    layer = tower().blocks[0].attn
    x = torch.rand(1, 17, 32)
    for count, mask in ((1, None), (1, None), (2, torch.ones(1, 1, 17, 17, dtype=torch.bool))):
        layer(x, attn_mask=mask)
        assert len(listened) == count


def test_a_call_with_anything_but_tensors_and_numbers_is_listened_to() -> None:
    x = torch.rand(1, 17, 32)
    known = sdpa_redirect._form((x,), {"attn_mask": None, "is_causal": False})
    assert known == sdpa_redirect._form((x + 1,), {"attn_mask": None, "is_causal": False})
    assert known != sdpa_redirect._form((x[:, 1:],), {"attn_mask": None, "is_causal": False})
    assert known != sdpa_redirect._form((x,), {"attn_mask": None, "is_causal": True})
    assert sdpa_redirect._form((x, [x]), {}) is None


def test_the_config_of_a_layer_is_made_once() -> None:
    model = tower()
    (first, *_) = state.attention_layers(model).values()
    made = first.shared.layer_config(None, "", 1)
    assert made.sinks == 1
    assert first.shared.layer_config(None, "", 1) is made
    assert first.shared.layer_config(None, "", 0) is SPARSE
    with context.override_config(model, ratio=0.5):
        assert first.shared.layer_config(None, "", 1).ratio == 0.5
    assert first.shared.layer_config(None, "", 1) == made


def test_equal_masks_of_inference_mode_share_a_layout(monkeypatch) -> None:
    made = []
    build = call_layout.layout_from_spans
    monkeypatch.setattr(
        call_layout, "layout_from_spans", lambda *args: made.append(1) or build(*args)
    )
    model = tower()
    with torch.inference_mode():
        x = model.norm(torch.rand(1, 122, 32))
        mask = torch.zeros(1, 1, 1, 122)
        mask[..., 100:] = -10000.0
        for _ in range(2):
            for block in model.blocks:
                out = block.attn(x, attn_mask=mask.expand(-1, -1, 122, -1))
        assert len(made) == 1
        mask[..., 50:] = -10000.0
        other = model.blocks[-1].attn(x, attn_mask=mask.expand(-1, -1, 122, -1))
        assert len(made) == 2
    assert not torch.equal(out, other)


def test_a_memo_compares_small_masks_only() -> None:
    with torch.inference_mode():
        memo, row = LayoutCache(), torch.zeros(1, 1, 1, 8)
        found = memo.of((row.expand(1, 1, 8, 8),))
        found["here"] = None
        assert one_for_all(row.expand(1, 1, 8, 8)).shape == (1, 1, 1, 8)
        assert memo.of((row.clone().expand(1, 1, 8, 8),)) is found
        assert memo.of((row.double().expand(1, 1, 8, 8),)) == {}
        large = torch.zeros(1).expand(COMPARED + 1)
        assert memo.of((large,)) is not memo.of((large,))
    plain = torch.zeros(4, 4)
    memo.of((plain,))["there"] = None
    assert "there" in memo.of((plain,))


@pytest.mark.parametrize("dim", [16, 24, 12, 3], ids=lambda dim: f"D{dim}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_move_bit_for_bit(dim: int, dtype: torch.dtype, rows: int) -> None:
    qkv = torch.randn(2, 50, 3, 4, dim).to(dtype)
    qkv[0, 3] = float("nan")
    for x in (
        *qkv.permute(2, 0, 3, 1, 4),
        qkv[:, 1:, 1].transpose(1, 2),
        qkv[..., 1:].flatten(2, 3),
    ):
        tokens = x.dim() - 2
        index = torch.stack([torch.randperm(x.shape[tokens]) for _ in range(rows)])
        moved = patch_order._take(x, index, tokens)
        for b in range(2):
            want = x[b].index_select(tokens - 1, index[b % rows])
            assert torch.equal(moved[b].isnan(), want.isnan())
            assert torch.equal(moved[b].nan_to_num(), want.nan_to_num())
        assert moved.dtype == dtype


class Waits(TorchDispatchMode):
    """Operators that a GPU would have to be waited for."""

    names = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero",
             "aten::equal", "aten::masked_select")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in self.names:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_a_warm_forward_waits_for_nothing() -> None:
    model = tower(mms.SparseConfig(0.3, tile=64, causal=False, dense_below=0, backend="triton"))
    with torch.inference_mode():
        with Waits() as first:
            want = model(LARGE)
        with Waits() as second:
            out = model(LARGE)
    assert first.seen  # what it looks for is there while layouts are made
    assert second.seen == []
    assert torch.equal(out, want)
