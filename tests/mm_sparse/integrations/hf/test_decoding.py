"""Steps of decoding: in place, and inside a compiled graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import mm_sparse as mms
from mm_sparse.integrations.hf import attention, decoding
from tests.support.hf_models import IMAGE, build, long_ids

pytest.importorskip("transformers")

CONFIG = mms.SparseConfig(ratio=0.3, dense_below=0, sinks=16, window=16)
BUDGETS = {"model.layers.0.self_attn": (0.2, 0.5), "model.layers.1.self_attn": 0.4}
CONFIGS = {
    "ratio": CONFIG,
    "heads": mms.SparseConfig(ratio=0.3, dense_below=0, window=0, layer_ratio=BUDGETS),
    "queries": mms.SparseConfig(
        ratio=0.3,
        dense_below=0,
        window=0,
        layer_ratio={0: {"TEXT": (0.2, 0.5), "IMAGE": 0.05}},
        query_ratio={"TEXT": 0.4, "IMAGE": (0.1, 0.2)},
    ),
    "tokens": mms.SparseConfig(tokens=64, dense_below=0, sinks=0, unit=32),
    "floors": mms.SparseConfig(ratio=0.3, dense_below=0, modality_floor=0.1),
}


def llama(config: mms.SparseConfig, scorer: str | None = None) -> Any:
    torch.manual_seed(0)
    model = mms.sparsify(build("llama").model, config, scorer=scorer)
    for own in mms.scorers_of(model).values():
        for parameter in own.parameters() if scorer else ():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@contextmanager
def with_plans_of_their_own() -> Iterator[None]:
    """Steps make layouts and plans as any other call does."""
    patch = pytest.MonkeyPatch()
    patch.setattr(attention, "run_step", lambda *_: None)
    try:
        yield
    finally:
        patch.undo()


@contextmanager
def counted_steps() -> Iterator[list[int]]:
    found: list[int] = []
    patch = pytest.MonkeyPatch()
    run_step = decoding.run_step

    def counted(*args: Any) -> Any:
        out = run_step(*args)
        found.append(int(out is not None))
        return out

    patch.setattr(attention, "run_step", counted)
    try:
        yield found
    finally:
        patch.undo()


def masks(rows: int, tokens: int, padding: str) -> Tensor:
    mask = torch.ones(rows, tokens, dtype=torch.long)
    if padding == "left":
        mask[0, :7] = 0
    if padding == "hole":
        mask[0, 20:29] = 0
    return mask


def steps(model: Any, ids: Tensor, mask: Tensor, first: int, cache: Any = None) -> list[Tensor]:
    out = model(ids[:, :first], attention_mask=mask[:, :first], past_key_values=cache)
    cache, logits = out.past_key_values, [out.logits[:, -1]]
    for t in range(first, ids.shape[1]):
        out = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
        logits.append(out.logits[:, -1])
    return logits


@pytest.mark.parametrize("padding", ["none", "left", "hole"])
@pytest.mark.parametrize("scorer", [None, "fine", "relevance"])
@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
@pytest.mark.thinned(4)
def test_steps_equal_those_with_plans_of_their_own(
    config: str, scorer: str | None, padding: str
) -> None:
    model, ids = llama(CONFIGS[config], scorer), long_ids(140)
    mask = masks(2, 140, padding)
    with with_plans_of_their_own():
        want = steps(model, ids, mask, 90)
    with counted_steps() as counts:
        found = steps(model, ids, mask, 90)
    assert counts == [1] * 100
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_that_grows_beyond_its_room_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "capacity_for", lambda tokens: tokens + 10)
    model, ids = llama(CONFIG), long_ids(140)[:1]
    mask = masks(1, 140, "none")
    found = steps(model, ids, mask, 90)
    with with_plans_of_their_own():
        want = steps(model, ids, mask, 90)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "select", "written"])
@torch.no_grad()
def test_a_cache_that_others_changed_is_described_anew(change: str) -> None:
    model, ids = llama(CONFIG, "fine"), long_ids(140)

    def run() -> Tensor:
        cache = model(ids[:, :100]).past_key_values
        for t in range(100, 110):
            model(ids[:, t : t + 1], past_key_values=cache)
        rows = torch.tensor([1, 0])
        if change == "crop":
            cache.crop(95)
        elif change == "reorder":
            cache.reorder_cache(rows)
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
            rows = torch.tensor([0, 0, 1, 1])
        elif change == "select":
            cache.batch_select_indices(rows)
        else:
            cache.layers[1].keys.mul_(-1)
        rows = rows if change in ("reorder", "repeat", "select") else torch.arange(2)
        logits = []
        for t in range(110, 116):
            out = model(ids[rows, t : t + 1], past_key_values=cache)
            logits.append(out.logits[:, -1])
        return torch.stack(logits)

    found = run()
    with with_plans_of_their_own():
        want = run()
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_is_continued_several_times() -> None:
    from copy import deepcopy

    model, ids = llama(CONFIG, "fine"), long_ids(140)[:1]

    def run() -> Tensor:
        prefix = model(ids[:, :100]).past_key_values
        logits = []
        for start in (100, 120):
            cache = deepcopy(prefix)
            for t in range(start, start + 12):
                out = model(ids[:, t : t + 1], past_key_values=cache)
                logits.append(out.logits[:, -1])
        return torch.stack(logits)

    found = run()
    with with_plans_of_their_own():
        want = run()
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_modes_of_autograd_may_change_between_steps() -> None:
    model, ids = llama(CONFIG, "fine"), long_ids(130)[:1]
    with torch.inference_mode():
        cache = model(ids[:, :100]).past_key_values
        model(ids[:, 100:101], past_key_values=cache)
    out = model(ids[:, 101:102], past_key_values=cache)
    with with_plans_of_their_own():
        cache = model(ids[:, :100]).past_key_values
        model(ids[:, 100:101], past_key_values=cache)
        want = model(ids[:, 101:102], past_key_values=cache)
    torch.testing.assert_close(out.logits, want.logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_step_reads_no_more_masks_or_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step does is of the same size at every length."""
    from mm_sparse.layout import TokenLayout

    model, ids = llama(CONFIG), long_ids(140)[:1]
    cache = model(ids[:, :100]).past_key_values
    model(ids[:, 100:101], past_key_values=cache)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a step made a plan")

    monkeypatch.setattr(TokenLayout, "new_plan", refused)
    for t in range(101, 140):
        model(ids[:, t : t + 1], past_key_values=cache)


