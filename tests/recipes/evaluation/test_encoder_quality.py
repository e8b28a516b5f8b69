"""Figures of encoders: neighbours, packing, methods that keep equally much, Whisper's file."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mm_sparse.integrations import context, state

pytest.importorskip("timm")
pytest.importorskip("transformers")

import mm_sparse as mms
from mm_sparse.encoders.vision import create_vision_encoder
from mm_sparse.integrations import is_sparsified
from mm_sparse.recipes.datasets import asterisk_prompts
from mm_sparse.recipes.evaluation import encoder_quality, encoder_tasks
from mm_sparse.recipes.pretrained import whisper


def test_neighbours_vote_without_the_image_itself() -> None:
    features = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)
    assert encoder_tasks.neighbour_accuracy(features, list("aaaabbbb")) == 1.0
    # A label that nobody else bears cannot be found.
    assert encoder_tasks.neighbour_accuracy(features, list("aaaxbbbb")) == 7 / 8


def test_clips_are_packed_into_windows_with_all_their_words() -> None:
    clips = [(np.ones(10 * 16000, np.float32), f"clip {n}") for n in range(5)]
    windows = list(asterisk_prompts.packed(iter(clips)))
    assert [text for _, text in windows] == ["clip 0 clip 1", "clip 2 clip 3"]
    assert all(len(samples) <= 30 * 16000 for samples, _ in windows)
    assert asterisk_prompts.plain("Press 1, (then) Don't.") == ["press", "1", "then", "don't"]


def test_methods_keep_equally_much_and_leave_the_model_dense() -> None:
    pytest.importorskip("PIL")
    subject: Any = object.__new__(encoder_tasks.ImageTask)
    subject.model = create_vision_encoder(
        "vit_tiny_patch16_224", image_size=64, patch_size=4, embed_dim=32, depth=2, num_heads=2
    )
    subject.batch, subject.labels, subject.dense = torch.rand(4, 3, 64, 64), list("aabb"), None
    subject.by_kind = False
    stored = (*encoder_quality.STORED, "linformer")
    methods = [m for m in encoder_quality.METHODS if m not in stored]
    orders = ["raster", "grid"]
    rows = list(encoder_quality.compare(subject, methods, [0.25], orders))
    assert [row["method"] for row in rows[1::2]] == [
        "scores",
        "window",
        "random",
        "bigbird",
        "oracle",
    ]
    assert [row["order"] for row in rows] == ["", *orders * 5]
    pairs = zip(rows[1::2], rows[2::2], strict=True)
    assert all(a["patch_cosine"] != b["patch_cosine"] for a, b in pairs)
    assert rows[0]["patch_cosine"] == pytest.approx(1)
    assert all(0.2 < row["density"] < 0.3 for row in rows[1:])
    assert all(row["patch_cosine"] < 1 - 1e-6 for row in rows[1:])
    assert encoder_tasks.density(subject.model) == 1.0


def test_positions_of_whisper_are_those_of_transformers() -> None:
    from transformers.models.whisper.modeling_whisper import sinusoids

    torch.testing.assert_close(whisper.sinusoids(64, 32).float(), sinusoids(64, 32))


@pytest.mark.parametrize(("size", "width"), [("tiny.en", 384), ("base", 512)])
def test_whisper_writes_what_it_was_told(size: str, width: int) -> None:
    try:
        own = whisper.load_whisper(size)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    silence = torch.full((1, 80, 3000), -1.0)
    assert len(own.transcribe(silence, most=8)) == 1
    unknown = own.tokenizer.unk_token_id
    assert all(own.tokenizer.convert_tokens_to_ids(t) not in (None, unknown) for t in own.prompt)
    places = own.model.get_encoder().embed_positions.weight
    torch.testing.assert_close(whisper.sinusoids(1500, width).float(), places, atol=1e-3, rtol=0)


def test_whisper_hears_human_speech_in_the_language_that_it_is_told() -> None:
    pytest.importorskip("soundfile")
    try:
        samples, words = next(asterisk_prompts.packed(asterisk_prompts.prompts(Path("/"))))
        base = whisper.load_whisper("base")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    from transformers import WhisperFeatureExtractor

    extract: Any = WhisperFeatureExtractor()
    features = extract([samples], sampling_rate=16000, return_tensors="pt").input_features
    (heard,) = base.transcribe(features)
    shared = set(asterisk_prompts.plain(heard)) & set(asterisk_prompts.plain(words))
    assert len(shared) > 0.8 * len(set(asterisk_prompts.plain(words)))


def test_an_encoders_file_says_what_it_is(tmp_path) -> None:
    from safetensors.torch import save_file
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=128, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=512
    )
    made = WhisperEncoder(config).eval()
    save_file(made.state_dict(), tmp_path / "encoder.safetensors")
    read = whisper.load_encoder(str(tmp_path / "encoder.safetensors"))
    audio = torch.rand(1, 80, 3000)
    with torch.no_grad():
        assert torch.equal(read(audio).last_hidden_state, made(audio).last_hidden_state)
    with pytest.raises(
        ValueError, match=r"weights must be None, one of tiny\.en, base or a file, got"
    ):
        whisper.load_encoder("large")
    with pytest.raises(ValueError, match=r"name must be one of tiny\.en, base, got 'large'"):
        whisper.load_whisper("large")


def test_trained_scorers_are_one_more_method(tmp_path) -> None:
    pytest.importorskip("PIL")
    subject: Any = object.__new__(encoder_tasks.ImageTask)
    subject.model = create_vision_encoder(
        "vit_tiny_patch16_224", image_size=64, patch_size=4, embed_dim=32, depth=2, num_heads=2
    )
    subject.batch, subject.labels, subject.dense = torch.rand(2, 3, 64, 64), ["a", "b"], None
    subject.by_kind = True
    config = encoder_quality.config(0.25)
    with mms.sparse(subject.model, config, scorer="fine"):
        for parameter in state.scorer_parameters(subject.model):
            torch.nn.init.normal_(parameter, std=1.0)
        mms.save_scorers(subject.model, tmp_path)
    axes = ["scores", "trained"], [0.25], ["grid"], [0.0, 0.5]
    rows = list(encoder_quality.compare(subject, *axes, tmp_path))
    assert [(r["method"], r["sampled"]) for r in rows[1:]] == [
        ("scores", 0.0), ("scores", 0.5), ("trained", 0.0), ("trained", 0.5)
    ]  # fmt: skip
    assert len({row["patch_cosine"] for row in rows}) == 5
    for row in rows:
        kinds = (row["patch_cosine/a"] + row["patch_cosine/b"]) / 2
        assert kinds == pytest.approx(row["patch_cosine"])


def test_budgets_of_layers_are_scaled_for_trained_scorers_alone(tmp_path) -> None:
    pytest.importorskip("PIL")
    subject: Any = object.__new__(encoder_tasks.ImageTask)
    subject.model = create_vision_encoder(
        "vit_tiny_patch16_224", image_size=64, patch_size=4, embed_dim=32, depth=2, num_heads=2
    )
    subject.batch, subject.labels, subject.dense = torch.rand(1, 3, 64, 64), ["a"], None
    subject.by_kind = True
    config = encoder_quality.config(0.25)
    with mms.sparse(subject.model, config, scorer="fine"):
        first, second = state.attention_layers(subject.model)
        own = {first: 0.1, second: (0.4, 0.4)}
        with context.override_config(subject.model, layer_ratio=own):
            mms.save_scorers(subject.model, tmp_path)
    kept: dict[int, list[float]] = {}
    run = subject.run

    def seen() -> Any:
        found = run()
        if is_sparsified(subject.model):
            rows = mms.report(subject.model).rows
            kept[len(kept)] = [round(float(row.density or 0), 2) for row in rows]
        return found

    subject.run = seen
    list(encoder_quality.compare(
        subject, ["trained", "one ratio"], [0.25, 0.5], ["grid"], scorers=str(tmp_path)
    ))  # fmt: skip
    quarter, quarter_one, half, half_one = kept.values()
    assert quarter[1] > 2 * quarter[0]
    assert half == pytest.approx([2 * x for x in quarter], abs=0.07)
    for one, ratio in ((quarter_one, 0.25), (half_one, 0.5)):
        assert one == pytest.approx([ratio] * 2, abs=0.07)


@pytest.mark.parametrize("method", ["trained", "one ratio"])
def test_scorers_and_the_methods_that_use_them_come_together(capsys, method: str) -> None:
    with pytest.raises(SystemExit):
        encoder_quality.main(["images", "--methods", method, "--out", "x.json"])
    assert "must be given with the methods trained and one ratio" in capsys.readouterr().err


def test_unknown_methods_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        encoder_quality.main(["speech", "--methods", "magic", "--out", "x.json"])
    assert "invalid choice: 'magic'" in capsys.readouterr().err


def test_missing_prompts_say_where_they_were_sought(tmp_path) -> None:
    options = argparse.Namespace(root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"root must hold .*asterisk-core-sounds-en"):
        next(asterisk_prompts.prompts(options.root))
