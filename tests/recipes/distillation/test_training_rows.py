"""Rows out of files: everything comes, what is held back never does, and states are found again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mm_sparse.recipes.data import Messages
from mm_sparse.recipes.distillation.training_rows import ChatRows, TextRows, open_rows
from mm_sparse.recipes.finetuning import load_model, load_processor
from tests.support.tiny_checkpoints import (
    tokenizer,
    write_checkpoint,
    write_pictures,
    write_texts,
)


def files(folder: Path) -> list[Path]:
    return sorted(Path(write_texts(folder)).iterdir())


def ids(batch: Any) -> list[int]:
    return batch["input_ids"][0].tolist()


def test_rows_of_texts_are_all_of_them_with_ends_between(tmp_path: Path) -> None:
    words, paths = tokenizer(), files(tmp_path)
    rows = TextRows(paths, words, 64)
    want: list[int] = []
    for path in paths:
        want += [*words.encode(path.read_text()), words.eos_token_id]
    got = [i for _ in range(len(want) // 64) for i in ids(rows.take())]
    assert got == want[: len(got)]
    # Then from the start again.
    rest = want[len(got) :]
    assert ids(rows.take())[: len(rest)] == rest
    assert ids(rows.take())[0] in want


def test_rows_begin_with_the_start_of_text_where_there_is_one(tmp_path: Path) -> None:
    words = tokenizer()
    words.bos_token = "<|im_start|>"
    words._tokenizer.post_processor = __import__(
        "tokenizers.processors", fromlist=["x"]
    ).TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    rows = TextRows(files(tmp_path), words, 64)
    first, second = ids(rows.take()), ids(rows.take())
    assert first[0] == second[0] == 1
    assert 1 not in first[1:]
    assert len(second) == 64


def test_what_is_held_back_never_comes(tmp_path: Path) -> None:
    rows = TextRows(files(tmp_path), tokenizer(), 100)
    held = [tuple(ids(batch)) for batch in rows.hold_back(2)]
    seen = [tuple(ids(rows.take())) for _ in range(1500)]
    assert not set(held) & set(seen)
    assert rows._laps > 2
    with pytest.raises(ValueError, match="data must hold more than 9000 rows of 100 tokens"):
        TextRows(files(tmp_path), tokenizer(), 100).hold_back(9000)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "npz"])
def test_a_state_is_found_again_in_the_middle_of_a_file(tmp_path: Path, kind: str) -> None:
    words, paths = tokenizer(), files(tmp_path / "texts")
    if kind == "jsonl":
        path = tmp_path / "rows.jsonl"
        chat = {"messages": [{"role": "user", "content": "Hi"}]}
        path.write_text("\n".join(json.dumps({"text": p.read_text()[:500]}) for p in paths) + "\n")
        words.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        path.write_text(path.read_text() + json.dumps(chat))
        paths = [path]
    if kind == "npz":
        np.savez(tmp_path / "corpus.npz", train=np.arange(250_000) % 300)
        paths = [tmp_path / "corpus.npz"]
    rows, again = (TextRows(paths, words, 90) for _ in range(2))
    assert ids(rows.hold_back(1)[0]) == ids(again.hold_back(1)[0])
    for _ in range(3):
        rows.take()
    state = json.loads(json.dumps(rows.state()))
    again.restore(state)
    for _ in range(60):
        assert ids(rows.take()) == ids(again.take())


def test_conversations_fill_rows_and_are_found_again(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "qwen2_5_vl")
    data = Messages(write_pictures(tmp_path, 12, words=4))
    model, processor = load_model(folder), load_processor(folder)
    rows, again = (ChatRows(data, processor, model, 300) for _ in range(2))
    held = rows.hold_back(2)
    again.hold_back(2)
    assert all(batch["position_ids"].min() == 0 for batch in held)
    for _ in range(5):
        assert rows.take()["input_ids"].shape[1] <= 300
    again.restore(rows.state())
    for _ in range(8):
        assert ids(rows.take()) == ids(again.take())
    with pytest.raises(ValueError, match="tokens must be at least those of a conversation, got 20"):
        ChatRows(data, processor, model, 20).take()
    with pytest.raises(ValueError, match="data must hold more conversations"):
        ChatRows(data, processor, model, 300).hold_back(12)


def test_models_that_are_not_known_to_keep_conversations_apart_get_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "model", "qwen2_5_vl")
    model, data = load_model(folder), Messages(write_pictures(tmp_path, 6, words=4))
    monkeypatch.setattr(model.config, "model_type", "other")
    batch = ChatRows(data, load_processor(folder), model, 300).take()
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    assert len(batch["input_ids"]) > 1
    assert batch["input_ids"].numel() <= 300


def test_wrong_data_is_named(tmp_path: Path) -> None:
    words = tokenizer()
    speech = tmp_path / "speech.jsonl"
    speech.write_text(json.dumps({"audio_filepath": "a.wav", "text": "a"}))
    with pytest.raises(ValueError, match="data must be texts or messages for a model of text"):
        open_rows([str(speech)], words, None, 64)
    odd = tmp_path / "odd.jsonl"
    odd.write_text(json.dumps({"words": "a"}))
    with pytest.raises(ValueError, match='data must have "text" or "messages" in each row, got'):
        open_rows([str(odd)], words, None, 64).take()
    odd.write_text("{")
    with pytest.raises(ValueError, match=r"data must hold JSON, got .*odd\.jsonl"):
        open_rows([str(odd)], words, None, 64)
    empty = tmp_path / "empty.md"
    empty.write_text("")
    with pytest.raises(ValueError, match="data must hold text, got none in 1 files"):
        TextRows([empty], words, 64).take()
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="data must name files, folders or patterns of them, got"):
        open_rows([str(tmp_path / "none")], words, None, 64)
