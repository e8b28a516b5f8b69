from .wheels import smollm2 as smollm2
from .whisper import (
    FILES as FILES,
    load_encoder as load_encoder,
    load_whisper as load_whisper,
    sinusoids as sinusoids,
    whisper_tiny as whisper_tiny,
)