def static_cache(model: Any, room: int = 256) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=room)


def static_steps(
    model: Any, ids: Tensor, mask: Tensor, first: int, cache: Any, compiled: bool
) -> list[Tensor]:
    """Prefill and steps on a static cache."""
    cache.reset()
    out = model(ids[:, :first], attention_mask=mask[:, :first], past_key_values=cache)
    logits = [out.logits[:, -1]]
    step = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    for t in range(first, ids.shape[1]):
        whole = torch.zeros(len(ids), 256, dtype=torch.long)
        whole[:, : t + 1] = mask[:, : t + 1]
        out = step(ids[:, t : t + 1], attention_mask=whole, past_key_values=cache)
        logits.append(out.logits[:, -1].clone())
    return logits


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("scorer", [None, "fine"])
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_steps_equal_eager_ones(scorer: str | None, padding: str) -> None:
    model, ids, mask = llama(CONFIG, scorer), long_ids(130), masks(2, 130, padding)
    cache = static_cache(model)
    for first in (100, 90):  # Another sequence in the same cache.
        found = static_steps(model, ids, mask, first, cache, compiled=True)
        want = steps(model, ids, mask, first)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert any(decoding.NUMBER in vars(m) for m in model.modules())


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_another_cache_and_a_short_prompt_are_not_answered_from_what_was_before() -> None:
    config = mms.SparseConfig(ratio=0.3, dense_below=80, sinks=16, window=16)
    model, ids = llama(config), long_ids(130)[:1]
    mask = masks(1, 130, "none")
    one, other = static_cache(model), static_cache(model)
    for cache, first in ((one, 100), (other, 110), (one, 105), (other, 20), (one, 30)):
        found = static_steps(model, ids[:, : first + 10], mask, first, cache, compiled=True)
        if first >= 80:
            want = steps(model, ids[:, : first + 10], mask, first)
        else:
            # What a graph has recorded for a cache stays sparse.
            with mms.override_config(model, dense_below=0):
                want = steps(model, ids[:, : first + 10], mask, first)
            want[0] = found[0]
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_steps_compile_as_often_as_those_of_the_stock_model() -> None:
    from torch._dynamo.utils import counters

    ids, mask = long_ids(130)[:1], masks(1, 130, "none")
    graphs = []
    for sparse in (False, True):
        torch.compiler.reset()
        counters.clear()
        model = llama(CONFIG) if sparse else build("llama").model
        static_steps(model, ids, mask, 100, static_cache(model), compiled=True)
        graphs.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
    assert graphs[1] <= graphs[0]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_generate_takes_a_static_cache() -> None:
    model, ids = llama(CONFIG), long_ids(120)[:1]
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    want = model.generate(ids, **options)
    assert model.generate(ids, cache_implementation="static", **options).equal(want)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("below", [0, 50, 1000])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_5_vl"])
