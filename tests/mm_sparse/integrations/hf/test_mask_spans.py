"""Masks of transformers as ranges of keys, without a tensor of N x M elements."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mm_sparse as mms
from mm_sparse.integrations.hf import mask_spans
from mm_sparse.integrations.hf.lazy_mask import LazyMask, lazy_mask
from mm_sparse.integrations.hf.mask_spans import MaskRecipe
from mm_sparse.integrations.layout_cache import PlainLayouts
from mm_sparse.integrations.mask_spans import layout_from_spans, spans_from_dense
from mm_sparse.integrations.options import AttentionOptions
from tests.support.hf_models import build

transformers = pytest.importorskip("transformers")
mu = pytest.importorskip("transformers.masking_utils")

B, N = 2, 37
BLOCKS = torch.full((B, N), -1)
BLOCKS[0, 5:14] = 0
BLOCKS[0, 14:20] = 1
BLOCKS[1, 30:37] = 0
PACKED = (torch.arange(N) // 15).expand(B, -1)
LEFT = torch.tensor([3, 0])
WINDOW = mu.sliding_window_causal_mask_function(6)
FUNCTIONS = {
    "causal": mu.causal_mask_function,
    "bidirectional": mu.bidirectional_mask_function,
    "sliding": WINDOW,
    "both-sides": mu.sliding_window_bidirectional_mask_function(4),
    "chunked": mu.chunked_causal_mask_function(8, LEFT),
    "blocks": mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(BLOCKS)),
    "sliding-blocks": mu.or_masks(WINDOW, mu.blockwise_overlay(BLOCKS)),
    "packed": mu.and_masks(mu.causal_mask_function, mu.packed_sequence_mask_function(PACKED)),
    "strangers": lambda b, h, q, k: (k < q) & (k > q - 3) | (k == q),
}


def recipe(function, **changes) -> MaskRecipe:
    arguments = {"batch_size": B, "q_length": N, "kv_length": N, "mask_function": function}
    return MaskRecipe(**{**arguments, **changes})


def mask_of(span: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    position = torch.arange(valid.shape[1])
    return (position >= span[..., :1]) & (position < span[..., 1:]) & valid[:, None]


def padded(kind: str) -> torch.Tensor | None:
    if kind == "none":
        return None
    shown = torch.ones(B, N, dtype=torch.bool)
    holes = {"left": slice(0, 3), "right": slice(33, N), "middle": slice(12, 17)}
    shown[0, holes[kind]] = False
    return shown


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("padding", ["none", "left", "right", "middle"])
@pytest.mark.parametrize("vmap", [False, True], ids=["index", "vmap"])
def test_spans_equal_the_dense_mask(name: str, padding: str, vmap: bool) -> None:
    shown = padded(padding)
    made = recipe(FUNCTIONS[name], attention_mask=shown, use_vmap=vmap)
    span, valid = made.spans()
    found, true = mask_of(span, valid), made.dense()[:, 0]
    queries = torch.ones(B, N, dtype=torch.bool) if shown is None else shown
    assert found[queries].equal(true[queries])
    again = mask_of(*spans_from_dense(made.dense()))
    assert again.equal(true)


@pytest.mark.parametrize("name", ["causal", "sliding", "chunked", "sliding-blocks"])
def test_spans_of_new_tokens_behind_a_cache(name: str) -> None:
    shown = padded("left")
    made = recipe(
        FUNCTIONS[name], q_length=5, q_offset=torch.tensor(32), kv_length=27, kv_offset=10,
        attention_mask=shown,
    )  # fmt: skip
    span, valid = made.spans()
    assert mask_of(span, valid).equal(made.dense()[:, 0])
    assert made.first == 22


def test_unwritten_slots_of_a_static_cache_are_padding() -> None:
    span, valid = recipe(FUNCTIONS["causal"], q_length=4, q_offset=6).spans()
    assert valid.sum(1).tolist() == [10, 10]
    assert span[0].tolist() == [[0, 7], [0, 8], [0, 9], [0, 10]]


@pytest.mark.parametrize("exhaustive", [mask_spans.EXHAUSTIVE, 0], ids=["all", "sampled"])
def test_two_ranges_are_refused(monkeypatch: pytest.MonkeyPatch, exhaustive: int) -> None:
    monkeypatch.setattr(mask_spans, "EXHAUSTIVE", exhaustive)

    def every_other(b, h, q, k):
        return (k <= q) & ((q - k) % 2 == 0)

    with pytest.raises(ValueError, match=r"several ranges of keys.*row 0, token"):
        recipe(every_other).spans()
    with pytest.raises(ValueError, match="several ranges"):
        spans_from_dense(recipe(every_other).dense())


def test_refused_mask_names_the_layer() -> None:
    case = build("llama")
    mms.sparsify(case.model, mms.SparseConfig(ratio=1.0, dense_below=0))
    seen = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    seen[..., 8, 2:4] = False
    with pytest.raises(ValueError, match=r"layers.0.self_attn \(LlamaAttention\).*several ranges"):
        case.model(torch.ones(1, 9, dtype=torch.long), attention_mask=seen)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 4, 4, dtype=torch.bool), r"\(batch, 1, N, M\), got \(1, 4, 4\)"),
        (torch.full((1, 1, 4, 4), -2.0), "additive bias"),
        (torch.eye(4, dtype=torch.bool).expand(1, 1, 4, 4).repeat(1, 2, 1, 1), "differs"),
    ],
    ids=["rank", "bias", "heads"],
)
def test_bad_dense_masks_are_refused(mask: torch.Tensor, message: str) -> None:
    if message == "differs":
        mask[:, 1, 0] = True
    with pytest.raises(ValueError, match=message):
        spans_from_dense(mask)


def test_documents_are_found_in_the_mask() -> None:
    span, valid = recipe(FUNCTIONS["packed"]).spans()
    layout = layout_from_spans(span, valid, 0, torch.zeros(B, N, dtype=torch.int8))
    assert layout.document.equal(PACKED.to(torch.int32))
    span, valid = recipe(FUNCTIONS["sliding"], attention_mask=padded("left")).spans()
    layout = layout_from_spans(span, valid, 0, torch.zeros(B, N, dtype=torch.int8))
    assert layout.document[0].tolist() == [-1] * 3 + [layout.document[0, -1].item()] * (N - 3)


class Largest(TorchDispatchMode):
    """Remembers the most elements that a tensor owned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                size = x.untyped_storage().nbytes() // max(x.element_size(), 1)
                self.elements = max(self.elements, size)
        return out


