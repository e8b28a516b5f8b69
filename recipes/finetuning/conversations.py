"""Samples in the form of transformers' chat templates."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from mm_sparse.recipes.data import RATE, Sample, Turn

Message = dict[str, Any]
"""{"role": "user", "content": [{"type": "image", "image": ...}, {"type": "text", ...}]}."""


def messages_of(sample: Sample, rate: int = RATE) -> list[Message]:
    """The turns of a sample as messages that `processor.apply_chat_template` takes.

    Args:
        rate: samples a second of the audio that the processor wants.
    Raises:
        ValueError: the sample has no answer.

    Example:
        >>> messages_of(Sample((Turn(("Hi",)), Turn(("Hello",), answer=True))))[1]["role"]
        'assistant'
    """
    if not any(turn.answer for turn in sample.turns):
        raise ValueError(f"sample must have an answer, got none in {sample.name or 'it'}")
    return [message_of(turn, rate) for turn in sample.turns]


def message_of(turn: Turn, rate: int = RATE) -> Message:
    """One turn as a message that `processor.apply_chat_template` takes.

    Args:
        rate: samples a second of the audio that the processor wants.

    Example:
        >>> message_of(Turn(("Hi",)))
        {'role': 'user', 'content': [{'type': 'text', 'text': 'Hi'}]}
    """
    role = "assistant" if turn.answer else "system" if turn.system else "user"
    return {"role": role, "content": [_part(part, rate) for part in turn.content]}


def text_of(message: Message) -> str:
    """The texts of a message in one."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def count_media(messages: list[Message]) -> int:
    """Images, videos and audio clips of a conversation."""
    return sum(part["type"] != "text" for message in messages for part in message["content"])


def _part(part: str | Tensor, rate: int) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if part.ndim == 1:
        return {"type": "audio", "audio": _at_rate(part, rate)}
    pixels = (part * 255).round().clamp(0, 255).byte().movedim(-3, -1).numpy()
    if part.ndim == 4:
        return {"type": "video", "video": pixels}
    from PIL import Image

    return {"type": "image", "image": Image.fromarray(pixels)}


def _at_rate(wave: Tensor, rate: int) -> np.ndarray:
    if rate == RATE:
        return wave.numpy()
    from torchaudio.functional import resample as torchaudio_resample

    return torchaudio_resample(wave, RATE, rate).numpy()
