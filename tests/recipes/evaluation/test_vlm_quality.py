"""Methods beside each other on a vision-language model: one density, the same answers asked for."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mm_sparse as mms
from mm_sparse.integrations.state import attention_layers, sparse_config
from mm_sparse.recipes.data.collate import Collator
from mm_sparse.recipes.datasets.digits import DigitCanvases, DigitTokenizer
from mm_sparse.recipes.evaluation import vlm_quality
from mm_sparse.recipes.models import MultimodalLM
from mm_sparse.recipes.models.language import LanguageConfig
from mm_sparse.recipes.models.vision import ProjectorConfig, VisionConfig
from mm_sparse.recipes.run.sparse_vs_dense import prepare
from tests.recipes.models.test_vlm import SPARSE, TINY_LM, TINY_TOWER
from tests.support.tiny_recipes import sharpen

DIGITS = str(Path(__file__).resolve().parents[3] / "recipes" / "configs" / "vlm" / "digits.yaml")


def model(sparse: mms.SparseConfig | None = SPARSE, **options: Any) -> MultimodalLM:
    torch.manual_seed(0)
    made = MultimodalLM(
        DigitTokenizer(), vision=VisionConfig(image_size=72, options=TINY_TOWER),
        language=LanguageConfig(options=TINY_LM), projector=ProjectorConfig(positions=18),
        sparse=sparse, **options,
    )  # fmt: skip
    sharpen(made.language)
    return made


def batch(seed: int = 0) -> Any:
    """Two canvases, 324 image tokens each."""
    data = DigitCanvases("validation", 2, rows=3, columns=3, scale=2, questions=4, seed=seed)
    return Collator(DigitTokenizer(), patch_size=4, max_length=512)([data[0], data[1]])


def test_the_oracle_is_dense_where_everything_is_kept() -> None:
    oracle = {"oracle": vlm_quality.METHODS["oracle"]}
    dense, whole = vlm_quality.table(model(), [batch()], [1.0], oracle)
    assert dense["answers"] == 8
    assert dense["density"] == whole["density"] == whole["ratio"] == whole["as_dense"] == 1.0
    assert whole["exact_match"] == dense["exact_match"]
    assert whole["loss"] == pytest.approx(dense["loss"], abs=2e-5)
    assert whole["kl"] == pytest.approx(0, abs=1e-5)


def test_every_method_has_its_row_at_the_density_asked_for() -> None:
    vlm = model()
    own = {name: layer.scorer for name, layer in attention_layers(vlm.language).items()}
    dense, *rows = vlm_quality.table(vlm, [batch(), batch(1)], [0.5, 0.3], looked_at=1)
    asked = [(0.5, name) for name in vlm_quality.METHODS] + [
        (0.3, name) for name in vlm_quality.METHODS
    ]
    assert [(row["asked"], row["method"]) for row in rows] == asked
    assert dense["answers"] == 16
    for row in rows:
        # 380 tokens are 24 units, of which a budget holds whole ones.
        assert row["density"] == pytest.approx(row["asked"], rel=0.05)
        assert row["kl"] > 0
        assert row["loss"] != dense["loss"]
    found = {row["method"]: row for row in rows[:6]}
    assert len({found[name]["overlap"] for name in ("window", "bigbird", "pooled", "oracle")}) == 4
    assert found["oracle"]["overlap"] == 1.0
    # Untrained, a model's own scorers rank as the pooled score does.
    assert found["scorers"]["overlap"] == pytest.approx(found["pooled"]["overlap"], abs=1e-4)
    assert json.loads(json.dumps(rows)) == rows
    assert {name: layer.scorer for name, layer in attention_layers(vlm.language).items()} == own
    assert sparse_config(vlm.language) == SPARSE


def test_patterns_keep_sinks_and_others_do_not() -> None:
    some = {name: vlm_quality.METHODS[name] for name in ("window", "pooled")}
    without, sinks = (
        list(vlm_quality.table(model(), [batch()], [0.3], some, sinks=n)) for n in (0, 16)
    )
    pair = "TEXT>IMAGE"
    far, near = sinks[1]["density_by_pair"][pair], without[1]["density_by_pair"][pair]
    assert far != near
    assert sinks[1]["density"] == pytest.approx(without[1]["density"], rel=0.05)
    assert sinks[2] == without[2]
    with pytest.raises(ValueError, match=r"densities must be in reach of window, .* got 0.3"):
        list(vlm_quality.table(model(), [batch()], [0.3], some, sinks=64))


def test_scorers_that_learned_from_the_frozen_model_can_rank() -> None:
    vlm = model()
    before = {name: value.clone() for name, value in vlm.state_dict().items()}
    made = vlm_quality.learned(vlm, [batch(1), batch(2)])
    assert set(made) == set(attention_layers(vlm.language))
    _, row = vlm_quality.table(vlm, [batch()], [0.3], {"learned": made})
    assert row["method"] == "learned"
    assert all(torch.equal(value, before[name]) for name, value in vlm.state_dict().items())


@pytest.mark.parametrize("density", [0, -0.1, 1.5])
def test_a_density_that_cannot_be_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=rf"densities must be in \(0, 1\], got {density}"):
        next(vlm_quality.table(model(), [batch()], [0.3, density]))


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="held_out must have batches, got none"):
        next(vlm_quality.table(model(), [], [0.3]))
    with pytest.raises(ValueError, match=r"model must run sparse in language alone, got \[\]"):
        next(vlm_quality.table(model(None), [batch()], [0.3]))


def test_scorers_are_for_checkpoints_that_have_some(tmp_path: Path) -> None:
    paths = {name: str(tmp_path / f"{name}.ckpt") for name in ("dense", "sparse")}
    for name, sparse in (("dense", None), ("sparse", SPARSE)):
        torch.save({"state_dict": model(sparse).state_dict()}, paths[name])
    assert list(vlm_quality.rankers_for(paths["sparse"], None)) == list(vlm_quality.METHODS)
    assert "scorers" not in vlm_quality.rankers_for(paths["dense"], None)
    assert list(vlm_quality.rankers_for(paths["dense"], ["pooled"])) == ["pooled"]
    with pytest.raises(ValueError, match="methods must be without 'scorers' for "):
        vlm_quality.rankers_for(paths["dense"], ["scorers"])
    with pytest.raises(ValueError, match=r"methods must be among .*, got 'linformer'"):
        vlm_quality.rankers_for(paths["dense"], ["linformer"])
    with pytest.raises(ValueError, match=r"weights must be checkpoints, got 'none\.ckpt'"):
        vlm_quality.rankers_for("none.ckpt", None)


def test_the_program_writes_a_table_of_each_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe"])
    quiet = [
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path}",
        "--model.vision.weights=null",
        "--data.validation.init_args.length=2",
    ]
    cli = prepare("quality", DIGITS, quiet)
    weights, out = str(tmp_path / "last.ckpt"), tmp_path / "out.json"
    torch.save({"state_dict": cli.model.state_dict()}, weights)
    vlm_quality.main(
        ["--config", DIGITS, "--weights", weights, "--densities", "0.25", "--methods", "window",
         "scorers", "--out", str(out), *quiet]
    )  # fmt: skip
    record = json.loads(out.read_text())
    assert [row["method"] for row in record["rows"]] == ["dense", "window", "scorers"]
    assert {row["weights"] for row in record["rows"]} == {weights}
    assert record["rows"][0]["answers"] == 32
    assert record["rows"][1]["density"] == pytest.approx(0.25, abs=0.005)


@pytest.mark.gpu
def test_the_program_runs_where_its_trainer_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr(sys, "argv", ["recipe"])
    devices, answers = set(), MultimodalLM.answers

    def spied(self: MultimodalLM, batch: Any) -> Any:
        devices.update({self.device.type, batch["input_ids"].device.type})
        return answers(self, batch)

    monkeypatch.setattr(MultimodalLM, "answers", spied)
    quiet = [
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path}",
        "--model.vision.weights=null",
        "--data.validation.init_args.length=2",
    ]
    cli = prepare("quality", DIGITS, quiet)
    weights = str(tmp_path / "last.ckpt")
    torch.save({"state_dict": cli.model.state_dict()}, weights)
    vlm_quality.main(
        ["--config", DIGITS, "--weights", weights, "--densities", "0.25", "--methods", "window",
         "--out", str(tmp_path / "out.json"), *quiet]
    )  # fmt: skip
    assert devices == {"cuda"}
