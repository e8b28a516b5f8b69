"""Masks of a forward, cut to what a layer holds.

Layers hold different numbers of keys, and a model makes one mask for all. Keys of a layer stand
where as many newest tokens would, so the mask of a layer is the end of the mask of a larger one.

B batch, N new tokens, W newest of them, M keys that are held, new ones included
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_sparse.integrations.hf.lazy_mask import LazyMask
from mm_sparse.integrations.hf.mask_spans import MaskRecipe


def fitted(mask: Any, keys: int, released: int) -> Any:
    """The mask of a layer with M = `keys` keys, of which it held fewer than the tokens so far.

    Raises:
        ValueError: the mask is of a kind that cannot be cut.
    """
    if isinstance(mask, LazyMask):
        return _fitted_recipe(mask, keys, released)
    if mask is None or mask.shape[-1] == keys:
        return mask
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"a {type(mask).__name__} cannot be cut to what a layer of a SparseCache holds: use "
            'another attention than "flex_attention", or the same `keep` for all layers'
        )
    if mask.shape[-1] < keys:
        raise ValueError(
            f"attention_mask must be of the {keys} keys that a layer holds or of more, got "
            f"{tuple(mask.shape)}"
        )
    return mask[..., -keys:]


def _fitted_recipe(mask: LazyMask, keys: int, released: int) -> LazyMask:
    recipe = mask.recipe
    if recipe.shape[2] == keys and not released:
        return mask
    # Layers that hold equally many share the mask, and what is made of it.
    if keys not in recipe.fitted:
        arguments = dict(recipe.arguments)
        # A number of the device would end a compiled step here.
        compiled = torch.compiler.is_compiling()
        first = arguments.get("q_offset", 0) if compiled else recipe.offsets[0]
        padding = arguments.get("attention_mask")
        if recipe.is_causal:
            # Places count from the first key that is held, so that steps find it at 0.
            arguments |= {"q_offset": first - released, "kv_offset": 0}
            if padding is not None:
                arguments["attention_mask"] = padding[:, released:]
        else:
            arguments["kv_offset"] = released
        own = MaskRecipe(**(arguments | {"kv_length": keys}))
        own.released = released
        recipe.fitted[keys] = LazyMask(own)
    return recipe.fitted[keys]


def newest_visible(mask: Any, keys: int, window: int, device: Any) -> Tensor:
    """(B or 1, W, M) bool: which keys each of the newest queries of a causal call sees.

    Args:
        mask: of the call, as transformers hands it to attention.
        keys: M.
        window: W.
    Raises:
        ValueError: the mask is of a kind that is not known.
    """
    place = torch.arange(keys, device=device)
    if isinstance(mask, LazyMask):
        span, valid = mask.recipe.spans()
        low, high = span[:, -window:, :, None].to(device).unbind(2)
        return (place >= low) & (place < high) & valid.to(device)[:, None]
    own = torch.arange(keys - window, keys, device=device)
    causal = (place <= own[:, None])[None]
    if mask is None:
        return causal
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ValueError(
            "a SparseCache must be used with attention whose mask is a tensor or None, got "
            f"{type(mask).__name__}: not with flex_attention"
        )
    if mask.dim() == 2:
        return causal & mask[:, -keys:].bool().to(device)[:, None]
    seen = mask[:, 0, -window:, -keys:].to(device)
    return seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2


def valid_keys(visible: Tensor) -> Tensor:
    """(B or 1, M) bool: the keys that the newest query sees, which are all but padding.

    Raises:
        ValueError: padding stands elsewhere than on the left.
    """
    valid = visible[:, -1]
    if bool((valid[:, 1:] < valid[:, :-1]).any()) or not bool(valid[:, -1].all()):
        raise ValueError(
            "attention_mask must have its padding on the left of every row for a SparseCache, and "
            'show the newest token all keys: set the padding_side of the tokenizer to "left"'
        )
    return valid
