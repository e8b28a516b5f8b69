from .audio import (
    HOP as HOP,
    AudioConfig as AudioConfig,
    FrameClassifier as FrameClassifier,
    FrameProjectorConfig as FrameProjectorConfig,
    LogMel as LogMel,
)
from .exported import (
    RECIPE as RECIPE,
    export_language as export_language,
    from_checkpoint as from_checkpoint,
    recipe_of as recipe_of,
)
from .language import LanguageConfig as LanguageConfig, LoraConfig as LoraConfig
from .multimodal import MultimodalLM as MultimodalLM
from .multimodal_base import ScorerName as ScorerName
from .multimodal_training import (
    AnswerLogits as AnswerLogits,
    AnswerLoss as AnswerLoss,
    MultimodalTraining as MultimodalTraining,
)
from .vision import (
    PatchClassifier as PatchClassifier,
    ProjectorConfig as ProjectorConfig,
    VisionConfig as VisionConfig,
)
