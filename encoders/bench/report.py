"""What a case of `encoders.bench.run` comes to: its ceiling, the share of it reached, a table."""

from __future__ import annotations

from statistics import median
from typing import Any

from mm_sparse.bench import aligned

REST = "no attention core"
EAGER = "eager"
SPARSE = "sparse"
DENSE = "dense"
DEFAULT = f"{DENSE} SDPA default"


def ceiling(dense: float, rest: float, density: float) -> float:
    """Times as fast as dense, were attention to cost `density` of its time and choosing nothing.

    Args:
        dense: time of the whole tower.
        rest: time of the tower without its attention core.
    """
    return dense / (rest + density * max(dense - rest, 0.0))


def timed(samples: list[list[float]]) -> dict[str, Any]:
    """Milliseconds of rounds: the median of their medians, and the spread of these."""
    rounds = [median(times) for times in samples]
    return {
        "ms": round(median(rounds), 4),
        "low_ms": round(min(rounds), 4),
        "high_ms": round(max(rounds), 4),
        "rounds_ms": [round(value, 4) for value in rounds],
    }


def compared(runs: list[dict[str, Any]], ratio: float) -> dict[str, Any]:
    """The fastest dense run, and each sparse one beside it, the ceiling and the memory of others.

    Args:
        runs: rows with "what" and, unless the run failed, "ms"; "above_weights_mib" where known.
        ratio: share of the keys that is kept.
    """
    done = {run["what"]: run for run in runs if "ms" in run}
    dense = [run for what, run in done.items() if what.startswith(DENSE)]
    comparison: dict[str, Any] = {"fastest_dense": None, "dense_over_rest": None, "ceiling": None}
    if not dense:
        return {**comparison, "sparse": []}
    best = min(dense, key=lambda run: run["ms"])
    comparison["fastest_dense"], limit = best["what"], None
    if REST in done:
        rest = done[REST]["ms"]
        limit = ceiling(best["ms"], rest, ratio)
        comparison["dense_over_rest"], comparison["ceiling"] = (
            round(best["ms"] / rest, 3),
            round(limit, 3),
        )
    rows = []
    for what, run in done.items():
        if not what.startswith(SPARSE):
            continue
        times = best["ms"] / run["ms"]
        row: dict[str, Any] = {"what": what, "times_dense": round(times, 3)}
        # Where no layer ran sparse, there is no ceiling to reach.
        sparse = run.get("sparse_layers", 0) > 0
        row["share_of_ceiling"] = round(times / limit, 3) if limit and sparse else None
        for name, other in done.items():
            if name.startswith(DENSE) or name == EAGER:
                row[f"times_{name}"] = round(other["ms"] / run["ms"], 3)
                mine, theirs = run.get("above_weights_mib"), other.get("above_weights_mib")
                if mine is not None and theirs:
                    row[f"memory_of_{name}"] = round(mine / theirs, 3)
        rows.append(row)
    return {**comparison, "sparse": rows}


def table(cases: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each run of each case."""
    head = ["case", "run", "ms (spread)", "x fastest dense", "x default dense", "ceiling",
            "share of it", "peak MiB (above weights)"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for name, case in cases.items():
        ratios = {row["what"]: row for row in case.get("sparse", ())}
        for run in case.get("runs", ()):
            own = ratios.get(run["what"], {})
            share = own.get("share_of_ceiling")
            time = "not timed"
            if "ms" in run:
                time = f"{run['ms']:.2f} ({run['low_ms']:.2f}-{run['high_ms']:.2f})"
            peak = run.get("peak_mib")
            lines.append([
                name, run["what"], time, _cell(own.get("times_dense")),
                _cell(own.get(f"times_{DEFAULT}")),
                _cell(case.get("ceiling")) if share is not None else "-",
                "-" if share is None else f"{share:.0%}",
                "-" if peak is None else f"{peak:.0f} ({run['above_weights_mib']:.0f})",
            ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kernels(rows: list[dict[str, Any]], most: int = 25) -> str:
    """The `most` that took longest of a profile's rows, in plain columns."""
    lines = [["", "ms", "calls", "share"]]
    whole = sum(row["ms"] for row in rows) or 1.0
    for row in sorted(rows, key=lambda row: -row["ms"])[:most]:
        share = f"{row['ms'] / whole:.1%}"
        lines.append([row["what"][:90], f"{row['ms']:.3f}", str(row["calls"]), share])
    return "\n".join(aligned(lines))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
