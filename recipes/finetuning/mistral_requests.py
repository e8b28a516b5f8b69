"""Conversations through a tokenizer of mistral-common, which has code in place of a chat template.

The processor of Voxtral has one. It makes tokens of requests, of which no text can be made that
would give the same tokens again: so answers are found by counting tokens.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from mm_sparse.recipes.finetuning.conversations import Message, text_of

# Whole conversations pass the check of finetuning alone, those without a last answer the other.
WHOLE, ASKED = "finetuning", "test"
_TOKENIZERS: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def makes_requests(processor: Any) -> bool:
    """Whether a processor's tokenizer is one of mistral-common."""
    tokenizer = getattr(processor, "tokenizer", None)
    return type(tokenizer).__name__ == "MistralCommonBackend"


def check_package(folder: str) -> None:
    """Refuse a folder whose tokenizer is one of mistral-common where that is not installed.

    Raises:
        ImportError: it is not.
    """
    if find_spec("mistral_common") is not None:
        return
    from transformers.utils.hub import cached_file

    options: Any = {"_raise_exceptions_for_missing_entries": False}
    if cached_file(folder, "tekken.json", **options) is not None:
        raise ImportError(
            f"the processor of {folder!r} needs mistral_common; "
            'pip install "mm-sparse[voxtral]" brings it',
            name="mistral_common",
        )


def encode_requests(
    processor: Any, chats: list[list[Message]], wanted: dict[str, Any]
) -> dict[str, Any]:
    """The model's inputs of conversations, those of audio included.

    Args:
        chats: all end with an answer, or none does.
        wanted: arguments of the processor, `padding_side` for one.
    Raises:
        ValueError: a message holds what the processor cannot take.
    """
    own = processor.tokenizer
    tokenizer = _tokenizer_for(processor, chats[0])
    wanted = dict(wanted)
    side = wanted.pop("padding_side", own.padding_side)
    rate = int(wanted.get("sampling_rate") or processor.feature_extractor.sampling_rate)
    requests = [[_request(processor, message, rate) for message in chat] for chat in chats]
    before = tokenizer.padding_side
    tokenizer.padding_side, processor.tokenizer = side, tokenizer
    try:
        made = processor.apply_chat_template(
            requests, tokenize=True, return_dict=True, processor_kwargs=wanted
        )
    finally:
        tokenizer.padding_side, processor.tokenizer = before, own
    return dict(made)


def find_answers_of_request(
    processor: Any, messages: list[Message], ids: Sequence[int]
) -> list[tuple[int, int]]:
    """Where each answer of a conversation stands, end token included: [start, end) in `ids`.

    Raises:
        ValueError: the tokenizer changes what was said earlier, so that answers cannot be found.
    """
    rate = int(processor.feature_extractor.sampling_rate)
    requests = [_request(processor, message, rate) for message in messages]
    found = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, end = (
            len(_shared(processor, requests[:count], ids)) for count in (number, number + 1)
        )
        found.append((start, end))
    return found


def _shared(processor: Any, requests: list[Message], ids: Sequence[int]) -> list[int]:
    """Tokens of the start of a conversation, which the whole one begins with."""
    made = _tokenizer_for(processor, requests).apply_chat_template(requests, return_dict=True)
    head = list(made["input_ids"])
    if head != list(ids[: len(head)]):
        raise ValueError(
            "the tokenizer must make a conversation the start of a longer one, got other tokens "
            f"for its first {len(requests)} messages"
        )
    return head


def _tokenizer_for(processor: Any, messages: Sequence[Message]) -> Any:
    """The processor's tokenizer, in the mode that takes such a conversation."""
    own = processor.tokenizer
    mode = WHOLE if messages[-1]["role"] == "assistant" else ASKED
    if own.mode.value == mode:
        return own
    known = _TOKENIZERS.setdefault(own, {})
    if mode not in known:
        file = own.tokenizer.instruct_tokenizer.tokenizer.file_path
        known[mode] = type(own)(file, mode=mode, padding_side=own.padding_side)
    return known[mode]


def _request(processor: Any, message: Message, rate: int) -> Message:
    """A message as mistral-common takes it."""
    kinds = {part["type"] for part in message["content"]}
    if kinds <= {"text"}:
        return {**message, "content": text_of(message)}
    if not kinds <= {"text", "audio"}:
        other = sorted(kinds - {"text", "audio"})[0]
        raise ValueError(
            f"sample must hold nothing that {type(processor).__name__} cannot take, got "
            f"{other} in it"
        )
    return {
        **message,
        "content": [
            {"type": "audio", "base64": _wave_file(part["audio"], rate)}
            if part["type"] == "audio" else part
            for part in message["content"]
        ],
    }  # fmt: skip


def _wave_file(wave: np.ndarray, rate: int) -> str:
    """Audio as a file of floats, in base64."""
    import soundfile

    file = BytesIO()
    soundfile.write(file, np.asarray(wave, np.float32), rate, format="WAV", subtype="FLOAT")
    return b64encode(file.getvalue()).decode("ascii")
