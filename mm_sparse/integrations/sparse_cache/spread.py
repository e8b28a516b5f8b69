"""Spread the keys of a cache over layers, by what each layer loses.

B batch, K KV heads, M keys
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm_sparse.integrations.sparse_cache.key_choice import always_kept
from mm_sparse.integrations.sparse_cache.sparse_cache import SparseCache

# Shares of the keys at which the loss of a layer is measured.
STEPS = 128


class _MeasuringCache(SparseCache):
    """Holds everything, and notes what layers would lose."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(model, 1.0, **settings)
        self.lost: dict[int, Tensor] = {}
        """By layer, (STEPS + 1,), the share of the attention mass that is lost at each keep."""

    @torch.no_grad()
    def after_attention(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> None:
        index, layer = self._layer_of(module)
        valid, mass = self._mass(layer, q, k, mask, options)
        worth, _, _ = self._worth_of(layer, valid, mass)
        worth = worth.masked_fill(always_kept(valid, self.budget)[:, None], math.inf)
        worth = worth.masked_fill(~valid[:, None], -math.inf)
        kept = mass.gather(-1, worth.argsort(dim=-1, descending=True)).cumsum(-1)
        steps = torch.arange(1, STEPS + 1, device=mass.device) * kept.shape[-1] / STEPS
        at = (steps.ceil().long() - 1).clamp(max=kept.shape[-1] - 1)
        lost = 1 - kept[..., at] / kept[..., -1:].clamp(min=torch.finfo(kept.dtype).tiny)
        self.lost[index] = torch.cat([lost.new_ones(1), lost.mean((0, 1))]).cpu()


def spread_keep(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    keep: float = 0.4,
    *,
    least: float = 0.05,
    **settings: Any,
) -> tuple[float, ...]:
    """Shares of the keys for the layers of a `SparseCache`, with a given mean, by measurement.

    One prefill of each prompt measures which share of the attention mass of the last queries a
    layer loses when it keeps so many keys. Then keys go, step by step, to the layer that gains most
    by them, until the mean over layers is `keep`.

    Args:
        model: a decoder of transformers, as for `SparseCache`.
        inputs: arguments of the model for a prompt, or for several, on the model's device; like
            those that it will read.
        keep: the mean over layers with full attention, in (0, 1].
        least: share that each layer keeps in any case, beside its sinks and window.
        settings: sinks, window, near and unit, as for `SparseCache`.
    Returns:
        One share for each layer of the decoder, 1 for those without full attention.
    Raises:
        ValueError: `keep` or `least` is out of range, or no prompt has `window` tokens.

    Example:
        >>> keep = mms.spread_keep(model, tokenizer(text, return_tensors="pt"), 0.25)
        >>> cache = mms.SparseCache(model, keep)
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    if not 0 <= least <= keep:
        raise ValueError(f"least must be from 0 to keep = {keep}, got {least}")
    prompts = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    total: dict[int, Tensor] = {}
    layers, always = 0, 0.0
    for prompt in prompts:
        cache = _MeasuringCache(model, **settings)
        with torch.no_grad():
            model(**{**prompt, "past_key_values": cache, "use_cache": True})
        layers = len(cache.layers)
        # No layer keeps less than these, so that shares below are none.
        tokens = max(1, int(cache.get_seq_length()))
        always = max(always, (cache.budget.sinks + cache.budget.window) / tokens)
        for index, lost in cache.lost.items():
            total[index] = total.get(index, 0) + lost
    if not total:
        raise ValueError(
            "inputs must be prompts of at least `window` tokens, got none that is that long"
        )
    shares = _fill(torch.stack(list(total.values())), keep, min(keep, max(least, always)))
    found = dict(zip(total, shares, strict=True))
    return tuple(found.get(index, 1.0) for index in range(layers))


def _fill(lost: Tensor, keep: float, least: float) -> list[float]:
    """Shares with the mean `keep` that lose little, for losses (layers, STEPS + 1)."""
    count = len(lost)
    steps = [max(1, min(math.ceil(least * STEPS), round(keep * STEPS)))] * count
    curves = lost.tolist()
    for _ in range(round(keep * STEPS * count) - sum(steps)):
        # Where a curve is flat at first, what lies behind counts.
        slopes = [_steepest(curve, at) for curve, at in zip(curves, steps, strict=True)]
        steps[max(range(count), key=slopes.__getitem__)] += 1
    return [at / STEPS for at in steps]


def _steepest(curve: list[float], at: int) -> float:
    """The largest gain a step, over all numbers of steps from here; below any if there are none."""
    gains = ((curve[at] - curve[to]) / (to - at) for to in range(at + 1, len(curve)))
    return max(gains, default=-math.inf)
