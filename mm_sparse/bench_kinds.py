"""Benchmarks of other things than a forward and a backward: peak memory, one step of decoding.

B batch, H query heads, K KV heads, N tokens, D head dim
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from mm_sparse.bench import Bench
from mm_sparse.bench_peers import Contestant
from mm_sparse.cache import DescriptorCache
from mm_sparse.config import SparseConfig
from mm_sparse.layout import TokenLayout
from mm_sparse.scorers import Scorer, Scores


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


class MemoryBench(Bench):
    """Peak memory in place of time; a layout's plan, which layers share, is made before."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.graphs = ()

    def measure(self, made: Contestant, way: str) -> float:
        """MiB beyond inputs and output; gradients count, and the call before is not measured."""
        training = way == "backward"
        with torch.set_grad_enabled(training):
            for _ in range(2):
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                out = made.run()
                if training:
                    torch.autograd.grad(out, made.leaves, made.dout)
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated() - before - out.nbytes
                del out
        return peak / 2**20

    def keep(self, what: str, way: str, value: float, made: Contestant) -> None:
        """Make a row of the memory table."""
        whole = sum(x.nbytes for x in self.problem.leaves) / 2**20
        way = "training" if way == "backward" else way
        row = {"what": what, **self.where, "direction": way, "mib": round(value, 1)}
        row.update(share_of_qkv=round(value / whole, 4), index_bytes=made.index_bytes)
        self.session.memory.append(row)
