"""Rows cut into pieces: where runs begin and end, tables of pieces, and what a piece is made of.

B batch, M tokens, P pieces
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_sparse.modality import Modality


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


def partition(segment: Tensor, valid: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cut rows into pieces of at most `size` tokens: (B, P, 2) table, (B, M) piece of a token."""
    batch, length = segment.shape
    device = segment.device
    if not length or not batch:
        empty = torch.zeros(batch, 0, 2, dtype=torch.int32, device=device)
        return empty, torch.zeros(batch, length, dtype=torch.int64, device=device)
    if length == 1:
        # The query of a decoding step.
        table = torch.zeros(batch, 1, 2, dtype=torch.int32, device=device)
        table[..., 1] = 1
        return table, torch.zeros(batch, 1, dtype=torch.int64, device=device)
    position = torch.arange(length, device=device, dtype=torch.int32).expand(batch, -1)
    start, end = piece_edges(segment)
    long = (end - start) >= size
    change = torch.ones_like(valid)
    change[:, 1:] = (segment[:, 1:] != segment[:, :-1]) & (long[:, 1:] | long[:, :-1])
    change[:, 1:] |= valid[:, 1:] != valid[:, :-1]
    start, _ = run_edges(change, position)
    first = change | ((position - start) % size == 0)
    _, end = run_edges(first, position)
    piece = first.cumsum(1) - 1
    count = int(piece[:, -1].max()) + 1
    table = torch.zeros(batch, count + 1, 2, dtype=torch.int32, device=device)
    slot = torch.where(first, piece, count)[..., None].expand(-1, -1, 2)
    table.scatter_(1, slot, torch.stack([position, end - position], -1))
    return table[:, :count].contiguous(), piece


def drop_padding(table: Tensor, piece: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out pieces of padding: ids stay ascending in the row, fillers go last.

    One filler at least stays, so that a batch of padding alone has a unit that nobody keeps.
    """
    if not table.shape[1]:
        return table, piece
    real = torch.zeros(table.shape[:2], dtype=torch.bool, device=table.device)
    real.scatter_(1, piece, valid)
    number = real.cumsum(1) - 1
    count = max(int(number[:, -1].max()) + 1, 1)
    slot = torch.where(real, number, count)
    kept = table.new_zeros(table.shape[0], count + 1, 2)
    kept.scatter_(1, slot[..., None].expand(-1, -1, 2), table)
    return kept[:, :count].contiguous(), slot.gather(1, piece)


def per_piece(value: Tensor, piece: Tensor, count: int, reduce: str, empty: int) -> Tensor:
    """(B, P) int32: values of each piece's tokens reduced, `empty` where it has none."""
    result = torch.full((len(value), count), empty, dtype=torch.int64, device=value.device)
    result.scatter_reduce_(1, piece, value.long(), reduce, include_self=True)
    return result.to(torch.int32)


def majority(modality: Tensor, piece: Tensor, count: int) -> Tensor:
    """(B, P) int8: most frequent modality of each piece, -1 without a valid token."""
    votes = torch.zeros(
        len(modality), count + 1, len(Modality), dtype=torch.int32, device=modality.device
    )
    for kind in Modality:
        votes[..., int(kind)].scatter_add_(1, piece, (modality == int(kind)).int())
    votes = votes[:, :count]
    best = votes.argmax(-1).to(torch.int8)
    return torch.where(votes.sum(-1) > 0, best, -1).to(torch.int8)


def regular_offset(table: Tensor, size: int, length: int) -> int:
    """What the first piece lacks of `size` tokens if all but it and the last are whole, else -1.

    Piece p is then what exists of the tokens [p * size - lead, (p + 1) * size - lead).
    """
    pieces = table.shape[1]
    if not 0 <= pieces * size - length < 2 * size - 1 or not table.numel():
        return 0 if pieces == length == 0 else -1
    lead = size - table[0, 0, 1] if pieces > 1 else table.new_zeros(())
    start = torch.arange(pieces, device=table.device) * size - lead
    end = (start + size).clamp(max=length)
    start = start.clamp(min=0)
    even = (table == torch.stack([start, end - start], -1)).all()
    is_regular, number = torch.stack([even, lead]).tolist()
    return number if is_regular and number < size else -1


def part_sizes(units: Tensor, unit: int, count: int) -> Tensor:
    """(B, U, count) int32: keys in each of the runs that units (B, U, 2) of `unit` are cut into."""
    width = -(-unit // count)
    first = torch.arange(0, count * width, width, device=units.device)
    return (units[..., 1:] - first).clamp(0, width)


def token_budget(keys: Tensor, ratio: float | Tensor) -> Tensor:
    """Budget of keys, int64: to the nearest, one at least where there are any."""
    return (keys * ratio).round().long().clamp(min=1).minimum(keys)


def sum_between(value: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """(B, T) int64: sums of `value` (B, P) over runs of pieces from `first` to `end`, (B, T)."""
    before = torch.nn.functional.pad(value.cumsum(1), (1, 0))
    return before.gather(1, end) - before.gather(1, first)
