"""Masks of forwards that `torch.compile` traces.

A mask that a graph makes is what describes it: the padding, and numbers in a tensor. Every run of
the graph makes that tensor anew; layouts of the layers, and what is known of the forward, hang on
its memory.

B batch, N query tokens, M key tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm_sparse.integrations.forward_context import Context, current_context, uncompiled
from mm_sparse.integrations.hf.lazy_mask import LazyMask
from mm_sparse.integrations.hf.mask_spans import MaskRecipe

DENSE, CAUSAL, BIDIRECTIONAL = 0, 1, 2
"""Kinds of masks: of all pairs, or a function that is known by name."""
CONTEXT = "_mm_sparse_context"
HELD = "_mm_sparse_mask"


class TracedMask:
    """A mask inside a graph; whoever else asks for its elements breaks the graph and gets them."""

    has_stock = False
    stock: Tensor | None = None
    """What SDPA gets, where it was made."""

    def __init__(self, place: Tensor, mask: Tensor | None) -> None:
        self.place = place
        """Of `describe_mask`."""
        self.mask = mask
        """(B, tokens) of the padding, None without; of a `DENSE` one (B, 1, N, M) bool."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_elements_of(self), name)

    def __getitem__(self, index: Any) -> Any:
        return _elements_of(self)[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._pytree import tree_map_only

        args, kwargs = tree_map_only(TracedMask, _elements_of, (args, kwargs or {}))
        return func(*args, **kwargs)


@uncompiled
def _elements_of(mask: TracedMask) -> Tensor:
    place = mask.place if mask.mask is None else mask.mask
    known = eager_mask(mask.place, mask.mask, place.device)
    return known.recipe.dense() if isinstance(known, LazyMask) else known


def kind_of(function: Any) -> int:
    """The kind of one of transformers' mask functions."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if function is causal_mask_function:
        return CAUSAL
    return BIDIRECTIONAL if function is bidirectional_mask_function else DENSE


def traced_mask(arguments: dict[str, Any], stock: bool) -> TracedMask:
    """The mask that transformers asks for with these arguments, inside a graph.

    Args:
        stock: also have the mask that SDPA gets, for layers that run dense.

    Functions that are not known by name are evaluated for all pairs, as SDPA has it.
    """
    from transformers.masking_utils import sdpa_mask

    a, kind = arguments, kind_of(arguments["mask_function"])
    first = a.get("q_offset", 0)
    counted = first if isinstance(first, Tensor) else None
    padding = a.get("attention_mask")
    if kind == DENSE:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        padding = sdpa_mask(**{**a, **skips})  # pyright: ignore
    place = describe_mask(
        padding, None if counted is None else counted.clone(), 0 if counted is not None else first,
        a.get("kv_offset", 0), a["batch_size"], a["q_length"], a["kv_length"], kind,
        bool(a.get("allow_is_causal_skip", True)),
        bool(a.get("allow_is_bidirectional_skip", False)),
    )  # fmt: skip
    made = TracedMask(place, padding)
    if stock:
        made.has_stock, made.stock = True, sdpa_mask(**a)  # pyright: ignore
    return made


# Each call makes a tensor of its own: it must not be folded, shared or recorded.
@torch.library.custom_op(
    "mm_sparse::describe_mask",
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe, torch.Tag.nondeterministic_seeded),
)
def describe_mask(
    mask: Tensor | None, counted: Tensor | None, first: int, start: int, batch: int, queries: int,
    keys: int, kind: int, causal_skip: bool, bidirectional_skip: bool,
) -> Tensor:  # fmt: skip
    """(8,) int64 on the CPU: what `eager_mask` needs beside the padding.

    Args:
        mask: (B, tokens) of the padding; of a `DENSE` one (B, 1, N, M) bool.
        counted: position of the first query, where a cache counts on the device.
        first, start: positions of the first query and of the first key.
        causal_skip, bidirectional_skip: where the mask may be left out, as transformers has it.
    """
    first = first if counted is None else int(counted)
    numbers = first, start, batch, queries, keys, kind, int(causal_skip), int(bidirectional_skip)
    place = torch.tensor(numbers, device="cpu")
    setattr(place.untyped_storage(), CONTEXT, current_context())
    return place


@describe_mask.register_fake
def _(mask, counted, first, start, batch, queries, keys, kind, causal_skip, bidirectional_skip):
    return torch.empty(8, dtype=torch.int64, device="cpu")


@dataclass(frozen=True, eq=False)
class _Held:
    """Of what a description was made, and what was made of it."""

    source: Any
    mask: Any


def context_of(place: Tensor) -> Context:
    """What was true of the forward that asked for a mask.

    Raises:
        RuntimeError: what a graph has kept of it was copied.
    """
    context = getattr(place.untyped_storage(), CONTEXT, None)
    if context is None:
        raise RuntimeError("a compiled graph has copied the mask of a sparsified model")
    return context


def eager_mask(place: Tensor, mask: Tensor | None, device: torch.device) -> Any:
    """The mask as layers that are not compiled get it; layers of a forward get the same object."""
    storage: Any = place.untyped_storage()
    held = getattr(storage, HELD, None)
    source = None if mask is None else mask.untyped_storage()._cdata
    if held is not None and held.source == source:
        return held.mask
    first, start, batch, queries, keys, kind, causal_skip, bidirectional_skip = place.tolist()
    made: Any
    if kind == DENSE:
        # An object of this forward: layouts that hang on it are of these very elements.
        made = None if mask is None else mask.detach()
    else:
        from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

        functions = {CAUSAL: causal_mask_function, BIDIRECTIONAL: bidirectional_mask_function}
        recipe = MaskRecipe(
            batch_size=batch, q_length=queries, kv_length=keys, q_offset=first, kv_offset=start,
            mask_function=functions[kind], attention_mask=mask, device=device,
            allow_is_causal_skip=bool(causal_skip),
            allow_is_bidirectional_skip=bool(bidirectional_skip),
        )  # fmt: skip
        made = LazyMask(recipe)
    setattr(storage, HELD, _Held(source, made))
    return made
