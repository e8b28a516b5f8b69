"""Data that is missing, empty or of another format is refused in a sentence."""

import json
from pathlib import Path

import pytest
import torch

from mm_sparse.recipes.data import SampleData
from mm_sparse.recipes.data.llava import LlavaJson
from mm_sparse.recipes.data.speech_manifests import LibriSpeechTree, Manifest
from mm_sparse.recipes.datasets.digits import DigitCanvases, DigitTokenizer
from mm_sparse.recipes.models.audio import AudioConfig
from mm_sparse.recipes.models.language import LanguageConfig

WAV2VEC2 = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


def test_data_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="train must hold at least one sample, got none"):
        SampleData(DigitCanvases(length=0), DigitTokenizer())


def test_json_lines_and_json_are_told_apart(tmp_path: Path) -> None:
    lines, whole = tmp_path / "lines.json", tmp_path / "whole.json"
    lines.write_text("{}\n{}\n")
    whole.write_text(json.dumps([{"text": "a"}], indent=1))
    with pytest.raises(ValueError, match="must hold one JSON list, got more behind it"):
        LlavaJson(str(lines))
    with pytest.raises(ValueError, match="must have a JSON object in every line, got one JSON"):
        Manifest(str(whole))
    whole.write_text(json.dumps([{"text": "a"}]))
    with pytest.raises(ValueError, match="must have a JSON object in every line, got a JSON list"):
        Manifest(str(whole))
    whole.write_text("[]")
    with pytest.raises(ValueError, match="must hold at least one row, got an empty list"):
        LlavaJson(str(whole))


def test_missing_files_and_folders_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="path must be a JSON file, got 'no'"):
        LlavaJson("no")
    with pytest.raises(ValueError, match="path must be a file of JSON lines, got 'no'"):
        Manifest("no")
    with pytest.raises(ValueError, match="root must be a folder, got 'no'"):
        LibriSpeechTree("no")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    missing = str(tmp_path / "no")
    with pytest.raises(ValueError, match="path must be a folder with a model of transformers"):
        LanguageConfig(path=missing).build(0)
    with pytest.raises(ValueError, match="path must be a folder with a model of transformers"):
        AudioConfig("wav2vec2", path=missing).build()


@pytest.mark.parametrize(
    ("kind", "options", "shortest"), [("conformer", {}, 321), ("wav2vec2", WAV2VEC2, 3200)]
)
def test_audio_too_short_to_learn_from_is_refused(kind, options, shortest: int) -> None:
    tower = AudioConfig(kind, options=options).build().train()
    with pytest.raises(ValueError, match=f"waveforms must have at least {shortest} samples"):
        tower(torch.randn(1, 96), torch.tensor([96]))
    with pytest.raises(ValueError, match="waveforms must have at least"):
        tower.eval()(torch.zeros(1, 0), torch.tensor([0]))
    assert tower(torch.randn(1, 96), torch.tensor([96])).shape[1] == 1
