"""What is measured of caches that release keys."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mm_sparse as mms
from mm_sparse.recipes.evaluation import cache_quality, needle
from tests.support.hf_models import build, long_ids

pytest.importorskip("transformers")


class Numbers:
    """Three ids a letter, as a tokenizer of the tiny model's vocabulary."""

    def encode(self, text: str) -> list[int]:
        return [3 + ord(c) % 96 for c in text]


@torch.no_grad()
def test_pieces_give_the_logits_of_one_forward() -> None:
    from transformers import DynamicCache

    model, ids = build("llama").model, long_ids(150)[:1]
    found = cache_quality.continued(model, DynamicCache(), ids, 100)
    torch.testing.assert_close(found, model(ids).logits[0, 99:-1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_methods_hold_equally_many_keys_and_keep_what_they_say() -> None:
    model, ids = build("llama").model, long_ids(480)[:1]
    names = ("last", "snapkv", "sparse", "spread")
    caches = cache_quality.methods(model, names, 0.4, [ids])
    held = {}
    for name, make in caches.items():
        cache = make()
        cache_quality.continued(model, cache, ids, 460)
        held[name] = sum(layer.positions.shape[-1] for layer in cache.layers)
        if name == "last":
            want = [*range(4), *range(460 - 180, 460)]
            assert cache.layers[0].positions[0, 1].tolist() == want
    assert held["last"] == held["snapkv"] == held["sparse"] == 2 * 184
    assert abs(held["spread"] - 2 * 184) <= 4


@torch.no_grad()
def test_a_whole_cache_has_no_kl_and_a_smaller_one_more() -> None:
    model, ids = build("llama").model, long_ids(300)[:1]
    caches = {
        "all": lambda: mms.SparseCache(model, 1.0),
        "half": lambda: mms.SparseCache(model, 0.5),
        "few": lambda: mms.SparseCache(model, 0.1, window=16),
    }
    found = cache_quality.kl_of_next(model, caches, ids, 250)
    assert found["all"] == pytest.approx(0, abs=1e-6)
    assert 1e-5 < found["half"] < found["few"]


class Copies(torch.nn.Module):
    """Answers from the ids of the keys that are held: right if the fact is among them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.device = torch.device("cpu")

    def forward(self, ids: Tensor, past_key_values: Any, logits_to_keep: int = 0) -> Any:
        past_key_values.ids += ids[0].tolist()
        text = "".join(map(chr, past_key_values.ids))
        fact = past_key_values.fact if past_key_values.knows else " ?"
        logits = torch.zeros(ids.shape[1], 128)
        for at in range(ids.shape[1]):
            so_far = text[: len(text) - ids.shape[1] + at + 1]
            behind = so_far[so_far.rindex(" is") + 3 :] if " is" in so_far else ""
            if len(behind) < len(fact):
                logits[at, ord(fact[len(behind)])] = 1.0
        keep = logits[-logits_to_keep:] if logits_to_keep else logits
        return type("Out", (), {"logits": keep[None]})


@pytest.mark.parametrize("later", [False, True])
def test_an_answer_counts_if_all_of_it_is_right(later: bool) -> None:
    class Characters:
        def encode(self, text: str) -> list[int]:
            return [ord(c) for c in text]

    rows = torch.full((2, 400), ord("."))
    for trial in itertools.islice(needle.trials(rows, Characters()), 4):
        answer = "".join(map(chr, trial.ids[0, -trial.answer :].tolist()))
        for knows in (True, False):
            cache = type("Cache", (), {"ids": [], "fact": answer, "knows": knows})()
            assert cache_quality.recalls(Copies(), cache, trial, later) is knows


def test_the_program_writes_a_row_for_each_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.npz"
    ids = long_ids(360).numpy().astype(np.int32)
    np.savez(corpus, **{"test/text": ids, "validation/text": ids, "train": ids[0]})
    folder = tmp_path / "model"
    build("llama").model.save_pretrained(folder)
    monkeypatch.setattr(cache_quality, "HFTokenizer", lambda _: Numbers())
    # A model with random weights recalls nothing.
    monkeypatch.setattr(cache_quality, "recalls", lambda *_: True)
    out = tmp_path / "out.json"
    sizes = ["--tokens", "320", "--next", "40", "--count", "1", "--facts", "2", "--keeps", "0.4"]
    cache_quality.main(["--model", str(folder), "--corpus", str(corpus), "--out", str(out), *sizes])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4 + 2 * 4
    assert {row["method"] for row in rows} == {"last", "snapkv", "sparse", "spread"}
    assert all(row["kl"] >= 0 for row in rows if "kl" in row)
    assert [row["recalled"] for row in rows if "needle" in row] == [1.0] * 8
    with pytest.raises(SystemExit):
        cache_quality.main(
            ["--model", str(folder), "--corpus", str(corpus), "--out", str(out), "--tokens", "900"]
        )
    assert "--tokens 1412" in capsys.readouterr().err