@pytest.mark.parametrize("name", ["causal", "sliding", "blocks"])
def test_nothing_of_size_n_x_n_is_built(name: str) -> None:
    length = 32768
    blocks = torch.full((2, length), -1)
    blocks[:, 100:900] = 0
    function = FUNCTIONS[name]
    if name == "blocks":
        function = mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(blocks))
    with Largest() as largest:
        mask = lazy_mask(
            batch_size=2, q_length=length, kv_length=length, mask_function=function,
            attention_mask=torch.ones(2, length, dtype=torch.bool),
        )  # fmt: skip
        span, valid = mask.recipe.spans()
        layout_from_spans(span, valid, 0, torch.zeros(2, length, dtype=torch.int8))
    assert mask.shape == (2, 1, length, length)
    assert largest.elements <= 2 * length * 8


@torch.no_grad()
def test_a_model_builds_nothing_of_size_n_x_n() -> None:
    length = 2048
    case = build("gemma3")
    mms.sparsify(case.model, mms.SparseConfig(ratio=0.1, dense_below=0, unit=64))
    ids = torch.randint(3, 99, (1, length))
    with Largest() as largest:
        case.model(ids, attention_mask=torch.ones_like(ids), logits_to_keep=1)
    assert largest.elements < length * length // 2


def test_lazy_mask_passes_for_a_mask() -> None:
    mask = lazy_mask(batch_size=B, q_length=N, kv_length=N, mask_function=FUNCTIONS["blocks"])
    assert (mask.shape, mask.dtype, mask.dim()) == ((B, 1, N, N), torch.bool, 4)
    assert mask.untyped_storage().nbytes() == 1
    for same in (mask.to("cpu"), mask.contiguous(), mask.clone(), mask[:, :, :, :N], mask.bool()):
        assert isinstance(same, LazyMask)
    true = mask.recipe.dense()
    assert not isinstance(mask[0], LazyMask)
    assert mask[..., 3].equal(true[..., 3])
    assert torch.logical_not(mask).equal(~true)
    assert mask.float().equal(true.float())
    assert "LazyMask" in repr(mask)


def test_importing_patches_nothing() -> None:
    import subprocess
    import sys

    code = (
        "import sys, mm_sparse as mms; mms.sparsify, mms.report;"
        "assert 'transformers' not in sys.modules;"
        "import transformers as t; assert 'mm_sparse' not in t.AttentionInterface().keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=str(_root()))


def _root():
    from pathlib import Path

    return Path(__file__).resolve().parents[4]


@pytest.mark.parametrize(
    ("options", "span"),
    [
        ({}, [[0, 1], [0, 2], [0, 3]]),
        ({"sliding_window": 2}, [[0, 1], [0, 2], [1, 3]]),
        ({"is_causal": False}, [[0, 3], [0, 3], [0, 3]]),
    ],
    ids=["causal", "window", "both"],
)
def test_a_call_without_a_mask(options: dict, span: list) -> None:
    from mm_sparse.integrations.hf.call_layout import HFLayoutSource
    from mm_sparse.integrations.hf.modality_tracker import ModalityTracker

    tracker = ModalityTracker(SimpleNamespace(config=None))
    x = torch.zeros(1, 2, 3, 8)
    source = HFLayoutSource(tracker, mms.Modality.IMAGE, PlainLayouts())
    call_layout = source.layout_of_call(torch.nn.Module(), x, x, None, AttentionOptions(**options))
    assert call_layout.layout.span is not None
    assert call_layout.layout.span[0].tolist() == span
    assert call_layout.layout.modality.eq(int(mms.Modality.IMAGE)).all()
