"""Time whole encoders, dense and sparse, on one GPU in bfloat16, beside the ceiling of the run.

    python -m mm_sparse.encoders.bench.run --out results.json
    python -m mm_sparse.encoders.bench.run --profile vit-b-2048

Weights and inputs are random: speed and memory only. A batch of one, in inference mode, from pixels
or samples to features, scoring and selection included; runs of a case take turns, and a time is the
median of rounds by a clock that waits for the device. The ceiling is what a run would reach whose
attention cost the kept share of dense attention: the tower is also timed with an attention core
that costs nothing. Without a GPU the same runs on tiny encoders in float32, to try the program.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mm_sparse.analysis import report
from mm_sparse.bench import Session, machine, reason
from mm_sparse.config import SparseConfig
from mm_sparse.encoders.base import Encoder
from mm_sparse.encoders.bench.attention_stubs import FreeAttention, core, eager
from mm_sparse.encoders.bench.cases import CASES, TINY, Case
from mm_sparse.encoders.bench.profiling import profiled
from mm_sparse.encoders.bench.report import (
    DEFAULT,
    DENSE,
    EAGER,
    REST,
    SPARSE,
    compared,
    table,
    timed,
)
from mm_sparse.encoders.cuda_graph import CUDAGraphEncoder

MIB = 2**20
BACKENDS = {
    f"{DENSE} SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    f"{DENSE} SDPA FlashAttention-2": SDPBackend.FLASH_ATTENTION,
}
GRAPH = ", CUDA graph"
LIBRARIES = ("timm", "torchaudio")


@dataclass
class Run:
    """One way to run a case's tower."""

    what: str
    encoder: Encoder
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    replay: CUDAGraphEncoder | None = None
    samples: list[list[float]] = field(default_factory=list)
    """Milliseconds of the forwards of each round."""
    measured: dict[str, Any] = field(default_factory=dict)


