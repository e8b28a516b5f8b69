"""Random layouts through scoring, selection, attention and its gradients, against float64.

python -m tests.tools.fuzz --seconds 600                      # on a GPU if there is one
TRITON_INTERPRET=1 python -m tests.tools.fuzz --seconds 60 --backend triton

Few sizes of kernels and many layouts, so that little time goes into compilation. What was covered
is counted, printed, and written to `--out` as JSON; a failure is printed with the number that makes
it again: `--only NUMBER`. The exit status is 1 after a failure.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mm_sparse as mms
from mm_sparse.kernels.device import interpreted
from mm_sparse.kernels.reference import dense_mask

PRINT_EVERY = 10.0
"""Seconds."""


@dataclass(frozen=True)
class Size:
    """What kernels are compiled for."""

    group: int
    dim: int
    unit: int
    tile: int
    dtype: torch.dtype
    deterministic: bool = True

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        order = "ordered" if self.deterministic else "any order"
        return f"G{self.group} D{self.dim} unit {self.unit} tile {self.tile} {name} {order}"


SIZES = (
    Size(1, 128, 64, 128, torch.bfloat16),
    Size(4, 128, 16, 128, torch.bfloat16),
    Size(4, 128, 64, 128, torch.float16, deterministic=False),
    Size(7, 128, 16, 128, torch.bfloat16, deterministic=False),
    Size(3, 64, 16, 64, torch.float16),
    Size(8, 64, 32, 64, torch.float32),
    Size(1, 80, 16, 64, torch.bfloat16),
    Size(1, 256, 32, 64, torch.bfloat16),
    Size(2, 96, 128, 128, torch.float16),
    Size(1, 32, 16, 64, torch.float32),
)
KINDS = ("text", "text", "text", "image", "grid", "audio", "video", "frames", "pad")
SIDES = ("left", "right")


def random_row(draw: random.Random, most: int) -> list[tuple]:
    """Spans of one row: documents, pictures and videos with and without a grid, and holes."""
    row: list[tuple] = []
    document, left = 0, draw.randint(0, most)
    while left > 0 and len(row) < 12:
        kind = draw.choice(KINDS)
        document += draw.random() < 0.25
        size = draw.randint(1, max(1, min(left, draw.choice((3, 40, most)))))
        if kind == "pad":
            size = min(size, 30)
            row.append(("pad", size))
        elif kind == "grid":
            height = draw.randint(1, size)
            row.append(("image", (height, size // height), document))
            size = height * (size // height)
        elif kind == "frames":
            frames, height = draw.randint(1, min(4, size)), 1
            height = draw.randint(1, size // frames)
            width = size // frames // height
            row.append(("video", (frames, height, width), document))
            size = frames * height * width
        else:
            row.append((kind, size, document))
        left -= size
    return row or [("text", 1)]


def random_config(draw: random.Random, size: Size, backend: str) -> mms.SparseConfig:
    """Every kind of budget, sinks, windows, floors, and masks."""
    budget: dict[str, Any] = draw.choice((
        {"ratio": draw.uniform(0.02, 1.0)},
        {"ratio": draw.uniform(0.05, 0.3)},
        {"tokens": draw.randint(1, 400)},
        {"top_p": draw.uniform(0.05, 1.0)},
    ))  # fmt: skip
    if "ratio" in budget and draw.random() < 0.2:
        budget["sample_ratio"] = draw.uniform(0.1, 0.9)
    elif draw.random() < 0.2:
        budget["modality_floor"] = draw.uniform(0.0, 0.3)
    return mms.SparseConfig(
        **budget, unit=size.unit, tile=size.tile, deterministic=size.deterministic, dense_below=0,
        causal=draw.random() < 0.7, patch_order=draw.random() < 0.5, backend=backend,
        sinks=draw.choice((0, 4, 64)), window=draw.choice((0, 8, 128)),
        bidirectional=tuple(m for m in mms.Modality if draw.random() < 0.3),
    )  # fmt: skip


def bias_of(selection: mms.Selection) -> Tensor:
    """(B, H, N, M) float64: what is added to scores; -inf for keys that are not kept."""
    plan, sample = selection.plan, selection.sample
    mask = selection.to_dense_mask()
    bias = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    if sample is not None:
        drawn = dense_mask(
            plan.tiles, plan.units, plan.span, sample.index, sample.count, plan.layout.length
        ).repeat_interleave(plan.group, dim=1)
        token = torch.arange(plan.num_queries, device=mask.device)
        # Tiles that only fill a row begin nowhere, and would stand before the others.
        first, size = plan.tiles.unbind(-1)
        starts = first.masked_fill(size == 0, plan.num_queries)
        tile = torch.searchsorted(starts, token.expand(len(starts), -1).contiguous(), right=True)
        weight = sample.weight.double().repeat_interleave(plan.group, dim=1)
        place = (tile - 1).clamp(min=0)[:, None].expand(-1, weight.shape[1], -1)
        bias += torch.where(drawn, weight.gather(2, place)[..., None], 0.0)
    return bias.masked_fill(~mask, float("-inf"))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """(B, H, N, D) in the dtype of the inputs; zeros where a query sees nothing."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.mT).float() if q.dtype != torch.float64 else q @ k.mT
    scores = scores * q.shape[-1] ** -0.5 + bias.to(scores.dtype)
    empty = (bias == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return weights.to(q.dtype) @ v


def errors(
    q: Tensor, k: Tensor, v: Tensor, selection: mms.Selection, dout: Tensor
) -> dict[str, tuple[float, float]]:
    """Error of the output and of each gradient against float64, and its bound.

    The bound: twice what plain PyTorch gets wrong in the dtype of the inputs, and some roundings.
    """
    bias = bias_of(selection)
    runs = []
    for run, dtype in (("ours", q.dtype), ("plain", q.dtype), ("exact", torch.float64)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = mms.attend(*inputs, selection) if run == "ours" else plain_attention(*inputs, bias)
        runs.append([out.detach(), *torch.autograd.grad(out, inputs, dout.to(dtype))])
    eps = torch.finfo(q.dtype).eps
    peak = float(dout.abs().max() * v.abs().max() * max(k.abs().max(), q.abs().max()))
    rounding = 8 * torch.finfo(torch.float32).eps * peak * q.shape[-1] ** 0.5
    found = {}
    for name, ours, plain, exact in zip(("out", "dq", "dk", "dv"), *runs, strict=True):
        error, plain_error = (float((x - exact).abs().max()) for x in (ours, plain))
        bound = 2 * plain_error + 4 * eps * float(exact.abs().max())
        found[name] = error, bound + (rounding if name in ("dq", "dk") else 0.0)
    return found


def run_one(number: int, args: argparse.Namespace, covered: Counter[str]) -> str:
    """One random problem; what is wrong with it, empty if nothing is."""
    draw = random.Random(f"{args.seed} {number}")
    size = SIZES[number % len(SIZES)]
    if interpreted() and size.dtype == torch.bfloat16:
        # Triton's interpreter has no products of bfloat16.
        size = replace(size, dtype=torch.float16)
    config = random_config(draw, size, args.backend)
    rows = [random_row(draw, args.most) for _ in range(draw.choice((1, 1, 2, 3)))]
    side, kv_heads = draw.choice(SIDES), draw.choice((1, 2))
    layout = mms.TokenLayout.from_rows(rows, padding_side=side, device=args.device)
    queries = layout.length
    if config.causal and draw.random() < 0.2:
        queries = draw.randint(1, layout.length)
    torch.manual_seed(number)
    many = {"device": args.device, "dtype": size.dtype}
    q, dout = torch.randn(2, len(rows), kv_heads * size.group, queries, size.dim, **many)
    k, v = torch.randn(2, len(rows), kv_heads, layout.length, size.dim, **many)
    if draw.random() < 0.2:
        # As projections leave them.
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        covered["not contiguous"] += 1
    scores = mms.PooledScorer()(q, k, layout=layout, config=config)
    selection = mms.select(scores, layout, config).check()
    bad = [
        f"{name} is off by {error:.3g}, at most {bound:.3g}"
        for name, (error, bound) in errors(q, k, v, selection, dout).items()
        if not error <= bound
    ]
    for what in (
        str(size), f"rows {len(rows)}", f"padding {side}", f"KV heads {kv_heads}",
        "causal" if config.causal else "bidirectional", "whole" if queries == layout.length
        else "one query" if queries == 1 else "last queries",
        "tokens 1" if layout.length == 1 else f"tokens below {1 << layout.length.bit_length()}",
        *(name for name in ("tokens", "top_p", "modality_floor") if getattr(config, name)),
        *(["sample"] if selection.sample is not None else []),
        *{str(span[0]) + (" with a grid" if isinstance(span[1], tuple) else "")
          for row in rows for span in row},
    ):  # fmt: skip
        covered[what] += 1
    return "" if not bad else f"{number}: {'; '.join(bad)}; {size}; {rows} {side}; {config}"


def main() -> int:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first problem")
    parser.add_argument("--only", type=int, help="number of the one problem to run")
    parser.add_argument("--most", type=int, default=500, help="tokens of a row")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    covered: Counter[str] = Counter()
    failures: list[str] = []
    start = printed = time.monotonic()
    number, done = args.first if args.only is None else args.only, 0
    while done == 0 or (args.only is None and time.monotonic() - start < args.seconds):
        try:
            found = run_one(number, args, covered)
        except (ValueError, RuntimeError) as error:
            found = f"{number}: {type(error).__name__}: {error}"
        if found:
            failures.append(found)
            print(found, flush=True)
        number, done = number + 1, done + 1
        if time.monotonic() - printed > PRINT_EVERY:
            printed = time.monotonic()
            print(f"{done} problems, {len(failures)} failures", flush=True)
    report = {
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
        "torch": torch.__version__, "seconds": round(time.monotonic() - start, 1),
        "problems": done, "failures": failures, "covered": dict(sorted(covered.items())),
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1))
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
