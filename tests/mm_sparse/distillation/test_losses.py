"""Losses of scorers in whole models: checkpoints, accumulation, autocast, documents, processes."""

import socket
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mm_sparse as mms
from tests.support import hf_models

pytest.importorskip("transformers")
CONFIG = mms.SparseConfig(ratio=0.3, tile=64, dense_below=0, sinks=0, window=16)
KINDS = ["none", "reentrant", "not_reentrant"]


def fresh(scorer: str = "relevance", checkpointing: str = "none", dropout: float = 0.0) -> Any:
    model = hf_models.build("llama").model.train()
    torch.manual_seed(1)
    mms.sparsify(model, CONFIG, scorer=scorer)
    for weight in mms.scorer_parameters(model):
        nn.init.normal_(weight, std=0.1)
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    for layer in model.model.layers:
        # Between attention and what follows: a checkpoint must draw the same again.
        layer.post_attention_layernorm = nn.Sequential(
            layer.post_attention_layernorm, nn.Dropout(dropout)
        )
    return model


def batch(seed: int = 0, rows: int = 2, length: int = 300) -> Tensor:
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(model: Any) -> list[Tensor]:
    own = (*mms.scorer_parameters(model), *model.parameters())
    return [p.grad.clone() for p in own if p.grad is not None]


def assert_alike(found: list[Tensor], want: list[Tensor]) -> None:
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("where", ["inside", "behind"])
@pytest.mark.parametrize("tiles", [None, 3])
def test_checkpoints_change_neither_losses_nor_gradients(
    kind: str, where: str, tiles: int | None
) -> None:
    def run(checkpointing: str, place: str) -> tuple[dict[str, Tensor], list[Tensor]]:
        model, ids = fresh(checkpointing=checkpointing, dropout=0.3), batch()
        torch.manual_seed(4)
        with mms.distillation_losses(model, tiles=tiles, generator=seeded()) as losses:
            own = model(ids, labels=ids, use_cache=False).loss
            total = own + losses.mean()
            if place == "inside":
                total.backward()
        if place == "behind":
            total.backward()
        assert len(losses.losses) == len(mms.attention_layers(model))
        return {n: x.detach() for n, x in losses.losses.items()}, gradients(model)

    want = run("none", "behind")
    found = run(kind, where)
    torch.testing.assert_close(found[0], want[0])
    assert_alike(found[1], want[1])


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_layer_counts_once_where_the_backward_pass_is_inside_the_block(kind: str) -> None:
    model, ids, seen = fresh(checkpointing=kind), batch(), []

    def count(scores: mms.Scores, mass: Tensor) -> Tensor:
        seen.append(scores.plan.tiles.shape[1])
        return mms.attention_kl(scores.values, mass, scores.plan)

    with mms.distillation_losses(model, count, tiles=3) as losses:
        (model(ids, labels=ids, use_cache=False).loss + losses.mean()).backward()
    assert seen == [3] * len(mms.attention_layers(model))


def test_adapters_and_scorers_learn_together_under_a_checkpoint() -> None:
    peft: Any = pytest.importorskip("peft")

    def run(kind: str) -> list[Tensor]:
        model, ids = fresh(checkpointing=kind), batch()
        scorers = [*mms.scorer_parameters(model)]
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        torch.manual_seed(2)
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
        if kind == "reentrant":
            tuned.enable_input_require_grads()
        with mms.distillation_losses(tuned, tiles=3, generator=seeded()) as losses:
            own = tuned(input_ids=ids, labels=ids, use_cache=False).loss
        (own + losses.mean()).backward()
        return [p.grad.clone() for p in (*scorers, *tuned.parameters()) if p.grad is not None]

    want = run("none")
    for kind in KINDS[1:]:
        assert_alike(run(kind), want)


def test_gradients_of_several_blocks_add_up() -> None:
    def run(model: Any, seed: int) -> None:
        ids = batch(seed)
        with mms.distillation_losses(model, tiles=3, generator=seeded(seed)) as losses:
            own = model(ids, labels=ids, use_cache=False).loss
        (own + losses.mean()).backward()

    both = fresh(checkpointing="not_reentrant")
    run(both, 0)
    first = gradients(both)
    run(both, 1)
    alone = fresh()
    run(alone, 1)
    assert_alike(gradients(both), [a + b for a, b in zip(first, gradients(alone), strict=True)])


