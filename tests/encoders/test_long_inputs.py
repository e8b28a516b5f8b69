"""Images of 4096 pixels and half an hour of audio: nothing as large as a mask of N x N bytes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import mm_sparse as mms
from mm_sparse.encoders.audio import create_audio_encoder
from mm_sparse.encoders.vision import create_vision_encoder
from tests.support.encoder_cases import CONFORMER, TORCHAUDIO, WAVE

for needed in ("timm", "torchaudio", "transformers"):
    pytest.importorskip(needed)

SPARSE = mms.SparseConfig(0.05, tile=128, unit=64, dense_below=0, sinks=0, window=0)
# 320 samples a frame, as in wav2vec 2.0, in fewer and narrower layers.
OURS = {"encoder_embed_dim": 16, "encoder_num_layers": 1, "encoder_num_heads": 1,
        "extractor_conv_layer_config": [(4, 10, 10), (4, 8, 8), (8, 4, 4)]}  # fmt: skip
THEIRS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
          "conv_dim": (4, 4, 8), "conv_stride": (10, 8, 4), "conv_kernel": (10, 8, 4)}  # fmt: skip
PROFILE: dict[str, Any] = {
    "activities": [ProfilerActivity.CPU], "profile_memory": True, "acc_events": True,
}  # fmt: skip
# Bytes that the CPU path works on at a time.
WORKING = 20 << 20
VIT = {"embed_dim": 16, "depth": 1, "num_heads": 1}


def largest_allocation(encoder: Any, *batch: Tensor) -> tuple[int, int]:
    """Tokens, and bytes of the largest piece of memory that a forward asks for."""
    with torch.no_grad(), profile(**PROFILE) as seen:
        tokens, _ = encoder(*batch)
    assert [row.mode for row in mms.report(encoder).rows] == ["sparse"]
    events: Any = seen.events()
    return tokens.shape[1], max(event.self_cpu_memory_usage for event in events)


@pytest.mark.parametrize("pixels", [2048, pytest.param(4096, marks=pytest.mark.slow)])
def test_large_images(pixels: int) -> None:
    encoder = create_vision_encoder("vit_tiny_patch16_224", "timm", SPARSE, **VIT)
    count, largest = largest_allocation(encoder, torch.rand(1, 3, pixels, pixels))
    assert count == (pixels // 16) ** 2 + 1
    # The image itself is the largest: less than a byte for every pair of tokens by far.
    assert largest <= 3 * pixels * pixels * 4 < count * count / 5


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("torchaudio", 300),
        ("transformers", 300),
        ("conformer", 600),
        pytest.param("transformers", 1800, marks=pytest.mark.slow),
    ],
)
def test_long_audio_with_padding(name: str, seconds: int) -> None:
    if name == "conformer":
        options = {**CONFORMER, "input_dim": 16, "num_heads": 1, "num_layers": 1}
        encoder = create_audio_encoder("conformer", "torchaudio", SPARSE, input_rate=50, **options)
        audio = torch.randn(1, seconds * 50, 16)
    elif name == "torchaudio":
        options = {**TORCHAUDIO, **OURS}
        encoder = create_audio_encoder("wav2vec2_model", "torchaudio", SPARSE, **options)
        audio = torch.randn(1, seconds * 16000)
    else:
        encoder = create_audio_encoder("wav2vec2", name, SPARSE, **{**WAVE, **THEIRS})
        audio = torch.randn(1, seconds * 16000)
    lengths = torch.tensor([audio.shape[1] * 9 // 10])
    assert encoder.rate == 50
    count, largest = largest_allocation(encoder, audio, lengths)
    assert count == seconds * (45 if name == "conformer" else 50)
    # transformers counts samples in 8 bytes each; what is gathered at a time has a fixed size.
    assert largest < max(3 * audio.numel() * 4, WORKING) < count * count / 3


def test_an_encoder_with_fixed_positions_says_what_it_takes() -> None:
    from tests.support.encoder_cases import OPEN_CLIP, WHISPER

    whisper = create_audio_encoder("whisper", "transformers", SPARSE, **WHISPER)
    with pytest.raises(ValueError, match=r"cut to 300 frames of features \(3 s\), for which alone"):
        whisper(torch.zeros(1, 16, 180_000))
    clip = create_vision_encoder("ViT-B-32", "open_clip", SPARSE, **OPEN_CLIP)
    with pytest.raises(ValueError, match=r"be 48 x 48 pixels.*got 4096 x 4096 for VisionTransform"):
        clip(torch.zeros(1, 3, 4096, 4096))
