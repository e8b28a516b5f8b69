"""Sequence parallelism on P processes of a CPU (gloo), for `test_sequence_parallel.py`.

    python sequence_run.py P FILE

Each process runs every case alone with whole sequences, then together with the others. FILE holds
by case what came of both: loss, gradients by name, and units that layers selected.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mm_sparse as mms
from tests.support import hf_models
from tests.support.process_runs import spawn_from_command_line

SPARSE = mms.SparseConfig(ratio=0.3, tile=64, unit=16, dense_below=0, sinks=0, window=16)
TOKENS = 200


@dataclass
class Outcome:
    """What came of a step."""

    loss: Tensor
    grads: dict[str, Tensor]
    units: dict[str, tuple[Tensor, Tensor]]
    """By layer: numbers of units (B, K, T, S), and how many count."""
    scorer_loss: Tensor
    logits: Tensor
    sparse: dict[str, bool] = field(default_factory=dict)
    encoded: list[int] = field(default_factory=list)
    """Tokens of each call of a layer of a tower, where towers are shared."""


@dataclass(frozen=True)
class Scenario:
    """A model, a batch, and how they are trained."""

    model: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    config: mms.SparseConfig = SPARSE
    scorer: str | None = "relevance"
    checkpointing: bool | None = None
    """None: none; else whether it is of the reentrant kind."""
    distilled: bool = False
    sharded: bool = False
    """By FSDP2 over all processes, which takes means of gradients."""
    replicas: int = 1
    """Groups of processes, each with rows of its own."""
    towers_shared: bool = False
    """Whether each process encodes some of the images, so that towers have units of these alone."""


def llama(**changes: Any) -> Callable[[], nn.Module]:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, **changes}
    return lambda: hf_models.llama(**sizes).model


def text(tokens: int = TOKENS, padding: str = "none") -> dict[str, Tensor]:
    """Rows of random ids; "left" and "right" hide some, "documents" packs three into a row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (2, tokens), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if padding in ("left", "right"):
        mask = torch.ones_like(ids)
        mask[0, slice(0, 37) if padding == "left" else slice(-37, None)] = 0
        batch["attention_mask"] = mask
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    if padding == "documents":
        bounds = [0, 45, 110, tokens]
        parts = [torch.arange(b - a) for a, b in pairwise(bounds)]
        batch["position_ids"] = torch.cat(parts).expand(2, -1).contiguous()
    return batch


def pictures(make: Callable[[], hf_models.Case]) -> dict[str, Tensor]:
    """Two rows of a picture and a longer text, one of them padded on the left."""
    batch = make().inputs("left")
    more = text(150)["input_ids"]
    for name, new in {
        "input_ids": more,
        "attention_mask": torch.ones_like(more),
        "mm_token_type_ids": torch.zeros_like(more),
    }.items():
        if name in batch:
            batch[name] = torch.cat([batch[name], new], 1)
    ids = batch["input_ids"]
    return {**batch, "labels": ids.masked_fill(batch["attention_mask"] == 0, -100)}


