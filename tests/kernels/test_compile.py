"""The kernels compile for A100, H100, B200 and RTX 50 cards where none is present."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("target", ["80", "90", "100", "120"])
def test_kernels_compile_within_shared_memory(target: str) -> None:
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.compile_kernels", target],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"sm_{target} ") == (125 if target == "90" else 99)
    stacks = [int(n) for n in re.findall(r"stack (\d+) B", done.stdout)]
    assert max(stacks) <= 640, done.stdout
    if target == "90":
        # All parts of the kernel run at once, and more code than a multiprocessor keeps is fetched
        # anew at every tile with masked blocks (kernel-log.md has what that costs).
        for dim, most in ((64, 99), (128, 104)):
            code = re.findall(
                rf"_block_sparse_attention_fwd_hopper D{dim} unit \d+ even: .* code ([\d.]+) KiB",
                done.stdout,
            )
            assert len(code) == 3, done.stdout
            assert max(map(float, code)) <= most, done.stdout
