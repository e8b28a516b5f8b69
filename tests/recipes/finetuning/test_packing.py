"""A packed row says what its conversations say alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mm_sparse as mms
from mm_sparse.recipes.data import Messages, Samples
from mm_sparse.recipes.data.speech_manifests import Manifest
from mm_sparse.recipes.finetuning import (
    ChatCollator,
    check_packs,
    load_model,
    load_processor,
    pack_rows,
)
from tests.support.hf_models import build
from tests.support.tiny_checkpoints import write_checkpoint, write_pictures, write_tones

SPARSE = mms.SparseConfig(
    ratio=0.3, tile=64, unit=16, sinks=0, window=16, dense_below=0, bidirectional=()
)

# The queries of Granite's projector are of no kind.
pytestmark = pytest.mark.filterwarnings("ignore:.*counts as text")
KINDS = ["qwen2_5_vl", "smolvlm", "qwen2_audio", "granite_speech", "voxtral"]


def prepare(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A model, and a batch of three conversations of different length."""
    if kind == "smolvlm":
        from transformers.models.smolvlm import processing_smolvlm

        # It is wanted for videos alone, and by no extra of ours.
        monkeypatch.setattr(processing_smolvlm, "num2words", str)
    path = write_checkpoint(folder / "checkpoint", kind)
    samples: Samples
    if kind in ("qwen2_audio", "granite_speech", "voxtral"):
        samples = Manifest(write_tones(folder))
    else:
        samples = Messages(write_pictures(folder, words=12))
    batch = ChatCollator(load_processor(path))([samples[i] for i in range(3)])
    return load_model(path).eval(), batch


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_are_kept_apart(kind: str, tmp_path: Path, monkeypatch) -> None:
    model, batch = prepare(kind, tmp_path, monkeypatch)
    packed = pack_rows(model, batch)
    kept = batch["attention_mask"].bool()
    assert packed["input_ids"].shape == (1, kept.sum())
    with torch.no_grad():
        alone, joined = model(**batch), model(**packed, use_cache=False)
        torch.testing.assert_close(joined.logits[0], alone.logits[kept], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(joined.loss, alone.loss)
        config = mms.SparseConfig(ratio=1.0, dense_below=0, bidirectional=())
        mms.sparsify(model, config, strict=False)
        whole = model(**packed, use_cache=False).logits[0]
        torch.testing.assert_close(whole, alone.logits[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_row_sees_nothing_of_the_conversation_before(
    kind: str, tmp_path: Path, monkeypatch
) -> None:
    model, batch = prepare(kind, tmp_path, monkeypatch)
    mms.sparsify(model, SPARSE, strict=False)
    packed = pack_rows(model, batch)
    first = int(batch["attention_mask"][0].sum())
    other = packed["input_ids"].clone()
    other[0, first - 8 : first] = 5
    with torch.no_grad():
        said = model(**packed, use_cache=False).logits[0]
        changed = model(**{**packed, "input_ids": other}, use_cache=False).logits[0]
    assert not torch.equal(said[:first], changed[:first])
    # The tile at the border may choose other keys, for its rows of the first conversation.
    assert (said[first + 64 :] - changed[first + 64 :]).abs().max() < 1e-5


def test_other_families_are_refused() -> None:
    with pytest.raises(ValueError, match="pack must be false for a gemma3 model"):
        check_packs(build("gemma3").model)