class Race:
    """The runs of one case, which take turns."""

    def __init__(
        self, case: Case, device: str, dtype: torch.dtype, session: Session, ratio: float = 0.2
    ) -> None:
        self.case, self.device, self.dtype, self.ratio = case, device, dtype, ratio
        self.session = session
        self.encoder = self._made()
        self.batch = case.batch().to(device, dtype)
        own = {id(x): x.nbytes for x in (*self.encoder.parameters(), *self.encoder.buffers())}
        self.weights = sum(own.values())
        self.tokens = 0
        self.runs: list[Run] = []

    def _made(self, sparse: SparseConfig | None = None) -> Encoder:
        with torch.device(self.device):
            return self.case.encoder(sparse).to(self.dtype)

    def sparse(self, what: str, unit: int, sampled: float) -> Run:
        """The encoder with sparse attention, on the very weights of the dense one."""
        made = self._made(self.case.config(unit, self.ratio, sampled))
        made.load_state_dict(self.encoder.state_dict(), assign=True)
        return Run(what, made)

    def captured(self, make: Callable[[], Run]) -> Run:
        """The same run as a CUDA graph."""
        run = make()
        return Run(
            f"{run.what}{GRAPH}", run.encoder, replay=CUDAGraphEncoder(run.encoder, self.batch)
        )

    def enter(self, units: Sequence[int], sampled: float = 0.0, only: str = "") -> None:
        """Build runs, warm them up and measure their memory, one after the other.

        The tower without attention goes first: what libraries allocate once is then no run's own.

        Args:
            units: of the sparse runs.
            sampled: if not 0, one more of the first units, that share of its budget a sample.
            only: how the names of the runs begin that are wanted.
        """
        none = FreeAttention()
        makers: list[tuple[str, Callable[[], Run]]] = [
            (REST, lambda: Run(REST, self.encoder, lambda: core(none))),
            (DEFAULT, lambda: Run(DEFAULT, self.encoder)),
        ]
        for what, backend in BACKENDS.items() if self.device == "cuda" else ():
            around = partial(sdpa_kernel, backend)
            makers.append((what, partial(Run, what, self.encoder, around)))
        kinds = [(f"{SPARSE} units of {unit}", unit, 0.0) for unit in units]
        if sampled and units:
            kinds.append((f"{kinds[0][0]}, {sampled:.0%} sampled", units[0], sampled))
        makers += [(kind[0], partial(self.sparse, *kind)) for kind in kinds]
        if self.device == "cuda":
            makers += [
                (f"{what}{GRAPH}", partial(self.captured, make))
                for what, make in makers
                if what in (DEFAULT, *(kind[0] for kind in kinds))
            ]
        # Last, since it may leave no memory for others.
        makers.append((EAGER, lambda: Run(EAGER, self.encoder, lambda: core(eager))))
        for what, make in makers:
            if not what.startswith(only):
                continue
            run = self.session.guard(what, what, partial(self._warm, make))
            if run is not None:
                self.runs.append(run)
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def _warm(self, make: Callable[[], Run]) -> Run:
        cuda = self.device == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        run = make()
        for _ in range(2):
            self.once(run)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        self.once(run)
        # A graph holds its memory, used or not.
        if cuda and run.replay is None:
            above = torch.cuda.max_memory_allocated() - before
            whole = above + self.weights + self.batch.nbytes
            run.measured["peak_mib"] = round(whole / MIB, 1)
            run.measured["above_weights_mib"] = round(above / MIB, 1)
        if run.what.startswith(SPARSE):
            run.measured.update(modes(run.encoder))
        return run

    def forward(self, run: Run) -> None:
        """Launch one forward."""
        with torch.inference_mode(), run.around():
            out, _ = (run.replay or run.encoder)(self.batch)
        self.tokens = out.shape[1]

    def once(self, run: Run) -> float:
        """Milliseconds from the call of a forward until the device is done."""
        self.wait()
        start = time.perf_counter()
        self.forward(run)
        self.wait()
        return (time.perf_counter() - start) * 1000

    def wait(self) -> None:
        """For the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def turns(self, rounds: int, repeats: int) -> None:
        """Rounds in which every run has its turn; a run that fails leaves, a late round is none."""
        for _ in range(rounds):
            for run in list(self.runs):
                step = partial(self._turn, run, repeats)
                times = self.session.guard(run.what, run.what, step)
                if times is not None:
                    run.samples.append(times)
                elif self.over:
                    return
                else:
                    self.runs.remove(run)

    def _turn(self, run: Run, repeats: int) -> list[float]:
        # After another run, the first finds nothing of its own in the cache.
        self.once(run)
        return [self.once(run) for _ in range(repeats)]

    @property
    def over(self) -> bool:
        """Whether the time of the case has passed."""
        limit = self.session.seconds
        return limit is not None and time.monotonic() - self.session.start >= limit

    def result(self) -> dict[str, Any]:
        """The case as it is written down."""
        rows = [
            {"what": run.what, **run.measured, **(timed(run.samples) if run.samples else {})}
            for run in self.runs
        ]
        return {
            "model": self.case.model, "architecture": self.case.architecture,
            "input": list(self.batch.shape), "tokens": self.tokens, "ratio": self.ratio,
            "weights_mib": round(self.weights / MIB, 1), "runs": rows,
            **compared(rows, self.ratio), "skipped": self.session.skipped,
        }  # fmt: skip


def modes(encoder: Encoder) -> dict[str, Any]:
    """How many layers ran sparse in the last call, their density, and why others did not."""
    rows = report(encoder).rows
    densities = [row.density for row in rows if row.mode == "sparse" and row.density is not None]
    return {
        "sparse_layers": sum(row.mode == "sparse" and row.density is not None for row in rows),
        "density": round(sum(densities) / len(densities), 4) if densities else 1.0,
        "reasons": sorted({row.reason for row in rows if row.reason}),
    }


def measure(case: Case, device: str, dtype: torch.dtype, args: Any) -> dict[str, Any]:
    """Everything about one case."""
    session = Session(seconds=args.seconds)
    race: Race | None = None
    profiles: dict[str, Any] = {}
    try:
        race = Race(case, device, dtype, session, args.ratio)
        race.enter(args.units, args.sampled, SPARSE if args.profile else "")
        if args.profile:
            for run in race.runs:
                profiles[run.what] = profiled(partial(race.forward, run), run.what, device)
        else:
            race.turns(args.rounds, args.repeats)
    # A tower that does not fit must not end the run of the others.
    except Exception as error:
        session.skip(case.model, reason(error))
    result = race.result() if race else {"model": case.model, "skipped": session.skipped}
    return {**result, "profiles": profiles} if profiles else result


def versions() -> dict[str, str]:
    """Of the libraries whose towers are timed."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON file, written after every case")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, help="of a case, after which nothing starts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3, help="forwards of a run in a round")
    parser.add_argument("--units", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument(
        "--sampled", type=float, default=0.5, help="of the last sparse run; 0: none"
    )
    parser.add_argument("--profile", choices=CASES, help="where a sparse forward spends its time")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    options = {name: value for name, value in vars(args).items() if name != "out"}
    content: dict[str, Any] = {
        "machine": {**machine(device, dtype), **versions()},
        "weights": "random: speed and memory only", "options": options, "cases": {},
    }  # fmt: skip
    for name in [args.profile] if args.profile else args.cases:
        content["cases"][name] = measure((CASES if cuda else TINY)[name], device, dtype, args)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(content, indent=1) + "\n")
        if cuda:
            torch.cuda.empty_cache()
    if not args.profile:
        print(table(content["cases"]))


if __name__ == "__main__":
    main()
