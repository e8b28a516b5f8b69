"""Shipped scorers: they load by name, and their card can be measured again."""

import json
from pathlib import Path

import pytest
import torch

import mm_sparse as mms
from mm_sparse.checkpoints import pretrained
from mm_sparse.integrations.state import attention_layers
from mm_sparse.recipes.evaluation import eval_command, plot
from mm_sparse.recipes.metrics import ranking_methods
from mm_sparse.recipes.models import language
from tests.support.tiny_recipes import SPARSE, TINY, TOKENS, sharpen, tiny, write_corpus

SMOLLM2 = {
    "vocab_size": 40, "hidden_size": 576, "intermediate_size": 48, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
}  # fmt: skip


def test_every_shipped_card_names_tables_with_figures() -> None:
    assert "smollm2-135m" in pretrained.list_pretrained()
    for name in pretrained.list_pretrained():
        card = pretrained.read_card(name)
        assert {"model", "data", "training", "hardware", "tables"} <= set(card)
        for table in card["tables"].values():
            assert table["rows"]
        size = sum(path.stat().st_size for path in pretrained.scorers_folder(name).iterdir())
        assert size < 12e6


def test_scorers_load_by_name_into_the_model_they_are_for() -> None:
    model = language.LanguageConfig(options=SMOLLM2).build(0).eval()
    mms.load_scorers(model, "smollm2-135m")
    found = attention_layers(model)
    assert len(found) == 30
    assert all(layer.scorer is not None for layer in found.values())
    ratios = model_ratios(model)
    assert sum(ratios) / len(ratios) == pytest.approx(0.2, abs=1e-3)
    model(torch.randint(0, 40, (1, 64)))
    with pytest.raises(ValueError, match=r"folder must hold scorers of the model.s layers"):
        mms.load_scorers(tiny().build(0), "smollm2-135m")


def model_ratios(model: torch.nn.Module) -> list[float]:
    every = mms.sparse_config(model).layer_ratio.values()
    return [ratio for own in every for ratio in (own if isinstance(own, tuple) else (own,))]


def test_an_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"among the shipped \[.*'smollm2-135m'.*\].* got 'gpt'"):
        mms.load_scorers(tiny().build(0), "gpt")
    with pytest.raises(ValueError, match="name must be among"):
        pretrained.read_card("gpt")


def test_a_card_is_measured_again_beside_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny().build(0)
    mms.sparsify(model, SPARSE, scorer="fine")
    mms.save_scorers(model, tmp_path / "tiny", dtype=torch.float16)
    old = {"text": "a", "method": "window", "ratio": 0.3, "kl": 7.25}
    table = {
        "program": "evaluation.language_quality",
        "about": "KL",
        "rows": [old],
        "options": ["--methods", "window"],
    }
    card = {"model": "m", "tables": {"text": table, "other": table | {"program": "none"}}}
    (tmp_path / "tiny" / "card.json").write_text(json.dumps(card))
    monkeypatch.setattr(pretrained, "CHECKPOINTS", tmp_path)

    def build(self: language.LanguageConfig, vocabulary: int) -> torch.nn.Module:
        torch.manual_seed(0)
        built = original(language.LanguageConfig(options=TINY), vocabulary)
        sharpen(built)
        return built

    original = language.LanguageConfig.build
    monkeypatch.setattr(language.LanguageConfig, "build", build)
    out = tmp_path / "out.json"
    options = ["--corpus", write_corpus(tmp_path), "--tokens", str(TOKENS), "--ratios", "0.3"]
    eval_command.main(["tiny", "--only", "text", "--out", str(out), *options])
    record = json.loads(out.read_text())
    assert set(record) == {"text"}
    (row,) = record["text"]["rows"]
    assert row["kl"] > 0
    assert f"{row['kl']:g} (7.25)" in capsys.readouterr().out
    assert list(tmp_path.glob("out*")) == [out]
    with pytest.raises(SystemExit):
        eval_command.main(["tiny", "--only", "speed", "--out", str(out)])
    assert "must name tables of" in capsys.readouterr().err
    assert ranking_methods.METHODS["scorers"] is None


def test_results_become_an_image(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    rows = [
        {"text": text, "method": method, "density": density, "kl": 0.1 / density}
        for text in ("text", "code") for method in ("window", "scorers") for density in (0.1, 0.2)
    ]  # fmt: skip
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"text": {"rows": rows}, "needle": {"rows": [{"setting": "x"}]}}))
    plot.main([str(file), str(tmp_path / "out.png")])
    with image.open(tmp_path / "out.png") as chart:
        assert chart.width > chart.height > 100
        colours = chart.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 20
    with pytest.raises(ValueError, match="rows must hold results"):
        plot.draw([], tmp_path / "none.png")


def test_tables_of_encoders_become_images(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"method": "dense", "density": 1.0, "word_error_rate": 0.08, "frame_cosine": 1.0}]
    rows += [
        {"method": method, "density": 0.2, "sampled": sampled, "frame_cosine": 0.9,
         "word_error_rate": 0.1}
        for method in ("window", "trained") for sampled in (0.0, 0.5)
    ]  # fmt: skip
    figures = ["word_error_rate", "frame_cosine"]
    panels = plot.panels_of(rows, figures)
    assert list(panels) == [(f, t) for t in ("", "50% of it sampled") for f in figures]
    assert all([row["method"] for row in own] == ["window", "trained"] for own in panels.values())
    file = tmp_path / "speech.json"
    file.write_text(json.dumps({"rows": rows}))
    plot.main([str(file), str(tmp_path / "out.png"), "--figure", *figures])
    assert (tmp_path / "out.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="one of \\['kl'\\]"):
        plot.draw(rows, tmp_path / "none.png")
