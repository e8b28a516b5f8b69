from .wheels import smollm2 as smollm2
from .whisper import (
    FILES as FILES,
)
from .whisper import (
    load_encoder as load_encoder,
)
from .whisper import (
    load_whisper as load_whisper,
)
from .whisper import (
    sinusoids as sinusoids,
)
from .whisper import (
    whisper_tiny as whisper_tiny,
)
