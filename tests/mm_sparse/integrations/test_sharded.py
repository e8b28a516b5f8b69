"""A sparsified model that a user's loop shards with FSDP2, in two processes."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

import mm_sparse as mms
from tests.support import hf_models

pytest.importorskip("transformers")
SPARSE = mms.SparseConfig(ratio=0.3, dense_below=0, sinks=0, window=16)


def model(registered: bool) -> Any:
    made: Any = mms.sparsify(hf_models.build("llama").model, SPARSE, scorer="relevance")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in mms.scorer_parameters(made):
            parameter.normal_(std=0.05)
    if registered:
        mms.register_scorers(made)
    return made


def work(rank: int, port: int, registered: bool, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    ids = hf_models.long_ids(200)
    alone, sharded = model(registered), model(registered)
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    with torch.no_grad():
        want, found = alone(ids).logits, sharded(ids).logits
    modes = [row.mode for row in mms.report(sharded).rows]
    for layer in sharded.model.layers:
        layer.reshard()
    sharded.reshard()
    mms.save_scorers(sharded, folder / "scorers")
    distributed.barrier()
    mms.densify(sharded)
    mms.densify(alone)
    with torch.no_grad():
        dense = float((sharded(ids).logits - alone(ids).logits).abs().max())
    if rank == 0:
        error = float((found - want).abs().max())
        (folder / "found.json").write_text(json.dumps([error, dense, modes]))
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("registered", [False, True])
def test_a_sharded_model_runs_sparse_is_saved_and_densified(
    registered: bool, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, registered, tmp_path), 2)
    error, dense, modes = json.loads((tmp_path / "found.json").read_text())
    assert error < 1e-5
    assert dense < 1e-5
    assert set(modes) == {"sparse"}
    whole = model(False)
    loaded = mms.load_scorers(hf_models.build("llama").model, tmp_path / "scorers")
    for one, other in zip(mms.scorer_parameters(loaded), mms.scorer_parameters(whole), strict=True):
        assert torch.equal(one, other)
