"""Benchmarks of more than a forward and a backward: memory, a step of decoding, a million tokens.

B batch, H query heads, K KV heads, N tokens, D head dim
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mm_sparse.attention import sparse_attention
from mm_sparse.bench import Bench
from mm_sparse.bench_peers import Contestant
from mm_sparse.bench_report import Record
from mm_sparse.cache import DescriptorCache
from mm_sparse.config import SparseConfig
from mm_sparse.layout import TokenLayout
from mm_sparse.scorers import Scorer, Scores

LONG_KEYS = 8192
"""Keys of a tile in `LongBench`; a sixteenth of it on a CPU."""


class DecodeBench(Bench):
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


class LongBench(Bench):
    """Score + select + attend with as many keys for a tile whatever the length, and its memory."""

    def whole(self, unit: int) -> None:
        """What `sparse_attention` does, in blocks of queries where its scores would not fit."""
        shape, (q, k, v) = self.shape, (self.q.detach(), self.k.detach(), self.v.detach())
        keys = LONG_KEYS if self.device == "cuda" else LONG_KEYS // 16
        config = SparseConfig(tokens=keys, unit=unit, causal=shape.causal, dense_below=0)
        layout = TokenLayout.text(shape.batch, shape.tokens, device=self.device)

        def run() -> Tensor:
            return sparse_attention(q, k, v, layout=layout, config=config)

        density = min(keys / shape.tokens * (2 if shape.causal else 1), 1.0)
        made = Contestant(run, (self.q, self.k, self.v), self.dout, density=density)
        what = f"score + select + attend unit {unit}, {keys} keys"
        self.enter(what, "whole", lambda: made, backward=False)
        if self.device == "cuda" and any(
            r.what == what and r.tokens == shape.tokens for r in self.records
        ):
            row = {"what": what, **self.where, "direction": "forward"}
            self.session.memory.append(row | in_memory(peak_mib(run), made))


def growth(records: Sequence[Record]) -> list[dict[str, Any]]:
    """By what was timed on several lengths: how time grows, as the exponent of the length."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record.what.endswith(" keys"):
            key = (record.what, record.heads, record.head_dim, record.causal)
            found.setdefault(key, []).append(record)
    rows = []
    for key, times in found.items():
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


def in_memory(mib: float, made: Contestant) -> dict[str, Any]:
    """Columns of the memory table."""
    whole = sum(x.nbytes for x in made.leaves) / 2**20
    return {
        "mib": round(mib, 1),
        "share_of_qkv": round(mib / whole, 4),
        "index_bytes": made.index_bytes,
    }


class MemoryBench(Bench):
    """Peak memory in place of time; a layout's plan, which layers share, is made before."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.graphs = ()

    def measure(self, made: Contestant, way: str) -> float:
        """MiB beyond inputs and output; gradients count."""
        training = way == "backward"
        with torch.set_grad_enabled(training):
            return peak_mib(made.run, partial(_gradients, made) if training else None)

    def keep(self, what: str, way: str, value: float, made: Contestant) -> None:
        """Make a row of the memory table."""
        way = "training" if way == "backward" else way
        row = {"what": what, **self.where, "direction": way}
        self.session.memory.append(row | in_memory(value, made))


def _gradients(made: Contestant, out: Tensor) -> None:
    torch.autograd.grad(out, made.leaves, made.dout)
