"""Several threads that run one sparsified tower."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

import mm_sparse as mms

timm: Any = pytest.importorskip("timm")
GRID = mms.SparseConfig(ratio=0.3, tile=64, unit=16, dense_below=0, sinks=0, window=0)


def tower() -> Any:
    torch.manual_seed(0)
    options = {"depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
    made = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **options).eval()
    return mms.sparsify(made, GRID)


def together(model: Any, pictures: list[Tensor], rounds: int = 12) -> list[list[Tensor]]:
    """What threads get that run at the same time, one for each picture."""
    ready = Barrier(len(pictures))

    def run(picture: Tensor) -> list[Tensor]:
        found = []
        with torch.no_grad():
            for _ in range(rounds):
                ready.wait(60)
                found.append(model(picture))
        return found

    with ThreadPoolExecutor(len(pictures)) as pool:
        return list(pool.map(run, pictures))


def check(sizes: list[tuple[int, int]]) -> None:
    model = tower()
    make = torch.Generator().manual_seed(1)
    pictures = [torch.rand(1, 3, *size, generator=make) for size in sizes]
    with torch.no_grad():
        want = [model(picture) for picture in pictures]
    for found, alone in zip(together(model, pictures), want, strict=True):
        for out in found:
            torch.testing.assert_close(out, alone)


def test_threads_with_pictures_of_one_size_get_what_one_thread_gets() -> None:
    check([(160, 160), (160, 160)])


def test_threads_with_images_of_two_sizes_get_what_one_thread_gets() -> None:
    check([(160, 160), (128, 224)])
