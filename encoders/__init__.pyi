from .audio import AudioEncoder as AudioEncoder, create_audio_encoder as create_audio_encoder
from .cuda_graph import CUDAGraphEncoder as CUDAGraphEncoder
from .interleaving import (
    TokenSpec as TokenSpec,
    interleave as interleave,
    interleave_rows as interleave_rows,
    text_spec as text_spec,
)
from .vision import VisionEncoder as VisionEncoder, create_vision_encoder as create_vision_encoder