@torch.no_grad()
def test_generate_compiles_as_many_graphs_as_for_the_stock_model(name: str, below: int) -> None:
    """Its masks are made outside of the graph, and grow; "gemma3" has sliding windows, too."""
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    compiled = CompileConfig(fullgraph=False, backend="eager")
    compiled._compile_all_devices = True  # transformers compiles on GPUs alone
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    model, ids, graphs = build(name).model, long_ids(60)[:1], []
    config = mms.SparseConfig(ratio=0.3, dense_below=below)
    for sparse in (False, True):
        if sparse:
            mms.sparsify(model, config)
        want = model.generate(ids, **options)
        torch.compiler.reset()
        counters.clear()
        found = model.generate(
            ids, cache_implementation="static", compile_config=compiled, **options
        )
        assert found.equal(want)
        assert not counters["graph_break"]
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] <= graphs[0]


@pytest.mark.gpu
@pytest.mark.parametrize("unit", [16, 64])
@torch.no_grad()
def test_gpu_steps_in_a_graph_equal_eager_ones(unit: int) -> None:
    from mm_sparse.cuda_graph import capture

    torch.compiler.reset()
    config = mms.SparseConfig(ratio=0.3, dense_below=0, unit=unit)
    model = mms.sparsify(build("llama").model.cuda(), config)
    ids = long_ids(240)[:1].cuda()
    want = steps(model, ids, torch.ones_like(ids), 200)
    cache = static_cache(model)
    model(ids[:, :200], past_key_values=cache)
    token = ids[:, 200:201].clone()
    step = torch.compile(model, backend="eager", fullgraph=True)
    # Capturing runs the step three times: they are steps of the sequence.
    fed = iter(range(200, 203))

    def run() -> Tensor:
        if not torch.cuda.is_current_stream_capturing():
            token.copy_(ids[:, (t := next(fed)) : t + 1])
        return step(token, past_key_values=cache).logits

    replay = capture(run)
    for t in range(203, 240):
        token.copy_(ids[:, t : t + 1])
        torch.testing.assert_close(replay()[:, -1], want[t - 199], atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_three_hundred_steps_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cross units, and pages of a cache that grows."""
    from triton import knobs

    monkeypatch.setattr(decoding, "capacity_for", lambda tokens: tokens + 64)
    compiled: list[str] = []
    model = mms.sparsify(build("llama").model.cuda(), mms.SparseConfig(ratio=0.3, dense_below=0))
    ids = torch.randint(3, 99, (1, 810), device="cuda")
    cache = model(ids[:, :500]).past_key_values
    for t in range(500, 502):
        model(ids[:, t : t + 1], past_key_values=cache)
    monkeypatch.setattr(
        knobs.compilation, "listener", lambda *, src, **_: compiled.append(src.name)
    )
    for t in range(502, 810):
        model(ids[:, t : t + 1], past_key_values=cache)
    assert not compiled


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_other_weights_of_a_scorer_are_compiled_anew() -> None:
    model, ids, mask = llama(CONFIG, "fine"), long_ids(120)[:1], masks(1, 120, "none")
    cache = static_cache(model)
    for _ in range(2):
        found = static_steps(model, ids, mask, 100, cache, compiled=True)
        want = steps(model, ids, mask, 100)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        for scorer in mms.scorers_of(model).values():
            scorer.key_map += 0.05 * torch.randn_like(scorer.key_map)


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_what_graphs_read_of_many_caches_is_not_kept() -> None:
    model, ids, mask = llama(CONFIG), long_ids(110)[:1], masks(1, 110, "none")
    caches = [static_cache(model) for _ in range(6)]
    for cache in caches:
        found = static_steps(model, ids, mask, 100, cache, compiled=True)
        want = steps(model, ids, mask, 100)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    layers = mms.attention_layers(model).values()
    assert all(len(layer.recorded) == decoding.RECORDED for layer in layers)
    del caches, cache
    model(ids[:, :100], past_key_values=static_cache(model))
    for layer in layers:
        alive = [1 for kept in layer.recorded.values() if kept.keys() is not None]
        assert len(layer.recorded) == decoding.RECORDED
        assert len(alive) <= 1


FINE = mms.SparseConfig(ratio=0.3, dense_below=0, sinks=0, window=16, unit=16)


def equals_plans_of_their_own(run: Any) -> None:
    """Of a function that gives logits; nothing is kept between the steps that it equals."""
    found = run()
    patch = pytest.MonkeyPatch()
    patch.setattr("mm_sparse.integrations.hf.kv_cache.descriptors_for", lambda *_: None)
    with with_plans_of_their_own():
        want = run()
    patch.undo()
    torch.testing.assert_close(torch.stack(found), torch.stack(want), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", ["hides more", "shows more", "hides the newest"])
@torch.no_grad()
def test_a_mask_that_changes_between_steps_holds(change: str) -> None:
    model, ids = llama(FINE, "fine"), long_ids(150)

    def run() -> list[Tensor]:
        mask = torch.ones_like(ids)
        mask[0, 20:40] = int(change != "shows more")
        cache = model(ids[:, :130], attention_mask=mask[:, :130]).past_key_values
        logits = []
        for t in range(130, 150):
            if t == 138:
                mask[0, 20:40] = int(change != "hides more")
            if t in (139, 140) and change == "hides the newest":
                mask[1, t] = 0
            seen = mask[:, : t + 1]
            out = model(ids[:, t : t + 1], attention_mask=seen, past_key_values=cache)
            logits.append(out.logits[:, -1] * seen[:, -1:])
        return logits

    equals_plans_of_their_own(run)


@torch.no_grad()
def test_a_mask_that_changes_between_steps_equals_stock() -> None:
    whole, stock = build("llama").model, build("llama").model
    mms.sparsify(whole, mms.SparseConfig(ratio=1.0, dense_below=0))
    ids, logits = long_ids(110), []
    for model in (whole, stock):
        cache, mask = model(ids[:, :100]).past_key_values, torch.ones_like(ids)
        model(ids[:, 100:101], past_key_values=cache)
        mask[:, 30:60] = 0
        out = model(ids[:, 101:102], attention_mask=mask[:, :102], past_key_values=cache)
        logits.append(out.logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_picture_that_is_fed_step_by_step_is_no_text() -> None:
    ids, case = long_ids(140), build("smolvlm")
    ids[:, 110:130] = IMAGE
    model = mms.sparsify(case.model, FINE)

    def run() -> list[Tensor]:
        cache = model(ids[:, :100]).past_key_values
        steps = range(100, 130)
        outs = [model(ids[:, t : t + 1], past_key_values=cache) for t in steps]
        return [out.logits[:, -1] for out in outs]

    equals_plans_of_their_own(run)


@torch.no_grad()
def test_other_weights_of_a_scorer_describe_anew() -> None:
    model, ids = llama(FINE, "fine"), long_ids(130)
    weights = [p for own in mms.scorers_of(model).values() for p in own.parameters()]
    first = [p.data.clone() for p in weights]

    def run() -> list[Tensor]:
        for p, data in zip(weights, first, strict=True):
            p.data = data.clone()
        cache, logits = model(ids[:, :110]).past_key_values, []
        for t in range(110, 130):
            if t == 118:
                for p in weights:
                    p.data = p.data * -2
            out = model(ids[:, t : t + 1], past_key_values=cache)
            logits.append(out.logits[:, -1])
        return logits

    equals_plans_of_their_own(run)


@pytest.mark.parametrize("changes", [{"backend": "dense"}, {"dense_below": 10**5}])
def test_inference_mode_knows_a_sequence_whose_prefill_was_dense(changes: dict[str, Any]) -> None:
    model, ids = llama(FINE, "fine"), long_ids(140)
    logits = []
    with torch.inference_mode():
        for used in (True, False):
            cache = static_cache(model)
            if used:
                static_steps(model, ids.flip(1)[:, :102], torch.ones_like(ids), 100, cache, False)
                cache.reset()
            with mms.override_config(model, **changes):
                model(ids[:, :101], past_key_values=cache)
            steps = range(101, 110)
            outs = [model(ids[:, t : t + 1], past_key_values=cache) for t in steps]
            logits.append(torch.stack([out.logits for out in outs]))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"dense_layers": (0,)}, {"dense_below": 10**5}, {"backend": "dense"}, {"ratio": 0.1},
        "sparsify", "model",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
@pytest.mark.thinned(4)
def test_compiled_steps_go_by_the_prefill_before_them(changes: Any) -> None:
    """What layers have recorded for the same cache is not true of the next sequence."""
    model, ids = llama(FINE, "fine"), long_ids(130)
    mask, cache = masks(2, 130, "none"), static_cache(model)
    static_steps(model, ids.flip(1), mask, 100, cache, compiled=True)
    before = model
    if changes == "sparsify":
        model = mms.sparsify(mms.densify(model), FINE)
    elif changes == "model":
        model = llama(FINE)
    settings = changes if isinstance(changes, dict) else {}
    with mms.override_config(model, **settings):
        found = static_steps(model, ids, mask, 90, cache, compiled=True)
        want = steps(model, ids, mask, 90)
    torch.testing.assert_close(torch.stack(found), torch.stack(want), atol=1e-4, rtol=1e-4)
    if changes != "sparsify":
        found = static_steps(before, ids, mask, 95, cache, compiled=True)
        want = steps(before, ids, mask, 95)
        torch.testing.assert_close(torch.stack(found), torch.stack(want), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_new_caches_compile_nothing_anew() -> None:
    from torch._dynamo.utils import counters

    model, ids, graphs = llama(FINE), long_ids(104), []
    counters.clear()
    caches = [static_cache(model) for _ in range(decoding.RECORDED)]
    for cache in caches:
        static_steps(model, ids, torch.ones_like(ids), 100, cache, compiled=True)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[1]


@pytest.mark.xfail(strict=True, reason="a graph sees of a mask only where its sequence ends")
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_a_mask_that_changes_between_compiled_steps_holds() -> None:
    model, ids = llama(mms.SparseConfig(ratio=1.0, dense_below=0)), long_ids(110)
    mask, cache, logits = torch.zeros(2, 256, dtype=torch.long), static_cache(model), []
    for compiled in (True, False):
        cache.reset()
        model(ids[:, :100], past_key_values=cache)
        mask[:, :101] = 1
        mask[:, 30:60] = 0
        step = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        out = step(ids[:, 100:101], attention_mask=mask, past_key_values=cache)
        logits.append(out.logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
