"""Scorers of frozen towers: targets, the soft tower, packed inputs, the recipe end to end."""

import dataclasses
import io
import math
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("timm")
pytest.importorskip("PIL")

from PIL import Image

import mm_sparse as mms
from mm_sparse import SparseConfig, TokenLayout
from mm_sparse.distillation import soft_attention
from mm_sparse.distillation.topk_relaxation import dropped_mass
from mm_sparse.integrations.context import override_attention
from mm_sparse.integrations.state import attention_layers
from mm_sparse.recipes.data.packed_inputs import Packed, PackedData, write_packed
from mm_sparse.recipes.distillation.budget_search import spread
from mm_sparse.recipes.distillation.budget_search_towers import tower_costs
from mm_sparse.recipes.distillation.towers import DistillTower, TowerGoal, TowerPart, main
from mm_sparse.recipes.models.vision import VisionConfig
from mm_sparse.recipes.training.optimizer import OptimizerConfig

SPARSE = SparseConfig(
    0.25, tile=64, unit=16, causal=False, sinks=0, window=0, query_pools=2, dense_below=0
)
TINY = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
SIDE = 68


@pytest.fixture
def npz(tmp_path: Path) -> str:
    return packed(tmp_path)


def packed(folder: Path) -> str:
    """Coarse noise as images of two kinds."""
    rng = np.random.default_rng(0)

    def image() -> bytes:
        stream = io.BytesIO()
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(stream, "PNG")
        return stream.getvalue()

    items, names = {}, {}
    for key, count in (("train/a", 3), ("train/b", 2), ("validation/a", 2), ("validation/b", 1)):
        items[key] = [image() for _ in range(count)]
        names[key] = [f"{key}/{n}" for n in range(count)]
    write_packed(folder / "images.npz", items, names)
    return str(folder / "images.npz")


def make(sparse: SparseConfig = SPARSE, out: str | None = None, **goal) -> DistillTower:
    torch.manual_seed(0)
    vision = VisionConfig("vit_tiny_patch16_224", image_size=SIDE, options=TINY)
    module = DistillTower(
        sparse, TowerPart(vision=vision), TowerGoal(**{"tiles": 5, **goal}),
        OptimizerConfig(lr=3e-3, warmup=2), out=out,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if "qkv.weight" in name:
                parameter[:64].mul_(12)
    return module


def batch(npz: str) -> Tensor:
    return torch.stack([Packed(dict(np.load(npz)), ["train/a"])[i] for i in range(2)])


def attention_inputs(sampled: float = 0.0, dtype: torch.dtype = torch.float64):
    layout = TokenLayout.from_spans([("image", (13, 17)), ("text", 3)], batch=2)
    config = dataclasses.replace(SPARSE, sample_ratio=sampled)
    plan = layout.plan(config, num_query_heads=4, num_kv_heads=2)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, layout.length, 8, dtype=dtype) for h in (4, 2, 2))
    return layout, config, plan, q, k, v


@pytest.mark.parametrize("sampled", [0.0, 0.5])
def test_cold_weights_give_what_the_selection_gives(sampled: float) -> None:
    layout, config, plan, q, k, v = attention_inputs(sampled)
    values = mms.PooledScorer().score(q, k, plan, 8**-0.5)
    selection = mms.select(mms.Scores(values, plan), layout, config)
    weights = soft_attention.unit_weights(values, plan, 0.3, straight=True)
    out = soft_attention.weighted_attention(q, k, v, weights, plan, 8**-0.5)
    torch.testing.assert_close(out, mms.attend(q, k, v, selection), rtol=1e-5, atol=1e-5)
    soft = soft_attention.unit_weights(values, plan, 0.3)
    assert not torch.equal(soft, weights)


