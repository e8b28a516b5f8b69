"""Towers of uncommon shapes give what they give alone, whoever encodes their images."""

import pytest
import torch

from tests.support.process_runs import run_processes
from tests.support.tower_run import cases


@pytest.mark.parametrize("size", [2, 4])
def test_outputs_and_gradients_are_those_of_one_process(size, tmp_path):
    """Four processes share two or three images."""
    found = run_processes("tower_run.py", size, tmp_path / "outcomes.pt", 300)
    assert found.keys() == cases().keys()
    for name, (alone, together) in found.items():
        assert alone.keys() == together.keys()
        for key, wanted in alone.items():
            torch.testing.assert_close(together[key], wanted, msg=lambda m, n=name: f"{n}: {m}")
