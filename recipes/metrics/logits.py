"""How the logits of a sparse run differ from those of the dense run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mm_sparse.integrations import override_config


@torch.no_grad()
def predictions(model: Any, ids: Tensor, **changes: Any) -> Tensor:
    """(N / 2, V) log probabilities of the second half of a sequence (1, N)."""
    half = ids.shape[1] // 2
    with override_config(model, **{"dense_below": 0} | changes):
        logits = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - half).logits
    return logits[0].float().log_softmax(-1)


def change_of(dense: Tensor, sparse: Tensor, ids: Tensor) -> dict[str, float]:
    """KL(dense || sparse) in nats, change of the loss, and of the top-1 accuracy in points."""
    target = ids[0, ids.shape[1] - len(dense) + 1 :]
    loss = [cross_entropy(x[:-1], target).item() for x in (dense, sparse)]
    right = [(x[:-1].argmax(-1) == target).float().mean().item() for x in (dense, sparse)]
    kl = (dense.exp() * (dense - sparse)).sum(-1).mean().item()
    return {"kl": kl, "loss": loss[1] - loss[0], "top1": 100 * (right[1] - right[0])}


def logit_change(model: nn.Module, ids: Tensor) -> dict[str, float]:
    """`change_of` a sparsified model's second half against its own dense run."""
    return change_of(predictions(model, ids, backend="dense"), predictions(model, ids), ids)


@torch.no_grad()
def spread_predictions(
    model: Any, inputs: Mapping[str, Any], most: int = 512, **changes: Any
) -> Tensor:
    """(P, V) log probabilities at up to `most` places of the second half of padded rows, evenly
    spread.

    Args:
        inputs: of the model, padded on the right if they are; with `input_ids` (B, N).
        changes: of the sparse config.
    """
    with override_config(model, **{"dense_below": 0} | changes):
        logits, _ = spread_logits(model, inputs, most)
    return logits.float().log_softmax(-1)


def spread_logits(model: Any, inputs: Mapping[str, Any], most: int) -> tuple[Tensor, Tensor]:
    """(P, V) logits at such places, and their (P,) places in rows that are put one behind another.

    No others are computed where the model can be told so.
    """
    ids = inputs["input_ids"]
    rows, length = ids.shape
    own = max(most // rows, 1)
    places = torch.linspace(length // 2, length - 1, min(own, length - length // 2))
    places = places.round().long().to(ids.device)
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    more = {"logits_to_keep": places} if takes else {}
    logits = model(**inputs, use_cache=False, **more).logits
    # A model that cannot be told computes all.
    if logits.shape[1] != len(places):
        logits = logits[:, places]
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    real = real[:, places]
    where = places + length * torch.arange(rows, device=ids.device)[:, None]
    return logits[real], where[real]


def output_kl(dense: Tensor, sparse: Tensor) -> float:
    """KL(dense || sparse) in nats of (P, V) log probabilities, mean over places."""
    return (dense.exp() * (dense - sparse)).sum(-1).mean().item()
