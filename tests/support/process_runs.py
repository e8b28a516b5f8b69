"""Scripts of this folder that start processes of their own and write what came of them."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[2]


def run_processes(script: str, size: int, file: Path, timeout: float) -> Any:
    """What `tests/support/script` writes to `file` for `size` processes, within `timeout` s."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / script), str(size), str(file)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(file)


def spawn_from_command_line(work: Callable[[int, int, str, str], None]) -> None:
    """In such a script: start `work(rank, size, meeting, file)` as often as it is told.

    Args:
        meeting: a file that is not there yet, where the processes find each other.
    """
    size, file = int(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (size, os.path.join(folder, "meeting"), file), nprocs=size)
