"""The page for people with a model of their own: its program runs, before and after."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "your-model.md").read_text()


def lines():
    found = re.findall(r"```diff\n(.*?)```", PAGE, re.S)
    assert len(found) == 1
    return found[0].splitlines()


def test_fewer_than_50_lines_change():
    assert 0 < sum(line[:1] in "+-" and line != "" for line in lines()) < 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dropped", "sparse"), [("+", False), ("-", True)], ids=["before", "after"]
)
def test_the_program_runs(tmp_path, dropped, sparse):
    script = "\n".join(line[1:] for line in lines() if not line.startswith(dropped))
    (tmp_path / "program.py").write_text(script)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss") == 4
    assert (done.stdout.count("  sparse  ") == 4) == sparse
    assert (tmp_path / "scorers").is_dir() == sparse
