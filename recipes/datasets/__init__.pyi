from .asterisk_prompts import packed as packed
from .asterisk_prompts import plain as plain
from .asterisk_prompts import prompts as prompts
from .digit_dictation import SILENCE as SILENCE
from .digit_dictation import SpokenWords as SpokenWords
from .digits import DigitCanvases as DigitCanvases
from .stamps import find_stamps as find_stamps
