"""What a token is."""

from enum import IntEnum


class Modality(IntEnum):
    """Kind of a token."""

    TEXT = 0
    IMAGE = 1
    AUDIO = 2
