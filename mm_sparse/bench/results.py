"""What a benchmark found: records, what was skipped and why, ratios, a table, files, a figure."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
WHOLE = "score + select + attend"
SELECTING = "score + select unit"
FAMILIES = ("sdpa", "eager", "fa4", "cudnn", "flex", "attend", "select", "whole")
"""Groups of contestants, as `--only` names them."""


@dataclass
class Timing:
    """One timing."""

    what: str
    tokens: int
    heads: str
    head_dim: int
    causal: bool
    direction: str
    """"forward", "backward" or "decode"."""
    density: float
    milliseconds: float
    tflops: float | None
    """Of kept pairs only."""
    gb_per_s: float | None = None
    """Kept keys and values read per second by a decoding step."""

    @property
    def group(self) -> tuple[int, str, int, bool, str]:
        """What records must share to be compared."""
        return (self.tokens, self.heads, self.head_dim, self.causal, self.direction)


@dataclass
class Session:
    """What all shapes of a run share."""

    only: Sequence[str] = ()
    """Families that run, all if empty."""
    seconds: float | None = None
    """Nothing starts after so many seconds."""
    repeat: float = 0.3
    """Seconds of repetitions of a timing."""
    records: list[Timing] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    absent: set[str] = field(default_factory=set)
    """Families that could not be imported."""
    start: float = field(default_factory=time.monotonic)

    def wants(self, family: str) -> bool:
        """Whether contestants of a family are tried at all."""
        return family not in self.absent and (not self.only or family in self.only)

    def skip(self, what: str, why: str, **where: Any) -> None:
        """Say and keep what does not run."""
        self.skipped.append({"what": what, **where, "why": why})
        place = " ".join(f"{k}={v}" for k, v in where.items())
        print(f"skipped {what}{' ' if place else ''}{place}: {why}", flush=True)

    def guard(self, what: str, family: str, step: Callable[[], T], **where: Any) -> T | None:
        """The result of `step`, None if it fails or the time is over: then it is skipped."""
        if self.seconds is not None and time.monotonic() - self.start >= self.seconds:
            self.skip(what, f"the {self.seconds:g} s of --seconds are over", **where)
            return None
        try:
            return step()
        except ImportError as error:
            self.absent.add(family)
            self.skip(what.split(" blocks")[0].removeprefix("dense "), reason(error))
        # Peers fail in ways of their own, and one must not end the run.
        except Exception as error:
            self.skip(what, reason(error), **where)
        return None


def reason(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def dense_record(record: Timing) -> bool:
    """Whether it attends to everything."""
    return record.what.startswith("dense")


def peer_record(record: Timing) -> bool:
    """Whether it is somebody else's sparse attention."""
    return not record.what.startswith(("dense", "attend", "score"))


def fastest(
    records: Iterable[Timing], group: Any, which: Callable[[Timing], bool]
) -> Timing | None:
    """The fastest of a group among `which`."""
    matching = [r for r in records if r.group == group and which(r)]
    return min(matching, key=lambda r: r.milliseconds) if matching else None


def ratios(records: Sequence[Timing]) -> list[dict[str, Any]]:
    """How many times as fast as the fastest dense and the fastest sparse peer each record is.

    Scoring and selection alone are no attention and have None.
    """
    rows = []
    for record in records:
        names = ("tokens", "heads", "head_dim", "causal", "direction")
        row: dict[str, Any] = {"what": record.what}
        row.update(zip(names, record.group, strict=True))
        for name, which in (("dense", dense_record), ("sparse_peer", peer_record)):
            attends = not record.what.startswith(SELECTING)
            best = fastest(records, record.group, which) if attends else None
            row[f"fastest_{name}"] = best.what if best else None
            times = best.milliseconds / record.milliseconds if best else None
            row[f"times_{name}"] = None if times is None else round(times, 3)
        rows.append(row)
    return rows


