"""Keys in pages against keys side by side: the same attention, its time, and dense attention's.

python -m tests.tools.time_paged                          the shapes of an 8B model, on a GPU
TRITON_INTERPRET=1 python -m tests.tools.time_paged --tiny

Correctness is checked first, at the sizes that are timed and at small ones against float64; a
failed check ends the program. What is found is printed, and written to $OUT (a folder) or `--out`
as JSON. Of steps of decoding what a CUDA graph replays is timed, as engines run them.
"""

# What is timed is called in the turn of the loop that made it.
# ruff: noqa: B023
from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

import mm_sparse as mms
from mm_sparse.attention import (
    DecodingGeometry,
    LayerDecoding,
    PagedGeometry,
    PagedLayer,
    score_select_attend,
)
from mm_sparse.bench.results import machine, median_ms
from mm_sparse.kernels import ops
from mm_sparse.kernels.paged_attention import paged_attention, paged_attention_reference
from mm_sparse.layout import CallLayout
from mm_sparse.scorers import DescriptorCache, Scorer
from tests.support.paged_cases import PagedCase, empty_pools, write_tokens

LAYOUTS = {"NHD": "packed-tokens-first", "HND": "packed-heads-first"}
"""As vLLM 0.26 lays out a page; NHD unless `VLLM_KV_CACHE_LAYOUT` says otherwise."""

SAME_LISTS = 0.02
"""Most difference of attention on the same lists, in 16 bits and another order."""
SAME_UNITS = 0.1
"""Most difference of steps: units whose scores are equal in 16 bits may change places."""


