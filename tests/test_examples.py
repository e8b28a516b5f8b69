"""Examples run as their first lines say, on small input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "examples/high_resolution_vit.py", *arguments]
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
