"""A cache that releases keys: what it keeps, where it stands, and what models make of it."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import mm_sparse as mms
from mm_sparse import Modality
from tests.support.hf_models import IMAGE, TEXT, build, long_ids
from tests.support.tiny_configs import config_of

transformers = pytest.importorskip("transformers")

SPARSE = mms.SparseConfig(ratio=0.3, dense_below=0, sinks=4, window=16)
SETTINGS = {"sinks": 4, "window": 16}


def model_of(name: str = "llama", sparse: bool = False, attention: str = "sdpa") -> Any:
    if name == "qwen2":
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.15)
    else:
        model = build(name).model
    model.set_attn_implementation(attention)
    return mms.sparsify(model, SPARSE) if sparse else model


def padded(ids: Tensor, missing: int) -> dict[str, Tensor]:
    """The first row `missing` tokens shorter, padded on the left."""
    mask = torch.ones_like(ids)
    mask[0, :missing] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def greedy(model: Any, cache: Any, tokens: int, **inputs: Any) -> Tensor:
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return model.generate(**inputs, past_key_values=cache, **settings)


CALLS: list[tuple[Tensor, Tensor]] = []


def shown_sdpa(module: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
    CALLS.append((q, k))
    return transformers.AttentionInterface()["sdpa"](module, q, k, *args, **kwargs)


def shown_calls(model: Any) -> list[tuple[Tensor, Tensor]]:
    """q and k of every attention call of a model from now on, layer by layer."""
    transformers.AttentionInterface.register("shown", shown_sdpa)
    masks = transformers.AttentionMaskInterface
    masks.register("shown", masks()["sdpa"])
    model.set_attn_implementation("shown")
    CALLS.clear()
    return CALLS


def reference_mass(q: Tensor, k: Tensor, valid: Tensor, window: int) -> Tensor:
    """(B, K, M) float64, written plainly: one softmax over all keys per query."""
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    mass = torch.zeros(batch, kv_heads, keys, dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            for at in range(queries - window, queries):
                end = keys - queries + at + 1
                if not valid[row, end - 1]:
                    continue
                scores = k[row, head * kv_heads // heads, :end].double() @ q[row, head, at].double()
                scores = (scores / math.sqrt(dim)).masked_fill(~valid[row, :end], -math.inf)
                mass[row, head * kv_heads // heads, :end] += scores.softmax(0)
    return mass


def reference_kept(mass: Tensor, first: int, count: int, near: int, window: int) -> list[int]:
    """Positions that a head keeps, of one row: (M,) masses, `first` of them padding.

    Of a short row there are fewer than `count`.
    """
    keys, half = len(mass), near // 2
    best = [
        mass[max(0, p - half) : p + half + 1].max().item() + 1e-3 * mass[p].item()
        for p in range(keys)
    ]
    rank = [keys] * keys
    for worth in (mass.tolist(), best):
        for place, p in enumerate(sorted(range(keys), key=lambda p: -worth[p])):
            rank[p] = min(rank[p], place)
    always = {*range(first, min(keys, first + SETTINGS["sinks"])), *range(keys - window, keys)}
    always = {p for p in always if p >= first}
    others = sorted((p for p in range(first, keys) if p not in always), key=lambda p: rank[p])
    kept = [*always, *others][:count]
    return sorted(kept)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_whole_cache_generates_what_a_dynamic_one_does(name: str, sparse: bool) -> None:
    model, inputs = model_of(name, sparse), padded(long_ids(100), 7)
    want = greedy(model, transformers.DynamicCache(config=model.config), 64, **inputs)
    found = greedy(model, mms.SparseCache(model, 1.0, **SETTINGS), 64, **inputs)
    assert found.shape == (2, 164)
    assert torch.equal(found, want)


@pytest.mark.parametrize("near", [1, 5])
@pytest.mark.parametrize("missing", [0, 7, 70])
@torch.no_grad()
def test_kept_keys_are_those_of_a_plain_reference(missing: int, near: int) -> None:
    model, inputs = model_of(), padded(long_ids(100), missing)
    cache = mms.SparseCache(model, 0.4, near=near, **SETTINGS)
    calls = shown_calls(model)
    model(**inputs, past_key_values=cache)
    assert len(calls) == len(cache.layers) == 2
    for layer, (q, k) in zip(cache.layers, calls, strict=True):
        mass = reference_mass(q, k, inputs["attention_mask"].bool(), 16)
        assert layer.positions.shape == (2, 2, 40)
        for row in range(2):
            for head in range(2):
                first = missing if row == 0 else 0
                want = reference_kept(mass[row, head], first, 40, near, 16)
                found = layer.positions[row, head]
                assert found[found >= first].tolist() == want
                assert found[: 40 - len(want)].tolist() == found[found < first].tolist()
                keys = layer.keys[row, head, 40 - len(want) :]
                assert torch.equal(keys, k[row, head, want])


@torch.no_grad()
def test_memory_is_released_already_in_the_prefill() -> None:
    model, ids = model_of(), long_ids(200)
    cache = mms.SparseCache(model, 0.25, **SETTINGS)
    sizes = []

    def note(*_: Any) -> None:
        sizes.append([x.keys.untyped_storage().nbytes() for x in cache.layers if x.is_initialized])

    for layer in model.model.layers:
        layer.register_forward_hook(note)
    model(ids, past_key_values=cache)
    whole = 2 * 2 * 200 * 8 * 4
    assert sizes == [[whole // 4], [whole // 4] * 2]
    report = cache.report()
    tables = sum(x.positions.untyped_storage().nbytes() for x in cache.layers)
    assert report.bytes_held == 2 * 2 * whole // 4 + tables
    assert report.bytes_released == 2 * 2 * whole * 3 // 4
    assert "50 of 200" in str(report)


def masks_of(cache: Any, whole: int, new: int, missing: int) -> list[Tensor]:
    """Per layer, (B, H, N, M) bool of a cache that holds everything: what the other one holds."""
    masks = []
    for layer in cache.layers:
        held = layer.true_positions()
        batch, heads = held.shape[:2]
        mask = torch.zeros(batch, heads, new, whole + new, dtype=torch.bool)
        index = held.long()[:, :, None].expand(-1, -1, new, -1)
        mask.scatter_(-1, index, True)
        mask[0, ..., :missing] = False
        mask[..., whole:] = torch.ones(new, new, dtype=torch.bool).tril()
        masks.append(mask.repeat_interleave(4 // heads, 1))
    return masks


@contextmanager
def given_masks(model: Any, masks: list[Tensor]) -> Iterator[None]:
    def give(module: Any, args: Any, kwargs: Any) -> Any:
        mask = masks[module.layer_idx]
        if model.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask}

    modules = [layer.self_attn for layer in model.model.layers]
    handles = [m.register_forward_pre_hook(give, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("missing", [0, 7, 70])
@pytest.mark.parametrize("keep", [0.4, (0.3, 0.6)])
@torch.no_grad()
def test_steps_equal_a_whole_cache_under_the_same_selection(
    keep: Any, missing: int, attention: str
) -> None:
    model, ids = model_of(attention=attention), long_ids(120)
    inputs = padded(ids, missing)
    mask = inputs["attention_mask"]
    first = {name: x[:, :100] for name, x in inputs.items()}
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache, whole = mms.SparseCache(model, keep, **SETTINGS), transformers.DynamicCache()
    for c in (cache, whole):
        model(**first, position_ids=position[:, :100], past_key_values=c)
    assert cache.get_seq_length() == 100
    at = 100
    # Steps of one token, and of several as assistants write them.
    for new in (1, 1, 3, 1, 5, 1):
        given = {
            "input_ids": ids[:, at : at + new], "position_ids": position[:, at : at + new],
        }  # fmt: skip
        masks = masks_of(cache, at, new, missing)
        found = model(**given, attention_mask=mask[:, : at + new], past_key_values=cache).logits
        with given_masks(model, masks):
            want = model(**given, past_key_values=whole).logits
        torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
        at += new
        assert cache.get_seq_length() == at


@pytest.mark.parametrize("missing", [0, 7])
@torch.no_grad()
def test_a_sparsified_model_decodes_on_what_is_left(missing: int) -> None:
    from mm_sparse.integrations.hf import attention

    model, ids = model_of(sparse=True), long_ids(130)
    inputs = padded(ids, missing)

    def run(keep: Any, planned: bool = False) -> tuple[Tensor, Any, set[str]]:
        patch = pytest.MonkeyPatch()
        if planned:
            patch.setattr(attention, "run_step", lambda *_: None)
        cache = mms.SparseCache(model, keep, **SETTINGS)
        first = {name: x[:, :100] for name, x in inputs.items()}
        logits, modes = [model(**first, past_key_values=cache).logits[:, -1]], set()
        out = model(
            ids[:, 100:103], attention_mask=inputs["attention_mask"][:, :103], past_key_values=cache
        )
        logits += list(out.logits.unbind(1))
        for at in range(103, 130):
            mask = inputs["attention_mask"][:, : at + 1]
            out = model(ids[:, at : at + 1], attention_mask=mask, past_key_values=cache)
            logits.append(out.logits[:, -1])
            modes |= {(x.record.mode, x.record.keys) for x in mms.attention_layers(model).values()}
        patch.undo()
        return torch.stack(logits), cache, modes

    found, cache, modes = run((0.4, 0.6))
    assert modes == {("sparse", n) for held in (40, 60) for n in range(held + 4, held + 31)}
    assert [layer.held for layer in cache.layers] == [70, 90]
    want, *_ = run((0.4, 0.6), planned=True)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    with mms.override_config(model, ratio=1.0):
        everything, *_ = run((0.4, 0.6))
    with mms.override_config(model, backend="dense"):
        dense, *_ = run((0.4, 0.6))
    torch.testing.assert_close(everything, dense, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, dense, atol=1e-3)


@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_a_prefill_in_chunks_stays_within_its_budget(sparse: bool) -> None:
    model, inputs = model_of(sparse=sparse), padded(long_ids(200), 7)
    cache = mms.SparseCache(model, (0.3, 0.5), **SETTINGS)
    largest = []

    def note(*_: Any) -> None:
        largest.append(max(layer.held for layer in cache.layers))

    model.model.register_forward_hook(note)
    out = greedy(model, cache, 8, **inputs, prefill_chunk_size=40)
    # 5 chunks, of which the last ends at 200, and 7 steps.
    assert largest[:5] == [20, 40, 60, 80, 100]
    assert [layer.held for layer in cache.layers] == [67, 107]
    assert cache.get_seq_length() == 207
    assert out.shape == (2, 208)
    for layer in cache.layers:
        position = layer.true_positions()
        assert (position[..., 1:] > position[..., :-1]).all()
        # Sinks of each row, and the window and all that came after.
        assert (position[1, :, :4] == torch.arange(4)).all()
        assert (position[..., -23:] == torch.arange(184, 207)).all()
        assert (position[0] == 7).any(-1).all()


@torch.no_grad()
def test_a_whole_budget_in_chunks_equals_no_chunks() -> None:
    model, inputs = model_of(), padded(long_ids(150), 7)
    want = greedy(model, transformers.DynamicCache(), 20, **inputs)
    cache = mms.SparseCache(model, 1.0, **SETTINGS)
    assert torch.equal(greedy(model, cache, 20, **inputs, prefill_chunk_size=32), want)


@torch.no_grad()
def test_rows_are_reordered_repeated_and_selected() -> None:
    model, ids = model_of(), long_ids(110)

    def logits(change: Any, rows: Tensor) -> Tensor:
        cache = mms.SparseCache(model, 0.4, **SETTINGS)
        model(ids[:, :100], past_key_values=cache)
        change(cache)
        out = [model(ids[rows, t : t + 1], past_key_values=cache).logits for t in range(100, 110)]
        return torch.cat(out, 1)

    plain = logits(lambda cache: None, torch.arange(2))
    swap, twice = torch.tensor([1, 0]), torch.tensor([0, 0, 1, 1])
    for change, rows in (
        (lambda c: c.reorder_cache(swap), swap),
        (lambda c: c.batch_repeat_interleave(2), twice),
        (lambda c: c.batch_select_indices(twice), twice),
    ):
        torch.testing.assert_close(logits(change, rows), plain[rows], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_beam_search_keeps_rows_together() -> None:
    model, ids = model_of(), long_ids(100)
    settings = {"num_beams": 3, "max_new_tokens": 12, "do_sample": False}
    want = model.generate(ids, past_key_values=transformers.DynamicCache(), **settings)
    found = model.generate(ids, past_key_values=mms.SparseCache(model, 1.0), **settings)
    assert torch.equal(found, want)
    cache = mms.SparseCache(model, 0.4, **SETTINGS)
    assert model.generate(ids, past_key_values=cache, **settings).shape[0] == 2
    assert len(cache.layers[0].positions) == 6


@torch.no_grad()
def test_the_newest_tokens_are_cropped_and_no_others() -> None:
    model, ids = model_of(), long_ids(130)
    cache = mms.SparseCache(model, 0.4, **SETTINGS)
    model(ids[:, :100], past_key_values=cache)
    kept = [layer.keys.clone() for layer in cache.layers]
    for at in range(100, 110):
        model(ids[:, at : at + 1], past_key_values=cache)
    cache.crop(-10)
    assert cache.get_seq_length() == 100
    for layer, keys in zip(cache.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys)
    cache.crop(-6)
    assert cache.get_seq_length() == 94
    assert (cache.layers[0].true_positions()[..., -10:] == torch.arange(84, 94)).all()
    with pytest.raises(ValueError, match=r"tokens_to_remove must be at most 10.*got 11"):
        cache.crop(-11)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert model(ids, past_key_values=cache).logits.shape[1] == 130


@torch.no_grad()
def test_assisted_decoding_writes_what_a_step_at_a_time_does() -> None:
    model, ids = model_of(), long_ids(100)[:1]
    # A prompt that repeats itself, so that some of what is looked up is right.
    ids = torch.cat([ids[:, :50], ids[:, :50]], 1)
    want = greedy(model, transformers.DynamicCache(), 20, input_ids=ids)
    cache = mms.SparseCache(model, 1.0, **SETTINGS)
    found = greedy(model, cache, 20, input_ids=ids, prompt_lookup_num_tokens=4)
    assert torch.equal(found, want)
    cache = mms.SparseCache(model, 0.5, **SETTINGS)
    out = greedy(model, cache, 20, input_ids=ids, prompt_lookup_num_tokens=4)
    assert out.shape == (1, 120)
    assert cache.layers[0].positions is not None


@torch.no_grad()
def test_a_cache_is_copied_and_continued_several_times() -> None:
    model, ids = model_of(), long_ids(120)
    filled = mms.SparseCache(model, 0.4, **SETTINGS)
    model(ids[:, :100], past_key_values=filled)
    first, second = copy.deepcopy(filled), copy.deepcopy(filled)
    a = model(ids[:, 100:110], past_key_values=first).logits
    model(ids[:, 110:120], past_key_values=second)
    assert torch.equal(model(ids[:, 100:110], past_key_values=filled).logits, a)
    # A further turn of a conversation is released, too.
    model(long_ids(50), past_key_values=filled)
    assert [layer.held for layer in filled.layers] == [64, 64]


def picture(kept: Any = None) -> tuple[Any, dict[str, Tensor]]:
    case = build("qwen2_5_vl")
    inputs = case.inputs("left")
    return case.model, inputs


def kinds_of(cache: Any, ids: Tensor, layer: Any) -> Tensor:
    own = (ids == IMAGE)[:, None].expand(-1, layer.positions.shape[1], -1)
    return own.gather(-1, layer.positions.long())


@torch.no_grad()
def test_modalities_have_shares_and_floors() -> None:
    model, inputs = picture()
    ids = inputs["input_ids"]
    settings = {"sinks": 1, "window": 4}
    # 33 tokens, of them 16 of a picture; 4 of the first row are padding.
    for keep, more, least, most in (
        (0.5, {"shares": {Modality.IMAGE: 0.3}}, 5, 5),
        (0.5, {"shares": {Modality.IMAGE: 0.0}}, 0, 0),
        (0.3, {"floors": {Modality.IMAGE: 0.25}}, 4, 16),
        (0.2, {"floors": {Modality.IMAGE: 1.0}}, 16, 16),
        (0.3, {"shares": {Modality.IMAGE: 0.0}, "floors": {Modality.IMAGE: 0.25}}, 4, 4),
    ):
        cache = mms.SparseCache(model, keep, **settings, **more)
        model(**inputs, past_key_values=cache)
        for layer in cache.layers:
            count = kinds_of(cache, ids, layer).sum(-1)
            # All of a short row stays before padding does.
            assert count.min() >= least, more
            assert count[1].max() <= most, more
            assert layer.held < 33
    rows = cache.report().layers
    assert rows[0].kept[Modality.IMAGE][1] == 16
    assert "image" in str(cache.report())


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "llava_onevision", "smolvlm"])
@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_models_that_read_pictures_generate(name: str, sparse: bool) -> None:
    case = build(name)
    model = mms.sparsify(case.model, SPARSE) if sparse else case.model
    inputs = case.inputs("left")
    want = greedy(model, transformers.DynamicCache(config=model.config), 8, **inputs)
    settings = {"sinks": 1, "window": 4}
    assert torch.equal(greedy(model, mms.SparseCache(model, 1.0, **settings), 8, **inputs), want)
    cache = mms.SparseCache(model, 0.5, **settings, floors={Modality.IMAGE: 0.5})
    assert greedy(model, cache, 8, **inputs).shape == want.shape
    held = {row.index: row for row in cache.report().layers if row.kind == "sparse"}
    assert held
    assert all(row.bytes_released > 0 for row in held.values())
    assert len(held) == (1 if name == "gemma3" else 2)


FAMILIES = (
    "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt2", "olmo2", "cohere", "granite",
    "stablelm", "gpt_oss", "deepseek_v3", "jamba", "glm4",
)  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_families_generate_the_same_with_a_whole_cache(model_type: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(model_type)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.1)
    inputs = padded(long_ids(90), 7)
    want = greedy(model, transformers.DynamicCache(config=model.config), 24, **inputs)
    cache = mms.SparseCache(model, 1.0, **SETTINGS)
    assert torch.equal(greedy(model, cache, 24, **inputs), want)
    cache = mms.SparseCache(model, 0.4, **SETTINGS)
    assert greedy(model, cache, 24, **inputs).shape == want.shape
    rows = [row for row in cache.report().layers if row.kind == "sparse"]
    assert {row.held for row in rows} == {36 + 23}


@torch.no_grad()
def test_units_stay_whole() -> None:
    model, ids = model_of(), long_ids(256)
    cache = mms.SparseCache(model, 0.5, sinks=16, window=16, unit=16)
    model(ids, past_key_values=cache)
    for layer in cache.layers:
        unit = layer.positions // 16
        for row in unit.reshape(-1, unit.shape[-1]):
            assert (row.unique(return_counts=True)[1] == 16).all()


@torch.no_grad()
def test_keep_is_spread_by_what_layers_lose() -> None:
    model, ids = model_of(), long_ids(200)
    with torch.no_grad():
        # Attention of the first layer is even, so that it has to keep more.
        model.model.layers[0].self_attn.q_proj.weight.mul_(0.01)
        model.model.layers[1].self_attn.q_proj.weight.mul_(30)
    keep = mms.spread_keep(model, {"input_ids": ids}, 0.4, near=1, **SETTINGS)
    assert len(keep) == 2
    assert sum(keep) / 2 == pytest.approx(0.4, abs=1e-2)
    assert keep[0] > 0.5
    assert keep[1] < 0.3
    cache = mms.SparseCache(model, keep, **SETTINGS)
    model(ids, past_key_values=cache)
    assert [x.held for x in cache.layers] == [math.ceil(k * 200) for k in keep]
    with pytest.raises(ValueError, match="least must be from 0 to keep"):
        mms.spread_keep(model, {"input_ids": ids}, 0.4, least=0.5)
    with pytest.raises(ValueError, match="at least `window` tokens"):
        mms.spread_keep(model, {"input_ids": ids[:, :8]}, 0.4)


def test_hooks_go_with_the_last_cache() -> None:
    model = model_of()
    module = model.model.layers[0].self_attn
    config = module.config
    first = mms.SparseCache(model)
    second = copy.deepcopy(first)
    assert len(module._forward_pre_hooks) == 1
    del first
    gc.collect()
    assert len(module._forward_pre_hooks) == 1
    del second
    gc.collect()
    assert not module._forward_pre_hooks
    assert not module._forward_hooks
    assert not model._forward_pre_hooks
    assert module.config is config


@torch.no_grad()
def test_an_error_in_a_call_leaves_the_model_as_it_was() -> None:
    model, ids = model_of(), long_ids(100)
    module = model.model.layers[0].self_attn
    config = module.config
    inputs = padded(ids, 7)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with pytest.raises(ValueError, match="padding on the left"):
        model(**inputs, past_key_values=mms.SparseCache(model, 0.4, **SETTINGS))
    assert module.config is config
    want = model(ids).logits
    found = model(ids, past_key_values=mms.SparseCache(model, 0.4, **SETTINGS)).logits
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "keep must be in"),
        ({"keep": (0.4, 1.5)}, "keep must be in"),
        ({"keep": (0.4,) * 3}, "a number for each of 2 layers, got 3"),
        ({"tokens": 0}, "tokens must be a positive int"),
        ({"sinks": -1}, "sinks must be"),
        ({"window": 0}, "window must be"),
        ({"near": 4}, "near must be an odd"),
        ({"unit": 8}, "unit must be one of"),
        ({"shares": {Modality.IMAGE: 1.5}}, "shares must be numbers in"),
        ({"floors": {"image": 0.5}}, "floors must be numbers in"),
        ({"shares": {Modality.IMAGE: 0.7, Modality.TEXT: 0.5}}, "must not exceed 1 together"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mms.SparseCache(model_of(), **settings)


def test_models_are_checked() -> None:
    with pytest.raises(TypeError, match="transformers model, got Linear"):
        mms.SparseCache(torch.nn.Linear(2, 2))
    whisper = transformers.T5Config(num_layers=1, d_model=8, d_kv=4, num_heads=2, d_ff=8)
    with pytest.raises(ValueError, match="which has an encoder"):
        mms.SparseCache(transformers.T5ForConditionalGeneration(whisper))
    bloom = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=50)
    with pytest.raises(ValueError, match=r"goes by queries and keys alone|attention interface"):
        mms.SparseCache(transformers.BloomForCausalLM(bloom))
    config = transformers.MistralConfig(**TEXT, sliding_window=16)
    with pytest.raises(ValueError, match="full attention"):
        mms.SparseCache(transformers.MistralForCausalLM(config))


@torch.no_grad()
def test_a_number_of_tokens_is_a_budget() -> None:
    model, ids = model_of(), long_ids(200)
    cache = mms.SparseCache(model, tokens=48, **SETTINGS)
    model(ids, past_key_values=cache)
    assert [layer.held for layer in cache.layers] == [48, 48]
