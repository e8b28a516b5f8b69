from .audio import AudioEncoder as AudioEncoder
from .audio import create_audio_encoder as create_audio_encoder
from .cuda_graph import CUDAGraphEncoder as CUDAGraphEncoder
from .interleaving import (
    TokenSpec as TokenSpec,
)
from .interleaving import (
    interleave as interleave,
)
from .interleaving import (
    interleave_rows as interleave_rows,
)
from .interleaving import (
    text_spec as text_spec,
)
from .vision import (
    VisionTower as VisionTower,
)
from .vision import (
    create_vision_encoder as create_vision_encoder,
)
from .vision import (
    create_vision_tower as create_vision_tower,
)
