"""Sequence parallelism on several GPUs (NCCL): the check of the tests, and the time of a step.

torchrun --nproc-per-node 2 -m tests.tools.time_sequence_parallel --tokens 32768
torchrun --nproc-per-node 2 -m tests.tools.time_sequence_parallel --tokens 256 --width 64 (on CPUs)
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import mm_sparse as mms
from tests.support.sequence_run import SCENARIOS, scenarios_for, step


def check(group: dist.ProcessGroup, device: str) -> dict[str, Any]:
    """Every scenario alone and together, in float32: errors of norms, and whether units differ."""
    found = {}
    for name in scenarios_for(group.size()):
        scenario = SCENARIOS[name]
        if scenario.replicas > 1:
            continue
        alone, both = (step(scenario, g, device, torch.float32) for g in (None, group))
        errors = [
            float((both.grads[key] - grad).norm() / grad.norm().clamp(min=1e-12))
            for key, grad in alone.grads.items()
        ]
        found[name] = {
            "loss": float((both.loss - alone.loss).abs()),
            "gradient": max(errors),
            "units": all(
                torch.equal(both.units[key][1][:, :, : count.shape[2]], count)
                and torch.equal(
                    _live(both.units[key][0][:, :, : count.shape[2]], count), _live(index, count)
                )
                for key, (index, count) in alone.units.items()
            ),
        }
    return found


def _live(index: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The numbers of units that count."""
    return index[torch.arange(index.shape[-1], device=index.device) < count[..., None]]


def seconds(
    model: nn.Module, ids: torch.Tensor, group: dist.ProcessGroup | None, steps: int
) -> float:
    """The least time of a step, forward and backward."""
    with mms.sequence_parallel(model, group) if group else nullcontext() as sequence:
        times = []
        for _ in range(steps + 1):
            wait(ids.device)
            dist.barrier()
            start = time.perf_counter()
            logits = model(input_ids=ids, use_cache=False).logits
            if sequence is None:
                loss = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
            else:
                loss = sequence.loss(logits, ids)
            loss.backward()
            if sequence is not None:
                sequence.sum_gradients()
            wait(ids.device)
            times.append(time.perf_counter() - start)
            model.zero_grad()
            del logits, loss
    return min(times[1:])


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Both, as JSON of the first rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    group = dist.group.WORLD
    report: dict[str, Any] = {"ranks": group.size(), "check": check(group, device), "seconds": {}}
    torch.manual_seed(0)
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8} if args.width >= 1024 else {
        "num_attention_heads": 4, "num_key_value_heads": 2
    }  # fmt: skip
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000, hidden_size=args.width, intermediate_size=args.width * 7 // 2,
            num_hidden_layers=args.layers, max_position_embeddings=args.tokens, **heads,
        )
    ).to(device, torch.bfloat16 if on_gpu else torch.float32).train()  # fmt: skip
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.requires_grad_(True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(32000, (1, args.tokens), device=device)
    for name, backend in (("dense", "dense"), ("sparse", "auto")):
        mms.sparsify(model, mms.SparseConfig(ratio=0.2, backend=backend, dense_below=0))
        for ranks, together in ((1, None), (group.size(), group)):
            report["seconds"][f"{name} x{ranks}"] = seconds(model, ids, together, args.steps)
    report["device"] = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    report["arguments"] = vars(args)
    if group.rank() == 0:
        print(json.dumps(report, indent=2))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
