"""Both recipes on two processes of a CPU (gloo), and a run that is killed and resumed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tests" / "support" / "distributed_run.py"
DDP = "ddp_find_unused_parameters_true"
# Each takes a minute: speech with every other strategy.
CASES = [("vlm", strategy) for strategy in (DDP, "fsdp2", "sequence", "sharded sequence")]
CASES += [("speech", DDP), ("speech", "sharded sequence")]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def run(folder, recipe, strategy, devices, *more, code=0):
    """Losses by step."""
    command = [sys.executable, str(SCRIPT), recipe, strategy, str(devices), "4", str(folder), *more]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    for name in ("LOCAL_RANK", "NODE_RANK", "MASTER_PORT", "WORLD_SIZE"):
        environment.pop(name, None)
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == code, done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of one process, by recipe."""
    return {
        recipe: run(tmp_path_factory.mktemp(recipe), recipe, "auto", 1)
        for recipe in ("vlm", "speech")
    }


@pytest.mark.parametrize(("recipe", "strategy"), CASES)
def test_two_processes_give_the_losses_of_one_and_resume_after_a_kill(
    tmp_path, alone, recipe, strategy
):
    whole = run(tmp_path / "whole", recipe, strategy, 2)
    assert [step for step, _ in whole] == [1, 2, 3, 4]
    assert [loss for _, loss in whole] == pytest.approx([x for _, x in alone[recipe]], rel=1e-4)
    assert whole[0][1] != pytest.approx(whole[-1][1], rel=1e-3)

    broken = tmp_path / "broken"
    run(broken, recipe, strategy, 2, "--kill=3", code=-signal.SIGKILL)
    (broken / "losses.jsonl").unlink()
    resumed = run(broken, recipe, strategy, 2, "--resume")
    assert [step for step, _ in resumed] == [3, 4]
    assert [loss for _, loss in resumed] == pytest.approx([x for _, x in whole[2:]], rel=1e-6)


@pytest.mark.parametrize("strategy", ["fsdp2", "sharded sequence"])
def test_tied_embeddings_are_sharded_together(tmp_path, strategy):
    alone = run(tmp_path / "alone", "vlm", "auto", 1, "--tied")
    both = run(tmp_path / "both", "vlm", strategy, 2, "--tied")
    assert [loss for _, loss in both] == pytest.approx([x for _, x in alone], rel=1e-4)
    assert both[0][1] != pytest.approx(both[-1][1], rel=1e-3)
