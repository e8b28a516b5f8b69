"""Attention of a layer inside a compiled graph: one operator, which runs what runs without a graph.

Beside q, k and v the operator is given tensors that describe the mask and the tokens, and the
number of the layer, in a tensor as well: blocks of a model can share a graph.

With gradients, the operator keeps the small graph of its own call at a tensor that autograd saves.
Who drops that tensor drops the graph; where it is gone (a checkpoint, a copy), the call is made
again.

B batch, H query heads, K KV heads, N query tokens, M key tokens, D head dim
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from mm_sparse._checks import autocast_inputs
from mm_sparse.integrations.forward_context import (
    Context,
    current_context,
    in_backward,
    only,
    uncompiled,
)
from mm_sparse.integrations.hf.decoding import forget_recorded
from mm_sparse.integrations.hf.discovery import UNSERVED
from mm_sparse.integrations.hf.lazy_mask import LazyMask, recipe_of
from mm_sparse.integrations.hf.traced_mask import TracedMask, context_of, eager_mask
from mm_sparse.integrations.layer import LAYER, scale_of

if TYPE_CHECKING:
    from mm_sparse.integrations.hf.attention import HFLayer

R = TypeVar("R")
_GRAPH = "_mm_sparse_graph"
_NUMBERS = count()
_LAYERS: weakref.WeakValueDictionary[int, HFLayer] = weakref.WeakValueDictionary()
_AUTOGRAD = ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView")


def number_of(layer: HFLayer) -> Tensor:
    """A number for a layer, by which the operator finds it as long as it lives: () int64."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return torch.tensor(number, device="cpu")


TENSORS = 4
"""How many of `Given` are tensors: the first."""


class Given(NamedTuple):
    """What the operator is given beside q, k and v, in the order of its arguments."""

    number: Tensor
    place: Tensor | None
    """Of a `TracedMask`."""
    mask: Tensor | None
    bounds: Tensor | None
    """Of the sequences of a packed row."""
    lazy: bool
    """Whether the mask is one that was made outside of the graph."""
    scale: float
    causal: bool | None
    window: int | None


def serves(module: nn.Module, mask: Any, options: dict[str, Any]) -> bool:
    """Whether a call can be the operator; others break the graph."""
    layer: HFLayer | None = getattr(module, LAYER, None)
    if layer is None or layer.head_split is not None or layer.original != "sdpa":
        return False
    known = isinstance(mask, (LazyMask, TracedMask))
    known = known or (layer.packed and options.get("cu_seq_lens_q") is not None)
    if torch.is_grad_enabled() and not known:
        # A checkpoint may make the call again when the forward is over: nothing tells of it then,
        # and only sequences of a packed row need nothing.
        return False
    if isinstance(mask, LazyMask) and mask.by_vmap and torch.is_grad_enabled():
        # vmap does not run where an operator records a graph.
        return False
    if module.training and options.get("dropout"):
        return False
    return all(options.get(name) is None for name in UNSERVED)


def traced_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
) -> Tensor:
    """(B, N, H, D) of a call that `serves`, inside a graph."""
    layer: HFLayer = getattr(module, LAYER)
    q, k, v = autocast_inputs(q, k, v)
    given = _given(layer, q, mask, options)
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return layer_attention(q, k, v, *given, wanted)[0]


def _given(layer: HFLayer, q: Tensor, mask: Any, options: dict[str, Any]) -> Given:
    place, lazy = None, isinstance(mask, LazyMask)
    if isinstance(mask, TracedMask):
        place, mask = mask.place, mask.mask
    elif lazy:
        mask = mask.handle
    return Given(
        layer.number, place, mask, options.get("cu_seq_lens_q"), lazy,
        scale_of(q, options.get("scaling")), options.get("is_causal"),
        options.get("sliding_window"),
    )  # fmt: skip


@uncompiled
def broken_attention(
    attend: Callable[..., R], module: nn.Module, q: Tensor, k: Tensor, v: Tensor,
    mask: TracedMask | LazyMask, options: dict[str, Any],
) -> R:  # fmt: skip
    """A call that breaks a graph, in the forward that its mask is of."""
    if isinstance(mask, LazyMask):
        known, context = mask, mask.recipe.context
    else:
        known, context = eager_mask(mask.place, mask.mask, q.device), context_of(mask.place)
    with only(_as_of_now(context)):
        return attend(module, q, k, v, known, **options)


def _attend(layer: HFLayer, q: Tensor, k: Tensor, v: Tensor, given: Given) -> Tensor:
    """What the layer computes without a graph, in the forward that `given` is of."""
    mask: Any = given.mask
    if given.place is not None:
        mask = eager_mask(given.place, mask, q.device)
        context = context_of(given.place)
    elif given.lazy:
        mask = LazyMask(recipe_of(mask))
        context = mask.recipe.context
    else:
        # Layouts must not hang on an object that the next run of the graph may write to.
        mask = None if mask is None else mask.detach()
        context = current_context()
    bounds = None if given.bounds is None else given.bounds.detach()
    options = {
        "scaling": given.scale, "is_causal": given.causal, "sliding_window": given.window,
        "dropout": 0.0, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
    }  # fmt: skip
    with only(_as_of_now(context)):
        if given.place is not None and layer.source.lost_forward:
            raise RuntimeError("the forward of a compiled model was mixed with another thread's")
        return layer.attend(q, k, v, mask, options)[0]


def _as_of_now(context: Context) -> Context:
    return context.later() if in_backward() else context


