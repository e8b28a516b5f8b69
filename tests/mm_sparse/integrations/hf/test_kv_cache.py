"""Descriptors beside the KV cache of a transformers model: generated tokens are those without."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import mm_sparse as mms
from mm_sparse.attention import decoding
from mm_sparse.integrations.hf import attention, kv_cache
from mm_sparse.scorers import descriptor_cache as caches
from tests.support.hf_models import TEXT

CONFIG = mms.SparseConfig(ratio=0.3, dense_below=0, sinks=0, window=8, tile=64, unit=16)
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return mms.sparsify(made, CONFIG)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many units each call described."""
    found: list[int] = []

    def spy_on(cls: Any) -> None:
        update = cls.update

        def spied(self: Any, k: Tensor, plan: Any, describe: Callable[[Any], Tensor]) -> Tensor:
            def counted(part: Any) -> Tensor:
                found.append(int((part.units[0, :, 1] > 0).sum()))
                return describe(part)

            return update(self, k, plan, counted)

        monkeypatch.setattr(cls, "update", spied)

    spy_on(caches.DescriptorCache)
    spy_on(decoding.UnitDescriptors)
    return found


def prompt(rows: int = 2, tokens: int = 70) -> Tensor:
    return torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(1))


def without(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(kv_cache, "descriptors_for", lambda *_: None)
        patch.setattr(attention, "run_step", lambda *_: None)
        return run()


@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_generated_tokens_are_those_without(
    beams: int, model: Any, described: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams are reordered after each step: what was described of other rows is not used."""
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :13] = 0

    def run() -> Tensor:
        options = {**GREEDY, "num_beams": beams}
        return model.generate(prompt(), attention_mask=mask, **options)

    want = without(monkeypatch, run)
    assert not described
    assert torch.equal(run(), want)
    if beams == 1:
        # Two layers describe the prompt, the first step all of it, and every other its last unit.
        assert min(described[:4]) > 3
        assert set(described[4:]) == {1}
    else:
        assert min(described) > 3


@torch.no_grad()
def test_a_prefill_in_parts_and_steps_say_what_they_say_without(
    model: Any, described: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(1, 90)

    def run() -> Tensor:
        cache, said = DynamicCache(config=model.config), []
        for first, end in ((0, 33), (33, 80), *((i, i + 1) for i in range(80, 90))):
            said.append(model(ids[:, first:end], past_key_values=cache).logits)
        return torch.cat(said, 1)

    want = without(monkeypatch, run)
    torch.testing.assert_close(run(), want)
    assert described[:6] == [3, 3, 3, 3, 6, 6]
    assert set(described[6:]) == {1}


@torch.no_grad()
def test_keys_that_somebody_changed_are_described_anew(
    model: Any, described: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crop(cache: Any) -> Any:
        cache.crop(-10)
        return cache

    def scribble(cache: Any) -> Any:
        cache.layers[0].keys[:, :, :20] += 1
        return cache

    def through_a_file(cache: Any) -> Any:
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    changes = (crop, scribble, copy.deepcopy, through_a_file)
    for change in changes:

        def run(change: Callable[[Any], Any] = change) -> Tensor:
            cache = DynamicCache(config=model.config)
            model(prompt(1, 90), past_key_values=cache)
            model(prompt(1, 1), past_key_values=cache)
            cache = change(cache)
            described.clear()
            return model(prompt(1, 1), past_key_values=cache).logits

        want = without(monkeypatch, run)
        torch.testing.assert_close(run(), want)
        # The layers share what was written down of the sequence.
        assert described == [6, 6], change.__name__


@torch.no_grad()
def test_another_scorer_describes_for_itself(model: Any, described: list[int]) -> None:
    cache = DynamicCache(config=model.config)
    model(prompt(1, 90), past_key_values=cache)
    model(prompt(1, 1), past_key_values=cache)
    described.clear()
    layer = next(iter(mms.attention_layers(model).values()))
    layer.scorer = mms.RelevanceScorer(num_query_heads=4, num_kv_heads=2, head_dim=8)
    model(prompt(1, 1), past_key_values=cache)
    assert described == [6, 6]
    layer.scorer.pair_bias += 1
    model(prompt(1, 1), past_key_values=cache)
    assert described[2:] == [6, 6]


def test_calls_with_gradients_keep_nothing(model: Any, described: list[int]) -> None:
    cache = DynamicCache(config=model.config)
    model(prompt(1, 40), past_key_values=cache)
    assert not described
    assert not any(kv_cache.HELD in vars(layer) for layer in cache.layers)


@torch.no_grad()
def test_watchers_are_shown_scores_of_all(model: Any, described: list[int]) -> None:
    cache = DynamicCache(config=model.config)
    model(prompt(1, 90), past_key_values=cache)
    described.clear()
    with mms.capture_attention(model, lambda call: None):
        model(prompt(1, 1), past_key_values=cache)
    assert not described
    model(prompt(1, 1), past_key_values=cache)
    assert described == [6, 6]
