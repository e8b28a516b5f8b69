"""Benchmarks of more than a forward and a backward: memory, a step of decoding, a million tokens.

B batch, H query heads, K KV heads, N tokens, D head dim
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mm_sparse.attention import sparse_attention
from mm_sparse.bench.baselines import Implementation
from mm_sparse.bench.results import Timing
from mm_sparse.bench.runner import Runner
from mm_sparse.config import SparseConfig
from mm_sparse.layout import TokenLayout
from mm_sparse.scorers import DescriptorCache, PooledScorer, Scorer
from mm_sparse.selection import Scores, lists_to_mask, select

LONG_KEYS = 8192
"""Keys of a tile in `LongBench`; a sixteenth of it on a CPU."""
RUN_KEYS = 256
"""Keys of the runs that are ranked first."""
TOPIC_TOKENS = 2048
# With 0.4 tiles of 128 tokens share two thirds to three quarters of 8192 keys with the next. On
# 8192 tokens of code SmolLM2's, 128 tokens apart, share 0.72 of an eighth (kernel-log.md).
TOPIC_STRENGTH = 0.4


class DecodeBench(Runner):
    """One query behind a long context, whose descriptors a step before has left.

    A layout and its plan, which the layers of a step share, are made before.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # A launch costs the host more than a short step costs the GPU.
        self.graphs = ("attend", "select", "whole") if self.device == "cuda" else ()
        self._before: dict[SparseConfig, DescriptorCache] = {}

    def scores(self, scorer: Scorer, layout: TokenLayout, config: SparseConfig) -> Scores:
        """With the descriptors of all keys but the last: its unit is described anew."""
        q, k = self.q.detach(), self.k.detach()
        if config not in self._before:
            before = TokenLayout.text(layout.batch, layout.length - 1, device=layout.device)
            kept = self._before[config] = DescriptorCache()
            scorer(q, k[:, :, :-1], layout=before, config=config, descriptors=kept)
        kept = copy.copy(self._before[config])
        return scorer(q, k, layout=layout, config=config, descriptors=kept)


