"""What a token is."""

from enum import IntEnum


class Modality(IntEnum):
    """Kind of a token; files hold the numbers, so new kinds go last."""

    TEXT = 0
    IMAGE = 1
    AUDIO = 2
    VIDEO = 3
