"""Measure attend, and score + select + attend, beside dense SDPA and FlexAttention on one machine.

`python -m mm_sparse.bench --out results.json`; times are medians of one run, ratios count.
B batch, H query heads, K KV heads, N tokens, D head dim
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mm_sparse.attention import attend
from mm_sparse.config import SparseConfig
from mm_sparse.layout import TokenLayout
from mm_sparse.scorers import PooledScorer
from mm_sparse.selection import Selection, select


@dataclass
class Record:
    """One timing."""

    what: str
    tokens: int
    heads: str
    head_dim: int
    causal: bool
    direction: str
    density: float
    milliseconds: float
    tflops: float
    """Of kept pairs only."""


@dataclass(frozen=True)
class Shape:
    """One problem."""

    tokens: int
    query_heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    causal: bool = False
    batch: int = 1

    @property
    def heads(self) -> str:
        """As a table shows them."""
        return f"{self.query_heads}/{self.kv_heads}"


def median_ms(run: Callable[[], Any], device: str, seconds: float = 0.3) -> float:
    """Median time of `run` in milliseconds, by events on a GPU."""
    if device == "cuda":
        from triton.testing import do_bench

        median: Any = do_bench(run, warmup=50, rep=int(seconds * 1000), return_mode="median")
        return median
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1000


def inputs(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v (leaves) and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        size = (shape.batch, heads, shape.tokens, shape.head_dim)
        return torch.randn(size, device=device, dtype=dtype, generator=generator)

    q, k, v = draw(shape.query_heads), draw(shape.kv_heads), draw(shape.kv_heads)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), draw(shape.query_heads)


def random_selection(shape: Shape, config: SparseConfig, device: str) -> Selection:
    """Units kept at random, as many for every tile as the budget allows."""
    layout = TokenLayout.text(shape.batch, shape.tokens, device=device)
    plan = layout.plan(config, num_query_heads=shape.query_heads, num_kv_heads=shape.kv_heads)
    size = (shape.batch, shape.kv_heads, plan.tiles.shape[1], plan.units.shape[1])
    generator = torch.Generator(device).manual_seed(1)
    values = torch.rand(size, device=device, generator=generator)
    return select(values, layout, config, num_query_heads=shape.query_heads)


def flex_runner(selection: Selection, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """FlexAttention on the very blocks of a regular selection that is not causal; none masked."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    plan = selection.plan
    count = selection.count.repeat_interleave(plan.group, 1)
    blocks = selection.index.clamp(min=0).repeat_interleave(plan.group, 1)
    index = blocks.new_zeros(*blocks.shape[:3], plan.units.shape[1])
    index[..., : blocks.shape[3]] = blocks
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(count),
        torch.zeros_like(index),
        count,
        index,
        BLOCK_SIZE=(plan.tile_tokens, plan.unit),
        seq_lengths=(q.shape[2], k.shape[2]),
    )
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=plan.group > 1)


class Bench:
    """Times contestants on one shape and keeps the records."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        self.shape, self.device = shape, device
        self.q, self.k, self.v, self.dout = inputs(shape, device, dtype)
        pairs = shape.batch * shape.query_heads * shape.tokens**2 * (0.5 if shape.causal else 1)
        self.flops = 4 * pairs * shape.head_dim
        self.records: list[Record] = []

    def add(
        self, what: str, run: Callable[[], Tensor], density: float, backward: bool = True
    ) -> None:
        """Time forward and, if asked, backward."""
        with torch.no_grad():
            self._record(what, "forward", median_ms(run, self.device), density, 1.0)
        if backward:
            out = run()
            leaves = (self.q, self.k, self.v)
            ms = median_ms(
                lambda: torch.autograd.grad(out, leaves, self.dout, retain_graph=True), self.device
            )
            self._record(what, "backward", ms, density, 2.5)

    def _record(self, what: str, way: str, ms: float, density: float, work: float) -> None:
        s = self.shape
        rate = round(self.flops * density * work / ms / 1e9, 1)
        row = (what, s.tokens, s.heads, s.head_dim, s.causal, way)
        self.records.append(Record(*row, round(density, 4), round(ms, 4), rate))
        print(self.records[-1], flush=True)

    def dense(self) -> None:
        """torch's SDPA, by backend on a GPU."""
        s = self.shape

        def run(backend: SDPBackend | None) -> Tensor:
            options: Any = {"is_causal": s.causal, "enable_gqa": s.query_heads != s.kv_heads}
            if backend is None:
                return scaled_dot_product_attention(self.q, self.k, self.v, **options)
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(self.q, self.k, self.v, **options)

        backends: dict[str, SDPBackend | None] = {"dense sdpa": None}
        if self.device == "cuda":
            backends = {
                "dense sdpa flash": SDPBackend.FLASH_ATTENTION,
                "dense sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
            }
        for name, backend in backends.items():
            self.add(name, lambda b=backend: run(b), 1.0)

    def sparse(self, unit: int, ratio: float = 0.2) -> None:
        """attend on random units, FlexAttention on the same, and the whole of score to attend."""
        q, k, v = self.q, self.k, self.v
        sinks, window = (64, 128) if self.shape.causal else (0, 0)
        config = SparseConfig(
            ratio=ratio,
            unit=unit,
            causal=self.shape.causal,
            dense_below=0,
            sinks=sinks,
            window=window,
        )
        selection = random_selection(self.shape, config, self.device)
        density = selection.density()
        self.add(f"attend unit {unit}", lambda: attend(q, k, v, selection), density)
        if self.device == "cuda" and unit >= 128 and not self.shape.causal:
            # Of smaller blocks it has no backward, or nothing at head dim 64 (torch 2.11).
            self.add(f"flex blocks {unit}", flex_runner(selection, q, k, v), density)
        layout, scorer = selection.plan.layout, PooledScorer()

        def whole() -> Tensor:
            with torch.no_grad():
                scores = scorer(q, k, layout=layout, config=config)
            return attend(q, k, v, select(scores, layout, config))

        self.add(f"score + select + attend unit {unit}", whole, density, backward=False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--tokens", type=int, nargs="+", default=None)
    args = parser.parse_args()
    if torch.cuda.is_available():
        import triton

        device, dtype, units = "cuda", torch.bfloat16, (128, 64, 16)
        machine = {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
        kinds = [(16, 16, 128, False), (16, 16, 64, False), (16, 16, 128, True), (32, 8, 128, True)]
        shapes = [Shape(n, *kind) for n in args.tokens or [16384] for kind in kinds]
    else:
        device, dtype, units = "cpu", torch.float32, (64, 16)
        machine = {"cpu": platform.machine(), "threads": torch.get_num_threads()}
        shapes = [Shape(n, 8, 8, 64, c) for n in args.tokens or [8192] for c in (False, True)]
    records = []
    for shape in shapes:
        bench = Bench(shape, device, dtype)
        bench.dense()
        for unit in units:
            bench.sparse(unit)
        records += bench.records
    machine = {**machine, "torch": torch.__version__, "dtype": str(dtype)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "records": [asdict(r) for r in records]}
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