@dataclass(frozen=True)
class Shape:
    """Of a layer, and of the work that is timed."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    batch: int = 4
    chunk: int = 8192
    contexts: tuple[int, ...] = (32768, 131072)
    of_prefill: int = 131072
    pages: tuple[tuple[int, str], ...] = ((16, "NHD"), (128, "NHD"), (128, "HND"))
    decode_ratio: float = 0.125
    prefill_ratio: float = 0.2


TINY = Shape(
    heads=4, kv_heads=2, dim=32, batch=2, chunk=96, contexts=(320,), of_prefill=256,
    pages=((16, "NHD"), (64, "HND")),
)  # fmt: skip


class Bench:
    """Keys and values of some sequences, side by side and in pages.

    Args:
        scorer: name of a scorer, or "pooled".
    """

    def __init__(self, shape: Shape, scorer: str, device: str) -> None:
        self.shape, self.device = shape, torch.device(device)
        self.gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.scale = shape.dim**-0.5
        self.scorer = self._scorer(scorer)
        self.rows: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []

    def _scorer(self, name: str) -> Scorer:
        if name == "pooled":
            return mms.PooledScorer()
        torch.manual_seed(2)
        scorer = mms.FineScorer(
            num_query_heads=self.shape.heads, num_kv_heads=self.shape.kv_heads,
            head_dim=self.shape.dim, modalities=(mms.Modality.TEXT,),
        )  # fmt: skip
        for parameter in scorer.parameters():
            torch.nn.init.normal_(parameter, std=0.01)
        return scorer.to(self.device).requires_grad_(False)

    def config(self, ratio: float) -> mms.SparseConfig:
        return mms.SparseConfig.preset(
            "text", ratio=ratio, dense_below=0, backend="auto" if self.gpu else "triton"
        )

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def keys(self, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        k, v = (self.random(batch, self.shape.kv_heads, tokens, self.shape.dim) for _ in range(2))
        return k, v

    def in_pages(self, k: Tensor, v: Tensor, size: int, layout: str) -> tuple[Tensor, ...]:
        """The same keys and values in pages that lie anywhere, and the table."""
        batch, heads, tokens, dim = k.shape
        each = -(-tokens // size)
        pools = empty_pools(
            LAYOUTS[layout], batch * each + 1, heads, size, dim, self.dtype, str(self.device)
        )
        generator = torch.Generator().manual_seed(1)
        table = 1 + torch.randperm(batch * each, generator=generator).view(batch, each)
        table = table.to(self.device, torch.int32)
        for pool, x in zip(pools, (k, v), strict=True):
            pool.zero_()
            for row in range(batch):
                write_tokens(pool, table[row], x[row].transpose(0, 1))
        return (*pools, table)

    def layer(
        self, config: mms.SparseConfig, k: Tensor, table: Tensor
    ) -> tuple[PagedGeometry, PagedLayer]:
        geometry = PagedGeometry(
            [config], group=self.shape.heads // self.shape.kv_heads, page=k.shape[2],
            rows=len(table), pages=table.shape[1], memory=len(k), device=self.device,
        )  # fmt: skip
        return geometry, PagedLayer(geometry, config, self.scorer)

    def describe_all(
        self, geometry: PagedGeometry, layer: PagedLayer, k: Tensor, table: Tensor, tokens: int
    ) -> None:
        """Describe what chunks of prompts before would have described."""
        chunk = self.shape.chunk
        for row in range(len(table)):
            for first in range(0, tokens, chunk):
                count = min(chunk, tokens - first)
                ends = torch.tensor([first + count], device=self.device)
                step = geometry.step([0, count], [first + count], ends, table[row : row + 1])
                q = self.random(count, self.shape.heads, self.shape.dim)
                layer.describe(q, k, step, self.scale)

    def time(self, run: Callable[[], Any], recorded: bool) -> float:
        """Median milliseconds; of what a CUDA graph replays, if recorded."""
        if not self.gpu:
            run()
            return median_ms(run, "cpu", 0.01)
        if not recorded:
            run()
            return median_ms(run, "cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return median_ms(graph.replay, "cuda")

    def check(self, what: str, error: float, most: float) -> None:
        self.checks.append({"what": what, "error": error, "most": most})
        if not error <= most:
            raise SystemExit(f"{what}: error {error:.3g} above {most:.3g}")

    def check_alike(self, what: str, got: Tensor, want: Tensor, most: float) -> None:
        """The norm of the difference, in norms of what is wanted."""
        error = (got.double() - want.double()).norm() / want.double().norm()
        self.check(what, float(error), most)

    def note(self, work: str, context: int, what: str, **found: Any) -> None:
        self.rows.append({"work": work, "context": context, "what": what, **found})
        numbers = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in found.items()}
        print(work, context, what, numbers, flush=True)

    def decode(self, context: int) -> None:
        """A step of decoding of a batch of sequences of this length."""
        shape, config = self.shape, self.config(self.shape.decode_ratio)
        k, v = self.keys(shape.batch, context)
        q = self.random(shape.batch, shape.heads, 1, shape.dim)
        group = shape.heads // shape.kv_heads
        layout = mms.TokenLayout.text(shape.batch, context, device=self.device)
        geometry = DecodingGeometry(layout, config, group, context + 64)
        own = LayerDecoding(geometry, config, self.scorer)
        geometry.of_layer(config)
        geometry.advance(context)
        want, selection = own.step(q, k, v, self.scale)
        lists = selection.plan.block_lists(selection.index, selection.count)
        backend = config.backend
        # All that a call before left behind is there: the step describes the newest unit alone.
        whole = self.time(lambda: own.step(q, k, v, self.scale), True)
        only = self.time(lambda: ops.attend(q, k, v, lists, self.scale, backend, True), True)
        dense = self.time(
            lambda: scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=True), True
        )
        for size, order in shape.pages:
            kp, vp, table = self.in_pages(k, v, size, order)
            paged, layer = self.layer(config, kp, table)
            self.describe_all(paged, layer, kp, table, context - 1)
            ends = torch.full((shape.batch,), context, device=self.device, dtype=torch.int32)
            starts, lengths = [*range(shape.batch + 1)], [context] * shape.batch
            step = paged.step(starts, lengths, ends, table, recorded=True)
            rows = q[:, :, 0].contiguous()
            out = torch.empty_like(rows)
            layer.attend(rows, kp, vp, step, self.scale, out)
            name = f"step, page {size} {order}"
            self.check_alike(f"decode {context} {name}", out, want[:, :, 0], SAME_UNITS)
            got, _ = paged_attention(q, kp, vp, table, lists, self.scale, backend)
            self.check_alike(f"decode {context} attention, page {size}", got, want, SAME_LISTS)
            ms = self.time(lambda: layer.attend(rows, kp, vp, step, self.scale, out), True)
            self.note(
                "decode", context, name, paged_ms=ms, contiguous_ms=whole, speed=whole / ms,
                dense_sdpa_ms=dense, over_dense=dense / ms,
            )  # fmt: skip
            ms = self.time(
                lambda: paged_attention(q, kp, vp, table, lists, self.scale, backend), True
            )
            self.note(
                "decode", context, f"attention alone, page {size} {order}", paged_ms=ms,
                contiguous_ms=only, speed=only / ms,
            )  # fmt: skip
            self._note_host(paged, starts, lengths, ends, table, context)

    def _note_host(self, paged: PagedGeometry, *step: Any) -> None:
        """What the host does once for each step, for all layers."""
        *told, context = step
        runs = 20 if self.gpu else 2
        begin = time.perf_counter()
        for _ in range(runs):
            paged.step(*told, recorded=True)
        if self.gpu:
            torch.cuda.synchronize()
        ms = (time.perf_counter() - begin) * 1e3 / runs
        self.note("decode", context, "a step written down, once for all layers", paged_ms=ms)

    def prefill(self, context: int) -> None:
        """The last chunk of a prompt of this length."""
        shape, config = self.shape, self.config(self.shape.prefill_ratio)
        k, v = self.keys(1, context)
        count = min(shape.chunk, context)
        q = self.random(1, shape.heads, count, shape.dim)
        layout = mms.TokenLayout.text(1, context, device=self.device)
        call, cache = CallLayout(layout, context - count), DescriptorCache()
        kept: list[Any] = []

        def contiguous(note: Any = None) -> Tensor:
            return score_select_attend(
                q, k, v, call, config, self.scorer, self.scale, cache=cache, note=note
            )

        want = contiguous(lambda _, selection: kept.append(selection))
        lists = kept[0].plan.block_lists(kept[0].index, kept[0].count)
        backend, whole = config.backend, self.time(contiguous, False)
        only = self.time(lambda: ops.attend(q, k, v, lists, self.scale, backend, True), False)
        dense = self._dense_chunk(q, k, v)
        for size, order in shape.pages:
            kp, vp, table = self.in_pages(k, v, size, order)
            paged, layer = self.layer(config, kp, table)
            self.describe_all(paged, layer, kp, table, context - count)
            ends = torch.tensor([context], device=self.device, dtype=torch.int32)
            step = paged.step([0, count], [context], ends, table)
            rows = q[0].transpose(0, 1).contiguous()
            out = torch.empty_like(rows)
            layer.attend(rows, kp, vp, step, self.scale, out)
            name = f"chunk of {count}, page {size} {order}"
            self.check_alike(f"prefill {name}", out, want[0].transpose(0, 1), SAME_UNITS)
            got, _ = paged_attention(q, kp, vp, table, lists, self.scale, backend)
            self.check_alike(f"prefill attention, page {size} {order}", got, want, SAME_LISTS)
            ms = self.time(lambda: layer.attend(rows, kp, vp, step, self.scale, out), False)
            self.note(
                "prefill", context, name, paged_ms=ms, contiguous_ms=whole, speed=whole / ms,
                **({"dense_sdpa": dense} if isinstance(dense, str) else
                   {"dense_sdpa_ms": dense, "over_dense": dense / ms}),
            )  # fmt: skip
            ms = self.time(
                lambda: paged_attention(q, kp, vp, table, lists, self.scale, backend), False
            )
            self.note(
                "prefill", context, f"attention alone, page {size} {order}", paged_ms=ms,
                contiguous_ms=only, speed=only / ms,
            )  # fmt: skip

    def _dense_chunk(self, q: Tensor, k: Tensor, v: Tensor) -> float | str:
        """Dense attention of the chunk; why not, where torch does not serve it."""
        mask: Any = causal_lower_right(q.shape[2], k.shape[2])

        def run() -> Tensor:
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=True
            )

        try:
            return self.time(run, False)
        except (RuntimeError, ValueError) as error:
            return f"not measured: {error}"[:200]

    def small(self) -> None:
        """Attention in pages against float64, on lengths that end anywhere."""
        dim = self.shape.dim
        backend = "auto" if self.gpu else "triton"
        for case in (
            PagedCase((1500, 901), 1, 4, 2, dim, 128, 16, 128),
            PagedCase((700,), 300 if self.gpu else 40, 4, 2, dim, 16, 16, 128),
            replace(PagedCase((333, 90), 33, 4, 2, dim, 64, 64, 128), layout="stacked"),
        ):
            q, k, v, table, lists = case.make(self.dtype, str(self.device))
            k, v = (x.nan_to_num_(0.0) for x in (k, v))
            wide = (x.double() for x in (q, k, v))
            exact = paged_attention_reference(*wide, table, lists, self.scale)
            plain = paged_attention_reference(q, k, v, table, lists, self.scale)
            got, _ = paged_attention(q, k, v, table, lists, self.scale, backend)
            bound = 2 * float((plain - exact).abs().max())
            bound += 4 * torch.finfo(self.dtype).eps * float(exact.abs().max())
            error = float((got.double() - exact).abs().max())
            self.check(f"{case.lengths} in pages of {case.size}", error, bound)


def main() -> None:
    """Run the checks and the timings that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--scorer", default="fine", choices=("fine", "pooled"))
    parser.add_argument("--out", type=Path, default=None, help="file for the JSON")
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not asked.tiny:
        parser.error("the shapes of an 8B model need a GPU; --tiny runs on a CPU")
    shape = TINY if asked.tiny else Shape()
    begin = time.perf_counter()
    bench = Bench(shape, asked.scorer, device)
    with torch.no_grad():
        bench.small()
        for context in shape.contexts:
            bench.decode(context)
        bench.prefill(shape.of_prefill)
    content = {
        "machine": machine(device, bench.dtype), "scorer": asked.scorer,
        "shape": vars(shape) | {"contexts": list(shape.contexts), "pages": list(shape.pages)},
        "seconds": round(time.perf_counter() - begin, 1), "checks": bench.checks,
        "rows": bench.rows,
    }  # fmt: skip
    out = asked.out
    if out is None and os.environ.get("OUT"):
        out = Path(os.environ["OUT"]) / f"paged-{asked.scorer}.json"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1) + "\n")
    worst = min((row["speed"] for row in bench.rows if "speed" in row), default=0.0)
    print(f"{len(bench.checks)} checks passed, {content['seconds']} s, least speed {worst:.3f}")


if __name__ == "__main__":
    main()
