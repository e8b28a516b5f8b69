from .asterisk_prompts import packed as packed, plain as plain, prompts as prompts
from .digit_dictation import SILENCE as SILENCE, SpokenWords as SpokenWords
from .digits import DigitCanvases as DigitCanvases
from .stamps import find_stamps as find_stamps