@pytest.mark.parametrize("scorer", ["relevance", "fine"])
def test_scorers_learn_under_autocast_what_they_learn_without(scorer: str) -> None:
    def run(context: Any) -> tuple[Tensor, Tensor]:
        model, ids = fresh(scorer, "not_reentrant"), batch()
        with context, mms.distillation_losses(model, tiles=4, generator=seeded()) as losses:
            own = model(ids, labels=ids, use_cache=False).loss
        (own + losses.mean()).backward()
        grads = [p.grad for p in mms.scorer_parameters(model)]
        assert all(g is not None and g.dtype == torch.float32 for g in grads)
        return losses.mean().detach(), torch.cat([g.flatten() for g in grads if g is not None])

    want, found = run(nullcontext()), run(torch.autocast("cpu", torch.bfloat16))
    torch.testing.assert_close(found[0], want[0], rtol=0.05, atol=0)
    assert torch.cosine_similarity(found[1], want[1], dim=0) > 0.98


def test_autocast_holds_nothing_that_a_loss_was_made_of() -> None:
    q, k = torch.randn(2, 1, 2, 300, 16).unbind()
    from mm_sparse.distillation.layer_loss import layer_loss
    from mm_sparse.distillation.tile_draw import draw_tiles

    layout = mms.TokenLayout.from_spans([("text", 300)])
    plan = layout.plan(CONFIG, num_query_heads=2, num_kv_heads=2)
    scorer = mms.RelevanceScorer(num_query_heads=2, num_kv_heads=2, head_dim=16)
    weight = torch.randn(16, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer_loss(q, k, plan, draw_tiles(plan, 2, None), scorer, 0.25)
        assert torch.is_autocast_cache_enabled()
        # What comes after has a gradient in float32 as ever.
        (torch.randn(4, 16) @ weight).sum().backward()
    assert weight.grad is not None


def test_documents_of_a_packed_row_learn_apart() -> None:
    """A row of two documents has the tiles, masses and scores of two rows."""
    model, ids = fresh(), batch(rows=2, length=128)
    positions = torch.arange(128).repeat(2)[None]
    packed = ids.reshape(1, -1)
    with mms.distillation_losses(model, tiles=None) as apart:
        model(ids, use_cache=False)
    with mms.distillation_losses(model, tiles=None) as together:
        model(packed, position_ids=positions, use_cache=False)
    assert apart.losses.keys() == together.losses.keys()
    torch.testing.assert_close(apart.mean(), together.mean())


def test_layers_take_turns() -> None:
    model, ids = fresh(), batch()
    names = list(mms.attention_layers(model))
    learned: list[str] = []
    for _ in range(len(names)):
        with mms.distillation_losses(model, tiles=2, every=len(names)) as losses:
            model(ids, use_cache=False)
        learned += losses.losses
    assert len(names) > 1
    assert sorted(learned) == sorted(names)


def test_scorers_that_come_inside_the_block_learn() -> None:
    model, ids = fresh(), batch()
    names = [layer.name for layer in mms.attention_layers(model).values()]
    made: list[mms.Scorer] = []

    def make() -> mms.Scorer:
        made.append(mms.FineScorer(num_query_heads=4, num_kv_heads=2, head_dim=8))
        return made[-1]

    with mms.distillation_losses(model, tiles=2) as losses, mms.override_scorers(model, make):
        model(ids, use_cache=False)
    losses.mean().backward()
    assert list(losses.losses) == names
    assert all(p.grad is not None for scorer in made for p in scorer.parameters())
    with mms.override_scorers(model, mms.PooledScorer), mms.distillation_losses(model) as losses:
        model(ids, use_cache=False)
    assert not losses.losses


def test_losses_draw_no_numbers_inside_the_block() -> None:
    """A checkpoint that computes a block again would draw others."""
    model, ids = fresh(), batch()
    torch.manual_seed(3)
    with mms.distillation_losses(model, tiles=2) as first:
        before = torch.get_rng_state()
        model(ids, use_cache=False)
        assert torch.get_rng_state().equal(before)
    torch.manual_seed(3)
    with mms.distillation_losses(model, tiles=2) as again:
        model(ids, use_cache=False)
    with mms.distillation_losses(model, tiles=2) as other:
        model(ids, use_cache=False)
    assert again.mean().equal(first.mean())
    assert not other.mean().equal(first.mean())


def test_losses_are_taken_back_where_they_arise_if_asked() -> None:
    def learn(**options: Any) -> tuple[Tensor, list[Tensor]]:
        model = fresh()
        with (
            torch.no_grad(),
            mms.distillation_losses(model, tiles=3, generator=seeded(), **options) as losses,
        ):
            model(batch(), use_cache=False)
        if losses.mean().requires_grad:
            (0.5 * torch.stack([*losses.losses.values()]).sum()).backward()
        return losses.mean().detach(), gradients(model)

    want, found = learn(), learn(backward_weight=0.5)
    assert found[0].equal(want[0])
    assert found[1]
    assert_alike(found[1], want[1])


# Dynamo asks tensors of the graph for it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_scorers_of_a_compiled_model_learn_as_without() -> None:
    def run(compiled: bool) -> tuple[Tensor, list[Tensor]]:
        model, ids = fresh(), batch()
        called = torch.compile(model, backend="eager") if compiled else model
        with mms.distillation_losses(model, tiles=3, generator=seeded()) as losses:
            own = called(ids, labels=ids, use_cache=False).loss
        (own + losses.mean()).backward()
        assert len(losses.losses) == len(mms.attention_layers(model))
        return losses.mean().detach(), gradients(model)

    want, found = run(False), run(True)
    torch.testing.assert_close(found[0], want[0])
    assert_alike(found[1], want[1])


def test_losses_leave_scores_of_queries_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks for the scores of all queries at once."""
    monkeypatch.setattr("mm_sparse.attention.query_chunks.MOST_SCORES", 200)
    model, ids = fresh(), batch()
    shapes: list[int] = []
    inner = mms.RelevanceScorer.describe

    def describe(self: Any, q: Tensor, k: Tensor, plan: Any, *rest: Any) -> Any:
        shapes.append(plan.tiles.shape[1])
        return inner(self, q, k, plan, *rest)

    monkeypatch.setattr(mms.RelevanceScorer, "describe", describe)
    with mms.distillation_losses(model, tiles=2) as losses:
        model(ids, use_cache=False)
    assert losses.losses
    assert max(shapes) <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiles": 0}, "tiles must be an int of at least 1, got 0"),
        ({"tiles": 2.5}, "tiles must be an int of at least 1, got 2.5"),
        ({"every": 0}, "every must be an int of at least 1, got 0"),
        ({"every": None}, "every must be an int of at least 1, got None"),
    ],
)
def test_wrong_numbers_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), mms.distillation_losses(fresh(), **options):
        pass


def weights(model: Any) -> list[Tensor]:
    own = (*model.parameters(), *mms.scorer_parameters(model))
    return [p.detach().clone() for p in {id(p): p for p in own}.values()]


def steps(model: Any, ids: Callable[[int], Tensor], wrap: Any, average: bool) -> list[Tensor]:
    own = {id(p): p for p in (*model.parameters(), *mms.scorer_parameters(model))}
    optimizer = torch.optim.SGD(list(own.values()), lr=1e-2)
    called = wrap(model)
    for step in range(2):
        optimizer.zero_grad()
        rows = ids(step)
        with mms.distillation_losses(model, tiles=None) as losses:
            own_loss = called(rows, labels=rows, use_cache=False).loss
        (own_loss + losses.mean()).backward()
        if average:
            mms.average_scorer_gradients(model)
        optimizer.step()
    return weights(model)


def _work(rank: int, port: int, how: str, kind: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = fresh(checkpointing=kind)
    if how == "registered":
        mms.register_scorers(model)
    found = steps(
        model, lambda step: batch(step)[rank : rank + 1],
        nn.parallel.DistributedDataParallel, how == "averaged",
    )  # fmt: skip
    torch.save(found, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["registered", "averaged"])
@pytest.mark.parametrize("kind", ["none", "not_reentrant"])
def test_two_processes_learn_what_one_does(how: str, kind: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = str(tmp_path / "weights")
    torch.multiprocessing.spawn(_work, (port, how, kind, out), nprocs=2)
    model = fresh()
    if how == "registered":
        mms.register_scorers(model)
    want = steps(model, batch, lambda own: own, False)
    start = weights(fresh())
    assert len(start) == len(want)
    assert any(not a.equal(b) for a, b in zip(want[-3:], start[-3:], strict=True))
    for rank in (0, 1):
        assert_alike(torch.load(f"{out}.{rank}"), want)


@pytest.mark.parametrize("dense_layers", [(), (0,)])
def test_a_dense_run_teaches_what_a_run_that_keeps_all_teaches(
    dense_layers: tuple[int, ...],
) -> None:
    found = []
    for changes in ({"backend": "dense"}, {"ratio": 1.0}):
        model = fresh()
        with (
            torch.no_grad(),
            mms.override_config(model, dense_layers=dense_layers, **changes),
            mms.distillation_losses(
                model, tiles=3, generator=seeded(), backward_weight=0.5
            ) as losses,
        ):
            model(batch())
        assert len(losses.losses) == 2 - len(dense_layers)
        found.append([losses.mean(), *gradients(model)])
    assert_alike(*found)


def test_calls_that_are_dense_because_they_are_short_teach_nothing() -> None:
    model = fresh()
    with mms.override_config(model, dense_below=1000), mms.distillation_losses(model) as losses:
        model(batch())
    assert not losses.losses
