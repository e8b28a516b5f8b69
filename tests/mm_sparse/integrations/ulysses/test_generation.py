"""Processes (gloo) that share a prompt say what one says, and each keeps the keys of its heads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.split_generation import NEW, cases_for

ROOT = Path(__file__).resolve().parents[4]
SCRIPT = ROOT / "tests" / "support" / "split_generation.py"
SLOW = {2: (), 4: pytest.mark.slow}
CASES = [
    pytest.param(size, name, marks=marks)
    for size, marks in SLOW.items()
    for name in cases_for(size)
]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """By number of processes."""
    found = {}

    def of(size):
        if size not in found:
            file = tmp_path_factory.mktemp("generation") / "answers.pt"
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
            done = subprocess.run(
                [sys.executable, str(SCRIPT), str(size), str(file)],
                cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            found[size] = torch.load(file)
        return found[size]

    return of


@pytest.mark.parametrize(("size", "name"), CASES)
def test_tokens_are_those_of_one_process(answers, size, name):
    alone, together = answers(size)[name]
    assert together["ids"].shape[1] == NEW
    torch.testing.assert_close(together["logits"], alone["logits"], rtol=1e-6, atol=1e-8)
    assert torch.equal(together["ids"], alone["ids"])
    assert together["modes"] == alone["modes"]
    heads, tokens = alone["keys"]
    assert together["keys"] == (max(heads // size, 1), tokens)


def test_sparse_steps_are_among_them(answers):
    modes = {name: set(alone["modes"]) for name, (alone, _) in answers(2).items()}
    assert modes["text"] == modes["fine"] == modes["1 KV head"] == {"sparse"}
    assert modes["dense"] == {"dense"}