def test_weights_of_one_are_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, plan, q, k, v = attention_inputs()
    monkeypatch.setattr(soft_attention, "BLOCK_ELEMENTS", 1)
    ones = torch.ones(2, 2, *plan.visible.shape[1:])
    out = soft_attention.weighted_attention(q, k, v, ones, plan, 8**-0.5)
    want = mms.attention_reference(q, k, v, mask=torch.ones(1, dtype=torch.bool))
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_gradients_reach_weights_and_inputs() -> None:
    _, _, plan, q, k, v = attention_inputs()
    weights = torch.rand(2, 2, *plan.visible.shape[1:]) + 0.1
    inputs = [x.float().requires_grad_() for x in (q, k, v, weights)]
    out = soft_attention.weighted_attention(*inputs, plan, 8**-0.5)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, dout)
    for x, grad in zip(inputs, grads, strict=True):
        step = torch.randn_like(x) * 1e-3
        moved = [y + step if y is x else y for y in inputs]
        back = [y - step if y is x else y for y in inputs]
        with torch.no_grad():
            ahead, behind = (
                soft_attention.weighted_attention(*y, plan, 8**-0.5) for y in (moved, back)
            )
        change = ((ahead - behind) * dout).sum() / 2
        torch.testing.assert_close((grad * step).sum(), change, rtol=2e-2, atol=1e-4)


