"""Lengths that no two batches share must not have kernels compiled again and again."""

import json
import os
import subprocess
import sys

import pytest
import torch

import mm_sparse as mms

# What a model or a config fixes; and rows of units, which are read faster where they are aligned.
FIXED = {"scale", "heads", "q_heads", "k_heads", "kv_heads", "budgets", "query_pools"}
FIXED |= {"other_b", "other_h", "other_n"}
ROWS = ("num_units", "row_length")
ALIGNED = {
    "_block_scores": ROWS[1:],
    "_block_scores_lse": ROWS[1:],
    "few_row_logits": ROWS[1:],
    "few_row_shares": ROWS[1:],
    "_topk_registers": ROWS,
    "_topk_chunked": ROWS,
}
# The interpreter knows nothing of how kernels are compiled, so this runs without it.
LOOK = """
import importlib, json, pkgutil
from triton.runtime import JITFunction
found = {}
import mm_sparse.kernels
root = "mm_sparse.kernels."
for module in pkgutil.walk_packages(mm_sparse.kernels.__path__, root):
    name = module.name.removeprefix(root)
    for kernel in vars(importlib.import_module(module.name)).values():
        if isinstance(kernel, JITFunction) and kernel.module == module.name:
            numbers = [p for p in kernel.params if not p.is_constexpr]
            compiled = [p.name for p in numbers if not p.do_not_specialize]
            if len(compiled) < len(numbers):
                found[name + "." + kernel.__name__] = compiled
print(json.dumps(found))
"""


def test_no_number_that_differs_between_calls_is_compiled_in():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    looked = subprocess.run(
        [sys.executable, "-c", LOOK], capture_output=True, text=True, check=True, env=environment
    )
    found = json.loads(looked.stdout)
    assert len(found) == 23
    for kernel, names in found.items():
        numbers = {n for n in names if not n[0].isupper() and not n.startswith("stride")}
        numbers -= {*ALIGNED.get(kernel.rsplit(".", 1)[1], ())}
        assert numbers <= FIXED, kernel


@pytest.mark.gpu
def test_twenty_lengths_compile_attention_four_times_at_most():
    from mm_sparse.kernels.hopper import forward
    from mm_sparse.kernels.triton import attention_backward

    attention = (
        forward._block_sparse_attention_fwd_hopper,
        attention_backward._block_sparse_attention_bwd_dq,
        attention_backward._block_sparse_attention_bwd_dkv,
    )
    before = [len(kernel.device_caches[0][0]) for kernel in attention]
    config = mms.SparseConfig(ratio=0.3, unit=16, tile=128, sinks=16, window=32, dense_below=0)
    torch.manual_seed(0)
    for length in torch.randint(600, 1500, (20,)).tolist():
        q, k, v = torch.randn(3, 1, 2, length, 64, device="cuda", dtype=torch.half).unbind()
        q.requires_grad_()
        layout = mms.TokenLayout.text(1, length, device="cuda")
        mms.sparse_attention(q, k, v, layout=layout, config=config).sum().backward()
    for kernel, old in zip(attention, before, strict=True):
        # Units and tiles are all whole or not, which the kernels of the backward compile in.
        assert 1 <= len(kernel.device_caches[0][0]) - old <= 4, kernel.__name__
