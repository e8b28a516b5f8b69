"""Prefill and training of sparsified transformers models inside `torch.compile`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import mm_sparse as mms
from tests.support.hf_models import SPARSE, TEXT, build, long_ids

pytest.importorskip("transformers")

from torch._dynamo.utils import counters

from mm_sparse.integrations.hf import traced_attention
from mm_sparse.integrations.layer import LAYER

# Of transformers' own code under dynamo.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
LENGTHS = (200, 181, 230)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def mask_of(ids: Tensor, padding: str) -> Tensor:
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :20] = 0
    elif padding == "right":
        mask[0, -20:] = 0
    return mask


def sparse_llama(**changes: Any) -> Any:
    from tests.support.hf_models import llama

    torch.manual_seed(0)
    model = llama(**changes).model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return mms.sparsify(model, SPARSE)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found


def assert_same_gradients(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name in found.keys() | want.keys():
        a, b = found.get(name), want.get(name)
        # A graph gives zeros where autograd gives nothing.
        a = torch.zeros_like(b) if a is None and b is not None else a
        b = torch.zeros_like(a) if b is None and a is not None else b
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023


def breaks(case: Any, train: bool, compiled: str) -> int:
    """Graph breaks of a forward, and of a backward pass."""
    torch.compiler.reset()
    counters.clear()
    model = case.model
    backend = "aot_eager" if train else "eager"
    step = torch.compile(model, backend=backend) if compiled == "wrapped" else model
    if compiled == "in place":
        model.compile(backend=backend)
    inputs = case.inputs("left")
    if not case.placeholders:
        inputs = {"input_ids": long_ids(200)[:, :200]}
    with torch.set_grad_enabled(train):
        out = step(**inputs, use_cache=not train).logits
        if train:
            out.square().mean().backward()
    return sum(counters["graph_break"].values())


@pytest.mark.parametrize("compiled", ["wrapped", "in place"])
@pytest.mark.parametrize("train", [False, True], ids=["prefill", "training"])
@pytest.mark.parametrize("name", ["llama", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_sparse_models_break_no_more_graphs_than_stock(
    name: str, train: bool, compiled: str
) -> None:
    stock = breaks(build(name), train, compiled)
    case = build(name)
    mms.sparsify(case.model, SPARSE)
    assert breaks(case, train, compiled) <= stock
    assert "sparse" in {row.mode for row in mms.report(case.model).rows}


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@torch.no_grad()
def test_prefill_equals_eager(cache: str) -> None:
    """Other lengths and other masks are inputs of the same graphs."""
    from transformers import DynamicCache, StaticCache

    model = sparse_llama()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in LENGTHS:
        ids = long_ids(length)[:, :length]
        for padding in ("none", "left", "right"):
            shown, found = mask_of(ids, padding), []
            for run in (model, step):
                kwargs: dict[str, Any] = {"use_cache": False}
                if cache == "dynamic":
                    kwargs = {"past_key_values": DynamicCache(config=model.config)}
                elif cache == "static":
                    kwargs = {
                        "past_key_values": StaticCache(config=model.config, max_cache_len=256)
                    }
                found.append(run(ids, attention_mask=shown, **kwargs).logits[shown.bool()])
            torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    assert not counters["graph_break"]
    assert counters["frames"]["ok"] <= 2 * 4  # Of the hook and of the forward.


@torch.no_grad()
def test_a_changed_mask_of_the_same_length_is_seen() -> None:
    model, ids = sparse_llama(), long_ids(200)[:, :200]
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    mask = mask_of(ids, "left")
    first = step(ids, attention_mask=mask, use_cache=False).logits
    mask[0, :60] = 0  # In place: the same tensor.
    graphs = counters["stats"]["unique_graphs"]
    second = step(ids, attention_mask=mask, use_cache=False).logits
    assert counters["stats"]["unique_graphs"] == graphs
    assert not torch.allclose(first[0, 60:], second[0, 60:], atol=1e-3)
    want = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(second[mask.bool()], want[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["prefill", "steps"])
@torch.no_grad()
def test_a_static_cache_that_a_graph_fills_again(kind: str) -> None:
    """What the prefill before has written down for steps is of another sequence."""
    from transformers import StaticCache

    model, ids = sparse_llama(), long_ids(200)[:1, :200]
    step = torch.compile(model, backend="aot_eager")
    own, other = (StaticCache(config=model.config, max_cache_len=256) for _ in range(2))
    model(ids[:, :150], past_key_values=own)
    if kind == "steps":
        for t in range(150, 153):
            step(ids[:, t : t + 1], past_key_values=own)
    own.reset()
    again = ids.flip(1)
    mask = torch.ones_like(again)
    mask[:, :30] = 0
    found = [step(again[:, :120], attention_mask=mask[:, :120], past_key_values=own).logits]
    want = [model(again[:, :120], attention_mask=mask[:, :120], past_key_values=other).logits]
    torch.testing.assert_close(found[0][:, 30:], want[0][:, 30:], atol=1e-5, rtol=1e-5)
    # Steps are dense after a prefill in a graph.
    with mms.override_config(model, ratio=1.0):
        whole = torch.zeros(1, 256, dtype=torch.long)
        for t in range(120, 124):
            whole[:, : t + 1] = mask[:, : t + 1]
            token = again[:, t : t + 1]
            b = model(token, attention_mask=whole, past_key_values=other).logits
            want.append(b)
    for t in range(120, 124):
        whole = torch.zeros(1, 256, dtype=torch.long)
        whole[:, : t + 1] = mask[:, : t + 1]
        a = step(again[:, t : t + 1], attention_mask=whole, past_key_values=own).logits
        torch.testing.assert_close(a, want[t - 119], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recomputed", ["never", "checkpoint", "reentrant"])
@pytest.mark.parametrize("compiled", ["whole", "blocks"])
@pytest.mark.thinned(3)
def test_training_equals_eager(compiled: str, recomputed: str) -> None:
    """Two forwards before a backward pass, frozen weights, padding, and a checkpoint."""
    model = sparse_llama().train()
    for name, parameter in model.named_parameters():
        # Reentrant checkpoints want an input with a gradient.
        parameter.requires_grad_(any(part in name for part in ("q_proj", "v_proj", "embed")))
    if recomputed != "never":
        model.gradient_checkpointing_enable({"use_reentrant": recomputed == "reentrant"})

    def run(step: Any, length: int, padding: str) -> dict[str, Tensor]:
        ids = long_ids(length)[:, :length]
        shown = mask_of(ids, padding)
        first = step(ids, attention_mask=shown, use_cache=False).logits[shown.bool()]
        second = step(ids.flip(1), use_cache=False).logits
        (first.square().mean() + second.square().mean()).backward()
        return gradients(model)

    cases = [(length, padding) for length in LENGTHS for padding in ("left", "right")]
    want = [run(model, *case) for case in cases]
    step = model
    if compiled == "whole":
        step = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        for block in model.model.layers:
            block.compile(backend="aot_eager", fullgraph=True)
    for case, known in zip(cases, want, strict=True):
        found = run(step, *case)
        assert found
        assert_same_gradients(found, known)
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "in place", "blocks", "blocks, checkpoint"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_modalities_reach_graphs(name: str, how: str) -> None:
    case = build(name)
    model = mms.sparsify(case.model, SPARSE)
    if "checkpoint" in how:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def run(step: Any, padding: str) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = case.inputs(padding)
        logits = step(**inputs, use_cache=False).logits
        logits[inputs["attention_mask"].bool()].square().mean().backward()
        return logits.detach()[inputs["attention_mask"].bool()], gradients(model)

    want = [run(model, padding) for padding in ("none", "left", "right")]
    step = model
    if how == "whole":
        step = torch.compile(model, backend="aot_eager")
    elif how == "in place":
        model.compile(backend="aot_eager")
    else:
        for block in model.model.language_model.layers:
            block.compile(backend="aot_eager")
    for padding, (logits, known) in zip(("none", "left", "right"), want, strict=True):
        found, grads = run(step, padding)
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
        assert_same_gradients(grads, known)
        pairs = mms.report(model).rows[-1].pair_density
        assert pairs is not None
        assert (mms.Modality.TEXT, mms.Modality.IMAGE) in pairs


@pytest.mark.parametrize("train", [False, True], ids=["prefill", "training"])
@pytest.mark.parametrize("kind", ["sliding window", "documents", "four dimensions"])
@pytest.mark.thinned(3)
def test_other_masks(kind: str, train: bool) -> None:
    import transformers as tf

    torch.manual_seed(0)
    model: Any = sparse_llama()
    if kind == "sliding window":
        model = tf.MistralForCausalLM(tf.MistralConfig(**TEXT, sliding_window=50)).eval()
        mms.sparsify(model, SPARSE)
    step = torch.compile(model, backend="aot_eager")
    for length in LENGTHS[:2]:
        ids = long_ids(length)[:, :length]
        kwargs: dict[str, Any] = {"attention_mask": mask_of(ids, "left")}
        shown = kwargs["attention_mask"].bool()
        if kind == "documents":
            position = torch.cat([torch.arange(90), torch.arange(length - 90)])[None]
            kwargs, shown = {"position_ids": position.expand(2, -1)}, torch.ones_like(shown)
        elif kind == "four dimensions":
            seen = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
            kwargs, shown = {"attention_mask": seen}, torch.ones_like(shown)
        found = []
        for run in (model, step):
            with torch.set_grad_enabled(train):
                logits = run(ids, use_cache=False, **kwargs).logits[shown]
                if train:
                    logits.square().mean().backward()
            found.append((logits.detach(), gradients(model)))
        torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
        assert_same_gradients(found[1][1], found[0][1])
    if kind != "four dimensions":
        assert not counters["graph_break"]


def test_nothing_is_left_of_a_forward_without_a_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs: list[weakref.ref[Any]] = []
    made = traced_attention._Graph.__init__

    def note(self: Any, *args: Any) -> None:
        graphs.append(weakref.ref(self))
        made(self, *args)

    monkeypatch.setattr(traced_attention._Graph, "__init__", note)
    model = sparse_llama()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = long_ids(200)[:, :200]
    loss = step(ids, use_cache=False).logits.square().mean()
    assert len(graphs) == 2
    assert all(graph() is not None for graph in graphs)
    del loss
    gc.collect()
    assert all(graph() is None for graph in graphs)
    loss = step(ids, use_cache=False).logits.square().mean()
    loss.backward(retain_graph=True)
    want = gradients(model)
    loss.backward()
    assert_same_gradients(gradients(model), want)
    assert len(graphs) == 4  # Made once a call, for both backward passes.
    del loss
    gc.collect()
    assert all(graph() is None for graph in graphs)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.thinned(2)
def test_no_tensor_is_left_of_a_step(checkpoint: bool) -> None:
    model = sparse_llama().train()
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    ids = long_ids(200)[:, :200]
    least, left = model.config.head_dim * ids.numel(), []
    for _ in range(3):
        model(ids, use_cache=False).logits.square().mean().backward()
        model.zero_grad()
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is Tensor]
        left.append(sum(x.numel() >= least and x.is_floating_point() for x in tensors))
    assert left[1] == left[2]


def test_a_backward_pass_without_the_kept_graph_makes_the_call_again() -> None:
    """Hooks that copy what autograd saves lose it."""
    from torch.autograd.graph import saved_tensors_hooks

    layer = vars(sparse_llama().model.layers[0].self_attn)[LAYER]
    q, k, v = (torch.randn(1, heads, 96, 8, requires_grad=True) for heads in (4, 2, 2))
    found = []
    for hooks in (lambda x: x, lambda x: x.clone()):
        with saved_tensors_hooks(hooks, lambda x: x):
            out, _ = traced_attention.layer_attention(
                q, k, v, layer.number, None, None, None, False, 0.3, True, None, True
            )
        found.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_gradients_go_by_the_tensors_that_the_backward_pass_gives() -> None:
    """A compiler may write to the memory of q, k and v, and computes them again."""
    layer = vars(sparse_llama().model.layers[0].self_attn)[LAYER]
    q, k, v = (torch.randn(1, heads, 96, 8) for heads in (4, 2, 2))
    given = layer.number, None, None, None, False, 0.3, True, None
    copies = [x.clone() for x in (q, k, v)]
    out, kept = traced_attention.layer_attention(q, k, v, *given, True)
    dout = torch.randn_like(out)
    want = traced_attention.layer_attention_backward(dout, kept, q, k, v, *given)
    for x in (q, k, v, out):
        x.zero_()
    found = traced_attention.layer_attention_backward(dout, kept, *copies, *given)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@torch.no_grad()
def test_blocks_share_a_graph() -> None:
    graphs = []
    for sparse in (False, True):
        torch.compiler.reset()
        counters.clear()
        model = sparse_llama(num_hidden_layers=10)
        if not sparse:
            mms.densify(model)
        for block in model.model.layers:
            block.compile(backend="eager", fullgraph=True)
        model(long_ids(200)[:, :200], use_cache=False)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] <= graphs[0]


@torch.no_grad()
@pytest.mark.slow
def test_a_copy_of_a_model_asks_its_own_layers() -> None:
    one = sparse_llama()
    other = mms.sparsify(deepcopy(one), SPARSE.scaled(0.05))
    ids = long_ids(200)[:, :200]
    want = [model(ids, use_cache=False).logits for model in (one, other, deepcopy(one))]
    assert not torch.allclose(want[0], want[1], atol=1e-3)
    for model, known in zip((one, other, deepcopy(one)), want, strict=True):
        step = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(step(ids, use_cache=False).logits, known, atol=1e-5, rtol=1e-5)
    numbers = [int(vars(m.model.layers[0].self_attn)[LAYER].number) for m in (one, deepcopy(one))]
    assert len(set(numbers)) == 2


@torch.no_grad()
@pytest.mark.slow
def test_autocast_and_scorers_that_change() -> None:
    model = sparse_llama()
    mms.sparsify(model, SPARSE, scorer="relevance")
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = long_ids(200)[:, :200]
    for bias in (0.0, 1.0):
        for parameter in mms.scorer_parameters(model):
            parameter.add_(bias * torch.randn_like(parameter))
        with torch.autocast("cpu", torch.bfloat16):
            found, want = (m(ids, use_cache=False).logits for m in (step, model))
        torch.testing.assert_close(found, want, atol=0.05, rtol=0.05)
        found, want = (m(ids, use_cache=False).logits for m in (step, model))
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_settings_of_a_block_break_the_graph_and_hold() -> None:
    model, ids = sparse_llama(), long_ids(200)[:, :200]
    step = torch.compile(model, backend="aot_eager")
    before = step(ids, use_cache=False).logits
    seen: list[str] = []
    with (
        mms.override_config(model, ratio=0.05),
        mms.capture_attention(model, lambda call: seen.append(call.name)),
    ):
        found = step(ids, use_cache=False).logits
        assert len(seen) == 2
        want = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)
    torch.testing.assert_close(step(ids, use_cache=False).logits, before)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["whole", "blocks"])
def test_inductor_equals_eager(compiled: str) -> None:
    import shutil

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler on a CPU")
    compare_with_inductor(compiled, "cpu", torch.float32, 1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("compiled", ["whole", "blocks", "reduce-overhead"])
def test_gpu_inductor_equals_eager(compiled: str) -> None:
    compare_with_inductor(compiled, "cuda", torch.float32, 5e-3)


def compare_with_inductor(compiled: str, device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Prefill and a step of training, at three lengths with other masks."""
    model = sparse_llama().to(device, dtype)

    def run(step: Any, length: int, padding: str) -> list[Tensor]:
        ids = long_ids(length)[:, :length].to(device)
        shown = mask_of(ids, padding)
        with torch.no_grad():
            logits = step(ids, attention_mask=shown, use_cache=False).logits[shown.bool()].clone()
        out = step(ids, attention_mask=shown, use_cache=False).logits[shown.bool()]
        out.square().mean().backward()
        grads = gradients(model)
        return [logits, *(grads[name].clone() for name in sorted(grads))]

    cases = [(length, padding) for length in LENGTHS for padding in ("left", "right")]
    want = [run(model, *case) for case in cases]
    step = model
    if compiled == "blocks":
        for block in model.model.layers:
            block.compile()
    else:
        mode = compiled if compiled != "whole" else None
        step = torch.compile(model, mode=mode)
    for case, known in zip(cases, want, strict=True):
        found = run(step, *case)
        assert len(found) == len(known) > 1
        for a, b in zip(found, known, strict=True):
            scale = float(b.abs().max())
            torch.testing.assert_close(a, b, atol=tolerance * scale, rtol=tolerance)
    assert not counters["graph_break"]
