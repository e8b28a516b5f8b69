from .audio import (
    HOP as HOP,
)
from .audio import (
    AudioConfig as AudioConfig,
)
from .audio import (
    FrameClassifier as FrameClassifier,
)
from .audio import (
    LogMel as LogMel,
)
from .language import LanguageConfig as LanguageConfig
from .language import LoraConfig as LoraConfig
from .multimodal_training import (
    AnswerLogits as AnswerLogits,
)
from .multimodal_training import (
    MultimodalTraining as MultimodalTraining,
)
from .vision import PatchClassifier as PatchClassifier
from .vision import VisionConfig as VisionConfig
