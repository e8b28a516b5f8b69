"""The loss of conversations from the logits of their answers alone.

B conversations, L tokens of each, P positions in front of an answer's tokens

Logits of all tokens are larger than the model itself: in float32, 31,500 tokens and 152,000 words
take 18 GiB, and their softmax and gradient as much again. Answers are a few tokens of a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mm_sparse.recipes.data import IGNORED

OWN_LOSS = ("granite_speech", "qwen2_audio")
"""Model types that compute the mean cross entropy in their own forward: tests hold them to it."""


def answer_loss(model: Any, base: Any, inputs: dict[str, Any]) -> Tensor:
    """Mean cross entropy over the tokens of answers, as the model computes it itself.

    Models whose forward takes `logits_to_keep` and asks their `loss_function` compute P logits
    instead of L, and those of `OWN_LOSS` too; others compute all.

    Args:
        model: that is called: `base`, or peft's model around it.
        base: the model of transformers.
        inputs: of its forward, with `labels` (B, L), `IGNORED` where no answer is.

    Example:
        >>> answer_loss(model, model, batch).backward()
    """
    labels = inputs["labels"]
    kept = (labels[:, 1:] != IGNORED).any(0).nonzero()[:, 0]
    if len(kept) and _asks_its_loss_function(base):
        with _shifted_labels(base, labels[:, kept + 1]):
            return model(**inputs, logits_to_keep=kept, use_cache=False).loss
    if len(kept) and base.config.model_type in OWN_LOSS:
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        with _cut_before_logits(base, kept, labels.shape[1]):
            logits = model(**unlabelled, use_cache=False).logits
        wanted = labels[:, kept + 1].flatten()
        return nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), wanted, ignore_index=IGNORED
        )
    return model(**inputs, use_cache=False).loss


def _asks_its_loss_function(base: Any) -> bool:
    forward = inspect.unwrap(type(base).forward)
    takes = "logits_to_keep" in inspect.signature(forward).parameters
    return takes and "loss_function" in forward.__code__.co_names


@contextmanager
def _shifted_labels(base: Any, shifted: Tensor) -> Iterator[None]:
    """The model's loss function compares with labels that are shifted and cut already."""
    own, before = base.loss_function, base.__dict__.get("_loss_function")

    def loss(*arguments: Any, **options: Any) -> Tensor:
        return own(*arguments, **{**options, "shift_labels": shifted})

    base.loss_function = loss
    try:
        yield
    finally:
        if before is None:
            del base._loss_function
        else:
            base.loss_function = before


@contextmanager
def _cut_before_logits(base: Any, kept: Tensor, tokens: int) -> Iterator[None]:
    """The layer that makes logits sees some positions alone."""

    def cut(_: nn.Module, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if hidden[0].shape[1] == len(kept) != tokens:
            return hidden
        if hidden[0].shape[1] != tokens:
            raise ValueError(
                f"labels must have a column for each of the {hidden[0].shape[1]} tokens of the "
                f"model, got {tokens}"
            )
        return (hidden[0].index_select(1, kept),)

    handle = base.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()
