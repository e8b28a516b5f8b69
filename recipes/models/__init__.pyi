from .audio import (
    HOP as HOP,
    AudioConfig as AudioConfig,
    FrameClassifier as FrameClassifier,
    LogMel as LogMel,
)
from .language import LanguageConfig as LanguageConfig, LoraConfig as LoraConfig
from .multimodal_training import (
    AnswerLogits as AnswerLogits,
    MultimodalTraining as MultimodalTraining,
)
from .vision import PatchClassifier as PatchClassifier, VisionConfig as VisionConfig
