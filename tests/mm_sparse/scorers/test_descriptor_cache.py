"""Descriptors beside a KV cache: the ranking without them, for less reading."""

import pytest
import torch

import mm_sparse as mms
from mm_sparse.scorers.descriptor_cache import units_alike

HEADS, KV_HEADS, DIM = 6, 2, 32
CONFIG = mms.SparseConfig(ratio=0.3, unit=16, tile=64, sinks=4, window=8, dense_below=0)
SHAPE = {"num_query_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM}
LENGTH = 150
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def scorer(name, device="cpu"):
    """With weights that make a difference."""
    torch.manual_seed(1)
    made = {
        "pooled": mms.PooledScorer,
        "relevance": lambda: mms.RelevanceScorer(**SHAPE),
        "fine": lambda: mms.FineScorer(**SHAPE),
    }[name]()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return made.to(device)


def tokens(device="cpu"):
    torch.manual_seed(0)
    dtype = torch.half if device == "cuda" else torch.float32
    q = torch.randn(2, HEADS, LENGTH, DIM, device=device, dtype=dtype)
    k, v = torch.randn(2, 2, KV_HEADS, LENGTH, DIM, device=device, dtype=dtype).unbind()
    return q, k, v


def layout(length, device="cpu"):
    """Two rows, one padded on the left; a sound of 40 tokens, then a picture of 10, then text."""
    kinds = torch.zeros(2, LENGTH, dtype=torch.int8)
    kinds[:, 25:65], kinds[:, 65:75] = int(mms.Modality.AUDIO), int(mms.Modality.IMAGE)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :13] = 0
    made = mms.TokenLayout.from_modality(kinds[:, :length], attention_mask=mask[:, :length])
    return made.to(device)


def steps():
    """A prompt in two parts, then token by token."""
    return [(0, 61), (61, 90), *((at, at + 1) for at in range(90, LENGTH))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["pooled", "relevance", "fine"])
@torch.no_grad()
def test_ranking_and_output_are_those_without(name, device):
    own, (q, k, v) = scorer(name, device), tokens(device)
    kept = mms.DescriptorCache()
    for first, end in steps():
        call = (q[:, :, first:end], k[:, :, :end])
        options = {"layout": layout(end, device), "config": CONFIG}
        want = own(*call, **options)
        visible = want.plan.visible[:, None].expand_as(want.values)
        found = own(*call, **options, descriptors=kept)
        torch.testing.assert_close(found.values[visible], want.values[visible], atol=0, rtol=2e-3)
        assert len(kept) == end
    out = mms.sparse_attention(*call, v, scorer=own, **options, descriptors=kept)
    torch.testing.assert_close(out, mms.sparse_attention(*call, v, scorer=own, **options))


@torch.no_grad()
def test_kernels_describe_new_units_alone():
    """The same through the interpreter, where CPUs have no kernels of their own."""
    config = mms.SparseConfig(
        ratio=0.3, unit=16, tile=64, sinks=4, window=8, dense_below=0, backend="triton"
    )
    own, (q, k, _) = scorer("relevance"), tokens()
    kept = mms.DescriptorCache()
    for first, end in ((0, 61), (61, 62), (62, 70)):
        call = (q[:, :, first:end], k[:, :, :end])
        want = own(*call, layout=layout(end), config=config)
        visible = want.plan.visible[:, None].expand_as(want.values)
        found = own(*call, layout=layout(end), config=config, descriptors=kept)
        torch.testing.assert_close(found.values[visible], want.values[visible])


@pytest.mark.parametrize("name", ["pooled", "relevance", "fine"])
@torch.no_grad()
def test_keys_of_full_units_are_not_read_again(name):
    own, (q, k, _) = scorer(name), tokens()
    kept = mms.DescriptorCache()
    own(q[:, :, :100], k[:, :, :100], layout=layout(100), config=CONFIG, descriptors=kept)
    want = own(q[:, :, 100:101], k[:, :, :101], layout=layout(101), config=CONFIG)
    k[:, :, :65] = 1e4
    found = own(
        q[:, :, 100:101], k[:, :, :101], layout=layout(101), config=CONFIG, descriptors=kept
    )
    visible = want.plan.visible[:, None].expand_as(want.values)
    torch.testing.assert_close(found.values[visible], want.values[visible])


