"""Sequence parallelism on several GPUs (NCCL): the check of the tests, and the time of a step.

torchrun --nproc-per-node 2 -m tests.tools.time_sequence_parallel check
torchrun --nproc-per-node 2 -m tests.tools.time_sequence_parallel lora --tokens 32768
torchrun --nproc-per-node 2 -m tests.tools.time_sequence_parallel lora --tokens 256 --shape tiny

The last one runs on CPUs (gloo). What is found is printed, and written to $OUT as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

import mm_sparse as mms
from tests.support.sequence_run import SCENARIOS, scenarios_for, step

SHAPES = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 16, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 320,
    },
}  # fmt: skip
"""Of Llama 3 and one that CPUs run; weights are random."""
FASTEST = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
"""Dense attention that GPUs have; the faster one of a run is the one to beat."""
LABELS = 16
"""Tokens of which one has a label, as in conversations; logits are made of those alone."""
NEW = 16
"""Tokens of an answer."""


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
            "units": all(_same_units(units, both.units[key]) for key, units in alone.units.items()),
        }
        if group.rank() == 0:
            print(json.dumps({name: found[name]}), flush=True)
    return found


def _same_units(alone: tuple[Tensor, Tensor], both: tuple[Tensor, Tensor]) -> bool:
    """Whether lists and their counts are equal, of tiles that one rank alone has keys for.

    Ranks pad a batch: tiles at the end may be of padding, which is nobody's.
    """
    (index, count), (other, counted) = alone, (x[:, :, : alone[1].shape[2]] for x in both)
    live = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    real = count > 0
    return torch.equal(counted[real], count[real]) and torch.equal(
        other[..., : index.shape[-1]][live], index[live]
    )


def made(args: argparse.Namespace, device: torch.device) -> Any:
    """A model with random weights, trained as asked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {**SHAPES[args.shape], **({"num_hidden_layers": args.layers} if args.layers else {})}
    config = LlamaConfig(max_position_embeddings=args.tokens + NEW, **shape)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    with device:
        model: Any = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if args.work in ("lora", "all"):
        options = {"use_reentrant": False}
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    else:
        model.eval()
    if args.work != "all":
        model.requires_grad_(False)
    if args.work == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        inject_adapter_in_model(LoraConfig(r=16, target_modules=targets), model)
    return model


def train(
    model: Any, ids: Tensor, sequence: mms.SequenceParallel | None, optimizer: Any, sharded: bool
) -> None:
    """A step of all or some weights on a loss of every `LABELS`-th token."""
    labels = torch.full_like(ids, -100)
    labels[:, LABELS::LABELS] = ids[:, LABELS::LABELS]
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    targets = targets if sequence is None else sequence.targets(labels)
    columns = (targets != -100).any(0).nonzero().flatten()
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits
    count = int((labels[:, 1:] != -100).sum())
    own = targets[:, columns].flatten()
    loss = cross_entropy(logits.flatten(0, 1).float(), own, reduction="sum") / count
    # FSDP takes the mean.
    (loss * dist.get_world_size() if sharded else loss).backward()
    if sequence is not None and not sharded:
        sequence.sum_gradients()
    optimizer.step()
    optimizer.zero_grad()


def teach(model: Any, ids: Tensor, sequence: mms.SequenceParallel | None, optimizer: Any) -> None:
    """A step of the scorers alone, from dense attention."""
    weight = 1 / len(mms.scorers_of(model))
    with (
        torch.no_grad(),
        mms.override_config(model, backend="dense"),
        mms.distillation_losses(model, tiles=24, backward_weight=weight),
    ):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    if sequence is not None:
        sequence.sum_gradients(mms.scorer_parameters(model))
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def prefill(model: Any, ids: Tensor, new: int) -> None:
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
        min_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0,
    )  # fmt: skip


def timed(run: Callable[[], None], steps: int, device: torch.device) -> dict[str, float]:
    """Least time of some steps behind a first one, and the peak of memory."""
    times = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(steps + 1):
        wait(device)
        dist.barrier()
        start = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return {"seconds": min(times[1:]), "first": times[0], "GiB": round(peak, 2)}


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def attending(name: str) -> Iterator[None]:
    """With one of the `FASTEST` where it is named."""
    with sdpa_kernel(FASTEST[name]) if name in FASTEST else nullcontext():
        yield


