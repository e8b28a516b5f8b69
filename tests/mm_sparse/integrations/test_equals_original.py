"""At ratio 1.0 a sparsified model equals the stock one."""

import pytest
import torch

import mm_sparse as mms
from tests.support.hf_models import MODELS, WHOLE, build

pytest.importorskip("transformers")

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", ["none", "left", pytest.param("right", marks=pytest.mark.slow)])
@torch.no_grad()
def test_whole_ratio_equals_stock(name: str, padding: str) -> None:
    case = build(name)
    model, inputs = case.model, case.inputs(padding)
    shown = inputs["attention_mask"].bool()
    logits = model(**inputs).logits
    tokens = model.generate(**inputs, **GREEDY)
    mms.sparsify(model, WHOLE)
    found = model(**inputs).logits
    assert all(r.mode == "sparse" or "cross" in r.reason for r in mms.report(model).rows)
    torch.testing.assert_close(found[shown], logits[shown], atol=1e-5, rtol=0)
    assert model.generate(**inputs, **GREEDY).equal(tokens)


@pytest.mark.parametrize("cache", ["static", "beams", "none"])
@torch.no_grad()
def test_other_caches_equal_stock(cache: str) -> None:
    case = build("gemma3")
    inputs = case.inputs("left")
    options = {**GREEDY, "cache_implementation": "static"} if cache == "static" else dict(GREEDY)
    if cache == "beams":
        options["num_beams"] = 3
    if cache == "none":
        options["use_cache"] = False
    tokens = case.model.generate(**inputs, **options)
    mms.sparsify(case.model, WHOLE)
    assert case.model.generate(**inputs, **options).equal(tokens)


@pytest.mark.slow
# Of dynamo, which traces the mask function by vmap.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@torch.no_grad()
def test_compiled_model_equals_stock() -> None:
    case = build("gemma3")
    inputs = case.inputs("left")
    shown = inputs["attention_mask"].bool()
    logits = case.model(**inputs).logits
    mms.sparsify(case.model, WHOLE)
    found = torch.compile(case.model, backend="eager")(**inputs).logits
    torch.testing.assert_close(found[shown], logits[shown], atol=1e-5, rtol=0)
    row = mms.report(case.model).rows[-1]
    assert row.pair_density is not None
    assert (mms.Modality.TEXT, mms.Modality.IMAGE) in row.pair_density


