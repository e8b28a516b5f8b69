"""Where one forward spends its time: kernels, launches, and calls that wait for the device."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mm_sparse.encoders.bench.report import kernels


def profiled(forward: Callable[[], Any], what: str, device: str) -> dict[str, Any]:
    """Profile one warm forward, print it, and return what was printed.

    On a CPU, operators stand for kernels.

    Args:
        forward: launches it.
        what: its name.
    """
    cuda = device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    forward()
    wait()
    start = time.perf_counter()
    forward()
    launched = time.perf_counter() - start
    wait()
    whole = time.perf_counter() - start
    with profile(activities=activities, acc_events=True) as seen:
        forward()
        wait()
    rows = spent(seen, cuda)
    profile_row: dict[str, Any] = {
        "ms": round(whole * 1000, 4), "launched_ms": round(launched * 1000, 4),
        "kernels_ms": round(sum(row["ms"] for row in rows), 4),
        "calls": sum(row["calls"] for row in rows), "kernels": rows,
        "waits": waits(forward) if cuda else {},
    }  # fmt: skip
    print(
        f"{what}: {profile_row['ms']} ms, the host was done after {profile_row['launched_ms']}; "
        f"{profile_row['calls']} kernels take {profile_row['kernels_ms']}"
    )
    print(kernels(rows))
    for place, count in profile_row["waits"].items():
        print(f"the host waited {count} x at {place}")
    return profile_row


def spent(seen: Any, cuda: bool) -> list[dict[str, Any]]:
    """Milliseconds and calls of each kernel, or operator of a CPU, the longest first."""
    rows = []
    for event in seen.key_averages():
        own: Any = event
        time_us = own.self_device_time_total if cuda else own.self_cpu_time_total
        if (own.device_type.name == "CUDA") == cuda and time_us:
            rows.append({"what": own.key, "ms": round(time_us / 1000, 4), "calls": own.count})
    return sorted(rows, key=lambda row: -row["ms"])


def waits(forward: Callable[[], Any]) -> dict[str, int]:
    """Lines that waited for the GPU in a forward, and how often."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            forward()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    said = "called a synchronizing"
    lines = Counter(f"{w.filename}:{w.lineno}" for w in caught if said in str(w.message))
    return dict(lines.most_common())
