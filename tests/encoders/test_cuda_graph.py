"""A captured forward on a GPU: the encoder's own answer, for inputs it was not captured with."""

import pytest
import torch

from mm_sparse import SparseConfig
from mm_sparse.encoders.cuda_graph import CUDAGraphEncoder
from mm_sparse.encoders.vision import create_vision_encoder

pytest.importorskip("timm")
pytestmark = pytest.mark.gpu

SPARSE = SparseConfig(ratio=0.25, causal=False, sinks=0, window=0, unit=16, tile=64, dense_below=0)


@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
@torch.inference_mode()
def test_a_replay_equals_the_encoder(sparse: SparseConfig | None) -> None:
    torch.manual_seed(0)
    encoder = create_vision_encoder(
        "vit_tiny_patch16_224", sparse=sparse, pretrained=False, image_size=384, depth=2
    )
    encoder = encoder.eval().half().cuda()
    first, second = torch.randn(2, 1, 3, 384, 384, device="cuda", dtype=torch.half)
    replay = CUDAGraphEncoder(encoder, first)
    for images in (first, second, first):
        want, spec = encoder(images)
        tokens, same = replay(images)
        assert torch.equal(tokens, want)
        assert (same.grid, same.prefix, same.lengths) == (spec.grid, spec.prefix, None)
    with pytest.raises(ValueError, match=r"inputs\[0\] must be torch\.float16 \(1, 3, 384, 384\)"):
        replay(first[..., :368])