@torch.no_grad()
def test_the_same_keys_again_need_no_description():
    own, (q, k, _) = scorer("fine"), tokens()
    kept = mms.DescriptorCache()
    options = {"layout": mms.TokenLayout.text(2, 96), "config": CONFIG, "descriptors": kept}
    first = own(q[:, :, :96], k[:, :, :96], **options).values
    assert torch.equal(own(q[:, :, :96], k[:, :, :96], **options).values, first)


def test_units_that_a_segment_moved_are_described_anew():
    before, after = (layout(n).plan(CONFIG, num_query_heads=6, num_kv_heads=2) for n in (70, 90))
    # The picture's 5 tokens were one unit with nothing else; now it has 10, and text follows.
    alike = units_alike(after, before.units, before.unit_modality)
    assert 0 < alike < before.units.shape[1]
    assert torch.equal(after.units[:, :alike], before.units[:, :alike])


def test_gradients_are_not_kept_from_anybody():
    own, (q, k, _) = scorer("relevance"), tokens()
    kept = mms.DescriptorCache()
    k.requires_grad_()
    own(q, k, layout=layout(LENGTH), config=CONFIG, descriptors=kept).values.sum().backward()
    assert len(kept) == 0
    assert k.grad is not None


@torch.no_grad()
def test_another_sequence_is_refused_until_it_is_cleared():
    own, (q, k, _) = scorer("pooled"), tokens()
    kept = mms.DescriptorCache()
    options = {"config": CONFIG, "descriptors": kept}
    own(q[:, :, :40], k[:, :, :40], layout=layout(40), **options)
    with pytest.raises(ValueError, match=r"k must have \(2, 2\) rows and heads and at least 40 "):
        own(q[:, :, :30], k[:, :, :30], layout=layout(30), **options)
    with pytest.raises(ValueError, match=r"got \(1, 2, 40\); clear\(\) the descriptors"):
        own(q[:1, :, :40], k[:1, :, :40], layout=mms.TokenLayout.text(1, 40), **options)
    kept.clear()
    own(q[:, :, :30], k[:, :, :30], layout=layout(30), **options)
    assert len(kept) == 30


@torch.no_grad()
def test_a_picture_that_comes_to_be_ranked_in_another_order_is_described_anew():
    """Few queries leave it in rows, many move it into patches of its grid."""
    config = mms.SparseConfig(ratio=0.3, unit=16, tile=64, sinks=0, window=0, dense_below=0)
    own, kept = scorer("pooled"), mms.DescriptorCache()
    q, k, v = (torch.cat([x, x + 1], 2)[:1, :, :270] for x in tokens())
    for length, count in ((250, 1), (270, 20)):
        spans = [("text", 20), ("image", (13, 15)), ("text", length - 215)]
        options = {"layout": mms.TokenLayout.from_spans(spans), "config": config, "scorer": own}
        call = (q[:, :, length - count : length], k[:, :, :length], v[:, :, :length])
        want = mms.sparse_attention(*call, **options)
        found = mms.sparse_attention(*call, **options, descriptors=kept)
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("before", [True, False])
def test_calls_in_inference_mode_and_outside_share_a_cache(before):
    own, (q, k, _) = scorer("pooled"), tokens()
    kept = mms.DescriptorCache()
    with torch.inference_mode(before), torch.no_grad():
        own(q[:, :, :42], k[:, :, :42], layout=layout(42), config=CONFIG, descriptors=kept)
    call = (q[:, :, 42:43], k[:, :, :43])
    with torch.inference_mode(not before), torch.no_grad():
        want = own(*call, layout=layout(43), config=CONFIG)
        found = own(*call, layout=layout(43), config=CONFIG, descriptors=kept)
        visible = want.plan.visible[:, None].expand_as(want.values)
        torch.testing.assert_close(found.values[visible], want.values[visible])