def _eager(q: Tensor, k: Tensor, v: Tensor, given: Given) -> Tensor:
    """(B, N, H, D) of a call in a graph."""
    layer = _LAYERS.get(int(given.number))
    if layer is None:
        raise ValueError("the layer of a compiled graph is gone: compile the model again")
    if q.shape[2] < k.shape[2]:
        forget_recorded(layer, k)
    with torch.autocast(q.device.type, enabled=False):
        return _attend(layer, q, k, v, given).to(q.dtype).contiguous()


class _Input(torch.autograd.Function):
    """Where the graph of a call begins. A leaf would keep its tensor; a node does not."""

    @staticmethod
    def forward(ctx: Any, wanted: Tensor, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        raise RuntimeError("gradients are taken at the output of this node")


class _Inputs:
    """q, k and v where a graph saves them: their numbers, as others may be given for a backward."""

    def __init__(self, *now: Tensor) -> None:
        self.now = now

    def pack(self, x: Tensor) -> Any:
        """A hook of saved tensors."""
        if all(_storage(y) != _storage(x) for y in self.now):
            # An output leads to the node that saves it, and nobody would collect the two.
            return x.detach()
        at = [i for i, y in enumerate(self.now) if _same_view(x, y)]
        return at[0] if at else x.clone()

    def unpack(self, packed: Any) -> Tensor:
        """The other one."""
        return self.now[packed] if isinstance(packed, int) else packed


class _Graph:
    """The graph of one call, without the q, k and v of it.

    Who compiled the model may write to their memory before the backward pass, and computes them
    again for it.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, given: Given) -> None:
        # Nodes keep the hooks, and hooks must not lead to the nodes: nobody would collect them.
        self._inputs = _Inputs(q, k, v)
        with _autograd():
            wanted = q.new_empty(0, requires_grad=True)
            q, k, v = (_Input.apply(wanted, x) for x in (q, k, v))  # pyright: ignore
            self._edges = [get_gradient_edge(x) for x in (q, k, v)]
            with saved_tensors_hooks(self._inputs.pack, self._inputs.unpack):
                self.out = _eager(q, k, v, given)
        self._inputs.now = ()

    def gradients(self, dout: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """For q, k and v, which are given again."""
        self._inputs.now = inputs
        try:
            with _autograd():
                return torch.autograd.grad(
                    self.out, self._edges, dout, retain_graph=True, materialize_grads=True
                )
        finally:
            self._inputs.now = ()


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _same_view(x: Tensor, y: Tensor) -> bool:
    return (_storage(x), x.storage_offset(), x.shape, x.stride(), x.dtype) == (
        _storage(y), y.storage_offset(), y.shape, y.stride(), y.dtype,
    )  # fmt: skip


@contextmanager
def _autograd() -> Iterator[None]:
    """Record a graph inside an operator, where torch records none."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in _AUTOGRAD:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


# What it computes depends on Python: a CUDA graph must not record it.
@torch.library.custom_op(
    "mm_sparse::layer_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def layer_attention(
    q: Tensor, k: Tensor, v: Tensor, number: Tensor, place: Tensor | None, mask: Tensor | None,
    bounds: Tensor | None, lazy: bool, scale: float, causal: bool | None, window: int | None,
    wanted: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B, N, H, D) of a layer's call; and where its graph hangs, if gradients are wanted.

    Args:
        q: (B, H, N, D).
        k, v: (B, K, M, D).
        number, ...: see `Given`.
    """
    given = Given(number, place, mask, bounds, lazy, scale, causal, window)
    kept = torch.empty(1, dtype=torch.uint8, device="cpu")
    if not wanted:
        return _fresh(_eager(q, k, v, given), v), kept
    graph = _Graph(q, k, v, given)
    setattr(kept.untyped_storage(), _GRAPH, graph)
    return graph.out.detach().clone(), kept


def _fresh(out: Tensor, v: Tensor) -> Tensor:
    """An operator must not give back what it was given."""
    return out.clone() if _storage(out) == _storage(v) else out


@layer_attention.register_fake
def _(q, k, v, number, place, mask, bounds, lazy, scale, causal, window, wanted):
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    return out, torch.empty(1, dtype=torch.uint8, device="cpu")


@torch.library.custom_op(
    "mm_sparse::layer_attention_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def layer_attention_backward(
    dout: Tensor, kept: Tensor, q: Tensor, k: Tensor, v: Tensor, number: Tensor,
    place: Tensor | None, mask: Tensor | None, bounds: Tensor | None, lazy: bool, scale: float,
    causal: bool | None, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `layer_attention` for q, k and v."""
    graph = getattr(kept.untyped_storage(), _GRAPH, None)
    if graph is None:
        given = Given(number, place, mask, bounds, lazy, scale, causal, window)
        graph = _Graph(q, k, v, given)
    dq, dk, dv = (x.contiguous() for x in graph.gradients(dout, q, k, v))
    return dq, dk, dv


@layer_attention_backward.register_fake
def _(dout, kept, q, k, v, *given):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    *given, _ = rest
    ctx.save_for_backward(q, k, v, output[1], *given[:TENSORS])
    ctx.rest = given[TENSORS:]


def _differentiate(ctx: Any, dout: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, kept, *tensors = ctx.saved_tensors
    found = layer_attention_backward(dout, kept, q, k, v, *tensors, *ctx.rest)
    return *found, *(None for _ in (*tensors, *ctx.rest)), None


layer_attention.register_autograd(_differentiate, setup_context=_save)
