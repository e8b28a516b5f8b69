"""Which tokens of a conversation are the assistant's answers.

A processor replaces the placeholder of an image or a clip by many tokens, and the mask that it
returns for `{% generation %}` counts characters of the text before that. So answers are found in
the rendered text, and their places among the model's tokens by counting.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from mm_sparse.recipes.finetuning.chat_templates import as_wanted, encode, render
from mm_sparse.recipes.finetuning.conversations import Message, count_media
from mm_sparse.recipes.finetuning.mistral_requests import find_answers_of_request, makes_requests

Span = tuple[int, int]
MARK = re.compile(r"\{%-?\s*generation\b")


def find_answers(processor: Any, messages: list[Message], ids: Sequence[int]) -> list[Span]:
    """Where each answer of a conversation stands, end token included: [start, end) in `ids`.

    Templates with `{% generation %}` say it themselves. Of others the conversation is rendered up
    to each answer, and once more with it.

    Args:
        processor: of the checkpoint.
        messages: the conversation, as `apply_chat_template` takes it.
        ids: its tokens without padding, as the processor gave them.
    Raises:
        ValueError: the template changes what was said earlier, so that answers cannot be found.

    Example:
        >>> find_answers(processor, messages, inputs["input_ids"][0].tolist())
        [(17, 21)]
    """
    if makes_requests(processor):
        return find_answers_of_request(processor, messages, ids)
    text = render(processor, messages)
    spans = _marked(processor, messages) or _rendered(processor, messages, text)
    bare = _Tokens(processor.tokenizer, text)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) != len(answers):
        raise ValueError(
            f"chat_template must mark each of {len(answers)} answers with generation, "
            f"got {len(spans)} marks"
        )
    media, found = count_media(messages), []
    for number, (start, end) in zip(answers, spans, strict=True):
        before = count_media(messages[:number])
        if not before:
            added = 0
        elif before == media:
            added = len(ids) - len(bare.ids)
        else:
            head = messages[: number + 1]
            whole = encode(processor, [head], {"padding": False})["input_ids"][0]
            added = len(whole) - len(_Tokens.of(processor, head).ids)
        first, last = bare.span(start, end)
        own = bare.ids[first:last]
        if not own or list(ids[first + added : last + added]) != own:
            raise ValueError(
                f"chat_template must render the answer of message {number} as it is in the whole "
                f"conversation, got other tokens at {first + added}"
            )
        found.append((first + added, last + added))
    return found


def _marked(processor: Any, messages: list[Message]) -> list[Span]:
    """Characters that the template marks; none if it marks nothing."""
    template = getattr(processor, "chat_template", None)
    if not isinstance(template, str) or not MARK.search(template):
        return []
    from transformers.utils.chat_template_utils import render_jinja_template

    _, marks = render_jinja_template(
        conversations=[as_wanted(processor, messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    return [(int(start), int(end)) for start, end in marks[0]]


def _rendered(processor: Any, messages: list[Message], text: str) -> list[Span]:
    """Characters that come on top when an answer does."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        bare = render(processor, messages[:number])
        asked = render(processor, messages[:number], add_generation_prompt=True)
        said = render(processor, messages[: number + 1])
        start, end = _shared(asked, text), _shared(said, text)
        if start < len(bare) or end <= start:
            raise ValueError(
                "chat_template must render a conversation as the start of a longer one, got "
                f"another text before the answer of message {number}"
            )
        # What follows the token that ends an answer (a line break) is nothing to learn.
        spans.append((start, start + len(text[start:end].rstrip())))
    return spans


def _shared(one: str, other: str) -> int:
    """Characters that both begin with."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in same)


class _Tokens:
    """A text's tokens, and which characters they are of."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.text = text
        start = getattr(tokenizer, "bos_token", None)
        options = {"add_special_tokens": False} if start and text.startswith(start) else {}
        self.count: Callable[[str], int] = lambda part: len(tokenizer(part, **options)["input_ids"])
        fast = bool(getattr(tokenizer, "is_fast", False))
        given = tokenizer(text, **options, **({"return_offsets_mapping": True} if fast else {}))
        self.ids: list[int] = list(given["input_ids"])
        self.offsets: list[Span] | None = given["offset_mapping"] if fast else None

    @classmethod
    def of(cls, processor: Any, messages: list[Message]) -> _Tokens:
        return cls(processor.tokenizer, render(processor, messages))

    def span(self, start: int, end: int) -> Span:
        """Tokens that hold characters [start, end)."""
        if self.offsets is None:
            return self.count(self.text[:start]), self.count(self.text[:end])
        last = bisect_left([a for a, _ in self.offsets], end)
        return bisect_right([b for _, b in self.offsets], start), last