class LongBench(Runner):
    """Score + select + attend with as many keys for a tile whatever the length, and its memory."""

    def whole(self, unit: int) -> None:
        """What `sparse_attention` does, in blocks of queries where its scores would not fit.

        On random tokens no two tiles keep the same units, so each reads its own from memory; on
        tokens with topics neighbours keep about as many of the same as on real text.
        """
        for kind in ("", ", topics"):
            for coarse in (1, RUN_KEYS // unit):
                self._whole(unit, kind, coarse)

    def _whole(self, unit: int, kind: str, coarse: int) -> None:
        shape, (q, k, v) = self.shape, (self.q.detach(), self.k.detach(), self.v.detach())
        if kind:
            q, k = (_with_topics(x, seed) for seed, x in enumerate((q, k)))
        keys = LONG_KEYS if self.device == "cuda" else LONG_KEYS // 16
        config = SparseConfig(
            tokens=keys, unit=unit, causal=shape.causal, dense_below=0, coarse_factor=coarse
        )
        layout = TokenLayout.text(shape.batch, shape.tokens, device=self.device)

        def run() -> Tensor:
            return sparse_attention(q, k, v, layout=layout, config=config)

        density = min(keys / shape.tokens * (2 if shape.causal else 1), 1.0)
        made = Implementation(run, (self.q, self.k, self.v), self.dout, density=density)
        runs = f", runs of {coarse} units first" if coarse > 1 else ""
        what = f"score + select + attend unit {unit}, {keys} keys{kind}{runs}"
        self.enter(what, "whole", lambda: made, backward=False)
        if self.device == "cuda" and any(
            r.what == what and r.tokens == shape.tokens for r in self.records
        ):
            row = {"what": what, **self.where, "direction": "forward"}
            row |= in_memory(peak_mib(run), made)
            row["shared_with_next_tile"] = round(_shared(q, k, layout, config), 3)
            self.session.memory.append(row)


def _with_topics(x: Tensor, seed: int) -> Tensor:
    """Random tokens (B, heads, N, D) whose runs of `TOPIC_TOKENS` have something in common."""
    generator = torch.Generator(x.device).manual_seed(seed)
    runs = -(-x.shape[2] // TOPIC_TOKENS)
    size = (*x.shape[:2], runs, x.shape[3])
    topic = torch.randn(size, device=x.device, dtype=x.dtype, generator=generator)
    return x + TOPIC_STRENGTH * topic.repeat_interleave(TOPIC_TOKENS, 2)[:, :, : x.shape[2]]


@torch.no_grad()
def _shared(q: Tensor, k: Tensor, layout: TokenLayout, config: SparseConfig) -> float:
    """Share of its units that a tile has in common with the next, over the last topic."""
    scores = PooledScorer()(q[:, :, -TOPIC_TOKENS:], k, layout=layout, config=config)
    chosen = select(scores, layout, config)
    kept = lists_to_mask(chosen.index, chosen.count, chosen.plan.units.shape[1])
    both = kept[:, :, 1:] & kept[:, :, :-1]
    return (both.sum() / kept[:, :, 1:].sum().clamp(min=1)).item()


def growth(records: Sequence[Timing]) -> list[dict[str, Any]]:
    """By what was timed on several lengths: how time grows, as the exponent of the length."""
    timings_by_case: dict[tuple[Any, ...], list[Timing]] = {}
    for record in records:
        if " keys" in record.what:
            key = (record.what, record.heads, record.head_dim, record.causal)
            timings_by_case.setdefault(key, []).append(record)
    rows = []
    for key, times in timings_by_case.items():
        short, long = (pick(times, key=lambda r: r.tokens) for pick in (min, max))
        if short.tokens < long.tokens:
            longer = math.log(long.tokens / short.tokens)
            exponent = math.log(long.milliseconds / short.milliseconds) / longer
            names = ("what", "heads", "head_dim", "causal")
            row = dict(zip(names, key, strict=True))
            rows.append(
                row | {"from": short.tokens, "to": long.tokens, "exponent": round(exponent, 3)}
            )
    return rows


def peak_mib(run: Callable[[], Tensor], after: Callable[[Tensor], Any] | None = None) -> float:
    """MiB beyond inputs and output at the peak of a call, and of what comes `after`; the second."""
    peak = 0
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = run()
        if after is not None:
            after(out)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before - out.nbytes
        del out
    return peak / 2**20


def in_memory(mib: float, made: Implementation) -> dict[str, Any]:
    """Columns of the memory table."""
    whole = sum(x.nbytes for x in made.leaves) / 2**20
    return {
        "mib": round(mib, 1),
        "share_of_qkv": round(mib / whole, 4),
        "index_bytes": made.index_bytes,
    }


class MemoryBench(Runner):
    """Peak memory in place of time; a layout's plan, which layers share, is made before."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.graphs = ()

    def measure(self, made: Implementation, way: str) -> float:
        """MiB beyond inputs and output; gradients count."""
        training = way == "backward"
        with torch.set_grad_enabled(training):
            return peak_mib(made.run, partial(_gradients, made) if training else None)

    def keep(self, what: str, way: str, value: float, made: Implementation) -> None:
        """Make a row of the memory table."""
        way = "training" if way == "backward" else way
        row = {"what": what, **self.where, "direction": way}
        self.session.memory.append(row | in_memory(value, made))


def _gradients(made: Implementation, out: Tensor) -> None:
    torch.autograd.grad(out, made.leaves, made.dout)


def bench_shapes(
    args: argparse.Namespace, cuda: bool, tokens: Sequence[int], head_dims: Sequence[int] = ()
) -> list[tuple[int, int, int, int, bool]]:
    """Tokens, query heads, KV heads, head dim and causal of what is asked for; else defaults."""
    masks = {"no": (False,), "yes": (True,)}.get(args.causal, (False, True))
    heads = args.heads or ([(16, 16), (32, 8)] if cuda else [(8, 8)])
    kinds = [(*h, causal) for h in heads for causal in masks]
    if cuda and not args.heads and not args.causal:
        kinds = [(16, 16, False), (32, 8, True)]
    dims = args.head_dims or ((head_dims or (128,)) if cuda else (64,))
    return [(n, q, kv, d, c) for n in args.tokens or tokens for d in dims for q, kv, c in kinds]
