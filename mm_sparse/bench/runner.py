"""Measure attend, and score + select + attend, beside dense and sparse peers on one machine.

`mm-sparse bench --out results.json`; times are medians of one run, ratios count.
B batch, H query heads, K KV heads, N tokens, D head dim
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from mm_sparse.attention import attend
from mm_sparse.bench import baselines as peers, results as report
from mm_sparse.bench.baselines import Implementation, Shape, flex_runner, inputs, random_selection
from mm_sparse.bench.results import Session, Timing, median_ms
from mm_sparse.config import SparseConfig
from mm_sparse.cuda_graph import capture
from mm_sparse.layout import TokenLayout
from mm_sparse.scorers import PooledScorer, Scorer
from mm_sparse.selection import Scores, Selection, select

__all__ = ["Runner", "Shape", "Timing", "flex_runner", "inputs", "median_ms", "random_selection"]

LONGEST = 16384
"""Tokens up to which gradients and eager attention are timed."""


class Runner:
    """Times contestants on one shape; what fails is skipped with its reason."""

    def __init__(
        self,
        shape: Shape,
        device: str,
        dtype: torch.dtype,
        session: Session | None = None,
        longest: int = LONGEST,
    ) -> None:
        self.shape, self.device = shape, device
        self.session = session or Session()
        self.q, self.k, self.v, self.dout = inputs(shape, device, dtype)
        self.problem = peers.Problem(shape, (self.q, self.k, self.v), self.dout)
        rows = shape.queries or shape.tokens
        pairs = shape.batch * shape.query_heads * rows * shape.tokens
        self.flops = 4 * pairs * (0.5 if shape.causal else 1) * shape.head_dim
        self.forward = "decode" if shape.queries else "forward"
        self.backward = shape.tokens <= longest and not shape.queries
        self.graphs: tuple[str, ...] = ("select", "whole") if device == "cuda" else ()
        """What is also timed as a CUDA graph."""

    @property
    def where(self) -> dict[str, Any]:
        """The shape, as it is listed."""
        s = self.shape
        return {"tokens": s.tokens, "heads": s.heads, "head_dim": s.head_dim, "causal": s.causal}

    @property
    def records(self) -> list[Timing]:
        """Timings of the session."""
        return self.session.records

    def add(
        self, what: str, run: Callable[[], Tensor], density: float, backward: bool = True
    ) -> None:
        """Time forward and, if asked, backward."""
        made = Implementation(run, self.problem.leaves, self.dout, density=density)
        self.enter(what, "attend", lambda: made, backward=backward)

    def enter(
        self,
        what: str,
        family: str,
        build: Callable[[], Implementation],
        *,
        forward: bool = True,
        backward: bool = True,
        reference: Callable[[], Tensor | None] | None = None,
    ) -> None:
        """Build a contestant, hold its output against a reference, time it."""
        if not self.session.wants(family):
            return
        guard = partial(self.session.guard, what, family, **self.where)
        made = guard(build)
        if made is None:
            return

        def one_way() -> float:
            with torch.no_grad():
                if reference and (expected := reference()) is not None:
                    made.check(expected)
                return self.measure(made, self.forward)

        steps = [(self.forward, one_way), ("backward", lambda: self.measure(made, "backward"))]
        for way, step in steps[not forward :]:
            value = guard(step, direction=way)
            if value is None:
                return
            self.keep(what, way, value, made)
            if not (backward and self.backward):
                return

    def measure(self, made: Implementation, way: str) -> float:
        """Milliseconds."""
        run = made.run if way != "backward" else made.backward
        if run is None:
            out = made.run()
            run = partial(torch.autograd.grad, out, made.leaves, made.dout, retain_graph=True)
        return median_ms(run, self.device, self.session.repeat)

    def keep(self, what: str, way: str, value: float, made: Implementation) -> None:
        """Make a record of a timing."""
        s, rate = self.shape, None
        if not what.startswith(report.SELECTING):
            work = 2.5 if way == "backward" else 1.0
            rate = round(self.flops * made.density * work / value / 1e9, 1)
        row = (what, s.tokens, s.heads, s.head_dim, s.causal, way)
        record = Timing(*row, round(made.density, 4), round(value, 4), rate)
        if way == "decode":
            size = (self.k.numel() + self.v.numel()) * self.k.element_size()
            record.gb_per_s = round(size * made.density / value / 1e6, 1)
        self.records.append(record)
        print(report.running_line(self.records), flush=True)

    def dense(self, eager: bool = False, backward: bool = True) -> None:
        """torch's SDPA, by backend on a GPU, flash-attn-4 there, and eager if asked."""
        backends: dict[str, SDPBackend | None] = {"dense sdpa": None}
        if self.device == "cuda":
            backends = {
                "dense sdpa flash": SDPBackend.FLASH_ATTENTION,
                "dense sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
            }
        for name, backend in backends.items():
            build = partial(peers.sdpa, self.problem, backend)
            self.enter(name, "sdpa", build, backward=backward)
        # It does not split a long context, so one decoding step is not its business.
        if self.device == "cuda" and not self.shape.queries:
            run = peers.sdpa(self.problem, SDPBackend.FLASH_ATTENTION).run
            build = partial(peers.fa4_dense, self.problem)
            self.enter("dense flash-attn-4", "fa4", build, backward=backward, reference=run)
        if eager and self.shape.tokens <= LONGEST:
            self.enter("dense eager", "eager", partial(peers.eager, self.problem), backward=False)

    def sparse(self, unit: int, ratio: float = 0.2, parts: Sequence[str] = ()) -> None:
        """attend on random units, scoring with selection, and the whole; or `parts` of these."""
        q, k, v = self.problem.leaves
        config, scorer = peers.settings(self.shape, unit, ratio), PooledScorer()
        chosen = self._chosen(random_selection, config)

        def picked() -> Selection:
            layout = chosen()[0].plan.layout
            with torch.no_grad():
                return select(self.scores(scorer, layout, config), layout, config)

        def build(run: Callable[[], Tensor]) -> Implementation:
            made = Implementation(run, self.problem.leaves, self.dout, density=chosen()[1])
            made.index_bytes = chosen()[0].index.nbytes + chosen()[0].count.nbytes
            return made

        for family, what, pick in (
            ("attend", "attend", lambda: chosen()[0]),
            ("select", "score + select", picked),
            ("whole", "score + select + attend", picked),
        ):
            if parts and family not in parts:
                continue
            run = partial(lambda pick: attend(q, k, v, pick()), pick)
            if family == "select":
                run = partial(lambda pick: pick().index, pick)
            backward = family != "select" and (family == "attend" or family in parts)
            self.enter(f"{what} unit {unit}", family, partial(build, run), backward=backward)
            if backward and self.backward and self.device == "cuda":
                free = partial(lambda pick: attend(q, k, v, _any_order(pick())), pick)
                name = f"{what} unit {unit}, any order"
                self.enter(name, family, partial(build, free), forward=False)
            if family in self.graphs:
                captured = partial(lambda run: build(capture(torch.no_grad()(run))), run)
                self.enter(f"{what} unit {unit}, CUDA graph", family, captured, backward=False)

    def scores(self, scorer: Scorer, layout: TokenLayout, config: SparseConfig) -> Scores:
        """What selection is given."""
        return scorer(self.q, self.k, layout=layout, config=config)

    def sparse_peers(self, block: int, ratio: float = 0.2) -> None:
        """Sparse peers on random blocks, held against `attend` on the same."""
        chosen = self._chosen(peers.peer_selection, peers.settings(self.shape, block, ratio))

        @cache
        def expected() -> Tensor | None:
            run = partial(peers.attend_reference, self.problem, chosen()[0])
            return self.session.guard(f"reference of blocks {block}", "attend", run)

        def build(make: Callable[..., Implementation]) -> Implementation:
            return replace(make(self.problem, chosen()[0]), density=chosen()[1])

        for name, family, make, blocks in peers.SPARSE_PEERS:
            if block in blocks:
                run = partial(build, make)
                self.enter(f"{name} blocks {block}", family, run, reference=expected)

    def _chosen(self, make: Callable[..., Selection], config: SparseConfig) -> Any:
        @cache
        def chosen() -> tuple[Selection, float]:
            selection = make(self.shape, config, self.device)
            return selection, selection.density()

        return chosen


def _any_order(selection: Selection) -> Selection:
    """The same, with gradients that need not repeat bit for bit."""
    config = replace(selection.plan.config, deterministic=False)
    return replace(selection, plan=replace(selection.plan, config=config))
