"""What is true of one running forward. It belongs to the forward, not to objects that others share.

Each thread and each asyncio task has a context of its own: a mapping from an owner (a tower, a
tracker, the settings of a model) to what is true of it now.

A checkpoint computes a block again in the backward pass. By then the forward is over, another one
may have run, and the autograd engine may use another thread. A `ForwardMemory` notes the context in
which the input of a block was made, by the storage of that input, and finds it again there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# Contexts of inputs that are gone are dropped when so many are noted, or twice as many as last time
# were left.
NOTED = 256


class Context(dict["ref[Any]", Any]):
    """Values by their owner, which it does not keep alive; never changed once it is made."""

    _later: Context | None = None

    def later(self) -> Context:
        """The context in which a block is computed again: values may differ then."""
        if self._later is None:
            self._later = Context({owner: _later(value) for owner, value in self.items()})
        return self._later


def _later(value: Any) -> Any:
    change = getattr(value, "when_recomputed", None)
    return value if change is None else change()


class _Recomputed(threading.local):
    """The context of the block that the running backward pass computes again."""

    task = -1
    context = Context()


_EMPTY = Context()
_CONTEXT: ContextVar[Context] = ContextVar("mm_sparse_forward", default=_EMPTY)
_RECOMPUTED = _Recomputed()
# Number of the backward pass that the thread is in, -1 outside. `torch.utils.checkpoint` asks for
# it in the same way.
_backward_pass = torch._C._current_graph_task_id


def in_backward() -> bool:
    """Whether the thread is in a backward pass, where only checkpoints run a model."""
    return _backward_pass() != -1


def current_context() -> Context:
    """The context of the running forward."""
    task = _backward_pass()
    if task != -1 and task == _RECOMPUTED.task:
        return _RECOMPUTED.context
    return _CONTEXT.get()


def current(owner: Any, default: Any = None) -> Any:
    """What is true of an owner now."""
    # As `current_context`, written out: layers ask several times in a call.
    task = _backward_pass()
    recomputed = task != -1 and task == _RECOMPUTED.task
    context = _RECOMPUTED.context if recomputed else _CONTEXT.get()
    return context.get(ref(owner), default) if context else default


def assign(owner: Any, value: Any) -> None:
    """Say what is true of an owner from here on, in this thread; None: nothing."""
    context = Context({key: x for key, x in current_context().items() if key() is not None})
    if value is None:
        context.pop(ref(owner), None)
    else:
        context[ref(owner)] = value
    task = _backward_pass()
    if task == -1:
        _CONTEXT.set(context)
    else:
        _RECOMPUTED.task, _RECOMPUTED.context = task, context


@contextmanager
def assigned(owner: Any, value: Any) -> Iterator[None]:
    """`assign` around a block."""
    before = current(owner)
    assign(owner, value)
    try:
        yield
    finally:
        assign(owner, before)


@contextmanager
def only(context: Context) -> Iterator[None]:
    """Nothing but this is true in a block."""
    task = _backward_pass()
    if task == -1:
        token = _CONTEXT.set(context)
        try:
            yield
        finally:
            _CONTEXT.reset(token)
        return
    before = _RECOMPUTED.task, _RECOMPUTED.context
    _RECOMPUTED.task, _RECOMPUTED.context = task, context
    try:
        yield
    finally:
        _RECOMPUTED.task, _RECOMPUTED.context = before


NO_GRAPH = (
    "sparse attention is not part of a traced or exported graph: call "
    "mms.densify(model) first, and sparsify the model again afterwards"
)


F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """A function that `torch.compile` leaves out of its graphs; it may be a method."""
    disabled: Any = torch.compiler.disable(function, reason=NO_GRAPH)
    return disabled


def is_exporting() -> bool:
    """Whether a model is being exported. Dynamo takes `torch.compiler.is_exporting` for true."""
    return torch.compiler._is_exporting_flag


def refuse_export() -> None:
    """Say in one sentence that a forward cannot be traced or exported.

    Raises:
        ValueError: it is being traced or exported.
    """
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if tracing or torch.compiler.is_exporting():
        raise ValueError(NO_GRAPH)


class ForwardMemory:
    """Notes in which context the inputs of blocks were made, and finds it for a recomputation.

    Args:
        blocks: modules that a checkpoint may compute again.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.blocks = list({id(block): block for block in blocks}.values())
        self._handles: list[Any] = []
        self._noted: dict[int, tuple[StorageWeakRef, Context]] = {}
        self._limit = NOTED

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_noted": {}}

    def attach(self) -> None:
        """Set hooks on the blocks; again is harmless."""
        if not self._handles:
            self._handles = [
                block.register_forward_pre_hook(self.look, with_kwargs=True)
                for block in self.blocks
            ]

    def detach(self) -> None:
        """Undo `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._noted = [], {}

    @property
    def may_recompute(self) -> bool:
        """Whether inputs of blocks are there that a checkpoint may have kept."""
        return any(not kept.expired() for kept, _ in list(self._noted.values()))

    def look(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a block."""
        if torch.compiler.is_compiling():
            return
        tokens = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if tokens is None or not (torch.is_grad_enabled() or tokens.requires_grad):
            return
        task = _backward_pass()
        try:
            storage = tokens.untyped_storage()
        except NotImplementedError:
            # A tensor of torch.func, which no checkpoint keeps.
            return
        if task == -1:
            self._note(storage, _CONTEXT.get())
            return
        # A weak reference keeps the address from being used for another storage.
        kept, context = self._noted.get(storage._cdata, (None, None))
        if kept is not None and context is not None and not kept.expired():
            _RECOMPUTED.task, _RECOMPUTED.context = task, context.later()

    def _note(self, storage: torch.UntypedStorage, context: Context) -> None:
        noted = self._noted
        if len(noted) >= self._limit:
            for address, (kept, _) in list(noted.items()):
                if kept.expired():
                    noted.pop(address, None)
            self._limit = max(NOTED, 2 * len(noted))
        noted[storage._cdata] = StorageWeakRef(storage), context


def is_memory_hook(hook: Any) -> bool:
    """Whether a hook of a module only notes contexts: it does not look at tokens."""
    return isinstance(getattr(hook, "__self__", None), ForwardMemory)
