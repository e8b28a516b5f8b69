"""Spread a mean density over KV heads by costs that a few passes estimate for all heads at once.

    python -m mm_sparse.recipes.distillation.first_order_budgets --scorers FOLDER \\
        --corpus corpus.npz

A gate g of a head mixes what it gives dense and what it gives on its selection, dense + g (sparse
- dense). At g = 0 the divergence from the dense model has no first derivative; to second order it
is g^2 / 2 times the Fisher information of the gate: the mean square of d log p(y) / dg over tokens
y that the model itself draws (the Gauss-Newton approximation, as for pruning in arXiv 1801.05787).
One pass forward and one back give the derivatives of all gates at all ratios.

Where there are several modalities, queries of each have gates of their own: what image tokens look
up in deep layers hardly reaches an answer, so their budget goes to the text that answers.

B rows, N tokens, H query heads, K KV heads, D head dim, R ratios, P places that are scored,
M modalities and none
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, pad

import mm_sparse as mms
from mm_sparse import Modality, PooledScorer, Scorer, SparseConfig, TokenLayout
from mm_sparse.attention import dense_attention
from mm_sparse.integrations import (
    AttentionCall,
    attention_layers,
    capture_attention,
    override_attention,
    override_config,
)
from mm_sparse.recipes.distillation.budget_search import (
    LEVELS,
    Place,
    budget_slots,
    budgets_parser,
    layer_ratios,
    spread,
)
from mm_sparse.recipes.metrics import output_kl, spread_logits
from mm_sparse.recipes.run import prepared
from mm_sparse.selection import count_pairs, select_units

Inputs = Mapping[str, Any]
"""Of the model, with `input_ids`."""
Logits = Callable[[Any], Tensor]
"""(P, V) where one of the inputs counts."""
QUERY_LEVELS = (0.03, *LEVELS)
"""Ratios that are tried by modality of the queries: images may do with less than any head."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How far on the way from one ratio for all heads to the spread ones budgets are tried."""


@dataclass(frozen=True)
class ChosenBudgets:
    """Ratios of places, and what was measured of them."""

    ratios: dict[Place, float]
    share: float
    """How far they are on the way from one ratio for all to the spread ones."""
    tried: dict[float, float]
    """Mean KL(dense || sparse) in nats by such share; 0 is one ratio for all."""


class _GateProbe(torch.autograd.Function):
    """A head's dense output; what comes back for it is held against sparse outputs."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, probe: _LayerProbe, *qkv: Tensor) -> Tensor:
        ctx.probe = probe
        ctx.save_for_backward(out, *qkv)
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        out, *qkv = ctx.saved_tensors
        ctx.probe.take(grad, out, *qkv)
        return (grad, *(None for _ in range(4)))


@dataclass(frozen=True, eq=False)
class _LayerProbe:
    """Derivatives of the gates of one call of a layer."""

    name: str
    layout: TokenLayout
    config: SparseConfig
    first: int
    scale: float
    scorer: Scorer
    levels: Sequence[float]
    found: dict[str, Tensor]
    """By name of the layer (R, K, M): sum over tokens, by the modality of their tiles, of the
    squared derivative."""
    kinds: dict[str, set[int]]
    """By name of the layer, modalities of the queries of tiles, -1 of those without a token."""

    @torch.no_grad()
    def take(self, grad: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Add the derivatives at all ratios, given the gradient of (B, H, N, D)."""
        width = v.shape[-1]
        v = pad(v, (0, k.shape[-1] - width))
        values, rows = None, []
        for level in self.levels:
            config = replace(
                self.config, ratio=level, tokens=None, top_p=None, head_ratio=(), query_ratio={}
            )
            plan = self.layout.plan(
                config, num_query_heads=q.shape[1], num_kv_heads=k.shape[1],
                num_queries=q.shape[2], query_offset=self.first,
            )  # fmt: skip
            if values is None:
                values = self.scorer.score(q, k, plan, self.scale)
            sparse = mms.attend(q, k, v, select_units(values, plan), scale=self.scale)
            change = (sparse[..., :width].float() - out.float()) * grad.float()
            slope = change.sum(-1).unflatten(1, (k.shape[1], -1)).sum(2)  # (B, K, N)
            # Those of a tile share its budget.
            kind = plan.query_modality.gather(1, plan.tile_of.clamp(min=0)).long()
            of_kind = one_hot(kind + 1, 1 + len(Modality)).double()
            rows.append((slope.double().pow(2) @ of_kind).sum(0).cpu())
        self.found[self.name] = self.found.get(self.name, 0) + torch.stack(rows)
        self.kinds.setdefault(self.name, set()).update(kind.unique().tolist())


