"""Models that transformers splits by heads (`tp_plan="auto"`) run sparse, in two processes."""

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import mm_sparse as mms
from tests.support import hf_models
from tests.support.tiny_checkpoints import write_language

SPARSE = mms.SparseConfig(
    ratio=0.3, tile=64, unit=16, dense_below=0, sinks=0, window=16,
    layer_ratio={0: (0.2, 0.4), 1: {"TEXT": (0.3, 0.2), "IMAGE": 0.1}},
)  # fmt: skip
SCORERS = ("pooled", "relevance", "fine")
pytestmark = pytest.mark.timeout(120)


def split_model(folder: str) -> Any:
    """As each process has it."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_plan="auto")
    ).eval()


def with_scorers(model: Any, scorer: str) -> Any:
    """Sparse, by scorers that differ from head to head and are the same in every process."""
    mms.sparsify(model, SPARSE, scorer=None if scorer == "pooled" else scorer)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in mms.scorer_parameters(model):
            parameter.normal_(std=0.1)
    return model


@torch.no_grad()
def say(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return model(ids).logits, model.generate(ids, max_new_tokens=6, do_sample=False)


def work(rank: int, port: int, folder: str, file: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
    }  # fmt: skip
    dist.init_process_group("gloo")
    alone, split = AutoModelForCausalLM.from_pretrained(folder).eval(), split_model(folder)
    ids, found = hf_models.long_ids(200), {}
    for name in SCORERS:
        one, two = (say(with_scorers(model, name), ids) for model in (alone, split))
        losses = []
        for model in (alone, split):
            with torch.no_grad(), mms.distillation_losses(model, tiles=None) as learned:
                model(ids)
            # Of a process's heads.
            loss = learned.mean().detach().clone()
            if model is split:
                dist.all_reduce(loss)
            losses.append(loss)
        modes = [row.mode for row in mms.report(split).rows]
        found[name] = one, two, losses, modes
    with pytest.raises(ValueError, match="it is split already"):
        mms.sequence_parallel(split)
    mms.densify(split)
    mms.densify(alone)
    found["dense"] = say(alone, ids), say(split, ids)
    few = split_model(f"{folder}-few")
    with pytest.raises(ValueError, match="2 processes do not divide its 1 KV heads"):
        mms.sparsify(few, replace(SPARSE, layer_ratio={}))
    if rank == 0:
        torch.save(found, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home: Path = tmp_path_factory.mktemp("split")
    folder = write_language(home / "model", num_key_value_heads=2)
    write_language(home / "model-few", num_key_value_heads=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, folder, str(home / "found.pt")), nprocs=2)
    return torch.load(home / "found.pt")


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.slow
def test_logits_tokens_and_lessons_are_those_of_one_process(found: Any, name: str) -> None:
    one, two, losses, modes = found[name]
    assert set(modes) == {"sparse"}
    torch.testing.assert_close(two[0], one[0], rtol=1e-4, atol=1e-3)
    assert torch.equal(two[1], one[1])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-7)
    assert (float(losses[0]) > 0) == (name != "pooled")


def test_it_is_taken_off_again(found: Any) -> None:
    one, two = found["dense"]
    torch.testing.assert_close(two[0], one[0], rtol=1e-4, atol=1e-3)
