"""The command line of the speech recipe: logs, images, the tower's distillation losses, the
page."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mm_sparse.cli.main import main as mm_sparse_main
from mm_sparse.recipes.run import pretrain_audio_tower, sparse_vs_dense
from mm_sparse.recipes.run.inspection import inspection_sample
from mm_sparse.recipes.run.lightning_cli import main

ROOT = Path(__file__).resolve().parents[3]
DIGITS = str(ROOT / "recipes" / "configs" / "speech" / "digits.yaml")
FEW = [
    "--trainer.max_steps=3",
    "--trainer.log_every_n_steps=1",
    "--trainer.val_check_interval=3",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--model.audio.weights=null",
    "--model.objectives.dense_steps=1",
    "--model.objectives.scorers_every=2",
    "--model.max_new_tokens=4",
    "--data.train.init_args.speaker=tones",
    "--data.train.init_args.words=5",
    "--data.validation.init_args.speaker=tones",
    "--data.validation.init_args.words=5",
    "--data.validation.init_args.length=2",
    "--data.batch_size=2",
]


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe"])


def fit(folder, *more):
    callbacks = "mm_sparse.recipes.run.callbacks"
    return main(
        [
            "fit",
            f"--config={DIGITS}",
            *FEW,
            f"--trainer.default_root_dir={folder}",
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
            f"--trainer.logger.save_dir={folder}",
            "--trainer.logger+=lightning.pytorch.loggers.TensorBoardLogger",
            f"--trainer.logger.save_dir={folder}",
            f"--trainer.callbacks={callbacks}.Throughput",
            f"--trainer.callbacks+={callbacks}.Density",
            f"--trainer.callbacks+={callbacks}.InspectionFigures",
            "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
            f"--trainer.callbacks.dirpath={folder / 'checkpoints'}",
            "--trainer.callbacks.save_last=true",
            *more,
        ],
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    before, sys.argv = sys.argv, ["recipe"]
    try:
        fit(folder)
    finally:
        sys.argv = before
    return folder


def test_a_run_logs_rates_and_density_by_modality(run_folder):
    log = next(run_folder.rglob("metrics.csv"))
    columns = set(log.read_text().splitlines()[0].split(","))
    assert columns >= {
        "train/loss",
        "train/scorer_kl",
        "validation/loss",
        "validation/wer",
        "validation/cer",
        "validation/density/TEXT>AUDIO",
        "validation/density/AUDIO>AUDIO",
        "validation/density/audio/all",
    }


def test_figures_are_written_and_logged(run_folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = {path.name for path in (run_folder / "figures" / "step-3").iterdir()}
    wanted = {"audio-1", "language-modalities", "language-heads", "audio-heads"}
    assert {f"{name}.png" for name in wanted} <= names
    events = EventAccumulator(str(next(run_folder.rglob("events.out*")).parent))
    events.Reload()
    assert wanted <= set(events.Tags()["images"])


def test_inspect_writes_a_page_for_a_checkpoint(run_folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    checkpoint = next(run_folder.rglob("last*.ckpt"))
    command = [
        "inspect",
        "mm_sparse.recipes.run.inspect_recipe:recipe",
        f"--config={DIGITS}",
        "--sample=1",
    ]
    mm_sparse_main([*command, f"--out={out}", f"--ckpt={checkpoint}", *FEW])
    page = out.read_text()
    assert "MultimodalLM: dictation/validation/1" in page
    assert "Audio 1" in page
    assert page.count("data:image/png;base64,") == 5


def test_a_dense_model_cannot_be_inspected():
    options = sparse_vs_dense.dense_options(DIGITS)
    cli = main([f"--config={DIGITS}", *FEW, *options], run=False)
    assert cli.model.sparse_configs == {}
    with pytest.raises(ValueError, match="model must run sparse to be inspected, got a dense one"):
        inspection_sample(cli.model, cli.datamodule.collator, cli.datamodule.validation[0])


def test_a_file_without_a_class_is_refused(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("model: {width: 3}")
    with pytest.raises(ValueError, match=r"model.class_path of .*mine.yaml must name a class"):
        sparse_vs_dense.dense_options(str(config))


def test_a_tower_learns_to_name_what_it_hears(tmp_path):
    record = yaml.safe_load(Path(DIGITS).read_text())
    weights = str(tmp_path / "tower.safetensors")
    record["model"]["init_args"]["audio"]["weights"] = weights
    for split in ("train", "validation"):
        record["data"][split]["init_args"] |= {"speaker": "tones", "words": 4}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(record))
    pretrain_audio_tower.main([f"--config={recipe}", "--steps=2"])
    cli = main([f"--config={DIGITS}", *FEW, f"--model.audio.weights={weights}"], run=False)
    names = cli.model.audio(torch.randn(1, 3200), torch.tensor([3200]))
    assert names.shape == (1, 10, 11)
    assert torch.allclose(names.sum(-1), torch.ones(1, 10))


def test_records_of_single_runs_become_one(tmp_path):
    same = {"machine": {"device": "a"}, "config": "c.yaml", "options": []}
    paths = [tmp_path / f"{name}.json" for name in ("dense", "sparse")]
    for speed, path in enumerate(paths):
        own = {**same, "machine": {"device": "a", "matmul_tflops": speed}}
        path.write_text(json.dumps({**own, path.stem: {"steps": 2}}))
    same = {**same, "machine": {"device": "a", "matmul_tflops": 0}}
    assert sparse_vs_dense.join(paths) == {**same, "sparse": {"steps": 2}, "dense": {"steps": 2}}
    paths[1].write_text(json.dumps({**same, "machine": {"device": "b"}, "sparse": {}}))
    with pytest.raises(ValueError, match=r"sparse.json: machine must be .* as in the first"):
        sparse_vs_dense.join(paths)
