"""The loss of a layer in blocks of drawn tiles, against plain dense formulas in float64.

B batch, H query heads, K KV heads, D head dim, T tiles, U units, S query pools of a tile
"""

import gc
import math
import random
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mm_sparse as mms
from mm_sparse.distillation import layer_loss as module
from mm_sparse.distillation.divergence import scorer_loss
from mm_sparse.distillation.layer_loss import layer_loss
from mm_sparse.distillation.tile_draw import TileDraw, draw_tiles
from mm_sparse.layout import Plan
from mm_sparse.scorers import FineScorer, RelevanceScorer
from tests.support.layouts import (
    IDS,
    Row,
    layout_of,
    random_qk,
    seen_batch,
    small_config,
)

DIM = 8


def drawn_scorer(kind: type[Any], heads: int, kv_heads: int, **options: Any) -> Any:
    """A scorer whose weights are random and matter."""
    torch.manual_seed(3)
    scorer = kind(num_query_heads=heads, num_kv_heads=kv_heads, head_dim=DIM, **options)
    for weight in scorer.parameters():
        nn.init.normal_(weight, std=0.2)
    return scorer


def plain_mass(q: Tensor, k: Tensor, seen: Tensor, plan: Plan) -> Tensor:
    """(B, K, T, U) by the whole matrix of attention."""
    logits = q @ k.repeat_interleave(plan.group, 1).transpose(-1, -2) / math.sqrt(q.shape[-1])
    share = logits.masked_fill(~seen[:, None], -math.inf).softmax(-1).nan_to_num(0.0)
    mass = q.new_zeros(len(q), k.shape[1], plan.tiles.shape[1], plan.units.shape[1])
    for b, t, start, size in pieces(plan.tiles):
        rows = torch.arange(start, start + size)
        rows = rows[seen[b, rows].any(-1)]
        if not len(rows):
            continue
        own = share[b][:, rows].unflatten(0, (k.shape[1], -1)).mean((1, 2))  # (K, M)
        for _, u, first, count in pieces(plan.units[b : b + 1]):
            mass[b, :, t, u] = own[:, first : first + count].sum(-1)
    return mass


