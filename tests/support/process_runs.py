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
        meeting = os.path.join(folder, "meeting")
        mp.spawn(_work_and_end, (work, size, meeting, file), nprocs=size)


def _work_and_end(rank: int, work: Callable[..., None], *given: Any) -> None:
    """Without what a process tears down behind its work: threads of gloo abort there at times."""
    work(rank, *given)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
