"""Samples to the inputs of a checkpoint's model, through its own chat template and processor.

B conversations, L tokens of the longest
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm_sparse.recipes.data import IGNORED, RATE, Sample
from mm_sparse.recipes.finetuning.answer_tokens import find_answers
from mm_sparse.recipes.finetuning.chat_templates import check_template, encode, sampling_rate
from mm_sparse.recipes.finetuning.conversations import Message, messages_of, text_of

logger = logging.getLogger(__name__)
PROMPTS, ANSWERS = "prompts", "answers"
EXTRA = (PROMPTS, ANSWERS)
"""Keys of a batch that are no inputs of the model."""


class ChatCollator:
    """Conversations to `model(**batch)`: inputs of the processor, padded right, and labels.

    `labels` (B, L) are `input_ids` on the assistant's answers and -100 elsewhere. It is a
    `data_collator` of `transformers.Trainer` as well (with `remove_unused_columns=False`).

    Example:
        >>> batch = ChatCollator(AutoProcessor.from_pretrained(folder))([sample])
        >>> model(**batch).loss
    """

    def __init__(
        self, processor: Any, *, max_length: int | None = None, prompts: bool = False
    ) -> None:
        """
        Args:
            processor: of the checkpoint, with a chat template.
            max_length: a conversation with more tokens is dropped, counted in `dropped`, and
                logged; None keeps all.
            prompts: also give `prompts`, the inputs up to the last answer (padded left, to
                generate from), and `answers`, the texts of the last answers.
        Raises:
            ValueError: the processor has no chat template, or `max_length` is below 1.
        """
        check_template(processor)
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.processor, self.max_length, self.prompts = processor, max_length, prompts
        self.rate = sampling_rate(processor) or RATE
        self.dropped = 0

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """A batch; empty where all samples are too long."""
        chats = [messages_of(sample, self.rate) for sample in samples]
        batch = self.inputs(chats)
        lengths = batch["attention_mask"].sum(1).tolist()
        fits = [self.max_length is None or length <= self.max_length for length in lengths]
        if not all(fits):
            for sample, length, fit in zip(samples, lengths, fits, strict=True):
                if not fit:
                    self.dropped += 1
                    logger.warning(
                        "dropped sample %s: %d tokens, max_length is %d",
                        sample.name or "without a name", length, self.max_length,
                    )  # fmt: skip
            chats = [chat for chat, fit in zip(chats, fits, strict=True) if fit]
            if not chats:
                return {}
            batch = self.inputs(chats)
        batch["labels"] = self.labels(chats, batch)
        if self.prompts:
            heads = [chat[: _last_answer(chat)] for chat in chats]
            batch[PROMPTS] = self.inputs(heads, side="left", add_generation_prompt=True)
            batch[ANSWERS] = [text_of(chat[_last_answer(chat)]) for chat in chats]
        return batch

    def inputs(
        self, chats: list[list[Message]], side: str = "right", **options: Any
    ) -> dict[str, Any]:
        """What the processor makes of conversations."""
        wanted = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        return encode(self.processor, chats, wanted, **options)

    def labels(self, chats: list[list[Message]], batch: dict[str, Any]) -> Tensor:
        """(B, L) int64 of a batch that is padded on the right."""
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        labels = torch.full_like(ids, IGNORED)
        for row, chat in enumerate(chats):
            for start, end in find_answers(self.processor, chat, ids[row][mask[row]].tolist()):
                labels[row, start:end] = ids[row, start:end]
        return labels


def _last_answer(chat: list[Message]) -> int:
    return max(i for i, message in enumerate(chat) if message["role"] == "assistant")
