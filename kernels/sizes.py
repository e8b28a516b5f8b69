"""Sizes of grids and blocks; Triton's own functions of these names take microseconds each."""

from functools import lru_cache

import torch
from torch import Tensor

# Programs that keep the largest GPUs busy to the end.
PROGRAMS = 1024


def cdiv(n: int, size: int) -> int:
    """Blocks of `size` that hold n."""
    return -(-n // size)


@lru_cache(maxsize=4096)
def next_power_of_2(n: int) -> int:
    """The lowest power of 2 that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def all_whole(lead: int, unit: int, keys: int) -> bool:
    """Whether unit u is exactly the keys [u * unit, (u + 1) * unit), as `Plan.lead` tells."""
    return lead == 0 and keys % unit == 0


def index_dtype(num_units: int) -> torch.dtype:
    """Of lists of units: those of long sequences are large, so half as wide where ids allow."""
    return torch.int16 if num_units < 2**15 else torch.int32


def unit_chunks(blocks: int, num_units: int, cols: int, places: int) -> tuple[int, int]:
    """Runs that units are cut into for `blocks` blocks of rows, and the units of a run."""
    steps = cdiv(num_units, cols)
    chunk = _steps_of_run(blocks, steps, places)
    return cdiv(steps, chunk), chunk * cols


@lru_cache(maxsize=1024)
def _steps_of_run(blocks: int, steps: int, places: int) -> int:
    """Steps that one program takes of a row.

    Many blocks are cut into about `PROGRAMS`. Those of few run at once in `places`, each for its
    steps and, to begin with, for as long as one and a half of them take.
    """
    if 2 * blocks >= places:
        return cdiv(steps, max(min(cdiv(steps, 4), cdiv(PROGRAMS, blocks)), 1))

    def cost(run: int) -> tuple[float, int]:
        return max(blocks * cdiv(steps, run) / places, 1) * (run + 1.5), -run

    return min(range(1, steps + 1), key=cost)


def new_output(q: Tensor) -> Tensor:
    """An output (B, H, N, D) for queries, in memory as projections behind attention read it."""
    batch, heads, num_queries, dim = q.shape
    return q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)
