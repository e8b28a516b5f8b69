"""A call without the host's part in it: as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

R = TypeVar("R")
# What is compiled, planned and allocated in a first call must not be part of the graph.
WARM_CALLS = 3


def capture(run: Callable[[], R]) -> Callable[[], R]:
    """The call as a CUDA graph, captured under the gradient mode of the caller.

    What it returns lies where it lay when it was captured: the next replay overwrites it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_CALLS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> R:
        graph.replay()
        return out

    return replay
