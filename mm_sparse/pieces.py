"""Runs of equal labels in a row of tokens: where each begins and ends.

B batch, M tokens
"""

from __future__ import annotations

import torch
from torch import Tensor


def piece_edges(label: Tensor) -> tuple[Tensor, Tensor]:
    """First token and end of the run of equal labels that each token is in: two (B, M) int32."""
    batch, length = label.shape
    position = torch.arange(length, device=label.device, dtype=torch.int32).expand(batch, -1)
    change = torch.ones_like(label, dtype=torch.bool)
    change[:, 1:] = label[:, 1:] != label[:, :-1]
    return run_edges(change, position)


def run_edges(change: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The same, from where runs begin."""
    length = change.shape[1]
    if not length:
        return position, position
    start = torch.where(change, position, 0).cummax(1).values
    following = torch.full_like(position, length)
    following[:, :-1] = torch.where(change[:, 1:], position[:, 1:], length)
    return start, following.flip(1).cummin(1).values.flip(1)


def fill_documents(document: Tensor) -> Tensor:
    """Give padding the number of the document before it, so that holes do not part a document."""
    if not document.shape[1]:
        return document
    position = torch.arange(document.shape[1], device=document.device).expand_as(document)
    last = torch.where(document >= 0, position, -1).cummax(1).values
    return torch.where(last >= 0, document.gather(1, last.clamp(min=0)), -1)
