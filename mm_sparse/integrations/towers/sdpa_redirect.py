"""A forward whose calls of `scaled_dot_product_attention` ask a layer; all else in it stays."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from mm_sparse.integrations.forward_context import refuse_export, uncompiled
from mm_sparse.integrations.options import AttentionOptions
from mm_sparse.integrations.towers.forward import Forward
from mm_sparse.layout import CallLayout, arrange, restore

if TYPE_CHECKING:
    from mm_sparse.integrations.last_call import LastCall
    from mm_sparse.integrations.layer import SparseLayer
    from mm_sparse.integrations.towers.adapter import TowerLayer


CALLS_IN_PATCH_ORDER: ContextVar[dict[int, CallLayout] | None] = ContextVar(
    "calls_in_patch_order", default=None
)
"""Layouts by id of a layer, inside of blocks whose tokens are in patch order; of one thread, and
of one forward in it."""


class RedirectedForward(Forward):
    """Projections, norms, rotations and gates are the module's, attention is the layer's."""

    layer: TowerLayer

    def __init__(self, layer: TowerLayer, before: Callable[..., Any] | None) -> None:
        super().__init__(layer, before)
        self._dense: tuple[Any, LastCall | None] = (None, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._uncompiled(*args, **kwargs)
        refuse_export()
        layer = self.layer
        settings = layer.shared.settings
        form = None if settings.watchers else _form(args, kwargs)
        given = None if form is None else (settings.config, form)
        known, record = self._dense
        if given is not None and given == known:
            # Listening to every function of the forward takes longer than a short call itself.
            layer.record = record
            return self.original(*args, **kwargs)
        calls_in_order = CALLS_IN_PATCH_ORDER.get()
        call = None if calls_in_order is None else calls_in_order.get(id(layer))
        if call is not None:
            out, record = self._listened(call, *args, **kwargs)
        else:
            out, record = self._ordered(*args, **kwargs)
        short = record is not None and record.mode == "dense"
        self._dense = (given, record) if short else (None, None)
        return out

    _uncompiled = uncompiled(__call__)

    def _ordered(self, *args: Any, **kwargs: Any) -> tuple[Any, LastCall | None]:
        """`_listened`, with tokens in patch order inside of it where that may be."""
        layer, call_layout = self.layer, None
        alone = len(args) == 1 and isinstance(args[0], Tensor)
        if alone and all(x is None or x is False for x in kwargs.values()):
            call_layout = layer.layout_in_patch_order(args[0])
        if call_layout is None:
            return self._listened(None, *args, **kwargs)
        tokens = arrange(args[0], call_layout.layout, call_layout.first, dim=1)
        out, record = self._listened(call_layout, tokens)
        return restore(out, call_layout.layout, call_layout.first, dim=1), record

    def _listened(
        self, ordered: CallLayout | None, *args: Any, **kwargs: Any
    ) -> tuple[Any, LastCall | None]:
        """What the forward gives, and the record of its call for attention if it was one call.

        Args:
            ordered: layout of tokens that are in patch order already.
        """
        with _Redirect(self.layer, ordered) as redirect:
            out = self.original(*args, **kwargs)
        if not redirect.calls:
            problem = "its forward did not call scaled_dot_product_attention"
            self.layer.note(self.layer.refuse(problem), 0, 0)
        return out, redirect.record if redirect.calls == 1 else None


def _form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All of a call that decides whether it is dense: sizes and devices, and what is no tensor.

    None of a call with anything else in it.
    """
    form = []
    for name, x in (*enumerate(args), *kwargs.items()):
        if isinstance(x, Tensor):
            form.append((name, x.shape, x.device))
        elif x is None or isinstance(x, (bool, int, float, str)):
            form.append((name, x))
        else:
            return None
    return form


class _Redirect(TorchFunctionMode):
    def __init__(self, layer: SparseLayer, ordered: CallLayout | None) -> None:
        super().__init__()
        self.layer, self.ordered, self.calls = layer, ordered, 0
        self.record: LastCall | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        return self._ask(lambda: func(*args, **kwargs), *args, **kwargs)

    def _ask(
        self, original: Callable[[], Tensor], query: Tensor, key: Tensor, value: Tensor,
        attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        options = AttentionOptions(scale=scale, is_causal=is_causal, dropout=dropout_p)
        out, self.record = self.layer.run(
            query, key, value, attn_mask, options,
            original=original, format_output=lambda out: out.transpose(1, 2),
            ordered=self.ordered,
        )  # fmt: skip
        return out
