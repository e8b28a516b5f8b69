"""Towers whose inputs or outputs are of uncommon shapes, alone and shared by P processes (gloo).

    python tower_run.py P FILE

FILE holds by case the outputs and gradients of both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm_sparse.integrations.ulysses.tower_split import TowerSplit
from tests.support.process_runs import spawn_from_command_line

DIM = 4


class Tower(nn.Module):
    """A map of patches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(DIM, DIM, dtype=torch.float64)


class BatchOfOne(Tower):
    """Gives back patches as a batch of one, and marks the end of every line (HunYuan-VL)."""

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> dict[str, Tensor]:
        states = self.map(pixel_values)
        lines = [
            torch.cat([part.view(height, width, DIM), part.new_ones(height, 1, DIM)], 1)
            for part, (_, height, width) in zip(
                states.split(grid_thw.prod(-1).tolist()), grid_thw.tolist(), strict=True
            )
        ]
        return {
            "states": states[None], "lines": torch.cat([x.flatten(0, 1) for x in lines])[None],
        }  # fmt: skip


class BatchOfOneGiven(Tower):
    """Is given patches as a batch of one (PaddleOCR-VL)."""

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> dict[str, Tensor]:
        if pixel_values.shape[1] != int(grid_thw.prod(-1).sum()):
            raise ValueError("grid_thw must be of the patches")
        return {"states": self.map(pixel_values)}


class Dropping(Tower):
    """Gives back what is no padding (Gemma 4)."""

    def forward(self, pixel_values: Tensor, pixel_position_ids: Tensor) -> dict[str, Tensor]:
        return {"states": self.map(pixel_values)[(pixel_position_ids >= 0).all(-1)]}


class Lengths(Tower):
    """Is given clips behind each other, channels first (Qwen2.5-Omni)."""

    def forward(self, input_features: Tensor, feature_lens: Tensor) -> dict[str, Tensor]:
        return {"states": self.map(input_features.T)}


def grids(*sizes: tuple[int, int]) -> Tensor:
    return torch.tensor([(1, *size) for size in sizes])


def cases() -> dict[str, tuple[Tower, dict[str, Any]]]:
    """Towers and what they are given."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    places = torch.zeros(3, 6, 2, dtype=torch.int64)
    places[0, 2:], places[2, 5:] = -1, -1
    alike, others = grids((2, 4), (2, 4)), grids((2, 4), (4, 4), (2, 2))
    return {
        "batch of one": (BatchOfOne(), {"pixel_values": random(16, DIM), "grid_thw": alike}),
        "lines": (BatchOfOne(), {"pixel_values": random(28, DIM), "grid_thw": others}),
        "given": (BatchOfOneGiven(), {"pixel_values": random(1, 28, DIM), "grid_thw": others}),
        "dropping": (
            Dropping(), {"pixel_values": random(3, 6, DIM), "pixel_position_ids": places}
        ),
        "lengths": (
            Lengths(), {"input_features": random(DIM, 9), "feature_lens": torch.tensor([4, 5])}
        ),
    }  # fmt: skip


def called(tower: Tower, given: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs, and the gradient of their weighted sum."""
    out = tower(**given)
    generator = torch.Generator().manual_seed(2)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in out.values()
    )
    # As ranks of a sequence, of which each has a share of the loss.
    size = dist.get_world_size() if tower._forward_hooks else 1
    (loss / size).backward()
    return {name: x.detach() for name, x in out.items()}


def work(rank: int, size: int, meeting: str, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=size)
    found = {}
    for name, (tower, given) in cases().items():
        alone = called(tower, given)
        gradient, tower.map.weight.grad = tower.map.weight.grad, None
        TowerSplit(tower, [], dist.group.WORLD).attach()
        together = called(tower, given)
        summed = tower.map.weight.grad.clone()
        dist.all_reduce(summed)
        found[name] = {**alone, "gradient": gradient}, {**together, "gradient": summed}
    if rank == 0:
        torch.save(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    spawn_from_command_line(work)
