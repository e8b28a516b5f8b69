"""Layers with room for the tokens to come, and steps on them inside a compiled graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mm_sparse as mms
from tests.support.hf_models import build, long_ids

transformers = pytest.importorskip("transformers")

SPARSE = mms.SparseConfig(ratio=0.3, dense_below=0, sinks=4, window=16)
SETTINGS = {"sinks": 4, "window": 16}
ROOM = 40


def model_of(sparse: bool) -> Any:
    model = build("llama").model
    return mms.sparsify(model, SPARSE) if sparse else model


def padded(ids: Tensor, missing: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones_like(ids)
    mask[0, :missing] = 0
    return ids.masked_fill(mask == 0, 0), mask


def steps(model: Any, cache: Any, ids: Tensor, mask: Tensor, first: int, run: Any = None) -> Tensor:
    """Logits of the prefill's last token and of steps to the end of the ids."""
    out = model(ids[:, :first], attention_mask=mask[:, :first], past_key_values=cache)
    logits, run = [out.logits[:, -1]], model if run is None else run
    for t in range(first, ids.shape[1]):
        # As long as it will get, so that a graph is compiled once.
        whole = torch.zeros(len(ids), first + ROOM, dtype=torch.long)
        whole[:, : t + 1] = mask[:, : t + 1]
        out = run(ids[:, t : t + 1], attention_mask=whole, past_key_values=cache)
        logits.append(out.logits[:, -1].clone())
    return torch.stack(logits)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("keep", [1.0, 0.4, (0.3, 0.6)])
@torch.no_grad()
def test_it_generates_what_a_growing_one_does(keep: Any, sparse: bool) -> None:
    model = model_of(sparse)
    ids, mask = padded(long_ids(100), 7)
    settings = {"max_new_tokens": ROOM, "min_new_tokens": ROOM, "do_sample": False}
    for more in ({}, {"prefill_chunk_size": 30}):
        found, want = (
            model.generate(
                ids, attention_mask=mask, past_key_values=cache, **settings, **more
            )
            for cache in (
                mms.SparseCache(model, keep, **SETTINGS, max_new_tokens=ROOM),
                mms.SparseCache(model, keep, **SETTINGS),
            )
        )  # fmt: skip
        assert torch.equal(found, want)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("missing", [0, 7, 70])
@pytest.mark.parametrize("keep", [0.4, (0.3, 0.6)])
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
@pytest.mark.thinned(3)
def test_compiled_steps_equal_eager_ones(keep: Any, missing: int, sparse: bool) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    model = model_of(sparse)
    ids, mask = padded(long_ids(130), missing)
    cache = mms.SparseCache(model, keep, **SETTINGS, max_new_tokens=ROOM)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    graphs = []
    for turn in range(2):  # Another sequence in the same cache.
        cache.reset()
        ids = ids if turn == 0 else ids.flip(0)
        mask = mask if turn == 0 else mask.flip(0)
        found = steps(model, cache, ids, mask, 100, compiled)
        want = steps(model, mms.SparseCache(model, keep, **SETTINGS), ids, mask, 100)
        torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert graphs[0] == graphs[1] <= 2


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_steps_stay_sparse_in_a_graph() -> None:
    model, ids = model_of(sparse=True), long_ids(130)
    mask = torch.ones_like(ids)
    logits = []
    for config in ({}, {"backend": "dense"}):
        torch.compiler.reset()
        with mms.override_config(model, **config):
            cache = mms.SparseCache(model, 0.4, **SETTINGS, max_new_tokens=ROOM)
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            logits.append(steps(model, cache, ids, mask, 100, compiled))
    assert not torch.allclose(*logits, atol=1e-2)


@torch.no_grad()
def test_tensors_have_their_size_and_place() -> None:
    model, ids = model_of(sparse=False), long_ids(140)
    cache = mms.SparseCache(model, 0.4, **SETTINGS, max_new_tokens=ROOM)
    model(ids[:, :100], past_key_values=cache)
    places = [layer.keys.data_ptr() for layer in cache.layers]
    for layer in cache.layers:
        assert layer.keys.shape == (2, 2, 40 + ROOM + 16, 8)
        assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * 4
    for t in range(100, 140):
        model(ids[:, t : t + 1], past_key_values=cache)
    assert [layer.held for layer in cache.layers] == [80, 80]
    assert int(cache.get_seq_length()) == 140
    cache.crop(-40)
    assert int(cache.get_seq_length()) == 100
    swap = torch.tensor([1, 0])
    cache.reorder_cache(swap)
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    found = model(ids[swap, 100:103], past_key_values=cache).logits
    whole = mms.SparseCache(model, 0.4, **SETTINGS)
    model(ids[:, :100], past_key_values=whole)
    want = model(ids[:, 100:103], past_key_values=whole).logits
    torch.testing.assert_close(found, want[swap], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_prompt_that_is_short_gets_room_too() -> None:
    model, ids = model_of(sparse=False), long_ids(12)
    cache = mms.SparseCache(model, 0.4, **SETTINGS, max_new_tokens=ROOM)
    want = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False).equal(
        want
    )
    assert cache.layers[0].keys.shape[2] == 12 + ROOM + 16


@torch.no_grad()
def test_what_cannot_have_a_fixed_size_is_refused() -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be a positive int"):
        mms.SparseCache(model_of(False), max_new_tokens=0)
    with pytest.raises(ValueError, match="full attention in all layers"):
        mms.SparseCache(build("gemma3").model, max_new_tokens=8)


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_generate_compiles_its_steps_whole(sparse: bool) -> None:
    from torch._dynamo.utils import counters

    model = model_of(sparse)
    ids = long_ids(100)[:1]
    settings = {"max_new_tokens": ROOM, "min_new_tokens": ROOM, "do_sample": False}
    want = model.generate(ids, past_key_values=mms.SparseCache(model, 0.4, **SETTINGS), **settings)
    torch.compiler.reset()
    counters.clear()
    compiling = transformers.CompileConfig(fullgraph=False, backend="eager")
    # Else `generate` compiles on a GPU alone.
    compiling._compile_all_devices = True
    cache = mms.SparseCache(model, 0.4, **SETTINGS, max_new_tokens=ROOM)
    found = model.generate(ids, past_key_values=cache, compile_config=compiling, **settings)
    assert found.equal(want)
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_gpu_steps_are_one_graph(sparse: bool) -> None:
    torch.compiler.reset()
    model = model_of(sparse).cuda()
    ids = long_ids(100)[:1].cuda()
    settings = {"max_new_tokens": ROOM, "min_new_tokens": ROOM, "do_sample": False}
    want = model.generate(ids, past_key_values=mms.SparseCache(model, 0.4, **SETTINGS), **settings)
    cache = mms.SparseCache(model, 0.4, **SETTINGS, max_new_tokens=ROOM)
    # On a GPU `generate` compiles steps of a cache of a fixed size.
    assert model.generate(ids, past_key_values=cache, **settings).equal(want)


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_memory_is_given_back() -> None:
    config = build("llama").model.config
    config.num_hidden_layers, config.max_position_embeddings = 8, 40_000
    model = transformers.LlamaForCausalLM(config).cuda().to(torch.bfloat16)
    ids = torch.randint(3, 99, (1, 32_768), device="cuda")

    def held(cache: Any) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        model(ids, past_key_values=cache, logits_to_keep=1)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before

    whole = held(transformers.DynamicCache())
    # The allocator rounds, and positions take a little.
    assert held(mms.SparseCache(model, 0.4)) < 0.5 * whole