def qwen3_vl() -> hf_models.Case:
    """Four KV heads; features of a picture are added behind the first block, too."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    config = Qwen3VLConfig(
        text_config={**hf_models.TEXT, **heads, "rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "out_hidden_size": 32, "patch_size": 4, "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        },
        image_token_id=hf_models.IMAGE, video_token_id=hf_models.VIDEO,
        vision_start_token_id=hf_models.VISION_START, vision_end_token_id=97,
    )  # fmt: skip
    extra = hf_models.qwen2_5_vl().extra
    model = Qwen3VLForConditionalGeneration(config)
    return hf_models.Case(model, extra, 16, kinds="mm_token_type_ids")


PICTURES = replace(SPARSE, unit=16, window=8, ratio=0.4)
SCENARIOS = {
    "text": Scenario(llama(), text),
    "fine": Scenario(llama(), text, scorer="fine"),
    "pooled": Scenario(llama(), text, scorer=None),
    "left": Scenario(llama(), lambda: text(padding="left")),
    "right": Scenario(llama(), lambda: text(padding="right")),
    "documents": Scenario(llama(), lambda: text(padding="documents")),
    "padded": Scenario(llama(), lambda: text(TOKENS - 3)),
    "padded documents": Scenario(llama(), lambda: text(TOKENS - 3, "documents")),
    "checkpointing": Scenario(llama(), text, checkpointing=False),
    "reentrant checkpointing": Scenario(llama(), text, checkpointing=True),
    "distilled": Scenario(llama(), text, distilled=True),
    "distilled fine": Scenario(llama(), text, scorer="fine", distilled=True),
    "distilled checkpointing": Scenario(llama(), text, distilled=True, checkpointing=False),
    "dense": Scenario(llama(), text, replace(SPARSE, backend="dense")),
    "dense padded": Scenario(
        llama(), lambda: text(TOKENS - 3, "left"), replace(SPARSE, backend="dense")
    ),
    "dense layer": Scenario(llama(), text, replace(SPARSE, dense_layers=(0,))),
    "short": Scenario(llama(), text, replace(SPARSE, dense_below=4096)),
    "sharded": Scenario(llama(), text, distilled=True, sharded=True),
    "sharded checkpointing": Scenario(llama(), text, sharded=True, checkpointing=False),
    "rows and tokens": Scenario(llama(), text, sharded=True, replicas=2),
    "ratios of heads": Scenario(
        llama(), text, replace(SPARSE, layer_ratio={0: (0.2, 0.4, 0.6, 0.3), 1: 0.5})
    ),
    "one head each": Scenario(llama(num_attention_heads=4), text),
    "pictures": Scenario(
        lambda: hf_models.qwen2_5_vl().model, lambda: pictures(hf_models.qwen2_5_vl), PICTURES
    ),
}
SCENARIOS["pictures, deep"] = Scenario(
    lambda: qwen3_vl().model, lambda: pictures(qwen3_vl), PICTURES
)
TOWERS = {
    "images": hf_models.qwen2_5_vl,
    "images, deep": qwen3_vl,
    "images of a batch": hf_models.smolvlm,
    "clips": hf_models.qwen2_audio,
}
for name, case in TOWERS.items():
    SCENARIOS[name] = Scenario(
        lambda case=case: case().model, lambda case=case: pictures(case), PICTURES, scorer=None,
        towers_shared=True,
    )  # fmt: skip
# More ranks than KV heads, with four of them; such a batch has one row, or rows alike.
MANY = replace(SPARSE, ratio=0.2)


def one_row(padding: str = "none") -> dict[str, Tensor]:
    return {name: x[:1].contiguous() for name, x in text(padding=padding).items()}


for heads in (1, 2):
    few = llama(num_key_value_heads=heads)
    SCENARIOS |= {
        f"{heads} KV heads": Scenario(few, one_row, MANY, distilled=True),
        f"{heads} KV heads, two rows": Scenario(few, lambda: text(192), MANY),
        f"{heads} KV heads, padding": Scenario(few, lambda: one_row("left"), MANY),
        f"{heads} KV heads, documents": Scenario(
            few, lambda: one_row("documents"), MANY, checkpointing=False
        ),
        f"{heads} KV heads, dense": Scenario(few, text, replace(SPARSE, backend="dense")),
    }


def scenarios_for(size: int) -> list[str]:
    """Those of so many processes."""
    # Two KV heads, and rows of which each has a picture.
    out = ("pictures", "images", "images of a batch", "clips") if size > 2 else ()
    return [n for n, s in SCENARIOS.items() if n not in out and (s.replicas == 1 or size == 4)]


def made(scenario: Scenario, device: str, dtype: torch.dtype) -> nn.Module:
    """The model of a scenario with scorers that differ from head to head."""
    torch.manual_seed(0)
    model = scenario.model().to(device, dtype).train()
    mms.sparsify(model, scenario.config, scorer=scenario.scorer)
    torch.manual_seed(3)
    for parameter in mms.scorer_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    if scenario.checkpointing is not None:
        options = {"use_reentrant": scenario.checkpointing}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if scenario.sharded:
        # FSDP2 wants one dtype.
        mms.register_scorers(model).to(dtype)
    return model


def next_token_count(labels: Tensor) -> int:
    """Labels of tokens that have one before them."""
    return int((labels[:, 1:] != -100).sum())


def shard(model: Any) -> None:
    """Weights of blocks, and what is left, over all processes."""
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    for block in (*model.model.layers, model):
        fully_shard(block, mesh=mesh)


def step(
    scenario: Scenario, group: dist.ProcessGroup | None, device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Outcome:  # fmt: skip
    """Loss and gradients of a model alone, or of the ranks of a group together."""
    model = made(scenario, device, dtype)
    batch = {name: x.to(device) for name, x in scenario.batch().items()}
    units, sparse, encoded = {}, {}, []

    layers = mms.attention_layers(model)

    def watch(call: mms.AttentionCall) -> None:
        if scenario.towers_shared and layers[call.name].modality is not None:
            encoded.append(call.q.shape[0] * call.q.shape[2])
            return
        sparse[call.name] = call.sparse
        if call.selection is not None:
            # gloo does not send integers of 16 bits.
            units[call.name] = call.selection.index.int(), call.selection.count.int()

    with mms.sequence_parallel(model, group) if group else nullcontext() as sequence:
        if sequence is not None:
            batch = sequence.pad(batch)
            if scenario.sharded:
                shard(model)
        count = next_token_count(batch["labels"])
        if group and scenario.replicas > 1:
            number = dist.get_rank() // group.size()
            batch = {name: x[number : number + 1] for name, x in batch.items()}
        labels = batch.pop("labels")
        lessons = mms.distillation_losses(model, tiles=4) if scenario.distilled else nullcontext()
        # As many draws on each rank do not begin alike by themselves.
        torch.manual_seed(7 if group is None or group.rank() == 0 else 8)
        with mms.capture_attention(model, watch), lessons as learned:
            logits = model(**batch, use_cache=False).logits
        taught = logits.new_zeros(()) if learned is None else learned.mean()
        if sequence is None:
            loss = model.loss_function(logits, labels, vocab_size=logits.shape[-1])
        else:
            loss = sequence.loss(logits, labels, count=count if scenario.replicas > 1 else None)
        whole = loss + 0.5 * taught if taught.requires_grad else loss
        (whole * dist.get_world_size() if scenario.sharded and group else whole).backward()
        loss, taught, logits = loss.detach(), taught.detach(), logits.detach()
        if sequence is not None:
            if not scenario.sharded:
                sequence.sum_gradients()
            dist.all_reduce(loss)
            dist.all_reduce(taught)
            logits = sequence.gather(logits)
            # Towers have all heads on every rank.
            for name, layer in mms.attention_layers(model).items():
                if layer.head_split is not None and name in units:
                    copies = layer.head_split.copies
                    units[name] = tuple(_all_heads(x, group)[:, ::copies] for x in units[name])
    named = [*model.named_parameters(), *mms.scorers_of(model).named_parameters()]
    grads = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in named
        if p.grad is not None
    }
    return Outcome(loss, grads, units, taught, logits, sparse, encoded)


def _all_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # Lists are as long as the longest of a rank.
    width = torch.tensor(x.shape[-1], device=x.device)
    if x.dim() == 4:
        dist.all_reduce(width, dist.ReduceOp.MAX, group=group)
        x = torch.nn.functional.pad(x, (0, int(width) - x.shape[-1]))
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, 1)


def work(rank: int, size: int, meeting: str, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=size)
    pairs = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "sequence"))
    found = {}
    for name in scenarios_for(size):
        scenario = SCENARIOS[name]
        group = pairs["sequence"].get_group() if scenario.replicas > 1 else dist.group.WORLD
        alone = step(scenario, None) if rank == 0 else None
        together = step(scenario, group)
        found[name] = alone, together
    if rank == 0:
        torch.save({n: (vars(a), vars(b)) for n, (a, b) in found.items()}, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    spawn_from_command_line(work)