def break_even(records: Sequence[Timing]) -> list[dict[str, Any]]:
    """Per shape and unit, the first length from which the whole is never slower than dense."""
    wins_by_case: dict[tuple[Any, ...], dict[int, bool]] = {}
    for record in records:
        best = fastest(records, record.group, dense_record)
        if record.what.startswith(WHOLE) and best and record.direction == "forward":
            key = (record.what, record.heads, record.head_dim, record.causal)
            wins = wins_by_case.setdefault(key, {})
            wins[record.tokens] = record.milliseconds <= best.milliseconds
    rows = []
    for key, wins in wins_by_case.items():
        first = None
        for tokens in sorted(wins, reverse=True):
            if not wins[tokens]:
                break
            first = tokens
        names = ("what", "heads", "head_dim", "causal")
        rows.append(
            {**dict(zip(names, key, strict=True)), "lengths": sorted(wins), "tokens": first}
        )
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Plain columns: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = []
    for row in rows:
        rest = (cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    return lines


def table(records: Sequence[Timing]) -> str:
    """Records grouped by shape and direction; "x dense" is times as fast as the fastest dense."""
    compared = list(zip(records, ratios(records), strict=True))
    lines: list[str] = []
    for group in dict.fromkeys(r.group for r in records):
        tokens, heads, head_dim, causal, direction = group
        mask = "causal" if causal else "not causal"
        lines += [f"{tokens} tokens, heads {heads}, head dim {head_dim}, {mask}, {direction}"]
        head = ["", "density", "ms", "TFLOP/s", "x dense", "x peer"]
        rows = [[*head, "GB/s"] if direction == "decode" else head]
        for r, row in (pair for pair in compared if pair[0].group == group):
            cells = [r.what, f"{r.density:.3f}", f"{r.milliseconds:.3f}", _cell(r.tflops, 1)]
            cells += [_cell(row[f"times_{n}"], 2) for n in ("dense", "sparse_peer")]
            rows.append([*cells, _cell(r.gb_per_s, 0)] if direction == "decode" else cells)
        lines += [f"  {line}" for line in aligned(rows)] + [""]
    return "\n".join(lines).rstrip()


def running_line(records: Sequence[Timing]) -> str:
    """The last record as a line of a table that grows; a head where a shape begins."""
    last, before = records[-1], records[-2:-1]
    lines = []
    if not before or before[0].group[:-1] != last.group[:-1]:
        mask = "causal" if last.causal else "not causal"
        lines += ["", f"{last.tokens} tokens, heads {last.heads}, head dim {last.head_dim}, {mask}"]
        lines += [f"  {'':40} {'':8} {'density':>8} {'ms':>10} {'x dense':>8}"]
    ratio = _cell(ratios(records)[-1]["times_dense"], 2)
    cells = f"{last.density:>8.3f} {last.milliseconds:>10.3f} {ratio:>8}"
    return "\n".join([*lines, f"  {last.what:40} {last.direction:8} {cells}"])


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def summary(content: dict[str, Any], session: Session) -> str:
    """What the terminal shows at the end."""
    lines = [table(session.records)] if session.records else []
    if any(r.gb_per_s for r in session.records) and "copy_gb_per_s" in content["machine"]:
        lines.append(f"a copy on this device moves {content['machine']['copy_gb_per_s']} GB/s")
    if session.memory:
        rows = [["peak beyond q, k, v, out", "shape", "", "MiB", "of q, k, v", "index, bytes"]]
        for m in session.memory:
            shape = f"{m['tokens']} {m['heads']} {m['head_dim']} {'causal' if m['causal'] else ''}"
            sizes = (f"{m['mib']:.1f}", f"{m['share_of_qkv']:.3f}", f"{m['index_bytes']}")
            rows.append([m["what"], shape.strip(), m["direction"], *sizes])
        lines.append("\n".join(aligned(rows)))
    for row in content.get("break_even", ()):
        verdict = f"never slower than dense from {row['tokens']} tokens"
        if row["tokens"] is None:
            verdict = f"still slower than dense at {row['lengths'][-1]} tokens"
        mask = "causal" if row["causal"] else "not causal"
        kind = f"heads {row['heads']}, head dim {row['head_dim']}, {mask}"
        lines.append(f"{row['what']} ({kind}) is {verdict}")
    if session.skipped:
        lines.append(f"{len(session.skipped)} skipped, as said above")
    return "\n\n".join(lines)


def median_ms(run: Callable[[], Any], device: str, seconds: float = 0.3) -> float:
    """Median time of `run` in milliseconds, by events and with L2 flushed on a GPU."""
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


def machine(device: str, dtype: Any) -> dict[str, Any]:
    """What ran, and on a GPU what it reaches in a matrix product and in a copy."""
    import torch

    known: dict[str, Any] = {"torch": torch.__version__, "dtype": str(dtype)}
    if device == "cpu":
        return {"cpu": platform.machine(), "threads": torch.get_num_threads(), **known}
    import triton

    known = {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__, **known}
    known["cuda"] = torch.version.cuda
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        known["driver"] = done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        known["driver"] = reason(error)
    a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    known["matmul_tflops"] = round(2 * 8192**3 / median_ms(lambda: a @ b, device) / 1e9, 1)
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), device)
    return {**known, "copy_gb_per_s": round(2 * source.nbytes / ms / 1e6, 1)}


def write(out: Path, content: dict[str, Any], session: Session) -> None:
    """The JSON file `out`, and the records beside it as CSV."""
    out.parent.mkdir(parents=True, exist_ok=True)
    full = {
        **content,
        "records": [asdict(r) for r in session.records],
        "ratios": ratios(session.records),
        "memory": session.memory,
        "skipped": session.skipped,
    }
    out.write_text(json.dumps(full, indent=1) + "\n")
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Timing)])
        writer.writeheader()
        writer.writerows(asdict(r) for r in session.records)


def plot(path: Path, records: Sequence[Timing]) -> None:
    """Forward time over length, a panel per kind of shape, with the break-even marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    forward = [r for r in records if r.direction == "forward"]
    panels = list(dict.fromkeys((r.heads, r.head_dim, r.causal) for r in forward))
    figure = Figure(figsize=(8 * max(len(panels), 1), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels, 1):
        heads, head_dim, causal = panel
        axes = figure.add_subplot(1, len(panels), place)
        own = [r for r in forward if (r.heads, r.head_dim, r.causal) == panel]
        for what in dict.fromkeys(r.what for r in own):
            line = sorted((r.tokens, r.milliseconds) for r in own if r.what == what)
            ours = what.startswith(("attend", "score"))
            style = "-" if ours else "--" if what.startswith("dense") else ":"
            axes.plot(*zip(*line, strict=True), style, marker=".", label=what)
        for row in break_even(own):
            if row["tokens"] is not None:
                label = f"{row['what']} pays from {row['tokens']}"
                axes.axvline(row["tokens"], color="0.7", linewidth=0.8, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_ylabel("ms, forward")
        axes.set_title(f"heads {heads}, head dim {head_dim}{', causal' if causal else ''}")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
