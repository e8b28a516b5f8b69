"""Scorers trained on a frozen model: losses, the batched product, the recipe end to end."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch

import mm_sparse as mms
from mm_sparse.distillation.divergence import attention_kl
from mm_sparse.distillation.topk_relaxation import dropped_mass
from mm_sparse.integrations.context import override_config
from mm_sparse.integrations.state import attention_layers
from mm_sparse.recipes.data.text_corpus import CorpusData
from mm_sparse.recipes.distillation.distiller import DistillationConfig, SaveScorers, some_tiles
from mm_sparse.recipes.distillation.language import Distill
from mm_sparse.recipes.metrics import layers as layer_metrics
from tests.support.tiny_recipes import SPARSE, TINY, TOKENS, make, mean, sharpen, tiny, write_corpus


@pytest.fixture
def npz(tmp_path: Path) -> str:
    return write_corpus(tmp_path)


def geometry() -> tuple[mms.TokenLayout, "mms.plan.Plan"]:
    layout = mms.TokenLayout.text(1, TOKENS)
    return layout, layout.plan(SPARSE, num_query_heads=4, num_kv_heads=2)


def test_the_soft_choice_drops_what_the_hard_one_drops_when_it_is_cold() -> None:
    _, plan = geometry()
    torch.manual_seed(0)
    values = torch.randn(1, 2, *plan.visible.shape[1:])
    mass = torch.rand(values.shape) * plan.visible
    open_units = (plan.visible & ~plan.always)[:, None]
    kept = layer_metrics.kept_units(values, plan)
    tight = (plan.budget - (plan.always * 16).sum(-1) >= 16)[0]
    soft = dropped_mass(values, mass, plan, 1e-4)
    hard = (mass * (open_units & ~kept)).sum(-1)
    # Where the budget holds no open unit the soft choice still takes one.
    bound = (mass * open_units).amax(-1) * ~tight
    assert abs(soft - hard.mean()) <= bound.mean() + (1 / 16) * hard.mean()


def test_its_gradient_lifts_heavy_units_and_lowers_light_ones() -> None:
    _, plan = geometry()
    torch.manual_seed(0)
    values = torch.zeros(1, 2, *plan.visible.shape[1:], requires_grad=True)
    mass = torch.rand(values.shape)
    dropped_mass(values, mass, plan, 0.5).backward()
    grad = values.grad
    assert grad is not None
    open_units = (plan.visible & ~plan.always)[:, None].expand_as(mass)
    assert (grad[~open_units] == 0).all()
    # One threshold for all: lifting every unit of a row alike changes nothing.
    torch.testing.assert_close(grad.sum(-1), torch.zeros(grad.shape[:-1]), atol=1e-6, rtol=0)
    row = open_units[0, 0].sum(-1).argmax()
    some = open_units[0, 0, row]
    corr = torch.corrcoef(torch.stack([grad[0, 0, row][some], mass[0, 0, row][some]]))
    assert corr[0, 1] < -0.99


def test_weights_of_tiles_follow_their_mass() -> None:
    _, plan = geometry()
    values = torch.randn(1, 2, *plan.visible.shape[1:])
    mass = torch.rand(values.shape) * plan.visible
    whole = attention_kl(values, mass, plan, weighted=True)
    torch.testing.assert_close(attention_kl(values, mass * 3, plan, weighted=True), 3 * whole)
    torch.testing.assert_close(
        attention_kl(values, mass * 3, plan), attention_kl(values, mass, plan), rtol=1e-4, atol=1e-5
    )


def test_all_layers_at_once_rank_as_each_alone() -> None:
    module = make()
    for scorer in module.scorers.values():
        for parameter in scorer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, 40, (1, TOKENS))
    sample = module.look(ids, 3)
    values = module.rank(sample)
    assert values.shape[:3] == (3, 1, 2)
    assert values.shape[3] == 3
    for i, scorer in enumerate(module.scorers.values()):
        want = scorer.rank(  # pyright: ignore
            sample.tiles[i], sample.units[i], sample.plan, sample.scale, torch.float32
        )
        torch.testing.assert_close(values[i], want)


def test_some_tiles_are_tiles_of_the_plan_that_have_a_choice() -> None:
    _, plan = geometry()
    part = some_tiles(plan, 4)
    every = plan.tiles[0].tolist()
    rows = [every.index(tile) for tile in part.tiles[0].tolist()]
    assert rows == sorted(rows)
    assert torch.equal(part.visible, plan.visible[:, rows])
    assert torch.equal(part.budget, plan.budget[:, rows])
    assert ((part.visible & ~part.always).sum(-1) > 1).all()
    short = mms.TokenLayout.text(1, 20).plan(SPARSE, num_query_heads=4, num_kv_heads=2)
    with pytest.raises(ValueError, match="tiles must have units to choose from"):
        some_tiles(short, 4)


def test_training_on_dropped_mass_keeps_more_of_it() -> None:
    module = make()
    sample = module.look(torch.randint(0, 40, (1, TOKENS)), 8)
    step = torch.optim.Adam(module.scorers.parameters(), lr=3e-3)
    dropped = []
    for _ in range(25):
        values = module.rank(sample)
        dropped.append(dropped_mass(values.detach(), sample.mass, sample.plan, 1e-3).item())
        loss = dropped_mass(values, sample.mass, sample.plan, 0.2)
        step.zero_grad()
        loss.backward()
        step.step()
    assert dropped[-1] < 0.985 * dropped[0]


def fit(module: Distill, npz: str, steps: int = 12, **options) -> L.Trainer:
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    data = CorpusData(npz, TOKENS, length=steps)
    trainer.fit(module, datamodule=data)
    return trainer


def test_the_recipe_learns_and_leaves_the_base_alone(npz: str, tmp_path: Path) -> None:
    module = make(
        out=str(tmp_path / "scorers"), goal=DistillationConfig(divergence_share=0.5, tiles=4)
    )
    before = {n: p.clone() for n, p in module.language.state_dict().items()}
    ids = CorpusData(npz, TOKENS).kinds("test")["a"][:1]
    untrained = mean(layer_metrics.layer_figures(module.language, ids))
    trainer = fit(module, npz, 30)
    trained = mean(layer_metrics.layer_figures(module.language, ids))
    assert trained["divergence"] < untrained["divergence"]
    assert all(torch.equal(p, before[n]) for n, p in module.language.state_dict().items())
    assert not any(n.startswith("language") for n in module.state_dict())
    assert {"validation/kl", "validation/kept", "layers/02/overlap"} <= set(trainer.logged_metrics)
    again = tiny().build(0)
    again.load_state_dict(before)
    mms.load_scorers(again, tmp_path / "scorers")
    for a, b in zip(
        attention_layers(again).values(), attention_layers(module.language).values(), strict=True
    ):
        assert a.scorer is not None
        assert b.scorer is not None
        assert all(
            torch.equal(x, y)
            for x, y in zip(a.scorer.parameters(), b.scorer.parameters(), strict=True)
        )


def test_a_run_that_breaks_off_leaves_its_scorers(npz: str, tmp_path: Path) -> None:
    class Break(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args, **kwargs) -> None:
            if trainer.global_step == 3:
                raise KeyError("a cable")

    module = make(out=str(tmp_path / "scorers"), goal=DistillationConfig(tiles=4))
    with pytest.raises(KeyError, match="a cable"):
        fit(module, npz, 10, callbacks=[Break()])
    again = tiny().build(0)
    mms.load_scorers(again, tmp_path / "scorers")
    left = next(iter(attention_layers(again).values())).scorer
    assert left is not None
    assert any(p.any() for p in left.parameters())
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        SaveScorers("x", every=0)


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_both_sequences(npz: str, tmp_path: Path) -> None:
    """DDP with gloo: after a step both ranks hold the same scorers, and not the untrained ones."""
    module = make(goal=DistillationConfig(tiles=4))
    fit(module, npz, 2, devices=2, strategy="ddp_spawn")
    assert any(p.abs().max() > 0 for p in module.scorers.parameters())


def test_the_shipped_config_is_one_that_the_recipe_takes(
    npz: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mm_sparse.recipes.distillation.language import main

    root = Path(__file__).parents[3]
    monkeypatch.setattr("sys.argv", ["distill"])
    language = {"path": None, "options": TINY | {"dtype": "float32"}}
    cli = main(
        ["fit", "--config", str(root / "recipes/configs/distill/smollm2.yaml"), "--data.path", npz,
         "--data.tokens", str(TOKENS), "--model.language", json.dumps(language),
         "--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--model.out", "null",
         "--trainer.limit_val_batches", "1", "--trainer.logger", "false",
         "--trainer.accelerator", "cpu", "--data.length", "1"]
    )  # fmt: skip
    assert cli.trainer.global_step == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"divergence_share": 2.0}, "divergence_share must be in"),
        ({"tiles": 0}, "must be positive"),
    ],
)
def test_impossible_goals_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**given)


def test_scorers_go_on_from_a_folder_with_the_budgets_of_their_heads(
    npz: str, tmp_path: Path
) -> None:
    module = make()
    ratios = {1: (0.2, 0.5)}
    with override_config(module.language, layer_ratio=ratios):
        mms.save_scorers(module.language, tmp_path / "first")
    again = Distill(
        tiny(),
        scorers_from=str(tmp_path / "first"),
        goal=DistillationConfig(divergence_share=0.0, tiles=4),
    )
    sharpen(again.language)
    sample = again.look(torch.randint(0, 40, (1, TOKENS)), 4)
    seen = (sample.plan.visible * sample.plan.units[:, None, :, 1]).sum(-1)
    for layer, heads in enumerate([(0.3, 0.3), (0.2, 0.5), (0.3, 0.3)]):
        for head, ratio in enumerate(heads):
            want = (seen * ratio).round().long()
            assert torch.equal(sample.budget[layer, :, head], want)
    fit(again, npz, 3)
    assert any(p.abs().max() > 0 for p in again.scorers.parameters())
    with pytest.raises(ValueError, match="sparse must be given where scorers_from is not"):
        Distill(tiny())


def test_padding_does_not_dilute_what_is_dropped() -> None:
    rows = [[("text", TOKENS)], [("text", 150)]]
    torch.manual_seed(0)
    sums, tiles = 0.0, 0
    both = mms.TokenLayout.from_rows(rows).plan(SPARSE, num_query_heads=4, num_kv_heads=2)
    values = torch.randn(2, 2, *both.visible.shape[1:])
    mass = torch.rand(values.shape) * both.visible[:, None]
    for number, row in enumerate(rows):
        layout = mms.TokenLayout.from_rows([row])
        plan = layout.plan(SPARSE, num_query_heads=4, num_kv_heads=2)
        part = (slice(number, number + 1), slice(None), *map(slice, plan.visible.shape[1:]))
        count = plan.visible.shape[1]
        sums += dropped_mass(values[part], mass[part], plan, 0.2).item() * count
        tiles += count
    assert dropped_mass(values, mass, both, 0.2).item() == pytest.approx(sums / tiles, rel=1e-5)
