"""A stand-in for a model's attention mask that carries how to compute it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only

from mm_sparse.integrations.forward_context import current_context
from mm_sparse.integrations.hf.mask_spans import MaskRecipe

RECIPE = "_mm_sparse_recipe"


class LazyMask(Tensor):
    """Looks like a (B, 1, N, M) bool mask, owns one element, and carries its recipe.

    An operation that needs the elements gets the dense mask.
    """

    recipe: MaskRecipe
    by_vmap: bool
    """Whether the mask function is one that takes single positions."""
    stock: Tensor | None
    """(B, 1, 1, C) bool of a step of a static cache, as SDPA has it: of one size in all steps."""
    handle: Tensor
    """For a graph, which takes no tensors of this class: memory that leads to the recipe."""

    @staticmethod
    def __new__(cls, recipe: MaskRecipe) -> LazyMask:
        batch, queries, keys = recipe.shape
        device = recipe.arguments.get("device", "cpu")
        one = torch.ones(1, dtype=torch.bool, device=device)
        mask = torch.Tensor._make_subclass(cls, one.expand(batch, 1, queries, keys))
        mask.recipe = recipe
        mask.stock = None
        mask.handle = one
        mask.by_vmap = bool(recipe.arguments.get("use_vmap"))
        if peek_interpreter_stack() is None:
            # Tensors of torch.func have no memory, and are in no compiled graph.
            setattr(one.untyped_storage(), RECIPE, recipe)
        return mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in _SAME and not _asks_for_numbers(args[1:], kwargs):
            return args[0]
        if name == "__getitem__" and _takes_all(args[0], args[1]):
            return args[0]
        args, kwargs = tree_map_only(LazyMask, lambda mask: mask.recipe.dense(), (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyMask(shape={tuple(self.shape)}, device={self.device})"


_ABOUT = frozenset(
    [
        "__get__",
        "__set__",
        "__len__",
        "__hash__",
        "size",
        "dim",
        "ndimension",
        "stride",
        "numel",
        "nelement",
        "get_device",
        "is_floating_point",
        "is_complex",
        "data_ptr",
        "storage_offset",
        "_is_view",
        "untyped_storage",
        "is_contiguous",
        "requires_grad_",
    ]
)
_SAME = frozenset(("contiguous", "to", "clone", "detach", "cuda", "cpu", "bool"))


def _asks_for_numbers(args: Any, kwargs: dict[str, Any]) -> bool:
    given = [*args, *kwargs.values()]
    return any(isinstance(x, torch.dtype) and x != torch.bool for x in given)


def _takes_all(mask: LazyMask, index: Any) -> bool:
    """Whether `mask[index]` is the whole mask, as in `mask[:, :, :, :keys]`."""
    index = index if isinstance(index, tuple) else (index,)
    if index and index[-1] is Ellipsis:
        index = index[:-1]
    return len(index) <= 4 and all(
        isinstance(part, slice) and part.indices(size) == (0, size, 1)
        for part, size in zip(index, mask.shape, strict=False)
    )


def recipe_of(mask: Tensor) -> MaskRecipe:
    """The recipe of what a graph has in place of a `LazyMask`.

    Raises:
        RuntimeError: it is a copy.
    """
    recipe = getattr(mask.untyped_storage(), RECIPE, None)
    if recipe is None:
        raise RuntimeError("a compiled graph has copied the mask of a sparsified model")
    return recipe


def lazy_mask(**arguments: Any) -> LazyMask:
    """A mask function for transformers' `AttentionMaskInterface`."""
    recipe = MaskRecipe(**_of_fixed_size(arguments))
    recipe.context = current_context()
    mask = LazyMask(recipe)
    # So transformers says that the cache is static.
    if arguments["q_length"] == 1 and not arguments.get("allow_is_causal_skip", True):
        mask.stock = recipe.original("sdpa")
    return mask


def _of_fixed_size(arguments: dict[str, Any]) -> dict[str, Any]:
    """A step of a static cache with a padding mask as wide as the cache, as all steps have it.

    `generate` has one that grows by a token a step, and a CUDA graph is of one size.
    """
    padding, offset = arguments.get("attention_mask"), arguments.get("kv_offset", 0)
    if padding is None or arguments["q_length"] != 1 or isinstance(offset, Tensor):
        return arguments
    missing = arguments["kv_length"] + offset - padding.shape[-1]
    if missing <= 0:
        return arguments
    return arguments | {"attention_mask": pad(padding, (0, missing))}