def pieces(table: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Row, number, first token and length of pieces that hold a token."""
    for b, row in enumerate(table.tolist()):
        for i, (first, size) in enumerate(row):
            if size:
                yield b, i, first, size


def plain_scores(
    q: Tensor, k: Tensor, visible: Tensor, plan: Plan, weights: list[Tensor]
) -> Tensor:
    """(B, K, T, U) of a relevance scorer, by the formula in its docstring."""
    query_tower, key_tower, bias = weights
    tile_kind, unit_kind = plan.tile_modality.tolist(), plan.unit_modality.tolist()
    pools = min(plan.config.query_pools, plan.tile_tokens)
    width = -(-plan.tile_tokens // pools)
    rank = query_tower.shape[-1]
    mean = k.new_zeros(*k.shape[:2], plan.units.shape[1], DIM)
    code = k.new_zeros(*k.shape[:2], plan.units.shape[1], rank)
    for b, u, first, size in pieces(plan.units):
        keys = k[b, :, first : first + size]  # (K, u, D)
        mean[b, :, u] = keys.mean(1)
        features = torch.cat([keys.mean(1), keys.amax(1), keys.amin(1)], -1)
        code[b, :, u] = torch.einsum("kf,kfr->kr", features, key_tower[unit_kind[b][u]])
    values = []
    for b, row in enumerate(plan.tiles.tolist()):
        for t, (first, size) in enumerate(row):
            if not visible[b, t].any():
                values.append(q.new_zeros(k.shape[1], plan.units.shape[1]))
                continue
            pooled = [
                q[b, :, first + at : min(first + at + width, first + size)].mean(1)
                for at in range(0, size, width)
            ]
            own = torch.stack(pooled, 1).unflatten(0, (k.shape[1], -1))  # (K, G, S, D)
            tower = query_tower[tile_kind[b][t]].unflatten(0, (k.shape[1], -1))
            mapped = torch.einsum("kgsd,kgdr->kgsr", own, tower)
            logits = torch.einsum("kgsd,kud->kgsu", own, mean[b]) / math.sqrt(DIM)
            logits = logits + torch.einsum("kgsr,kur->kgsu", mapped, code[b])
            logits = logits + (plan.units[b, :, 1].clamp(min=1) / plan.unit).to(q.dtype).log()
            share = logits.masked_fill(~visible[b, t], -1e30).softmax(-1)
            score = share.mean((1, 2)).clamp(min=1e-300 if q.dtype == torch.double else 1e-37)
            distance = plan.distance[b, t]
            bucket = (distance.abs() + 1).double().log2().floor().long().clamp(max=11)
            bucket = bucket + 12 * (distance < 0)
            kinds = torch.tensor(unit_kind[b]).clamp(min=0)
            values.append(score.log() + bias[:, tile_kind[b][t], kinds, bucket])
    return torch.stack(values).unflatten(0, plan.tiles.shape[:2]).transpose(1, 2)


def plain_loss(
    q: Tensor, k: Tensor, seen: Tensor, plan: Plan, draw: TileDraw, weights: list[Tensor]
) -> Tensor:
    """KL over open units: sum over the tiles that count, over their number."""
    mass = plain_mass(q, k, seen, plan)
    # Which units a tile sees is a matter of plans, whose tests ask it of pairs.
    visible = plan.visible
    values = plain_scores(q, k, visible, plan, weights)
    total, count = q.new_zeros(()), 0.0
    for b in range(len(q)):
        index = range(plan.tiles.shape[1]) if draw.index is None else draw.index[b].tolist()
        weight = 1.0 if draw.weight is None else float(draw.weight[b])
        for t in index:
            free = visible[b, t] & ~plan.always[b, t]
            for head in range(k.shape[1]):
                truth = mass[b, head, t, free]
                if len(truth) < 2 or truth.sum() <= 1e-6:
                    continue
                truth = truth / truth.sum()
                guess = values[b, head, t, free].log_softmax(0)
                entropy = torch.special.xlogy(truth, truth).sum()
                total = total + weight * (entropy - (truth * guess).sum())
                count += weight
    return total / count if count else total


def loss_and_gradients(loss: Tensor, weights: list[Tensor]) -> list[Tensor]:
    if not loss.requires_grad:
        return [loss, *(torch.zeros_like(x) for x in weights)]
    options: Any = {"allow_unused": True, "materialize_grads": True}
    return [loss.detach(), *torch.autograd.grad(loss, weights, **options)]


def random_case(seed: int) -> tuple[list[Row], str, mms.SparseConfig]:
    """Rows of documents, pictures, sound and holes, and a config that leaves a choice."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for _ in range(rng.choice([1, 2])):
        row: Row = []
        document = 0
        for _ in range(rng.randint(1, 5)):
            kind = rng.choice(["text", "text", "image", "audio", "pad"])
            document += rng.random() < 0.3
            if kind == "pad":
                row.append(("pad", rng.randint(1, 9)))
            else:
                size = (rng.randint(2, 9), rng.randint(2, 9)) if kind == "image" else 0
                row.append((kind, size or rng.randint(1, 120), document))
        rows.append(row)
    config = small_config(
        unit=rng.choice([16, 16, 32]), tile=rng.choice([64, 128]), sinks=rng.choice([0, 0, 4]),
        window=rng.choice([0, 0, 9]), causal=rng.random() < 0.6,
        bidirectional=rng.choice([(), (mms.Modality.IMAGE,)]), query_pools=rng.choice([1, 3, 4]),
    )  # fmt: skip
    return rows, rng.choice(["left", "right"]), config


@pytest.mark.parametrize("ten", range(20))
@pytest.mark.thinned(3)
def test_loss_and_gradients_in_blocks_are_those_of_dense_formulas_in_float64(
    ten: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = 0
    for seed in range(10 * ten, 10 * ten + 10):
        taught += compare_with_dense(seed, monkeypatch)
    # Some rows are so short that nothing is a matter of choice.
    assert taught >= 3


def compare_with_dense(seed: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there was something to learn from."""
    rows, side, config = random_case(seed)
    rng = random.Random(seed)
    kv_heads, group = rng.choice([(1, 1), (2, 1), (2, 3), (1, 7)])
    tiles = rng.choice([None, None, 1, 3])
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", rng.choice([1, 1 << 24]))
    monkeypatch.setattr(module, "MASS_ELEMENTS", rng.choice([1, 40, 1 << 24]))
    layout = mms.TokenLayout.from_rows(rows, padding_side=side)
    heads = kv_heads * group
    q, k = random_qk(layout, heads, kv_heads, DIM, seed=7)
    plan = layout.plan(config, num_query_heads=heads, num_kv_heads=kv_heads)
    draw = draw_tiles(plan, tiles, torch.Generator().manual_seed(1))
    scorer = drawn_scorer(RelevanceScorer, heads, kv_heads, rank=4)
    weights = list(scorer.parameters())
    seen = seen_batch(rows, side, config)
    dense = {}
    for dtype in (torch.float64, torch.float32):
        cast = [w.detach().to(dtype).requires_grad_() for w in weights]
        loss = plain_loss(q.to(dtype), k.to(dtype), seen, plan, draw, cast)
        dense[dtype] = loss_and_gradients(loss, cast)
    loss = layer_loss(q, k, plan, draw, scorer, 1 / math.sqrt(DIM))
    found = loss_and_gradients(loss, weights)
    for got, want, other in zip(found, dense[torch.float64], dense[torch.float32], strict=True):
        rounding = 64 * torch.finfo(torch.float32).eps * max(want.abs().max(), 1)
        assert (got - want).abs().max() <= 2 * (other - want).abs().max() + rounding
    return bool(found[0] > 0)


def case(
    name: str, kind: type[Any], tiles: int | None = None, **options: Any
) -> tuple[Tensor, Tensor, Plan, TileDraw, Any, float]:
    """Arguments of `layer_loss`."""
    layout = layout_of(name)
    q, k = random_qk(layout, 6, 2, DIM)
    plan = layout.plan(small_config(), num_query_heads=6, num_kv_heads=2)
    draw = draw_tiles(plan, tiles, torch.Generator().manual_seed(0))
    return q, k, plan, draw, drawn_scorer(kind, 6, 2, **options), 1 / math.sqrt(DIM)


class TileNorms(mms.Scorer):
    """Writes `score` alone, and thinks that all tiles of a row are asked for."""

    def __init__(self, *, num_query_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_kv_heads, head_dim))

    def score(self, q: Tensor, k: Tensor, plan: Plan, scale: float) -> Tensor:
        keys = torch.nn.functional.pad((k * self.weight[:, None]).cumsum(2), (0, 0, 1, 0))
        edges = plan.units.long().cumsum(-1)
        low, high = (
            keys.gather(2, e[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))
            for e in edges.unbind(-1)
        )
        tile = torch.arange(plan.tiles.shape[1], dtype=q.dtype)
        return (high - low).sum(-1)[:, :, None] * tile.sin()[:, None]


def whole_mean(scores: mms.Scores, mass: Tensor) -> Tensor:
    """The default loss under a name that is not known to be a sum over tiles."""
    return scorer_loss(scores, mass)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("kind", [FineScorer, RelevanceScorer, TileNorms])
@pytest.mark.parametrize("loss", [scorer_loss, whole_mean])
@pytest.mark.parametrize("block", [1, 1 << 24])
def test_all_tiles_give_the_loss_of_all_scores_and_its_gradients(
    name: str, kind: type[Any], loss: Any, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(module, "MASS_ELEMENTS", 100 * block)
    q, k, plan, draw, scorer, scale = case(name, kind)
    scores = scorer(q, k, layout=plan.layout, config=plan.config)
    want = scorer_loss(scores, mms.unit_mass(q, k, plan))
    weights = list(scorer.parameters())
    options: Any = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(want, weights, **options)
    with torch.no_grad():
        # The model itself may run without gradients.
        found = layer_loss(q, k, plan, draw, scorer, scale, loss)
    torch.testing.assert_close(found, want)
    # Of the loss times a number, as of a loss that is one of several terms.
    own = torch.autograd.grad(3 * found, weights, **options)
    for got, grad in zip(own, grads, strict=True):
        torch.testing.assert_close(got, 3 * grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [FineScorer, RelevanceScorer, TileNorms])
def test_drawn_tiles_are_scored_as_among_all(kind: type[Any]) -> None:
    q, k, plan, draw, scorer, scale = case("mixed", kind, tiles=3)
    assert draw.index is not None
    whole = scorer(q, k, layout=plan.layout, config=plan.config).values
    mass = mms.unit_mass(q, k, plan)
    torch.testing.assert_close(
        mms.unit_mass(q, k, draw.plan),
        mass.gather(2, draw.index[:, None, :, None].expand(-1, 2, -1, mass.shape[-1])),
    )
    seen: list[mms.Scores] = []

    def look(scores: mms.Scores, _: Tensor) -> Tensor:
        seen.append(scores)
        return scores.values.sum()

    layer_loss(q, k, plan, draw, scorer, scale, look)
    want = whole.gather(2, draw.index[:, None, :, None].expand(-1, 2, -1, whole.shape[-1]))
    shown = draw.plan.visible[:, None].expand_as(want)
    torch.testing.assert_close(seen[0].values[shown], want[shown])
    assert seen[0].plan.always.equal(
        plan.always.gather(1, draw.index[..., None].expand(-1, -1, plan.always.shape[-1]))
    )


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (4, 8), (20, 30)])
@pytest.mark.parametrize("causal", [True, False])
def test_open_units_are_counted_without_looking_at_each(
    name: str, sinks: int, window: int, causal: bool
) -> None:
    config = small_config(sinks=sinks, window=window, causal=causal)
    plan = layout_of(name).plan(config, num_query_heads=6, num_kv_heads=2)
    assert plan.open_units.equal((plan.visible & ~plan.always).sum(-1))


@pytest.mark.parametrize("name", ["mixed", "padded-left", "video"])
def test_a_draw_counts_every_tile_with_a_choice_alike(name: str) -> None:
    plan = layout_of(name).plan(small_config(), num_query_heads=6, num_kv_heads=2)
    choosing = plan.open_units > 1
    generator, draws, tiles = torch.Generator().manual_seed(0), 2000, 3
    counts = []
    for _ in range(draws):
        draw = draw_tiles(plan, tiles, generator)
        assert draw.index is not None
        assert draw.weight is not None
        weight = draw.weight[:, None].expand(-1, tiles)
        counts.append(torch.zeros(choosing.shape).scatter_add_(1, draw.index, weight))
    counted = torch.stack(counts)
    error = counted.std(0) / math.sqrt(draws)
    # The only tile with a choice of its row is always drawn.
    assert 0 < error.max() < 0.05
    assert ((counted.mean(0) - choosing.float()).abs() <= 4 * error + 1e-5).all()


def test_the_mean_over_draws_is_the_loss_of_all_tiles_and_its_gradient() -> None:
    q, k, plan, _, scorer, scale = case("padded-left", RelevanceScorer)
    weights = list(scorer.parameters())

    def flat(draw: TileDraw) -> Tensor:
        loss = layer_loss(q, k, plan, draw, scorer, scale)
        return torch.cat([x.flatten() for x in loss_and_gradients(loss, weights)])

    want = flat(draw_tiles(plan, None, None))
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([flat(draw_tiles(plan, 2, generator)) for _ in range(400)])
    error = found.std(0) / math.sqrt(len(found))
    assert error[0] > 0
    away = (found.mean(0) - want).abs() / (error + 1e-6)
    assert away[0] < 4
    # Of thousands of entries the furthest is further.
    assert away.max() < 6


def test_nothing_of_all_tiles_and_units_is_held_until_the_backward_pass() -> None:
    q, k, plan, draw, scorer, scale = case("mixed", FineScorer)
    saved: list[Any] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(weakref.ref(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = layer_loss(q, k, plan, draw, scorer, scale)
    gc.collect()
    made = len(saved)
    alive = [ref() for ref in saved if ref() is not None]
    assert made > len(alive)
    shapes = sorted(tuple(x.shape) for x in alive)
    assert shapes == sorted(tuple(p.shape) for p in scorer.parameters())
    node = loss.grad_fn
    assert node is not None
    # Behind it, there are the weights alone.
    ends = {type(after).__name__ for after, _ in node.next_functions if after is not None}
    assert ends == {"AccumulateGrad"}


def test_no_tensor_of_all_tiles_and_units_is_made_for_drawn_ones() -> None:
    layout = mms.TokenLayout.from_spans([("text", 12000)])
    q, k = random_qk(layout, 2, 1, 2)
    plan = layout.plan(small_config(), num_query_heads=2, num_kv_heads=1)
    draw = draw_tiles(plan, 2, torch.Generator().manual_seed(0))
    scorer = RelevanceScorer(num_query_heads=2, num_kv_heads=1, head_dim=2, rank=2)
    largest = Largest()
    with largest:
        layer_loss(q, k, plan, draw, scorer, 1.0)
    # The mass of each row of two tiles is of 2 x 64 x U, before the mean over rows.
    whole = plan.tiles.shape[1] * plan.units.shape[1]
    assert largest.shared(plan.units.shape[1]) < whole / 2


class Largest(TorchDispatchMode):
    """Notes the sizes of what is made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        self.shapes += [tuple(x.shape) for x in made if isinstance(x, Tensor)]
        return out

    def shared(self, units: int) -> int:
        """Entries of the largest tensor whose last dimension is units."""
        return max(math.prod(shape) for shape in self.shapes if shape and shape[-1] == units)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def on(device: str, kind: type[Any], backend: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of `layer_loss` and the weights, of one case that is the same everywhere."""
    cpu = mms.TokenLayout.from_rows([[("text", 150), ("image", (9, 11)), ("text", 90, 1)]] * 2)
    q, k = (x.to(device, dtype) for x in random_qk(cpu, 6, 2, 16))
    plan = cpu.to(device).plan(small_config(backend=backend), num_query_heads=6, num_kv_heads=2)
    index = torch.tensor([[2, 5, 8], [1, 5, 9]], device=device)
    draw = TileDraw(plan.of_tiles(index), index, torch.tensor([2.0, 3.0], device=device))
    torch.manual_seed(3)
    scorer = kind(num_query_heads=6, num_kv_heads=2, head_dim=16)
    for weight in scorer.parameters():
        nn.init.normal_(weight, std=0.2)
    return q, k, plan, draw, scorer.to(device), 0.25


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [FineScorer, RelevanceScorer])
@pytest.mark.parametrize("loss", [scorer_loss, whole_mean])
def test_kernels_give_the_loss_of_the_law(kind: type[Any], loss: Any, device: str) -> None:
    found = on(device, kind, "triton", torch.float32)
    want = on("cpu", kind, "torch", torch.float32)
    got = loss_and_gradients(layer_loss(*found, loss), list(found[4].parameters()))
    law = loss_and_gradients(layer_loss(*want, loss), list(want[4].parameters()))
    assert law[0] > 0.01
    for ours, other in zip(got, law, strict=True):
        torch.testing.assert_close(ours.cpu(), other, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("kind", [FineScorer, RelevanceScorer])
def test_a_loss_does_not_wait_for_the_device(kind: type[Any]) -> None:
    q, k, plan, _, scorer, scale = on("cuda", kind, "auto", torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    # What is known of a layout once is known for all layers of a step.
    layer_loss(q, k, plan, draw_tiles(plan, 2, generator), scorer, scale).backward()
    try:
        torch.cuda.set_sync_debug_mode("error")
        layer_loss(q, k, plan, draw_tiles(plan, 2, generator), scorer, scale).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_drawn_tiles_of_a_long_row_take_little_memory() -> None:
    layout = mms.TokenLayout.from_spans([("text", 32768)]).to("cuda")
    q = torch.randn(1, 32, 32768, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 8, 32768, 128, device="cuda", dtype=torch.bfloat16)
    plan = layout.plan(mms.SparseConfig(), num_query_heads=32, num_kv_heads=8)
    scorer = FineScorer(
        num_query_heads=32, num_kv_heads=8, head_dim=128, modalities=(mms.Modality.TEXT,)
    ).cuda()
    draw = draw_tiles(plan, 32, torch.Generator("cuda").manual_seed(0))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = layer_loss(q, k, plan, draw, scorer, 128**-0.5)
    held = torch.cuda.memory_allocated() - before
    own = sum(4 * p.numel() for p in scorer.parameters())
    assert loss.requires_grad
    assert held <= own + (64 << 20)  # workspaces of products
    assert torch.cuda.max_memory_allocated() - before < 1.2e9
