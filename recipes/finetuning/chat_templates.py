"""Chat templates of processors: those that take lists of parts, and those that take texts alone.

The template of Granite Speech is of the second kind: its text holds the placeholder of a clip.
"""

from __future__ import annotations

from typing import Any

from mm_sparse.recipes.finetuning.conversations import Message
from mm_sparse.recipes.finetuning.mistral_requests import encode_requests, makes_requests

PROBE: list[Message] = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]


def check_template(processor: Any) -> None:
    """Take the tokenizer's chat template where the processor has none of its own.

    Raises:
        ValueError: there is none.
    """
    if makes_requests(processor):
        return
    own = getattr(processor, "chat_template", None)
    if not own:
        own = getattr(getattr(processor, "tokenizer", None), "chat_template", None)
    if not isinstance(own, str) or not own:
        raise ValueError(
            f"processor must have a chat template, got {type(processor).__name__} without: "
            "put chat_template.jinja into its folder"
        )
    processor.chat_template = own


def render(processor: Any, messages: list[Message], **options: Any) -> str:
    """The text of a conversation before placeholders are replaced."""
    # SmolVLM's processor warns of settings of its own where it is given none.
    quiet = {"padding": False}
    return processor.apply_chat_template(
        as_wanted(processor, messages), tokenize=False, processor_kwargs=quiet, **options
    )


def encode(
    processor: Any, chats: list[list[Message]], wanted: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """The model's inputs of conversations, those of images and audio included.

    Args:
        wanted: arguments of the processor, `padding` for one.
        options: arguments of the chat template, `add_generation_prompt` for one.
    """
    wanted = {**_media_options(processor, chats), **wanted}
    if makes_requests(processor):
        # What asks for an answer is in the request, whatever the options say.
        return encode_requests(processor, chats, wanted)
    if takes_parts(processor):
        made = processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, processor_kwargs=wanted, **options
        )
        return dict(made)
    texts = [render(processor, chat, **options) for chat in chats]
    start = getattr(processor.tokenizer, "bos_token", None)
    if start and texts[0].startswith(start):
        wanted["add_special_tokens"] = False
    media: dict[str, Any] = {}
    for kind, name in (("image", "images"), ("video", "videos")):
        nested = [_parts(chat, kind) for chat in chats]
        if any(nested):
            media[name] = nested
    clips = [clip for chat in chats for clip in _parts(chat, "audio")]
    if clips:
        media["audio"] = clips
    return dict(processor(text=texts, **media, **wanted))


def takes_parts(processor: Any) -> bool:
    """Whether the template takes lists of parts: one that does not prints them, or fails."""
    try:
        text = processor.apply_chat_template(
            PROBE, tokenize=False, processor_kwargs={"padding": False}
        )
    except (TypeError, ValueError):
        return False
    return "{'" not in text and "probe" in text


def as_wanted(processor: Any, messages: list[Message]) -> list[Message]:
    """Messages as the template takes them."""
    if takes_parts(processor):
        return messages
    return [
        {**message, "content": "".join(_text(processor, part) for part in message["content"])}
        for message in messages
    ]


def sampling_rate(processor: Any) -> int | None:
    """Samples a second of the audio that a processor wants."""
    for name in ("feature_extractor", "audio_processor"):
        rate = getattr(getattr(processor, name, None), "sampling_rate", None)
        if rate is not None:
            return int(rate)
    return None


def _text(processor: Any, part: dict[str, Any]) -> str:
    if part["type"] == "text":
        return part["text"]
    token = getattr(processor, f"{part['type']}_token", None)
    if token is None:
        raise ValueError(
            f"sample must hold nothing that {type(processor).__name__} cannot take, got "
            f"{part['type']} in it"
        )
    return token


def _parts(chat: list[Message], kind: str) -> list[Any]:
    return [part[kind] for message in chat for part in message["content"] if part["type"] == kind]


def _media_options(processor: Any, chats: list[list[Message]]) -> dict[str, Any]:
    """What the processor must be told of videos and clips."""
    options: dict[str, Any] = {}
    if any(_parts(chat, "video") for chat in chats):
        # The reader has chosen the frames.
        options["do_sample_frames"] = False
    rate = sampling_rate(processor)
    if rate is not None and any(_parts(chat, "audio") for chat in chats):
        options["sampling_rate"] = rate
    return options
