"""Without a GPU: Triton's interpreter, and a reason for each test that is skipped."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Triton reads this when it is imported, so it is set before any test module is.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
