"""Processes (gloo) that share a prompt say what one says, and each keeps the keys of its heads."""

import pytest
import torch

from tests.support.process_runs import run_processes
from tests.support.split_generation import NEW, cases_for

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
            found[size] = run_processes("split_generation.py", size, file, 280)
        return found[size]

    return of


@pytest.mark.parametrize(("size", "name"), CASES)
@pytest.mark.slow
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