def measure(
    args: argparse.Namespace, model: Any, ids: Tensor, group: dist.ProcessGroup | None, kind: str
) -> dict[str, float]:
    """What one kind of attention takes on one rank, or on those of a group."""
    sparse = kind == "sparse"
    config = mms.SparseConfig(
        ratio=args.ratio, backend="auto" if sparse else "dense", dense_below=0 if sparse else None
    )
    mms.sparsify(model, config, scorer="fine" if args.work == "scorers" else args.scorer)
    scorers = list(mms.scorer_parameters(model))
    for p in scorers:
        p.requires_grad_(args.work == "scorers")
    learning = scorers if args.work == "scorers" else [
        p for p in model.parameters() if p.requires_grad
    ]  # fmt: skip
    with ExitStack() as stack:
        sequence = stack.enter_context(mms.sequence_parallel(model, group)) if group else None
        stack.enter_context(attending(kind))
        if args.work == "prefill":
            first = timed(lambda: prefill(model, ids, 1), args.steps, ids.device)
            more = timed(lambda: prefill(model, ids, 1 + NEW), 1, ids.device)
            rate = NEW / max(more["seconds"] - first["seconds"], 1e-9)
            return {**first, "tokens a second": rate}
        optimizer = torch.optim.AdamW(learning, lr=1e-5)
        if args.work == "scorers":
            return timed(lambda: teach(model, ids, sequence, optimizer), args.steps, ids.device)
        sharded = args.work == "all"
        return timed(
            lambda: train(model, ids, sequence, optimizer, sharded), args.steps, ids.device
        )


def times(args: argparse.Namespace, group: dist.ProcessGroup, device: torch.device) -> Any:
    """Seconds by kind of attention and number of ranks, and ratios of the fastest."""
    model = made(args, device)
    if args.work == "all":
        from torch.distributed.device_mesh import init_device_mesh

        from mm_sparse.recipes.training import shard_decoder

        shard_decoder(model, model.model, init_device_mesh(device.type, (group.size(),)))
    generator = torch.Generator(device).manual_seed(1)
    vocabulary = SHAPES[args.shape]["vocab_size"]
    ids = torch.randint(vocabulary, (1, args.tokens), device=device, generator=generator)
    found: dict[str, Any] = {}
    dense = "cudnn" if device.type == "cuda" else "dense"
    # Scorers learn from dense attention, whatever the model runs.
    kinds = args.kinds or (["sparse"] if args.work == "scorers" else [dense, "sparse"])
    for kind in kinds:
        for ranks in args.ranks or (1, group.size()):
            try:
                found[f"{kind} x{ranks}"] = measure(
                    args, model, ids, group if ranks > 1 else None, kind
                )
            except torch.OutOfMemoryError as error:
                # Where one rank has no room, all are stuck: name the ranks that have.
                raise SystemExit(f"{kind} x{ranks}: {error}") from error
            if group.rank() == 0:
                print(json.dumps({f"{kind} x{ranks}": found[f"{kind} x{ranks}"]}), flush=True)
    return found


def main() -> None:
    """What the command line asks for, as JSON of the first rank."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=("check", "lora", "scorers", "all", "prefill"))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="those of the shape")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--scorer", help="relevance, fine; the training-free score by default")
    parser.add_argument("--kinds", nargs="+", choices=(*FASTEST, "dense", "sparse"))
    parser.add_argument("--ranks", nargs="+", type=int, help="1 and all by default")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    group = dist.group.WORLD
    if args.work == "all" and args.ranks is None:
        # Weights are in parts on all of them.
        args.ranks = [group.size()]
    found = check(group, str(device)) if args.work == "check" else times(args, group, device)
    report = {
        "ranks": group.size(), "arguments": vars(args), "found": found, "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
    }  # fmt: skip
    if group.rank() == 0:
        print(json.dumps(report, indent=2))
        folder = os.environ.get("OUT")
        if folder:
            name = f"sequence-parallel-{args.work}-{args.tokens}-x{group.size()}.json"
            (Path(folder) / name).write_text(json.dumps(report, indent=2))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
