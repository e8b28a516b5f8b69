"""What towers are refused for, by name, and what not being strict does with them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mm_sparse as mms
from mm_sparse.integrations import context
from mm_sparse.integrations.options import AttentionOptions
from tests.support.tower_models import (
    SIZE,
    SPARSE,
    WHOLE,
    WIDTH,
    Case,
    build,
    clip,
    random,
    strong,
    vit,
    wav2vec2,
)

for needed in ("timm", "open_clip", "torchaudio"):
    pytest.importorskip(needed)


def timm_case(name: str, pixels: int, **options: Any) -> Case:
    import timm

    return Case(timm.create_model(name, **options), lambda m: [m(random(1, 3, pixels, pixels))])


def swin() -> Case:
    options = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    return timm_case("swin_tiny_patch4_window7_224", 32, img_size=32, **options)


def maxvit() -> Case:
    return timm_case("maxvit_rmlp_pico_rw_256", 64, img_size=64)


def unfused() -> Case:
    case = vit("vit_tiny_patch16_224")
    case.model.blocks[1].attn.fused_attn = False
    return case


def wavlm() -> Case:
    return wav2vec2(False, encoder_num_buckets=8, encoder_max_distance=16)


def emformer() -> Case:
    from torchaudio.models import Emformer

    model = Emformer(32, 2, 48, 2, segment_length=4, right_context_length=1)
    return Case(model, lambda m: [m(random(2, 41, 32), torch.tensor([40, 33]))[0]])


def cosine() -> Case:
    custom = {"block_type": "custom", "scaled_cosine_attn": True}
    case = clip("CustomTextCLIP", custom)
    # open_clip 3.3 cannot run it either.
    return Case(case.model, lambda m: [m.encode_text(torch.ones(1, 77, dtype=torch.long))])


def added_key() -> Case:
    case = clip()
    block = case.model.visual.transformer.resblocks[1]
    block.attn = nn.MultiheadAttention(32, 2, add_zero_attn=True, batch_first=True)
    return case


KNOWN: dict[str, tuple[Callable[[], Case], str]] = {
    "swin": (swin, r"\(WindowAttention\).*without scaled_dot_product_attention \(`fused_attn`"),
    "unfused": (unfused, r"blocks.1.attn \(Attention\).*`fused_attn` is False\); 1 of 2 layers"),
    "beit": (
        lambda: timm_case("beit_base_patch16_224", 48, **SIZE, **WIDTH),
        r"blocks.0.attn \(Attention\).*position bias.*`relative_position_bias_table`.*2 of 2",
    ),
    "relpos": (
        lambda: vit("vit_relpos_small_patch16_224"),
        r"\(RelPosAttention\).*position bias to the logits \(`rel_pos`\)",
    ),
    "maxvit": (maxvit, r"\(AttentionCl\).*position bias to the logits \(`rel_pos`\)"),
    "xcit": (
        lambda: timm_case("xcit_nano_12_p16_224", 32, depth=1, embed_dim=32, num_heads=2),
        r"\(XCA\).*over channels",
    ),
    "wavlm": (wavlm, r"\(WavLMSelfAttention\).*position bias.*2 of 2 layers of Wav2Vec2Model"),
    "emformer": (emformer, r"\(_EmformerAttention\) cannot run sparse: it computes attention with"),
    "cosine": (cosine, r"visual.*\(Attention\).*without.*`scaled_cosine`"),
    "added_key": (added_key, r"resblocks.1.attn \(MultiheadAttention\).*adds a key of its own"),
}


@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_what_is_known_before_a_call_is_refused_by_name(name: str) -> None:
    torch.manual_seed(0)
    make, message = KNOWN[name]
    case = make()
    case.model.eval()
    before = case.run(case.model)
    was = {n: (type(m), set(vars(m))) for n, m in case.model.named_modules()}
    with pytest.raises(ValueError, match=message):
        mms.sparsify(case.model, WHOLE)
    assert {n: (type(m), set(vars(m))) for n, m in case.model.named_modules()} == was
    mms.sparsify(case.model, WHOLE, strict=False)
    for a, b in zip(case.run(case.model), before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    refused = [row for row in mms.report(case.model).rows if row.mode == "refused"]
    assert refused
    assert all(row.reason for row in refused)


def two_ranges() -> torch.Tensor:
    mask = torch.zeros(1, 1, 145, 145)
    mask[:, :, 3, 40:60] = float("-inf")
    return mask


MASKS = {
    "two_ranges": (two_ranges, "several ranges of keys"),
    "bias": (lambda: random(1, 1, 145, 145), "0 and -inf only, got an additive bias"),
    "learned": (
        lambda: torch.zeros(1, 1, 145, 145, requires_grad=True),
        "0 and -inf only, got an additive bias",
    ),
    "heads": (
        lambda: torch.stack([torch.ones(145, 145).tril(), torch.ones(145, 145)])[None] > 0,
        "the same for all heads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_are_not_ranges_are_refused(name: str) -> None:
    case = build("vit")
    make, message = MASKS[name]
    states, mask = random(2, 145, 32), make()
    module = case.model.blocks[1].attn
    before = module(states, attn_mask=mask)
    mms.sparsify(case.model, SPARSE)
    with pytest.raises(ValueError, match=rf"blocks.1.attn \(Attention\) .*{message}"):
        module(states, attn_mask=mask)
    mms.sparsify(case.model, SPARSE, strict=False)
    assert module(states, attn_mask=mask).equal(before)
    row = mms.report(case.model).rows[1]
    assert row.mode == "refused"
    assert message in row.reason
    mms.sparsify(case.model, mms.SparseConfig(dense_below=1000))
    assert module(states, attn_mask=mask).equal(before)


def test_masks_that_are_ranges_are_honoured() -> None:
    case = build("vit")
    states, module = random(2, 145, 32), case.model.blocks[1].attn
    causal = torch.ones(145, 145, dtype=torch.bool).tril()
    band = causal.triu(-9) | torch.eye(145, dtype=torch.bool)
    masks = [
        {"attn_mask": causal},
        {"is_causal": True},
        {"attn_mask": band[None, None]},
        {"attn_mask": torch.zeros(145, 145).masked_fill(~band, -10000.0)},
        {"attn_mask": (torch.arange(145) < 99).expand(1, 1, 145, 145)},
    ]
    before = [module(states, **mask) for mask in masks]
    mms.sparsify(case.model, WHOLE)
    for mask, stock in zip(masks, before, strict=True):
        torch.testing.assert_close(module(states, **mask), stock, atol=1e-5, rtol=1e-5)
    # The memo of a mask must notice when the mask is written to.
    mask = causal.clone()
    module(states, attn_mask=mask)
    mask.copy_(band)
    torch.testing.assert_close(module(states, attn_mask=mask), before[2], atol=1e-5, rtol=1e-5)


def test_one_tensor_may_show_and_hide() -> None:
    from mm_sparse.integrations.layout_cache import LayoutCache, PlainLayouts
    from mm_sparse.integrations.tower_tokens import TowerTokens
    from mm_sparse.integrations.towers.call_layout import MultiheadMasks, TowerLayoutSource

    source = TowerLayoutSource(TowerTokens(mms.Modality.TEXT), PlainLayouts(), LayoutCache())
    x, mask = torch.zeros(9, 2, 9, 8), torch.zeros(9, 9, dtype=torch.bool)
    mask[:, 4:] = True
    shown = {}
    for name, given in (
        ("shows", mask),
        ("hides", MultiheadMasks(mask, None)),
        ("pads", MultiheadMasks(None, mask[:, :1].clone().expand(9, 9))),
        ("both", MultiheadMasks(mask, mask.roll(2, 1))),
    ):
        layout = source.layout_of_call(nn.Module(), x, x, given, AttentionOptions()).layout
        assert source.layout_of_call(nn.Module(), x, x, given, AttentionOptions()).layout is layout
        shown[name] = layout.valid[0].nonzero().flatten().tolist()
    assert shown == {
        "shows": [4, 5, 6, 7, 8], "hides": [0, 1, 2, 3], "pads": list(range(9)), "both": [2, 3],
    }  # fmt: skip
    with pytest.raises(
        ValueError, match=r"for \(batch, heads, N, N\) = \(9, 2, 9, 9\), got \(1, 1, 9, 8"
    ):
        source.layout_of_call(nn.Module(), x, x, mask[:, 1:], AttentionOptions())


@pytest.mark.parametrize("name", ["vit", "clip", "wav2vec2", "conformer"])
def test_dropout_while_training_is_refused(name: str) -> None:
    case = build(name)
    for module in case.model.modules():
        if isinstance(module, nn.MultiheadAttention) or "SelfAttention" in type(module).__name__:
            module.dropout = 0.5
        if hasattr(module, "attn_drop"):
            module.attn_drop.p = 0.5
    mms.sparsify(case.model, SPARSE)
    case.run(case.model)
    case.model.train()
    with pytest.raises(ValueError, match=r"Attention\) cannot run sparse: dropout of 0.5 on atten"):
        case.run(case.model)
    mms.sparsify(case.model, SPARSE, strict=False)
    case.run(case.model)
    assert {row.mode for row in mms.report(case.model).rows} == {"refused"}


def test_options_of_multihead_attention_are_refused() -> None:
    case = strong(clip())
    block = case.model.visual.transformer.resblocks[0]
    x, row = random(2, 145, 32), random(145, 32)
    before = block.attn(x, x, x, need_weights=True)
    mms.sparsify(case.model, SPARSE)
    with pytest.raises(ValueError, match=r"\(MultiheadAttention\).*weights \(`need_weights`\)"):
        block.attn(x, x, x, need_weights=True)
    with pytest.raises(ValueError, match=r"input must be \(batch, tokens, width\), got \(145, 32"):
        block.attn(row, row, row, need_weights=False)
    other = random(2, 145, 32)
    with context.capture_attention(case.model, lambda call: None):
        out, _ = block.attn(x, other, other, need_weights=False)
    assert mms.report(case.model).rows[0].reason == "cross-attention"
    mms.sparsify(case.model, SPARSE, strict=False)
    for a, b in zip(block.attn(x, x, x, need_weights=True), before, strict=True):
        assert a.equal(b)
    mms.densify(case.model)
    assert block.attn(x, other, other, need_weights=False)[0].equal(out)


def test_a_forward_without_the_fused_call_is_noticed() -> None:
    case = build("vit")
    mms.sparsify(case.model, SPARSE)
    case.model.blocks[1].attn.fused_attn = False
    with pytest.raises(ValueError, match=r"blocks.1.attn \(Attention\).*did not call scaled_dot"):
        case.run(case.model)


def test_windows_are_refused_when_they_come() -> None:
    import timm

    model = timm.create_model("nest_tiny", img_size=64).eval()
    mms.sparsify(model, SPARSE)
    with pytest.raises(ValueError, match=r"\(Attention\).*queries must be \(batch, heads, tokens"):
        model(random(1, 3, 64, 64))


def test_a_forward_that_was_replaced_since_is_not_lost() -> None:
    case = build("vit")
    module = case.model.blocks[0].attn
    module.forward = own = lambda x, **kwargs: type(module).forward(module, 2 * x, **kwargs)
    before = case.run(case.model)[0]
    mms.sparsify(case.model, WHOLE)
    torch.testing.assert_close(case.run(case.model)[0], before, atol=1e-5, rtol=1e-5)
    mms.densify(case.model)
    assert module.forward is own
    mms.sparsify(case.model, WHOLE)
    module.forward = own
    with pytest.raises(ValueError, match=r"blocks.0.attn.forward must be as `sparsify` left it"):
        mms.densify(case.model)


def test_a_model_without_attention_is_refused() -> None:
    import timm

    with pytest.raises(
        ValueError, match="of transformers, timm, open_clip or torchaudio, got ResNet"
    ):
        mms.sparsify(timm.create_model("resnet10t"), WHOLE)
