"""Linformer in the place of a tower's attention, its projections trained; for comparison.

B rows, H query heads, N query tokens, M key tokens, D head dim
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, scaled_dot_product_attention

from mm_sparse._checks import check_qkv
from mm_sparse.integrations import AttentionCall, override_attention


class Linformers(nn.Module):
    """A `Linformer` for each layer of a sparsified model, made when the layer first runs.

    Args:
        ratio: projected length over M: keys that a query attends to, as many as sparse ones.
    """

    def __init__(self, ratio: float) -> None:
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {ratio!r}")
        self.ratio = ratio
        self.layers = nn.ModuleDict()

    def of(self, call: AttentionCall) -> nn.Module:
        """The one of a call's layer."""
        name = call.name.replace(".", "/")
        if name not in self.layers:
            length = call.k.shape[2]
            rank = max(round(self.ratio * length), 1)
            made = Linformer(length, rank)
            # Means of runs of keys are what learning starts from.
            runs = one_hot(torch.arange(length) * rank // length, rank).T.float()
            for weight in (made.project_keys, made.project_values):
                weight.data.copy_(runs / runs.sum(1, keepdim=True))
            self.layers[name] = made.to(call.k.device)
        return self.layers[name]

    def forward(self, call: AttentionCall) -> Tensor:
        """(B, H, N, D): what `override_attention` asks for."""
        return self.of(call)(call.q, call.k, call.v, scale=call.scale)


@torch.enable_grad()
def train_linformers(
    model: nn.Module,
    batches: Iterator[Tensor],
    ratio: float,
    *,
    steps: int,
    lr: float = 1e-3,
    run: Callable[[Tensor], object] | None = None,
) -> Linformers:
    """Teach each layer's projections the output of dense attention on the layer's own inputs.

    Args:
        model: sparsified and frozen; its layers get dense attention while others learn.
        lr: of Adam at the first step; it falls to zero along a cosine.
        run: a forward pass on a batch, `model(batch)` if None.
    """
    made = Linformers(ratio)
    losses: list[Tensor] = []

    def learn(call: AttentionCall) -> Tensor:
        q, k, v = (x.detach() for x in (call.q, call.k, call.v))
        dense = scaled_dot_product_attention(
            q, k, v, scale=call.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        with torch.enable_grad():
            error = made.of(call)(q, k, v, scale=call.scale).float() - dense.float()
            losses.append(error.square().mean() / dense.float().var())
        return dense

    optimizer: torch.optim.Optimizer | None = None
    for step, batch in zip(range(steps), batches, strict=False):
        losses.clear()
        with override_attention(model, learn), torch.no_grad():
            (run or model)(batch)
        if not losses:
            raise ValueError("model must run sparse layers, got none")
        if optimizer is None:
            optimizer = torch.optim.Adam(made.parameters(), lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return made.requires_grad_(False)


class Linformer(nn.Module):
    """Attention on keys and values projected to a fixed length (Wang et al., 2020); for comparison.

    Not causal, and bound to one sequence length: that is the method's own limit.

    Args:
        length: M, number of tokens.
        rank: projected length.
    """

    def __init__(self, length: int, rank: int = 256) -> None:
        super().__init__()
        for name, value in (("length", length), ("rank", rank)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        self.length = length
        self.project_keys = nn.Parameter(torch.randn(rank, length) / math.sqrt(length))
        self.project_values = nn.Parameter(torch.randn(rank, length) / math.sqrt(length))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """(B, H, N, D), (B, K, M, D) twice -> (B, H, N, D)."""
        check_qkv(q, k, v)
        if k.shape[2] != self.length:
            raise ValueError(f"k and v must have {self.length} tokens, got {k.shape[2]}")
        keys = self.project_keys.to(k.dtype) @ k
        values = self.project_values.to(v.dtype) @ v
        return scaled_dot_product_attention(
            q, keys, values, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