def first_order_costs(
    model: Any,
    inputs: Sequence[Inputs],
    levels: Sequence[float] = LEVELS,
    *,
    by_head: bool = True,
    by_modality: bool = False,
    draws: int = 4,
    most: int = 512,
    seed: int = 0,
    logits: Logits | None = None,
) -> dict[Place, list[float]]:
    """Estimated KL to dense in nats by place and ratio, as `costs_of` measures it.

    Each draw is a pass forward and one back. Changes at different tokens count as independent:
    their squares are added up, since the square of their sum is mostly noise in a few draws.

    Args:
        model: sparsified, and frozen.
        inputs: what costs are means over.
        levels: ascending ratios; at 1.0 nothing is lost.
        by_head: by KV head; else by layer, whose heads count as independent.
        by_modality: by modality of the queries, too, in layers that have several.
        draws: of tokens for each of the inputs.
        most: P at most, of each of the inputs.
        seed: of the draws.
        logits: (P, V) where one of the inputs counts; at `most` places of it if None.
    Raises:
        ValueError: no inputs, `draws` below 1, a weight that wants gradients, or no layer that may
            run sparse.
    """
    if not inputs or draws < 1:
        raise ValueError(
            f"inputs and draws must be 1 or more, got {len(inputs)} inputs and {draws} draws"
        )
    learns = next((name for name, p in model.named_parameters() if p.requires_grad), None)
    if learns is not None:
        raise ValueError(f"model must be frozen, got {learns} that wants gradients")
    places = budget_slots(model, by_head)
    below = [level for level in levels if level < 1]
    sums: dict[str, Tensor] = {}
    of_tiles: dict[str, set[int]] = {}
    scored, ask = 0, logits or _spread_places(model, most)
    with _recomputed_layers(model), torch.enable_grad():
        for number, own in enumerate(inputs):
            for draw in range(draws):
                generator = torch.Generator().manual_seed(seed + number * draws + draw)
                scored += _probe(model, own, below, sums, of_tiles, ask, generator)
    costs: dict[Place, list[float]] = {}

    def add(place: Place, column: Tensor) -> None:
        costs[place] = [*(0.5 / scored * column).tolist(), *(0.0 for _ in levels[len(below) :])]

    for name, layer in attention_layers(model).items():
        key = name if layer.index is None else layer.index
        kinds = sorted(map(Modality, of_tiles.get(layer.name, set()) - {-1}))
        for (own, head), heads in places.items():
            if own != key:
                continue
            # A layer that did not run costs nothing.
            found = sums.get(layer.name, torch.zeros(len(below), heads, 1 + len(Modality)))
            by_kind = found.sum(1) if head is None else found[:, head]
            if len(kinds) < 2 or not by_modality:
                add((own, head), by_kind.sum(1))
                continue
            for kind in kinds:
                add((own, head, kind), by_kind[:, 1 + kind])
    return costs


