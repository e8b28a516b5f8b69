"""Towers of timm, open_clip and torchaudio under the same functions as transformers models."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mm_sparse as mms
from mm_sparse.integrations import context, state
from tests.support.selections import scored_again
from tests.support.tower_models import SPARSE, TOWERS, WHOLE, build, random

for needed in ("timm", "open_clip", "torchaudio"):
    pytest.importorskip(needed)


def marks(model: nn.Module) -> dict[str, Any]:
    """Class, attributes and number of hooks of every module."""
    return {
        name: (type(m), set(vars(m)), len(m._forward_hooks) + len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_whole_ratio_equals_stock_and_densify_restores(name: str) -> None:
    case = build(name)
    model = case.model
    before, weights, was = case.run(model), copy.deepcopy(model.state_dict()), marks(model)
    mms.sparsify(model, WHOLE)
    for found, stock in zip(case.run(model), before, strict=True):
        torch.testing.assert_close(found, stock, atol=1e-5, rtol=1e-5)
    rows = mms.report(model).rows
    assert len([row for row in rows if row.mode == "sparse"]) >= 2
    assert all(row.mode == "sparse" or row.reason == "cross-attention" for row in rows)
    state = model.state_dict()
    assert list(state) == list(weights)
    assert all(state[key].equal(weights[key]) for key in weights)
    mms.densify(mms.densify(model))
    assert marks(model) == was
    assert all(a.equal(b) for a, b in zip(case.run(model), before, strict=True))


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_sparse_keeps_less_and_changes_outputs(name: str) -> None:
    case = build(name)
    dense = case.run(case.model)
    with mms.sparse(case.model, SPARSE) as model:
        found = case.run(model)
        density = mms.report(model).rows[0].density
    assert density is not None
    assert density < 0.6
    for a, b in zip(found, dense, strict=True):
        assert a.isfinite().all()
        assert (a - b).abs().max() > 1e-4
    assert all(a.equal(b) for a, b in zip(case.run(case.model), dense, strict=True))


@pytest.mark.parametrize(
    ("name", "prefix", "grid"),
    [
        ("vit", 1, (12, 12)),
        ("dynamic", 1, (10, 14)),
        ("deit_distilled", 2, (12, 12)),
        ("dinov2_registers", 5, (12, 12)),
        ("dinov3", 5, (12, 12)),
        ("siglip", 0, (12, 12)),
        ("naflex", 4, (12, 10)),
        ("naflex_padded", 4, None),
        ("clip", 1, (12, 12)),
    ],
)
@torch.no_grad()
def test_class_and_register_tokens_are_kept_by_every_tile(name: str, prefix: int, grid) -> None:
    case = build(name)
    calls: list[context.AttentionCall] = []
    mms.sparsify(case.model, SPARSE)
    with context.capture_attention(case.model, calls.append):
        case.run(case.model)
    call = next(c for c in calls if c.selection is not None and c.scores is not None
                and c.scores.plan.layout.modality.eq(int(mms.Modality.IMAGE)).all())  # fmt: skip
    assert call.selection is not None
    layout = call.selection.plan.layout
    seen = call.selection.to_dense_mask()  # (B, H, N, N)
    live = seen.any(-1)
    assert seen[..., :prefix].all(-1)[live].all()
    assert call.selection.density() < 0.6
    behind = layout.segment[:, prefix]
    assert (layout.segment[:, :prefix] != behind[:, None]).all()
    assert [row.get(int(n)) for row, n in zip(layout.grids, behind, strict=True)] == [grid] * 2


@torch.no_grad()
def test_modalities_and_masks_of_the_towers() -> None:
    kinds = {"clip": {1, 0}, "clip_timm": {1, 0}, "vit": {1}, "wav2vec2": {2}, "conformer": {2}}
    for name, expected in kinds.items():
        model = mms.sparsify(build(name).model, WHOLE)
        assert {int(x.modality) for x in state.attention_layers(model).values()} == expected  # pyright: ignore
    case, calls = build("clip"), []
    mms.sparsify(case.model, mms.SparseConfig(causal=True, dense_below=0))
    with context.capture_attention(case.model, calls.append):
        case.run(case.model)
    layouts = {call.name.split(".")[0]: call.scores.plan.layout for call in calls}
    assert layouts["transformer"].span[0, :, 1].tolist() == list(range(1, 78))
    assert layouts["visual"].span[0, :, 1].eq(145).all()


@pytest.mark.parametrize("name", ["naflex_padded", "wav2vec2_lengths", "conformer"])
@torch.no_grad()
def test_padding_is_known_and_layers_share_a_layout(name: str) -> None:
    case, calls = build(name), []
    mms.sparsify(case.model, SPARSE)
    with context.capture_attention(case.model, calls.append):
        case.run(case.model)
    layouts = [call.scores.plan.layout for call in calls]
    valid = {"naflex_padded": [100, 112], "wav2vec2_lengths": [150, 100], "conformer": [150, 97]}
    assert layouts[0].valid.sum(1).tolist() == valid[name]
    assert all(layout is layouts[0] for layout in layouts)
    fresh = []
    with torch.inference_mode(), context.capture_attention(case.model, fresh.append):
        case.run(case.model)
    assert fresh[0].scores.plan.layout.valid.equal(layouts[0].valid)


@pytest.mark.parametrize("name", ["vit", "clip", "wav2vec2_lengths", "conformer"])
@torch.no_grad()
def test_short_inputs_run_stock(name: str) -> None:
    case = build(name)
    dense = case.run(case.model)
    mms.sparsify(case.model, mms.SparseConfig(ratio=0.1, dense_below=1000))
    assert all(a.equal(b) for a, b in zip(case.run(case.model), dense, strict=True))
    rows = mms.report(case.model).rows
    assert {row.mode for row in rows} == {"dense"}
    assert all("dense_below (1000)" in row.reason for row in rows)
    mms.sparsify(case.model, mms.SparseConfig(backend="dense", dense_below=0))
    assert all(a.equal(b) for a, b in zip(case.run(case.model), dense, strict=True))
    calls: list[context.AttentionCall] = []
    with context.capture_attention(case.model, calls.append):
        case.run(case.model)
    assert [call.selection for call in calls] == [None] * len(rows)


@pytest.mark.parametrize("name", ["dinov2_registers", "clip", "conformer"])
def test_copies_and_pickles_are_sparse_and_apart(name: str) -> None:
    case = build(name)
    with torch.no_grad():
        dense = case.run(case.model)
        mms.sparsify(case.model, SPARSE, scorer="relevance")
        found = case.run(case.model)
        for twin in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
            assert all(a.equal(b) for a, b in zip(case.run(twin), found, strict=True))
            for key, layer in state.attention_layers(twin).items():
                assert layer.module is twin.get_submodule(key)
            mms.densify(twin)
            assert all(a.equal(b) for a, b in zip(case.run(twin), dense, strict=True))
        assert all(a.equal(b) for a, b in zip(case.run(case.model), found, strict=True))


@pytest.mark.parametrize("name", ["dinov3", "clip_custom_attention", "hubert", "conformer"])
def test_scorers_train_and_go_through_files(name: str, tmp_path: Path) -> None:
    case, other = build(name), build(name)
    mms.sparsify(case.model, SPARSE)
    with torch.no_grad():
        plain = case.run(case.model)
    mms.sparsify(case.model, SPARSE, scorer="relevance")
    with torch.no_grad():
        for a, b in zip(case.run(case.model), plain, strict=True):
            torch.testing.assert_close(a, b)
    calls: list[Any] = []
    with context.capture_attention(case.model, calls.append):
        case.run(case.model)
    again = [scored_again(case.model, call).values for call in calls]
    sum(values.clamp(min=-20).square().mean() for values in again).backward()
    parameters = list(state.scorer_parameters(case.model))
    assert all(p.grad is not None for p in parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.3)
        found = case.run(case.model)
        assert not all(a.equal(b) for a, b in zip(found, plain, strict=True))
        mms.save_scorers(case.model, tmp_path)
        mms.load_scorers(other.model, tmp_path)
        assert all(a.equal(b) for a, b in zip(case.run(other.model), found, strict=True))


@pytest.mark.parametrize("name", ["vit", "clip", "conformer"])
def test_training_equals_stock_with_and_without_checkpointing(name: str) -> None:
    case = build(name)

    def gradients() -> dict[str, torch.Tensor]:
        case.model.zero_grad()
        sum(x.square().mean() for x in case.run(case.model)).backward()  # pyright: ignore
        found = {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}
        return {n: g.clone() for n, g in found.items()}

    stock = gradients()
    mms.sparsify(case.model, WHOLE)
    trials = [gradients()]
    if hasattr(case.model, "set_grad_checkpointing"):
        case.model.set_grad_checkpointing()
        trials.append(gradients())
    for found in trials:
        for key, value in stock.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_towers_inside_a_bigger_module() -> None:
    image, sound = build("dinov2_registers"), build("conformer")

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eyes, self.ears = image.model, sound.model

        def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
            return [self.eyes(pictures), *sound.run(self.ears)]

    model, pictures = Both(), random(2, 3, 48, 48)
    dense = model(pictures)
    mms.sparsify(model, WHOLE)
    for a, b in zip(model(pictures), dense, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    found = mms.report(model, {"pictures": pictures}, mass=True)
    names = [f"eyes.blocks.{i}.attn" for i in (0, 1)]
    names += [f"ears.conformer_layers.{i}.self_attn" for i in (0, 1)]
    assert [(row.name, row.mode) for row in found.rows] == [(name, "sparse") for name in names]
    assert all(row.seconds is not None and row.mass is not None for row in found.rows)
    assert "eyes.blocks.0.attn" in str(found)
    with pytest.raises(ValueError, match="must not be a part of a sparsified model"):
        mms.sparsify(model.eyes, WHOLE)
    message = "model must hold a transformers model, got Both"
    kinds = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=message), context.set_modality(model, kinds):
        pass


@torch.no_grad()
def test_transformers_and_timm_in_one_model() -> None:
    tf: Any = pytest.importorskip("transformers")
    from tests.support.hf_models import TEXT

    torch.manual_seed(0)
    wrapped = tf.TimmWrapperConfig(architecture="test_vit", num_labels=0)
    parts = {"eyes": tf.TimmWrapperModel(wrapped), "text": tf.LlamaModel(tf.LlamaConfig(**TEXT))}
    model = nn.ModuleDict(parts).eval()
    ids, pictures = torch.randint(3, 99, (2, 50)), random(2, 3, 160, 160)

    def run() -> list[torch.Tensor]:
        eyes: Any = model["eyes"](pictures)
        return [eyes.last_hidden_state, model["text"](ids).last_hidden_state]

    dense = run()
    mms.sparsify(model, WHOLE)
    for a, b in zip(run(), dense, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    rows = mms.report(model).rows
    assert {row.cls for row in rows} == {"Attention", "LlamaAttention"}
    assert {row.mode for row in rows} == {"sparse"}
    mms.densify(model)
    assert all(a.equal(b) for a, b in zip(run(), dense, strict=True))


@pytest.mark.parametrize("name", ["vit", "clip"])
@torch.no_grad()
def test_compiled_and_autocast_towers(name: str) -> None:
    case = build(name)
    dense = case.run(case.model)
    mms.sparsify(case.model, WHOLE)
    if name == "vit":
        for a, b in zip(case.run(torch.compile(case.model, backend="eager")), dense, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    calls: list[context.AttentionCall] = []
    with torch.autocast("cpu", torch.bfloat16), context.capture_attention(case.model, calls.append):
        found = case.run(case.model)
    assert all(call.q.dtype == torch.bfloat16 for call in calls)
    for a, b in zip(found, dense, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


def test_only_the_libraries_of_the_model_are_imported() -> None:
    code = (
        "import sys, mm_sparse as mms; mms.sparsify, mms.report;"
        "libraries = ('timm', 'open_clip', 'torchaudio', 'transformers');"
        "assert not [x for x in libraries if x in sys.modules];"
        "import timm; m = timm.create_model('test_vit');"
        "mms.densify(mms.sparsify(m, scorer='relevance'));"
        "assert not [x for x in libraries[1:] if x in sys.modules]"
    )
    root = Path(__file__).resolve().parents[4]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
