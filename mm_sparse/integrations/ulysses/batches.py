"""Batches whose sequences are split evenly between ranks, and the loss of a rank's tokens.

B batch, N tokens of all ranks, n tokens of a rank, V words
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

IGNORED = -100
# What tensors of a batch with one entry for each token are padded with.
FILLS = {
    "input_ids": 0,
    "attention_mask": 0,
    "labels": IGNORED,
    "inputs_embeds": 0,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
}


def pad_batch(batch: dict[str, Any], multiple: int, pad_token_id: int = 0) -> dict[str, Any]:
    """A batch with sequences padded at their end to a multiple of so many tokens.

    What is padded is hidden: by the attention mask, or, in packed rows that have position_ids and
    no mask, as a document of its own. What has no entry for each token stays as it is.

    Args:
        batch: arguments of a model's forward, with input_ids (B, N) or inputs_embeds.
        multiple: of which the number of tokens shall be one.
        pad_token_id: stands in input_ids behind the end.
    """
    tokens = next(
        (batch[n] for n in ("input_ids", "inputs_embeds") if batch.get(n) is not None), None
    )
    if tokens is None:
        raise ValueError(f"batch must have input_ids or inputs_embeds, got {sorted(batch)}")
    length = tokens.shape[1]
    missing = -length % multiple
    if not missing:
        return dict(batch)
    padded = dict(batch)
    if batch.get("attention_mask") is None and batch.get("position_ids") is None:
        padded["attention_mask"] = torch.ones(
            tokens.shape[:2], dtype=torch.long, device=tokens.device
        )
    for name, fill in FILLS.items():
        value = padded.get(name)
        if value is None:
            continue
        if value.dim() < 2 or value.shape[1] != length:
            raise ValueError(
                f"{name} must have one entry for each of {length} tokens, got {tuple(value.shape)}"
            )
        value_fill = pad_token_id if name == "input_ids" else fill
        width = (0, 0) * (value.dim() - 2)
        padded[name] = pad(value, (*width, 0, missing), value=value_fill)
    positions = batch.get("position_ids")
    if positions is not None:
        more = torch.arange(missing, device=positions.device, dtype=positions.dtype)
        padded["position_ids"] = torch.cat([positions, more.expand(*positions.shape[:-1], -1)], -1)
    return padded


def next_tokens(labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Labels (B, N) of the tokens before them: each token has the label of the next one."""
    return pad(labels[:, 1:], (0, 1), value=ignore_index)


def token_loss(logits: Tensor, targets: Tensor, count: Tensor, ignore_index: int) -> Tensor:
    """Cross entropy of a rank's tokens, summed and over the count of all tokens that have a label.

    Args:
        logits: (B, n, V).
        targets: (B, n), shifted already.
        count: scalar, of all ranks.
    """
    if logits.shape[:2] != targets.shape:
        raise ValueError(
            f"logits must be of the {tuple(targets.shape)} tokens of this rank, got "
            f"{tuple(logits.shape[:2])}"
        )
    total = cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=ignore_index, reduction="sum"
    )
    return total / count.clamp(min=1)
