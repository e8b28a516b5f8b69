"""Scripts of this folder that start processes of their own and write what came of them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

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
