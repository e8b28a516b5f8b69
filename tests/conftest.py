"""Without a GPU: Triton's interpreter, and a reason for each test that is skipped."""

import os
from collections import Counter

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Triton reads this when it is imported, so it is set before any test module is.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Before pytest leaves out what is marked slow.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[str] = Counter()
    skip = pytest.mark.skip(reason="needs a CUDA device, torch.cuda.is_available() is False")
    for item in items:
        thinned = item.get_closest_marker("thinned")
        if thinned is not None:
            name = item.nodeid.partition("[")[0]
            if seen[name] % thinned.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(skip)