def test_the_error_of_a_unit_is_what_leaving_it_out_changes() -> None:
    _, _, plan, q, k, v = attention_inputs()
    error = soft_attention.unit_error(q, k, v, plan, 8**-0.5)
    assert error.shape == (2, 2, *plan.visible.shape[1:])
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    share = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
    out = share @ v
    want = torch.zeros_like(error)
    for t, (start, size) in enumerate(plan.tiles[0].tolist()):
        for u, (first, keys) in enumerate(plan.units[0].tolist()):
            rows, unit = slice(start, start + size), slice(first, first + keys)
            lost = share[:, :, rows, unit] @ v[:, :, unit]
            lost -= share[:, :, rows, unit].sum(-1, keepdim=True) * out[:, :, rows]
            found = lost.square().sum(-1).mean(-1).unflatten(1, (2, 2)).mean(2)
            want[:, :, t, u] = found
    want = want / want.sum(-1, keepdim=True).mean(2, keepdim=True)
    torch.testing.assert_close(error, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", ["mass", "error", "features"])
def test_a_few_steps_lower_the_loss(target: str, npz: str) -> None:
    module, images = make(target=target), batch(npz)
    step = torch.optim.Adam(module.scorers.parameters(), lr=3e-3)
    sample = module.look(images, 5)
    for scorer, *seen in zip(module.scorers.values(), sample.tiles, sample.units, strict=True):
        scorer.calibrate(*seen)  # pyright: ignore

    def loss(temperature: float) -> Tensor:
        if target == "features":
            return module.feature_loss(images, temperature)
        return dropped_mass(module.rank(sample), sample.mass, sample.plan, temperature)

    found = []
    for _ in range(15):
        # What counts is the choice: a soft one may keep more than the budget holds.
        found.append(loss(1e-3).item())
        step.zero_grad()
        loss(0.2).backward()
        step.step()
    assert min(found[-3:]) < 0.99 * found[0]


def test_the_straight_tower_is_the_sparse_one(npz: str) -> None:
    module, images = make(dataclasses.replace(SPARSE, sample_ratio=0.4)), batch(npz)
    with torch.no_grad():
        lost = module.feature_loss(images, 0.3)
        sparse = module.run(images)
        with mms.override_config(module.model, backend="dense"):
            dense = module.run(images)
    want = 1 - torch.cosine_similarity(sparse, dense, dim=-1).mean()
    torch.testing.assert_close(lost, want, rtol=1e-3, atol=1e-6)


def test_other_attention_takes_the_place_of_a_layers_own_and_leaves_it(npz: str) -> None:
    module, images = make(), batch(npz)
    before = module.run(images)
    names = []

    def nothing(call) -> Tensor:
        names.append(call.name)
        return torch.zeros_like(call.q)

    with override_attention(module.model, nothing):
        other = module.run(images)
    assert names == list(attention_layers(module.model))
    assert not torch.allclose(other, before)
    assert torch.equal(module.run(images), before)
    assert mms.report(module.model).density == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("target", ["error", "features"])
def test_the_recipe_learns_validates_sparse_and_saves(
    target: str, npz: str, tmp_path: Path
) -> None:
    module = make(target=target, out=str(tmp_path / "scorers"), divergence_share=0.25)
    before = {n: p.clone() for n, p in module.model.state_dict().items()}
    trainer = L.Trainer(
        max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        val_check_interval=8, check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(module, datamodule=PackedData(npz, validation=1))
    logged = trainer.logged_metrics
    assert {"validation/a/cosine", "validation/b/worst", "validation/kept"} <= set(logged)
    assert 0 < logged["validation/a/cosine"] < 1
    assert all(torch.equal(p, before[n]) for n, p in module.model.state_dict().items())
    again = make().model
    mms.load_scorers(again, tmp_path / "scorers")
    images = batch(npz)
    assert torch.equal(again(images)[0], module.run(images))


@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_the_shipped_configs_are_ones_that_the_recipe_takes(
    name: str, npz: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["distill_towers"])
    path = Path(__file__).parents[3] / f"recipes/configs/distill/{name}.yaml"
    vision = [
        "--model.tower.kind", "vision", "--model.tower.vision.name", "vit_tiny_patch16_224",
        "--model.tower.vision.image_size", str(SIDE),
        "--model.tower.vision.options", str(TINY).replace("'", '"'),
    ]  # fmt: skip
    cli = main(
        ["fit", "--config", str(path), "--data.path", npz, *vision, "--model.out", "null",
         "--trainer.max_steps", "1", "--trainer.val_check_interval", "1",
         "--trainer.logger", "false", "--trainer.accelerator", "cpu",
         "--trainer.enable_progress_bar", "false"]
    )  # fmt: skip
    assert cli.trainer.global_step == 1


def test_density_goes_to_the_layer_that_loses(npz: str) -> None:
    model, images = make().model, batch(npz)
    first, second = attention_layers(model)
    levels = (0.1, 0.5, 1.0)
    costs = tower_costs(model, [images], levels)
    assert list(costs) == [(first, None), (second, None)]
    assert all(own[0] > own[1] > 0 and own[2] == 0 for own in costs.values())
    ratios = spread(costs, 0.5, levels)
    assert sum(ratios.values()) == pytest.approx(1.0)
    with mms.override_config(model, layer_ratio={first: 1.0}, dense_layers=(second,)):
        whole = model(images)[0]
        assert [row.mode for row in mms.report(model).rows] == ["sparse", "dense"]
    torch.testing.assert_close(whole, mms.densify(model)(images)[0], rtol=1e-3, atol=1e-3)
    config = dataclasses.replace(SPARSE, layer_ratio={first: 0.4}, dense_layers=(second,))
    assert SparseConfig.from_json(config.to_json()) == config
    mms.sparsify(model, config)
    wrong = dataclasses.replace(config, dense_layers=("blocks",))
    with pytest.raises(ValueError, match=r"config must name layers of TimmVision.*got 'blocks'"):
        mms.sparsify(model, wrong)


def test_packed_inputs_come_back(npz: str, tmp_path: Path) -> None:
    data = PackedData(npz, size=64)
    assert list(data.kinds("validation")) == ["a", "b"]
    assert data.kinds("train")["b"].names == ["train/b/0", "train/b/1"]
    assert len(data.train_dataloader()) == 5
    assert next(iter(data.train_dataloader())).shape == (1, 3, 64, 64)
    assert [len(loader) for loader in data.val_dataloader()] == [2, 1]
    mel = np.random.default_rng(0).uniform(-1, 2, (2, 80, 30)).astype(np.float32)
    write_packed(tmp_path / "mel.npz", {"train/x": mel}, {"train/x": ["one", "two"]})
    back = Packed(dict(np.load(tmp_path / "mel.npz")), ["train/x"])
    assert (back[1] - torch.from_numpy(mel[1])).abs().max() <= 2 / 255 + 1e-6
    with pytest.raises(ValueError, match="path must be a file of recipes"):
        PackedData(str(tmp_path / "none.npz"))
    with pytest.raises(ValueError, match="path must hold items of the split 'test'"):
        data.kinds("test")
    with pytest.raises(ValueError, match="names of train/x must be 2, got 1"):
        write_packed(tmp_path / "x.npz", {"train/x": mel}, {"train/x": ["one"]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": "beauty"}, 'target must be "mass", "error" or "features"'),
        ({"error_share": 0.95}, "error_share must be in"),
        ({"cold": 0.0}, "cold must be above 0 and at most warm"),
        ({"cold": 0.6}, "cold must be above 0 and at most warm"),
    ],
)
def test_impossible_goals_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TowerGoal(**given)
    assert math.isclose(TowerGoal().temperature, 0.2)