def _probe(
    model: Any, inputs: Any, levels: Sequence[float], sums: dict[str, Tensor],
    of_tiles: dict[str, set[int]], ask: Logits, generator: torch.Generator,
) -> int:  # fmt: skip
    """Add the squared derivatives of one draw; how many places it scored."""
    ranks = {
        layer.name: layer.scorer or PooledScorer() for layer in attention_layers(model).values()
    }

    def attend(call: AttentionCall) -> Tensor:
        q, k, v, layout, config = call.q, call.k, call.v, call.layout, call.config
        if layout is None or config is None:
            raise ValueError(f"{call.name} must have a layout, got none")
        out = dense_attention(
            q, k, v, layout=layout, config=config, query_offset=call.first, scale=call.scale
        )
        if not out.requires_grad:
            # The first layer: the graph begins here, for the weights have none.
            out = out.detach().requires_grad_()
        probe = _LayerProbe(
            call.name, layout, config, call.first, call.scale, ranks[call.name], levels, sums,
            of_tiles,
        )  # fmt: skip
        return _GateProbe.apply(out, probe, q.detach(), k.detach(), v.detach())

    with override_config(model, dense_below=0), override_attention(model, attend):
        logits = ask(inputs).float()
        chances = logits.detach().softmax(-1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
        cross_entropy(logits, drawn, reduction="sum").backward()
    return len(logits)


def _spread_places(model: Any, most: int) -> Logits:
    return lambda inputs: spread_logits(model, inputs, most)[0]


def pair_weights(
    model: Any,
    inputs: Sequence[Any],
    places: Collection[Place],
    *,
    logits: Logits | None = None,
) -> dict[Place, float]:
    """How much of a layer's visible query-key pairs a place's ratio is a share of.

    Ratios whose mean has these weights keep as much as one ratio. One sparse pass for each of the
    inputs.

    Args:
        places: of `first_order_costs`.
        logits: as there.
    """
    pairs = query_pairs(model, inputs, logits=logits) if any(len(p) > 2 for p in places) else {}

    def weight(place: Place) -> float:
        if len(place) < 3:
            return 1.0
        own = pairs.get(place[0], {})
        return own.get(place[2], 0.0) / max(sum(own.values()), 1.0)

    return {place: weight(place) for place in places}


@torch.no_grad()
def query_pairs(
    model: Any, inputs: Sequence[Any], *, logits: Logits | None = None
) -> dict[int | str, dict[Modality, float]]:
    """Visible query-key pairs of the layers that run sparse, by what the queries of a tile are.

    One sparse pass for each of the inputs.
    """
    seen: dict[str, Tensor] = {}

    def count(call: AttentionCall) -> None:
        if call.selection is not None:
            chosen, plan = call.selection, call.selection.plan
            plan = plan.sharing(tile_modality=plan.query_modality)
            pairs = count_pairs(chosen.index, chosen.count, plan)[1].sum(1).cpu()
            seen[call.name] = seen[call.name] + pairs if call.name in seen else pairs

    ask = logits or _spread_places(model, 1)
    with override_config(model, dense_below=0), capture_attention(model, count):
        for own in inputs:
            ask(own)
    return {
        name if layer.index is None else layer.index: {
            kind: seen[layer.name][kind].item() for kind in Modality if seen[layer.name][kind]
        }
        for name, layer in attention_layers(model).items()
        if layer.name in seen
    }


@contextmanager
def _recomputed_layers(model: Any) -> Iterator[None]:
    """Have a model of transformers compute its layers again on the way back, to save memory.

    All but the layers themselves stays in eval mode.
    """
    able = getattr(model, "supports_gradient_checkpointing", False)
    if not able or getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    modes = [layer.training for layer in layers]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode
        model.gradient_checkpointing_disable()


def choose_budgets(
    model: Any,
    inputs: Sequence[Inputs],
    costs: Mapping[Place, Sequence[float]],
    mean: float,
    levels: Sequence[float] = LEVELS,
    *,
    shares: Sequence[float] = SHARES,
    most: int = 512,
    weights: Mapping[Place, float] | None = None,
    logits: Logits | None = None,
) -> ChosenBudgets:
    """The best of budgets between one ratio for all and what `spread` makes of costs, as measured.

    Args:
        inputs: two of them and five `shares` are ten sparse passes.
        costs: by place and ratio.
        mean: of the ratios, at most.
        shares: how far on the way to the spread budgets the tried ones are.
        most: places of each of the inputs that KL is the mean of.
        weights: of the mean, as `pair_weights` finds them.
        logits: as in `first_order_costs`.
    Raises:
        ValueError: no inputs, or `shares` without 0.
    """
    if not inputs or 0 not in shares:
        raise ValueError(
            f"inputs must be one or more and shares hold 0, got {len(inputs)} inputs and {shares}"
        )
    wanted = spread(costs, mean, levels, weights)
    tried: dict[float, float] = dict.fromkeys(shares, 0.0)
    ask = logits or _spread_places(model, most)

    @torch.no_grad()
    def predictions(own: Any, **changes: Any) -> Tensor:
        with override_config(model, **{"dense_below": 0} | changes):
            return ask(own).float().log_softmax(-1)

    for own in inputs:
        dense = predictions(own, backend="dense")
        for share in shares:
            ratios = layer_ratios(_between(wanted, mean, share))
            sparse = predictions(own, ratio=mean, layer_ratio=ratios)
            tried[share] += output_kl(dense, sparse) / len(inputs)
    best = min(tried, key=lambda share: tried[share])
    return ChosenBudgets(_between(wanted, mean, best), best, tried)


def _between(wanted: Mapping[Place, float], mean: float, share: float) -> dict[Place, float]:
    return {place: mean + share * (ratio - mean) for place, ratio in wanted.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: the scorers' folder gets the ratios into its config."""
    from mm_sparse.recipes.data import CorpusData

    parser = budgets_parser(__doc__)
    parser.add_argument("--draws", type=int, default=4, help="of tokens for each sequence")
    args = parser.parse_args(argv)
    model, _ = prepared(args)
    device = next(model.parameters()).device
    kinds = CorpusData(args.corpus, args.tokens).kinds("validation")
    inputs = [
        {"input_ids": row[None].to(device)} for rows in kinds.values() for row in rows[: args.count]
    ]
    mean = mms.sparse_config(model).ratio if args.ratio is None else args.ratio
    costs = first_order_costs(model, inputs, by_head=args.by == "head", draws=args.draws)
    found = choose_budgets(model, inputs, costs, mean)
    for place, own in costs.items():
        print(*place, *(f"{cost:.5f}" for cost in own))
    print(json.dumps({"layer_ratio": layer_ratios(found.ratios), "kl": found.tried}))
    with override_config(model, ratio=mean, layer_ratio=layer_ratios(found.ratios)):
        mms.save_scorers(model, args.scorers)


if __name__ == "__main__":
    main()
