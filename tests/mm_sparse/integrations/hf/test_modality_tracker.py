"""The modality of every position, in a prefill and while tokens are generated."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

import mm_sparse as mms
from mm_sparse.integrations import context, state
from tests.support.hf_models import (
    AUDIO,
    IMAGE,
    MODELS,
    VIDEO,
    VISION,
    WHOLE,
    build,
)

tf: Any = pytest.importorskip("transformers")


def seen_kinds(model: Any) -> list[torch.Tensor]:
    """Modality of the keys in every call of the second decoder layer, as it arrives."""
    seen: list[torch.Tensor] = []
    layers = state.attention_layers(model)
    chosen = next(x for n, x in layers.items() if x.index == 1)

    def watcher(call: context.AttentionCall) -> None:
        if call.name == chosen.name and call.scores is not None:
            seen.append(call.scores.plan.layout.modality)

    base = chosen.shared.base
    chosen.shared.base = replace(base, watchers=(*base.watchers, watcher), scored=True)
    return seen


@pytest.mark.parametrize("name", [n for n in MODELS if n != "llama"])
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_modality_is_known_in_prefill_and_generate(name: str, beams: int) -> None:
    case = build(name)
    inputs = case.inputs("left")
    mms.sparsify(case.model, mms.SparseConfig(ratio=0.5, dense_below=0))
    seen = seen_kinds(case.model)
    for _ in range(2):
        seen.clear()
        out = case.model.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, num_beams=beams, do_sample=False
        )
        assert len(seen) == 4
        length = inputs["input_ids"].shape[1]
        prompt = inputs["input_ids"].repeat_interleave(beams, 0)
        kind = {IMAGE: mms.Modality.IMAGE, AUDIO: mms.Modality.AUDIO}[case.token]
        for step, found in enumerate(seen):
            assert found.shape[1] == length + step
            assert found[:, :length].equal((prompt == case.token).to(torch.int8) * int(kind))
        if beams == 1:
            written = out[:, length:-1]
            want = (written == case.token).to(torch.int8) * int(kind)
            if kind == mms.Modality.IMAGE:
                want[written == VIDEO] = int(mms.Modality.VIDEO)
            assert seen[-1][:, length:].equal(want)


def test_towers_know_their_modality() -> None:
    for name, kind in (("qwen2_5_vl", 1), ("gemma3", 1), ("qwen2_audio", 2)):
        case = build(name)
        mms.sparsify(case.model, WHOLE)
        for layer in state.attention_layers(case.model).values():
            tower = "visual" in layer.name or "tower" in layer.name
            assert layer.modality == (kind if tower else None)
            assert (layer.index is None) == tower
    model = mms.sparsify(tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION)), WHOLE)
    assert state.attention_layers(model).popitem()[1].modality == mms.Modality.IMAGE


@torch.no_grad()
def test_modality_can_be_given_without_ids() -> None:
    case = build("llava_onevision")
    ids = case.inputs("none")["input_ids"]
    embeds = case.model.get_input_embeddings()(ids)
    mms.sparsify(case.model, mms.SparseConfig(ratio=0.5, dense_below=0))
    seen = seen_kinds(case.model)
    with pytest.warns(UserWarning, match=r"counts as text; .* `mms.set_modality`"):
        case.model(inputs_embeds=embeds)
    case.model(inputs_embeds=embeds)  # says it once
    assert seen[-1].eq(0).all()
    kinds = (ids == IMAGE).to(torch.int8)
    with context.set_modality(case.model, kinds):
        out = case.model(inputs_embeds=embeds, use_cache=True)
        case.model(inputs_embeds=embeds[:, :1], past_key_values=out.past_key_values)
    assert seen[-2].equal(kinds)
    assert seen[-1].equal(torch.nn.functional.pad(kinds, (0, 1)))
    with pytest.raises(ValueError, match="modality must be a"), context.set_modality(
        case.model, kinds[0]
    ):  # fmt: skip
        pass


@torch.no_grad()
def test_modality_goes_with_the_cache() -> None:
    case = build("llava_onevision")
    inputs = case.inputs("none")
    stranger = case.model(**inputs).past_key_values
    mms.sparsify(case.model, mms.SparseConfig(ratio=0.5, dense_below=0))
    cache = case.model(**inputs).past_key_values
    case.model(input_ids=torch.full((1, 5), 7))
    seen = seen_kinds(case.model)
    step = torch.full((2, 1), 7)
    case.model(input_ids=step, past_key_values=copy.deepcopy(cache))
    assert seen[-1][:, :-1].equal((inputs["input_ids"] == IMAGE).to(torch.int8))
    with pytest.raises(ValueError, match="past_key_values must come from a call of the sparsified"):
        case.model(input_ids=step, past_key_values=stranger)
    case.model(input_ids=torch.full((1, 5), 7))
    assert seen[-1].shape == (1, 5)
