"""What sparsify and densify do to a model, its training, and the scorers' files."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mm_sparse as mms
from mm_sparse.integrations import context, state
from mm_sparse.integrations.hf import attention
from tests.support.hf_models import (
    ATTENTION,
    IMAGE,
    SPARSE,
    TEXT,
    WHOLE,
    build,
    long_ids,
)
from tests.support.selections import scored_again

tf: Any = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_audio"])
@torch.no_grad()
def test_densify_restores_everything(name: str) -> None:
    case = build(name)
    model, inputs = case.model, case.inputs("left")
    before, logits = copy.deepcopy(model.state_dict()), model(**inputs).logits
    names = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    mms.sparsify(model, WHOLE, scorer="relevance")
    mms.sparsify(model, SPARSE)
    model(**inputs)
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(state[key].equal(before[key]) for key in before)
    mms.densify(mms.densify(model))
    assert model(**inputs).logits.equal(logits)
    now = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    assert now == names
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


@torch.no_grad()
def test_sparse_keeps_the_asked_share_and_is_finite() -> None:
    case = build("llama")
    ids = long_ids()
    dense = case.model(ids).logits
    mms.sparsify(case.model, SPARSE)
    logits = case.model(ids).logits
    assert logits.isfinite().all()
    assert (logits - dense).abs().max() > 1e-2
    found = mms.report(case.model)
    assert found.density == pytest.approx(0.3, abs=0.04)
    assert all(len(row.head_density) == 2 for row in found.rows)


@torch.no_grad()
def test_sparse_context_puts_back_what_was_there() -> None:
    case = build("llama")
    ids = long_ids(100)
    dense = case.model(ids).logits
    with mms.sparse(case.model, SPARSE) as model:
        assert model is case.model
        assert not model(ids).logits.equal(dense)
    assert case.model(ids).logits.equal(dense)
    mms.sparsify(case.model, SPARSE, scorer="relevance")
    held = state.scorers_of(case.model)["model/layers/0/self_attn"]
    with pytest.raises(RuntimeError), mms.sparse(case.model, WHOLE):
        raise RuntimeError
    assert state.attention_layers(case.model)[ATTENTION].shared.config == SPARSE
    assert state.scorers_of(case.model)["model/layers/0/self_attn"] is held


def test_untrained_scorers_change_nothing_and_train() -> None:
    case = build("llama")
    ids = long_ids(200)
    mms.sparsify(case.model, SPARSE)
    with torch.no_grad():
        plain = case.model(ids).logits
    mms.sparsify(case.model, SPARSE, scorer="relevance")
    with torch.no_grad():
        torch.testing.assert_close(case.model(ids).logits, plain)
    calls = []
    with context.capture_attention(case.model, calls.append):
        case.model(ids)
    assert [call.name for call in calls] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert not any(call.scores.values.requires_grad for call in calls)
    again = [scored_again(case.model, call).values for call in calls]
    torch.testing.assert_close(again, [call.scores.values for call in calls])
    sum(values.clamp(min=-20).square().mean() for values in again).backward()
    assert all(p.grad is not None for p in state.scorers_of(case.model)[
        "model/layers/0/self_attn"
    ].parameters())  # fmt: skip
    assert len(list(state.scorer_parameters(case.model))) == 6


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_equals_stock_with_and_without_checkpointing(reentrant: bool) -> None:
    case = build("gemma3")
    model, inputs = case.model, case.inputs("left")
    model.train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        ids = inputs["input_ids"]
        labels = ids.masked_fill((inputs["attention_mask"] == 0) | (ids == IMAGE), -100)
        model(**inputs, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.model.language_model.layers.parameters()]

    stock = gradients()
    mms.sparsify(model, WHOLE)
    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients()
    for a, b, c in zip(stock, plain, again, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(c, b, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_scorers_are_saved_and_loaded(tmp_path: Path) -> None:
    case, other = build("llava_onevision"), build("llava_onevision")
    inputs = case.inputs("none")
    mms.sparsify(case.model, SPARSE, scorer="relevance")
    for parameter in state.scorer_parameters(case.model):
        parameter.normal_(std=0.3)
    mms.save_scorers(case.model, tmp_path / "scorers")
    record = json.loads((tmp_path / "scorers" / "scorers.json").read_text())
    assert len(record["layers"]) == 4
    mms.load_scorers(other.model, tmp_path / "scorers")
    assert state.attention_layers(other.model).popitem()[1].shared.config == SPARSE
    assert other.model(**inputs).logits.equal(case.model(**inputs).logits)
    wrong = build("llama").model
    with pytest.raises(ValueError, match="folder must hold scorers of the model's layers"):
        mms.load_scorers(wrong, tmp_path / "scorers")
    with pytest.raises(ValueError, match=r"no scorers\.safetensors"):
        mms.load_scorers(wrong, tmp_path)
    with pytest.raises(ValueError, match="model must be sparsified, got a Qwen2Audio"):
        mms.save_scorers(build("qwen2_audio").model, tmp_path)


def test_a_copy_of_a_sparsified_model_works() -> None:
    case = build("llama")
    ids = long_ids(100)
    mms.sparsify(case.model, SPARSE, scorer="relevance")
    twin = copy.deepcopy(case.model)
    with torch.no_grad():
        assert twin(ids).logits.equal(case.model(ids).logits)
    assert state.attention_layers(twin)[ATTENTION].module is twin.model.layers[0].self_attn
    mms.densify(case.model)
    assert state.attention_layers(twin)[ATTENTION].scorer is not None
    mms.densify(twin)
    assert twin.config._attn_implementation == case.model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_model_that_shares_the_config_stays_dense() -> None:
    config = tf.LlamaConfig(**TEXT)
    one, two = tf.LlamaForCausalLM(config).eval(), tf.LlamaForCausalLM(config).eval()
    before = two(long_ids(50)).logits
    mms.sparsify(one, SPARSE)
    attention._warn_of_dense.cache_clear()
    with pytest.warns(UserWarning, match="was not sparsified: it runs dense"):
        assert two(long_ids(50)).logits.equal(before)


def test_under_autocast_scores_and_lessons_see_its_dtype() -> None:
    """Rotary embeddings come in float32 then, which would make scoring slow."""
    case = build("llama")
    mms.sparsify(case.model, SPARSE)
    calls = []
    with context.capture_attention(case.model, calls.append), torch.autocast("cpu", torch.bfloat16):
        case.model(long_ids())
    sparse = [call for call in calls if call.selection is not None]
    assert sparse
    assert all(call.q.dtype == call.k.dtype == torch.bfloat16 for call in sparse)


@torch.no_grad()
def test_scorers_of_a_wrapped_tower_serve_the_bare_one(tmp_path: Path) -> None:
    """Names that differ in what all begin with are those of one tower."""

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = build("llama").model

        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            return self.tower(**inputs).logits

    inputs = build("llama").inputs("none")
    wrapped, bare = Wrapped(), build("llama").model
    name = "tower.model.layers.1.self_attn"
    mms.sparsify(wrapped, replace(SPARSE, layer_ratio={name: 0.9}), scorer="fine")
    for parameter in state.scorer_parameters(wrapped):
        parameter.normal_(std=0.3)
    mms.save_scorers(wrapped, tmp_path)
    mms.load_scorers(bare, tmp_path)
    assert list(state.sparse_config(bare).layer_ratio) == ["model.layers.1.self_attn"]
    assert bare(**inputs).logits.equal(wrapped(**inputs))
    mms.load_scorers(Wrapped(), tmp_path)


@torch.no_grad()
def test_a_watched_dense_run_has_a_layout_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    case = build("llama")
    mms.sparsify(case.model, SPARSE)
    calls: list[context.AttentionCall] = []
    with (
        context.override_config(case.model, backend="dense"),
        context.capture_attention(case.model, calls.append),
    ):
        case.model(long_ids())
    assert calls
    assert all(call.selection is None and call.plan().units.shape[1] > 1 for call in calls)
