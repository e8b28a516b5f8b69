"""Generation by P processes of a CPU (gloo) that share prompts, for `test_generation.py`.

    python split_generation.py P FILE

FILE holds by case the tokens of one process and of P, the logits of the first step, and the heads
and tokens of the keys that a layer's cache has in the end.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

import mm_sparse as mms
from tests.support import hf_models
from tests.support.process_runs import spawn_from_command_line
from tests.support.sequence_run import (
    MANY,
    PICTURES,
    SPARSE,
    Scenario,
    llama,
    made,
    pictures,
    qwen3_vl,
    text,
)

NEW = 8
# No multiple of the number of processes.
TOKENS = 203
CASES = {
    "text": Scenario(llama(), lambda: text(TOKENS)),
    "fine": Scenario(llama(), lambda: text(TOKENS), scorer="fine"),
    "pooled": Scenario(llama(), lambda: text(TOKENS), scorer=None),
    "left": Scenario(llama(), lambda: text(TOKENS, "left")),
    "dense": Scenario(llama(), lambda: text(TOKENS), replace(SPARSE, backend="dense")),
    "dense layer": Scenario(llama(), lambda: text(TOKENS), replace(SPARSE, dense_layers=(0,))),
    "ratios of heads": Scenario(
        llama(), lambda: text(TOKENS), replace(SPARSE, layer_ratio={0: (0.2, 0.4, 0.6, 0.3)})
    ),
    "one token": Scenario(llama(), lambda: text(1)),
    "fewer tokens than processes": Scenario(llama(), lambda: text(3)),
    "pictures, deep": Scenario(lambda: qwen3_vl().model, lambda: pictures(qwen3_vl), PICTURES),
    "1 KV head": Scenario(
        llama(num_key_value_heads=1), lambda: {n: x[:1] for n, x in text(TOKENS).items()}, MANY
    ),
    "2 KV heads": Scenario(
        llama(num_key_value_heads=2), lambda: {n: x[:1] for n, x in text(192).items()}, MANY
    ),
    "pictures": Scenario(
        lambda: hf_models.qwen2_5_vl().model, lambda: pictures(hf_models.qwen2_5_vl), PICTURES
    ),
}


def cases_for(size: int) -> list[str]:
    """Two KV heads and rows with padding are too few for four."""
    return [n for n in CASES if size == 2 or n != "pictures"]


def answer(scenario: Scenario, group: Any) -> dict[str, Any]:
    """What a model says to a prompt, alone or with the ranks of a group."""
    model: Any = made(scenario, "cpu", torch.float64).eval()
    inputs = {n: x for n, x in scenario.batch().items() if n != "labels"}
    with mms.sequence_parallel(model, group) if group else nullcontext(), torch.no_grad():
        found = model.generate(
            **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=True,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    keys = found.past_key_values.layers[0].keys
    modes = [row.mode for row in mms.report(model).rows if "visual" not in row.name]
    return {
        "ids": found.sequences[:, -NEW:], "logits": found.logits[0], "keys": keys.shape[1:3],
        "modes": modes,
    }  # fmt: skip


def work(rank: int, size: int, meeting: str, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=size)
    found = {}
    for name in cases_for(size):
        alone = answer(CASES[name], None) if rank == 0 else None
        found[name] = alone, answer(CASES[name], dist.group.WORLD)
        # Every rank says the same.
        first = found[name][1]["ids"].clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, found[name][1]["ids"]), name
    if rank == 0:
        torch.save(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    spawn_from_command_line(work)
