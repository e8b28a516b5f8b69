"""Ranges of keys from the mask functions of transformers.

B batch, N query tokens, M key tokens
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_sparse.integrations.forward_context import Context

# A mask function is checked on every (query, key) up to this many, at random points beyond.
EXHAUSTIVE = 1 << 24


CHUNK = 1 << 20


SAMPLES = 1 << 16


class MaskRecipe:
    """The arguments with which transformers asks for a mask; evaluated only where it matters."""

    context = Context()
    """What was true of the forward that asked for the mask."""

    def __init__(self, **arguments: Any) -> None:
        for name in ("q_offset", "kv_offset"):
            # A static cache hands out its live counter, which moves on before the layers run.
            if isinstance(arguments.get(name), Tensor):
                arguments[name] = arguments[name].clone()
        self.arguments = arguments
        self.layouts: dict[Any, Any] = {}
        """What layers made of this recipe, so that a forward makes each layout once."""
        self.released = 0
        """How many tokens of the sequence have no key any more; what is held is of no order."""
        self.fitted: dict[int, Any] = {}
        """Masks of layers of the same forward that hold fewer keys, by their number."""
        self._stock: dict[Any, Any] = {}
        self._numbers: tuple[int, int] | None = None
        self._spans: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, N, M."""
        a = self.arguments
        return a["batch_size"], a["q_length"], a["kv_length"]

    @property
    def offsets(self) -> tuple[int, int]:
        """Positions in the sequence of the first query and of the first key."""
        if self._numbers is None:
            a = self.arguments
            self._numbers = int(a.get("q_offset", 0)), int(a.get("kv_offset", 0))
        return self._numbers

    @property
    def first(self) -> int:
        """The first query's place among the keys."""
        return self.offsets[0] - self.offsets[1]

    @property
    def is_cross(self) -> bool:
        """Whether keys belong to another sequence than queries."""
        _, queries, keys = self.shape
        end = self.first + queries
        return end > keys or (self._kind() == "bidirectional" and end != keys)

    @property
    def is_causal(self) -> bool:
        """Whether a query sees all keys up to itself, padding apart."""
        return self._kind() == "causal"

    @property
    def skips_causal(self) -> bool:
        """Whether no mask of `original` means a causal one, not one that shows all."""
        return not self.arguments.get("allow_is_bidirectional_skip", False)

    def original(self, implementation: str) -> Any:
        """The mask that `implementation` of transformers would have got; built once."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        if implementation not in self._stock:
            build = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
            self._stock[implementation] = build(**self.arguments)
        return self._stock[implementation]

    def dense(self) -> Tensor:
        """(B, 1, N, M) bool, always built."""
        from transformers.masking_utils import sdpa_mask

        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(**{**self.arguments, **skips})  # pyright: ignore

    def spans(self) -> tuple[Tensor, Tensor]:
        """Half-open range of keys of each query, (B, N, 2) int32; keys that count, (B, M) bool.

        Raises:
            ValueError: the visible keys of some query are not one range, padding apart.
        """
        if self._spans is None:
            span = self._find()
            batch, queries, keys = self.shape
            position = torch.arange(keys, device=span.device)
            # Slots of a static cache that are not written yet are beyond what anybody sees.
            valid = position < (span[..., 1].amax(1, keepdim=True) if queries else 0)
            mask = self.arguments.get("attention_mask")
            if mask is not None:
                start = self.offsets[1]
                visible_from_mask = mask[:, start : start + keys].to(span.device, torch.bool)
                valid[:, visible_from_mask.shape[1] :] = False
                valid[:, : visible_from_mask.shape[1]] &= visible_from_mask
            valid = valid.expand(batch, keys)
            self._verify(span, valid)
            self._spans = span, valid
        return self._spans

    def _kind(self) -> str:
        from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

        function = self.arguments["mask_function"]
        known = {causal_mask_function: "causal", bidirectional_mask_function: "bidirectional"}
        return known.get(function, "other")

    def _find(self) -> Tensor:
        batch, queries, keys = self.shape
        device = torch.device(self.arguments.get("device", "cpu"))
        own = (torch.arange(queries, device=device) + self.first).expand(batch, -1)
        low, high = torch.zeros_like(own), torch.full_like(own, keys)
        if self._kind() == "causal":
            high = own + 1
        elif self._kind() == "other":
            seen = self._visible(own, own)
            low = torch.where(seen, self._edge(low - 1, own, own), 0)
            high = torch.where(seen, self._edge(high, own, own) + 1, 0)
        return torch.stack([low, high], -1).to(torch.int32)

    def _edge(self, hidden: Tensor, seen: Tensor, own: Tensor) -> Tensor:
        """Last visible key on the way from `seen` to `hidden`, by bisection."""
        for _ in range(self.shape[2].bit_length()):
            middle = torch.div(hidden + seen, 2, rounding_mode="floor")
            middle = torch.where((hidden - seen).abs() > 1, middle, seen)
            visible = self._visible(own, middle)
            seen = torch.where(visible, middle, seen)
            hidden = torch.where(visible, hidden, middle)
        return seen

    def _visible(self, query: Tensor, key: Tensor) -> Tensor:
        """The mask function at points: places among the keys, (B, ...) each; padding left out."""
        start = self.offsets[1]
        query, key = torch.broadcast_tensors(query + start, key + start)
        row = torch.arange(len(query), device=query.device)
        row = row.view(-1, *[1] * (query.dim() - 1)).expand_as(query)
        function = self.arguments["mask_function"]
        if not self.arguments.get("use_vmap"):
            head = torch.zeros((), dtype=torch.long, device=query.device)
            return function(row, head, query, key).expand_as(query)
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        points = [x.reshape(-1) for x in (row, torch.zeros_like(row), query, key)]
        with TransformGetItemToIndex():
            return torch.vmap(function)(*points).view(query.shape)

    def _verify(self, span: Tensor, valid: Tensor) -> None:
        if self._kind() != "other":
            return
        batch, queries, keys = self.shape
        device, first = span.device, self.first
        if queries * keys <= EXHAUSTIVE:
            step = max(1, CHUNK // max(1, batch * keys))
            key = torch.arange(keys, device=device).expand(batch, 1, -1)
            blocks = [torch.arange(a, min(a + step, queries)) for a in range(0, queries, step)]
            points = [(q.to(device).expand(batch, -1)[..., None], key) for q in blocks]
        else:
            generator = torch.Generator().manual_seed(0)
            shape = (batch, SAMPLES)
            q = torch.randint(queries, shape, generator=generator).to(device)
            k = torch.randint(keys, shape, generator=generator).to(device)
            points = [(q, k)]
        for q, k in points:
            ends = span.gather(1, q.flatten(1)[..., None].expand(-1, -1, 2)).view(*q.shape, 2)
            within = (k >= ends[..., 0]) & (k < ends[..., 1])
            counts = _at(valid, q + first) & _at(valid, k)
            wrong = (within != self._visible(q + first, k)) & counts
            if bool(wrong.any()):
                at = wrong.nonzero()[0].tolist()
                token = int(torch.broadcast_to(q, wrong.shape)[tuple(at)]) + first
                raise ValueError(
                    "the mask lets a query see several ranges of keys, only one range per query "
                    f"(padding apart) is honoured: row {at[0]}, token {token}"
                )


def _at(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a (B, M) table at (B, ...) places."""
    return table.gather(1, index.flatten(1)).view(index.shape)
