"""Examples run as their first lines say, on small input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, example: str = "high_resolution_vit") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"examples/{example}.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_picture_runs_both_ways_and_what_was_kept_is_drawn(tmp_path: Path) -> None:
    done = run("--size=784", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["patches"] == 56 * 56
    assert 0 < found["feature_cosine"] <= 1
    assert (tmp_path / "kept_patches.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert done.stdout.count("  sparse  ") == 12  # layers in the report


def test_sizes_and_patches_that_do_not_exist_are_refused() -> None:
    assert "--size must be a multiple of 14 from 28, got 100" in run("--size=100").stderr
    assert (
        "--at must be a patch of the 2 x 2 grid, got 2 0"
        in run("--size=28", "--at", "2", "0").stderr
    )


@pytest.mark.slow
def test_sound_runs_both_ways_and_what_was_kept_is_drawn(tmp_path: Path) -> None:
    done = run("--minutes=1.1", "--ratio=0.3", f"--out={tmp_path}", example="long_audio")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["frames"], found["frames_per_second"], found["audio"]) == (3300, 50, "synthetic")
    assert 0 < found["feature_cosine"] <= 1
    assert (tmp_path / "kept_frames.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert done.stdout.count("  sparse  ") == 4


def test_minutes_and_seconds_that_do_not_exist_are_refused() -> None:
    assert "--minutes must be at least a second, got 0.0" in run(
        "--minutes=0", example="long_audio"
    ).stderr  # fmt: skip
    assert "--at must be a second in [0, 60), got 61" in run(
        "--minutes=1", "--at=61", example="long_audio"
    ).stderr  # fmt: skip


@pytest.mark.slow
def test_titles_are_found_both_ways_and_random_weights_are_called_so(tmp_path: Path) -> None:
    done = run("--count=4", f"--out={tmp_path}", example="open_clip_zero_shot")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["weights"], found["patches"], found["right_by_chance"]) == ("random", 1024, 0.25)
    assert 0 < found["embedding_cosine"] < 1
    assert "titles are guesses" in done.stdout
    assert (tmp_path / "titles.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_weights_that_are_no_file_are_refused() -> None:
    done = run("--weights=nowhere.bin", example="open_clip_zero_shot")
    assert "--weights must be a file, got nowhere.bin" in done.stderr


@pytest.mark.slow
def test_the_quickstart_trains_once_answers_both_ways_and_times_many_patches(
    tmp_path: Path,
) -> None:
    few = ("--steps=4", "--canvases=2", "--size=784", f"--out={tmp_path}")
    done = run(*few, example="quickstart")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["dense"]["all"] == 1 > found["sparse"]["all"] > 0
    assert found["many_patches"]["patches"] == 56 * 56
    assert "trained_dense" not in found
    for step in range(1, 6):
        assert f" s] {step}/5 " in done.stdout
    assert "No speed here" in done.stdout
    assert "model: " in done.stdout
    assert (tmp_path / "kept_patches.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_quickstart_refuses_sizes_that_do_not_exist() -> None:
    assert "--size must be a multiple of 14, got 100" in run(
        "--size=100", example="quickstart"
    ).stderr  # fmt: skip
    assert "--steps must be at least 1, got 0" in run("--steps=0", example="quickstart").stderr


def test_the_quickstart_installs_no_tools_of_developers() -> None:
    script = (ROOT / "examples" / "quickstart.sh").read_text()
    assert "dev" not in script.split("pip install", 1)[1]
    assert "OMP_WAIT_POLICY" in script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny vision-language model of a folder, and conversations for it."""
    from tests.support.tiny_checkpoints import write_checkpoint, write_pictures

    folder = tmp_path_factory.mktemp("finetuning")
    return write_checkpoint(folder / "model", "qwen2_5_vl"), write_pictures(folder)


@pytest.mark.slow
def test_a_checkpoint_learns_on_under_lightning(checkpoint, tmp_path: Path) -> None:
    done = run(*checkpoint, "--steps=2", f"--out={tmp_path}", example="finetune_vlm")
    assert done.returncode == 0, done.stderr
    assert "validation/token_f1" in done.stdout
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "model" / "scorers" / "scorers.json").is_file()


@pytest.mark.slow
def test_a_checkpoint_learns_on_with_the_trainer(checkpoint, tmp_path: Path) -> None:
    done = run(*checkpoint, "--steps=2", f"--out={tmp_path}", example="finetune_vlm_trainer")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoint-2" / "scorers" / "scorers.json").is_file()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "adapter" / "scorers" / "scorers.json").is_file()
    lines = (ROOT / "examples" / "finetune_vlm_trainer.py").read_text().splitlines()
    assert len(lines) < 60
