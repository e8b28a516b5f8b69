"""How the logits of a sparse run differ from those of the dense run."""

from __future__ import annotations

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