@torch.no_grad()
def test_prompt_in_pieces_equals_whole() -> None:
    case = build("llama")
    ids = case.inputs("none")["input_ids"]
    whole = case.model(ids).logits
    mms.sparsify(case.model, WHOLE)
    first = case.model(ids[:, :9], use_cache=True)
    second = case.model(ids[:, 9:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, whole[:, 9:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other() -> None:
    case = build("llama")
    ids = torch.randint(3, 99, (1, 40))
    position = torch.cat([torch.arange(25), torch.arange(15)])[None]
    alone = [case.model(part).logits for part in (ids[:, :25], ids[:, 25:])]
    mms.sparsify(case.model, WHOLE)
    packed = case.model(ids, position_ids=position, use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dense_below", [0, 100], ids=["sparse", "dense"])
@torch.no_grad()
def test_cu_seq_lens_part_documents(dense_below: int) -> None:
    case = build("llama")
    ids = torch.randint(3, 99, (1, 40))
    position = torch.cat([torch.arange(25), torch.arange(15)])[None]
    cuts = torch.tensor([0, 25, 40], dtype=torch.int32)
    alone = [case.model(part).logits for part in (ids[:, :25], ids[:, 25:])]
    mms.sparsify(case.model, mms.SparseConfig(ratio=1.0, dense_below=dense_below))
    shown = torch.ones_like(ids)
    packed = case.model(
        ids, attention_mask=shown, position_ids=position, cu_seq_lens_q=cuts, cu_seq_lens_k=cuts
    ).logits
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_four_dimensional_masks_are_honoured() -> None:
    case = build("llama")
    ids = case.inputs("none")["input_ids"]
    length = ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril().triu(-6)
    bias = torch.zeros(2, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    logits = case.model(ids, attention_mask=bias).logits
    mms.sparsify(case.model, WHOLE)
    found = case.model(ids, attention_mask=bias).logits
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["mistral", "bert", "whisper", "siglip", "modernbert", "llama4"])
@torch.no_grad()
def test_other_kinds_equal_stock(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = _other(name)
    before = model(**inputs)[0]
    mms.sparsify(model, WHOLE)
    after = model(**inputs)[0]
    assert "sparse" in {row.mode for row in mms.report(model).rows}
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def _other(name: str):
    import transformers as tf

    from tests.support.hf_models import TEXT, VISION

    ids = torch.randint(3, 99, (2, 40))
    if name == "mistral":
        return tf.MistralForCausalLM(tf.MistralConfig(**TEXT, sliding_window=7)).eval(), {
            "input_ids": ids
        }
    if name == "bert":
        return tf.BertModel(tf.BertConfig(**TEXT)).eval(), {"input_ids": ids}
    if name == "modernbert":
        config = tf.ModernBertConfig(**TEXT, local_attention=8)
        return tf.ModernBertModel(config).eval(), {"input_ids": ids}
    if name == "llama4":
        config = tf.Llama4TextConfig(
            **TEXT, attention_chunk_size=16, num_local_experts=2, head_dim=8,
            intermediate_size_mlp=48,
        )  # fmt: skip
        return tf.Llama4ForCausalLM(config).eval(), {"input_ids": ids}
    if name == "siglip":
        return tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION)).eval(), {
            "pixel_values": torch.randn(2, 3, 24, 24)
        }
    config = tf.WhisperConfig(
        vocab_size=120, d_model=32, encoder_layers=2, decoder_layers=2, num_mel_bins=16,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_source_positions=40, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    return tf.WhisperForConditionalGeneration(config).eval(), {
        "input_features": torch.randn(2, 16, 80), "decoder_input_ids": ids,
    }  # fmt: skip


@pytest.mark.parametrize("train", [False, True])
def test_short_calls_compile_as_those_of_the_stock_model(train: bool) -> None:
    """Where all layers are dense a graph has no break, forward and backward."""
    from torch._dynamo.utils import counters

    ids = torch.randint(3, 99, (2, 60))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = []
    for sparse in (False, True):
        torch.compiler.reset()
        counters.clear()
        model = build("llama").model
        if sparse:
            mms.sparsify(model, mms.SparseConfig())
        step = torch.compile(model, backend="aot_eager" if train else "eager", fullgraph=True)
        with torch.set_grad_enabled(train):
            logits = step(ids, attention_mask=mask, use_cache=False).logits
            if train:
                logits.square().mean().backward()
        assert counters["stats"]["unique_graphs"] == 1
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert bool(grads) == train
        found.append([logits, *grads])
    torch.compiler.reset()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_compiled_calls_go_by_settings_of_a_block() -> None:
    torch.compiler.reset()
    model = mms.sparsify(build("llama").model, mms.SparseConfig())
    ids = torch.randint(3, 99, (1, 200))
    compiled = torch.compile(model, backend="eager")
    dense = compiled(ids, use_cache=False).logits
    few = {"dense_below": 0, "ratio": 0.1, "sinks": 0, "window": 0}
    with mms.override_config(model, **few):
        found, want = compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, dense, atol=1e-3)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, dense)
    torch.compiler.reset()


@torch.no_grad()
def test_a_config_object_may_be_that_of_two_models() -> None:
    from copy import deepcopy

    one = build("llama").model
    ids = torch.randint(3, 99, (1, 40))
    want = one(ids).logits
    other = type(one)(one.config).eval()
    other.load_state_dict(deepcopy(one.state_dict()))
    mms.sparsify(one, mms.SparseConfig())
    mms.sparsify(other, mms.SparseConfig())
    for model in (one, other):
        torch.testing.assert_close(model(ids).logits, want)
