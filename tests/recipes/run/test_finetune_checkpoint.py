"""The shipped recipes start from a folder and data that a user names."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jsonargparse")
from transformers import AutoModelForImageTextToText

import mm_sparse as mms
from mm_sparse.recipes.run import recipes_command
from tests.support.tiny_checkpoints import write_checkpoint, write_pictures, write_tones

SMALL = [
    "--trainer.accelerator=cpu", "--trainer.precision=32", "--trainer.max_steps=2",
    "--trainer.accumulate_grad_batches=1", "--trainer.val_check_interval=1",
    "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false",
    "--trainer.num_sanity_val_steps=0", "--data.workers=0", "--data.batch_size=2",
    "--model.init_args.dtype=float32", "--model.init_args.max_new_tokens=2",
]  # fmt: skip
KINDS = {
    "qwen2_5_vl_7b": "qwen2_5_vl",
    "smolvlm": "smolvlm",
    "qwen2_audio": "qwen2_audio",
    "voxtral": "voxtral",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_shipped_recipe_runs_on_a_folder(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    monkeypatch.setattr(sys, "argv", ["recipes"])
    monkeypatch.chdir(tmp_path)
    folder = write_checkpoint(tmp_path / "checkpoint", KINDS[name])
    data = write_tones(tmp_path) if name in ("qwen2_audio", "voxtral") else write_pictures(tmp_path)
    options = [
        f"--model.init_args.folder={folder}", f"--data.train.init_args.path={data}",
        f"--data.validation.init_args.path={data}", *SMALL,
    ]  # fmt: skip
    recipes_command.main(["run", f"finetune/{name}", *options])
    root = tmp_path / "runs" / f"finetune-{name.replace('_', '-')}"
    assert (root / "exported" / "scorers" / "scorers.json").is_file()
    if name != "qwen2_5_vl_7b":
        return
    checkpoint = root / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    recipes_command.main(
        ["run", f"finetune/{name}", "predict", f"--ckpt_path={checkpoint}", *options]
    )
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert [json.loads(line)["wanted"] for line in lines] == ["red", "green", "blue"] * 2
    recipes_command.main(["export", str(checkpoint), "again"])
    model: Any = AutoModelForImageTextToText.from_pretrained("again")
    mms.load_scorers(model, "again/scorers")


def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes"])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    data = write_pictures(tmp_path)
    with pytest.raises(SystemExit):
        recipes_command.main([
            "run", "finetune/smolvlm", "--model.init_args.folder=empty",
            f"--data.train.init_args.path={data}", f"--data.validation.init_args.path={data}",
            *SMALL,
        ])  # fmt: skip
    assert "folder must hold a processor, got 'empty'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--shard_weights=true", "--model.init_args.lora=null"]])
def test_two_processes_share_the_sequences_of_a_recipe(tmp_path: Path, more: list[str]) -> None:
    root = Path(__file__).resolve().parents[3]
    folder = write_checkpoint(tmp_path / "checkpoint", "qwen2_5_vl")
    data = write_pictures(tmp_path, words=12)
    config = root / "recipes" / "configs" / "finetune" / "qwen2_5_vl_7b_long.yaml"
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "mm_sparse.recipes.run.finetune_checkpoint", "fit",
         f"--config={config}", f"--model.init_args.folder={folder}",
         f"--data.train.init_args.path={data}", f"--data.validation.init_args.path={data}",
         *SMALL, "--trainer.devices=2", "--sequence_parallel=2", *more],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    home = tmp_path / "runs" / "finetune-qwen2-5-vl-7b-long"
    assert (home / "exported" / "scorers" / "scorers.json").is_file()
    AutoModelForImageTextToText.from_pretrained(home / "exported")
    assert (home / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--trainer.strategy=ddp"], "trainer.strategy must be auto where sequence_parallel"),
        (["--sequence_parallel=0"], "sequence must be at least 1, got 0"),
    ],
)
def test_impossible_sharing_is_one_sentence(
    tmp_path: Path, monkeypatch, capsys, more: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes"])
    monkeypatch.chdir(tmp_path)
    folder = write_checkpoint(tmp_path / "checkpoint", "qwen2_5_vl")
    data = write_pictures(tmp_path)
    with pytest.raises(SystemExit):
        recipes_command.main([
            "run", "finetune/qwen2_5_vl_7b_long", f"--model.init_args.folder={folder}",
            f"--data.train.init_args.path={data}", f"--data.validation.init_args.path={data}",
            *SMALL, *more,
        ])  # fmt: skip
    assert said in capsys.readouterr().err
