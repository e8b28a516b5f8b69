"""Checkpoints that processes train together, each with a part of every sequence (gloo)."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mm_sparse.checkpoints import read_scorers
from mm_sparse.recipes.training import join_checkpoint
from tests.support.shared_training import CASES, STEPS, cases_for, model_of, train
from tests.support.tiny_checkpoints import write_checkpoint, write_pictures

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tests" / "support" / "shared_training.py"
QUICK = ("whole", "sharded")
pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


def together(folder, processes, names, *more, code=0):
    """What several processes have written of the losses of cases."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(SCRIPT), str(processes), str(folder), ",".join(names), *more]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=560
    )
    assert (done.returncode == 0) == (code == 0), done.stderr[-3000:]
    assert not code or f"SIG{signal.Signals(-code).name[3:]}" in done.stderr
    return {name: json.loads((folder / f"{name}-{processes}.json").read_text()) for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with as many KV heads as processes, and conversations with pictures."""
    folder = tmp_path_factory.mktemp("shared")
    write_checkpoint(folder / "model", "qwen2_5_vl", num_key_value_heads=4)
    write_checkpoint(folder / "tied", "qwen2_5_vl", num_key_value_heads=4, tie_word_embeddings=True)
    write_pictures(folder, words=12, count=8)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """Losses of one process."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = train(folder, CASES[name])[2]
        return found[name]

    return of


def check(alone, found):
    for name, losses in found.items():
        wanted = alone(name)
        assert len(wanted) >= STEPS
        assert losses == pytest.approx(wanted, rel=CASES[name].close), name
        assert wanted[0] != pytest.approx(wanted[-1], rel=1e-3)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_and_one_goes_on(folder, alone):
    check(alone, together(folder, 2, QUICK))
    # What two have saved, one resumes: it has all weights and all states of the optimizer.
    for name in QUICK:
        saved = torch.load(folder / f"{name}-2.ckpt", weights_only=True)
        assert saved["global_step"] == STEPS
        _, _, losses = train(folder, CASES[name], steps=6, ckpt_path=folder / f"{name}-2.ckpt")
        _, _, unbroken = train(folder, CASES[name], steps=6)
        assert losses == pytest.approx(unbroken[STEPS:], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_all_kinds_of_training_give_the_losses_of_one_process(folder, alone, processes):
    check(
        alone,
        together(
            folder,
            processes,
            [n for n in cases_for(processes) if n not in QUICK and not CASES[n].answers],
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded"])
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(folder, alone, name):
    together(folder, 2, [name], "--kill=3", code=-signal.SIGKILL)
    for processes in (2, 4):
        # On as many processes, and on more.
        resumed = together(folder, processes, [name], "--resume")[name]
        assert resumed == pytest.approx(alone(name)[2:], rel=1e-5)


@pytest.mark.slow
def test_a_run_of_which_a_process_dies_in_a_step_goes_on(folder, alone):
    """Others wait for it in a collective until they are ended, too."""
    name = "parts"
    saved = folder / f"{name}.ckpt"
    shutil.rmtree(saved, ignore_errors=True)
    saved.unlink(missing_ok=True)
    together(folder, 2, [name], "--kill=3", "--in-step", code=-signal.SIGKILL)
    # Steps that were done, and nothing of the one that was cut off.
    assert json.loads((folder / f"{name}-2.json").read_text()) == pytest.approx(
        alone(name)[:2], rel=1e-5
    )
    resumed = together(folder, 2, [name], "--resume")[name]
    assert resumed == pytest.approx(alone(name)[2:], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parts of adapters", "parts of whole"])
def test_parts_of_a_checkpoint_are_read_by_any_number_of_processes(folder, alone, name, tmp_path):
    together(folder, 2, [name], "--kill=3", code=-signal.SIGKILL)
    saved = folder / f"{name}.ckpt"
    assert saved.is_dir()
    assert len(list(saved.glob("*.distcp"))) == 2
    assert not list(folder.glob(".*.part"))
    resumed = together(folder, 4, [name], "--resume")[name]
    assert resumed == pytest.approx(alone(name)[2:], rel=1e-5)
    # One process without the strategy goes on from the file that it is made to.
    join_checkpoint(saved, tmp_path / "whole.ckpt")
    _, _, losses = train(folder, CASES[name], ckpt_path=tmp_path / "whole.ckpt")
    assert losses == pytest.approx(alone(name)[2:], rel=1e-5)
    module = model_of(folder, CASES[name])
    module.read_weights(str(saved))
    module.export(tmp_path / "exported")
    file = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    state = module.state_dict()
    assert all(torch.equal(state[key], value) for key, value in file["state_dict"].items())
    with pytest.raises(ValueError, match="file must be new"):
        join_checkpoint(saved, tmp_path / "whole.ckpt")
    with pytest.raises(ValueError, match="checkpoint must be a folder of sharded_checkpoints"):
        join_checkpoint(tmp_path, tmp_path / "other.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.answers])
def test_answers_and_exported_weights_are_those_of_one_process(folder, alone, name):
    check(alone, together(folder, 2, [name]))
    one, two = (json.loads((folder / f"{name}-{n}-found.json").read_text()) for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-4)
    assert "validation/token_f1" in one
    models = [AutoModelForImageTextToText.from_pretrained(folder / f"{name}-{n}") for n in (1, 2)]
    for (key, wanted), found in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5, msg=key)
    one, two = (read_scorers(folder / f"{name}-{n}" / "scorers") for n in (1, 2))
    assert one.config == two.config
