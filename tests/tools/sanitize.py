"""Every kernel once on odd shapes, small enough for compute-sanitizer, which makes all much slower.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.tools.sanitize
compute-sanitizer --tool racecheck python -m tests.tools.sanitize
"""

import torch

import mm_sparse as mms
from mm_sparse.kernels.triton import topk as select_kernels
from mm_sparse.scorers.attention_mass import unit_mass

SPANS = [("text", 37), ("image", (9, 11)), ("text", 1), ("audio", 130), ("text", 66)]
OPTIONS = {"ratio": 0.4, "sinks": 4, "window": 16, "dense_below": 0, "modality_floor": 0.1}


def attention(
    heads: int, kv_heads: int, dim: int, unit: int, tile: int, dtype: torch.dtype, **options: object
) -> None:
    """Scores, selection, attention and its gradients on a row padded on the left and one that is
    not."""
    layout = mms.TokenLayout.from_rows([SPANS, SPANS[:3]], padding_side="left", device="cuda")
    config = mms.SparseConfig(**{**OPTIONS, "unit": unit, "tile": tile, **options})
    shape = {"num_query_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
    size = (2, heads, layout.length, dim)
    q = torch.randn(size, device="cuda", dtype=dtype, requires_grad=True)
    k, v = torch.randn(2, 2, kv_heads, layout.length, dim, device="cuda", dtype=dtype).unbind()
    k.requires_grad_(), v.requires_grad_()
    for scorer in (mms.PooledScorer(), mms.RelevanceScorer(**shape), mms.FineScorer(**shape)):
        out = mms.sparse_attention(q, k, v, layout=layout, config=config, scorer=scorer.cuda())
        torch.autograd.grad(out.float().square().sum(), (q, k, v))
    plan = layout.plan(config, num_query_heads=heads, num_kv_heads=kv_heads)
    with torch.no_grad():
        unit_mass(q, k, plan)
        for count in (1, 3):
            mms.sparse_attention(q[:, :, -count:], k, v, layout=layout, config=config)


def main() -> None:
    """All of it."""
    torch.manual_seed(0)
    half, wide = torch.bfloat16, torch.float32
    attention(2, 2, 128, 16, 128, half)
    attention(2, 2, 64, 64, 128, half, causal=False, sample_ratio=0.5)
    for dim in (64, 128):
        attention(4, 2, dim, 16, 128, half, deterministic=False)
    attention(6, 2, 80, 16, 64, half)
    attention(1, 1, 32, 32, 64, wide)
    # Text in whole units, whose lists stay as they are.
    layout = mms.TokenLayout.text(1, 384, device="cuda")
    q, k, v = torch.randn(3, 1, 2, 384, 128, device="cuda", dtype=half)
    for causal in (True, False):
        config = mms.SparseConfig(ratio=0.5, unit=16, tile=128, causal=causal, dense_below=0)
        mms.sparse_attention(q, k, v, layout=layout, config=config)
    runs = {"modality_floor": 0.0, "coarse_factor": 2, "coarse_budget": 1.5}
    attention(2, 1, 64, 16, 64, half, **runs)
    attention(6, 2, 80, 16, 64, wide, **runs, causal=False)
    select_kernels.IN_REGISTERS = 8
    attention(2, 1, 64, 16, 64, half, modality_floor=0.0)
    attention(2, 1, 64, 16, 64, half, **runs)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
