"""What cannot run sparse is refused by `sparsify`, or runs exactly as before; never in silence."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mm_sparse as mms
from tests.support import hf_models, tower_models

tf: Any = pytest.importorskip("transformers")
SPARSE = mms.SparseConfig(ratio=0.5, dense_below=0, sinks=0, window=0)
SMALL: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256,
    "pad_token_id": 0,
}  # fmt: skip
LATENT: dict[str, Any] = {
    **SMALL, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 1,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 6,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1,
    "num_decoder_layers": 1, "num_heads": 4, "pad_token_id": 0,
}  # fmt: skip
BEIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8, "use_relative_position_bias": True,
}  # fmt: skip


def ids() -> Tensor:
    return torch.randint(3, 99, (2, 40), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> Tensor:
    return model(ids()).logits


def both(model: Any) -> Tensor:
    return model(input_ids=ids(), decoder_input_ids=ids()[:, :7]).logits


def pixels(model: Any) -> Tensor:
    return model(pixel_values=tower_models.random(2, 3, 32, 32)).last_hidden_state


REFUSED: dict[str, Any] = {
    "deepseek_v32": (lambda: tf.DeepseekV32ForCausalLM(tf.DeepseekV32Config(**LATENT)), logits),
    "glm_moe_dsa": (lambda: tf.GlmMoeDsaForCausalLM(tf.GlmMoeDsaConfig(**LATENT)), logits),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), both),
    "mt5": (lambda: tf.MT5ForConditionalGeneration(tf.MT5Config(**T5)), both),
    "umt5": (lambda: tf.UMT5ForConditionalGeneration(tf.UMT5Config(**T5)), both),
    "beit": (lambda: tf.BeitModel(tf.BeitConfig(**BEIT)), pixels),
}


def build(make: Any) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_a_refused_model_is_refused_early_and_else_stays_bit_for_bit(name: str) -> None:
    make, run = REFUSED[name]
    model = build(make)
    want = run(model)
    with pytest.raises(ValueError, match=r"cannot run sparse: it (selects keys|adds a bias)"):
        mms.sparsify(model, SPARSE)
    mms.sparsify(model, SPARSE, strict=False)
    assert run(model).equal(want)
    rows = mms.report(model).rows
    assert "sparse" not in {row.mode for row in rows}
    refused = tuple(row.name for row in rows if row.mode == "refused")
    assert refused
    mms.densify(model)
    for config in (SPARSE, mms.SparseConfig()):
        named = mms.SparseConfig(**{**vars_of(config), "dense_layers": refused})
        mms.sparsify(model, named)
        assert run(model).equal(want)
        modes = {row.mode for row in mms.report(model).rows if row.name in refused}
        assert modes == {"dense"}
        mms.densify(model)
    assert run(model).equal(want)


def vars_of(config: mms.SparseConfig) -> dict[str, Any]:
    import dataclasses

    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


@torch.no_grad()
def test_some_layers_of_a_model_may_be_refused_and_named_dense() -> None:
    timm: Any = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("crossvit_tiny_240").eval()
    with pytest.raises(ValueError, match=r"CrossAttention\) cannot run sparse"):
        mms.sparsify(model, SPARSE)
    own = tuple(n for n, m in model.named_modules() if type(m).__name__ == "CrossAttention")
    mms.sparsify(model, mms.SparseConfig(ratio=0.5, dense_below=0, dense_layers=own))
    model(tower_models.random(1, 3, 240, 240))
    modes = {row.name: row.mode for row in mms.report(model).rows}
    assert {modes[name] for name in own} == {"dense"}
    assert set(modes.values()) == {"dense", "sparse"}


@torch.no_grad()
def test_attention_weights_are_refused_or_given() -> None:
    case = hf_models.build("llama")
    mms.sparsify(case.model, SPARSE)
    with pytest.raises(ValueError, match=r"asked for the attention weights \(`output_attentions`"):
        case.model(hf_models.long_ids(100), output_attentions=True)
    mms.sparsify(case.model, SPARSE, strict=False)
    case.model(hf_models.long_ids(100), output_attentions=True)
    rows = mms.report(case.model).rows
    assert all("output_attentions" in row.reason for row in rows)
    case.model(hf_models.long_ids(100))
    assert {row.mode for row in mms.report(case.model).rows} == {"sparse"}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("how", ["export", "trace"])
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_export_and_tracing_say_one_sentence(name: str, how: str) -> None:
    if name == "llama":
        model, x = hf_models.build("llama").model, hf_models.long_ids(40)
        model.config.use_cache = model.config.return_dict = False
    else:
        pytest.importorskip("timm")
        model, x = tower_models.build("vit").model.eval(), tower_models.random(2, 3, 48, 48)
    mms.sparsify(model, SPARSE)
    make = torch.export.export if how == "export" else torch.jit.trace
    with torch.no_grad(), pytest.raises(ValueError, match=r"call mms.densify\(model\) first"):
        make(model, (x,))


@torch.no_grad()
def test_bounds_of_packed_texts_do_not_reach_the_vision_tower() -> None:
    case = hf_models.build("qwen2_5_vl")
    inputs = {k: v for k, v in case.inputs("none").items() if k != "attention_mask"}
    want = case.model(**inputs, use_cache=False).logits
    length = inputs["input_ids"].shape[1]
    rows = []
    seen = []
    for row in (0, 1):
        one = {
            key: value[row : row + 1] if len(value) == 2 else value.chunk(2)[row]
            for key, value in inputs.items()
        }
        bounds = torch.tensor([0, length], dtype=torch.int32)
        cuts = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        for config in (mms.SparseConfig(ratio=1.0, dense_below=0), mms.SparseConfig()):
            mms.sparsify(case.model, config)
            rows.append(case.model(**one, **cuts, use_cache=False).logits)
            seen.append({row.mode for row in mms.report(case.model).rows})
            mms.densify(case.model)
    assert seen == [{"sparse"}, {"dense"}] * 2
    for found, row in zip(rows, (0, 0, 1, 1), strict=True):
        torch.testing.assert_close(found[0], want[row], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_hybrid_model_whose_layers_have_no_number_runs_without_a_cache() -> None:
    config = tf.Zamba2Config(
        **{**SMALL, "num_hidden_layers": 3}, layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_ngroups=1, n_mamba_heads=4, mamba_headdim=16, mamba_d_state=8, mamba_expand=2,
        num_mem_blocks=1, use_mem_rope=True, attention_head_dim=16, attention_hidden_size=64,
        chunk_size=16,
    )  # fmt: skip
    model = build(lambda: tf.Zamba2ForCausalLM(config))
    want = logits(model)
    mms.sparsify(model, mms.SparseConfig(ratio=1.0, dense_below=0))
    torch.testing.assert_close(logits(model), want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_tokens_that_have_no_ids_of_the_model_are_text_with_one_warning() -> None:
    config = tf.InstructBlipConfig(
        vision_config={**hf_models.VISION, "image_size": 24},
        qformer_config={
            "vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 48, "encoder_hidden_size": 32,
        },
        text_config={
            "model_type": "opt", "vocab_size": 120, "hidden_size": 32, "ffn_dim": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256,
            "word_embed_proj_dim": 32, "pad_token_id": 0,
        },
        num_query_tokens=8, image_token_index=100,
    )  # fmt: skip
    model = build(lambda: tf.InstructBlipForConditionalGeneration(config))
    prompt = torch.cat([torch.full((2, 8), 100), ids()[:, :12]], 1)
    x = {
        "input_ids": prompt, "attention_mask": torch.ones_like(prompt),
        "pixel_values": tower_models.random(2, 3, 24, 24), "qformer_input_ids": ids()[:, :7],
        "qformer_attention_mask": torch.ones(2, 7, dtype=torch.long),
    }  # fmt: skip
    options: Any = {"max_new_tokens": 4, "do_sample": False}
    want = model.generate(**x, **options)
    mms.sparsify(model, mms.SparseConfig(ratio=1.0, dense_below=0))
    with pytest.warns(UserWarning, match=r"counts as text; .* `mms.set_modality`"):
        found = model.generate(**x, **options)
    assert found.equal(want)
    # Warnings are errors here: it is said once.
    assert model.generate(**x, **options).equal(want)


def test_a_scorer_of_ones_own_is_told_what_is_wrong_with_its_scores() -> None:
    class Short(mms.PooledScorer):
        def score(self, *args: Any) -> Tensor:
            return super().score(*args)[..., :1]

    class Nothing(mms.PooledScorer):
        def score(self, *args: Any) -> Tensor:
            return super().score(*args) * float("nan")

    case = hf_models.build("llama")
    for scorer, message in (
        (Short, r"Short.score must give \(B, K, T, U\) .* got"),
        (Nothing, "NaN"),
    ):
        mms.sparsify(case.model, SPARSE, scorer=lambda made=scorer, **_: made())
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            case.model(hf_models.long_ids(100))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dense_layers": (99,)}, r"config.dense_layers must have layers .* 0 to 1; got 99"),
        ({"layer_ratio": {99: 0.1}}, r"config.layer_ratio must have layers .* 0 to 1; got 99"),
        ({"layer_ratio": {0: (0.1, 0.2, 0.3)}}, r"each of 2 KV heads of model.layers.0.self_attn"),
        ({"layer_ratio": {1: {"TEXT": (0.1, 0.2, 0.3)}}}, r"each of 2 KV heads of model.layers.1"),
        (
            {"query_ratio": {"IMAGE": (0.1,) * 3}},
            r"each of 2 KV heads of model.layers.0.self_attn, got 3",
        ),
    ],
)
def test_budgets_for_what_is_not_there_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mms.sparsify(hf_models.build("llama").model, mms.SparseConfig(**fields))


@torch.no_grad()
def test_another_ratio_scales_budgets_or_is_said_to_change_nothing() -> None:
    model = hf_models.build("llama").model
    budgets = {0: 0.3, 1: 0.5}
    own = mms.SparseConfig(ratio=0.4, dense_below=0, sinks=0, window=0, layer_ratio=budgets)
    mms.sparsify(model, own)
    with mms.override_config(model, ratio=0.2):
        assert mms.sparse_config(model).layer_ratio == pytest.approx({0: 0.15, 1: 0.25})
    changed = mms.SparseConfig(**{**vars_of(own), "ratio": 0.2})
    with pytest.warns(UserWarning, match=r"config.ratio 0.2 has no effect .*scaled\(0.2\)"):
        mms.sparsify(model, changed)


@torch.no_grad()
def test_the_report_says_what_keeps_more_than_was_asked_for() -> None:
    model = hf_models.build("llama").model
    mms.sparsify(model, mms.SparseConfig(ratio=0.2, dense_below=0))
    model(hf_models.long_ids(300))
    rows = mms.report(model).rows
    assert all("sinks 64 and window 128 keep more than ratio 0.2" in row.reason for row in rows)


def test_continuous_batching_is_refused_by_name() -> None:
    """Before transformers looks for kernels, of which some would run dense in silence."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)).eval()
    mms.sparsify(model, SPARSE)
    options = tf.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1)
    for call in (
        lambda: model.generate_batch([[1, 2, 3]], generation_config=options),
        lambda: model.init_continuous_batching(generation_config=options),
    ):
        with pytest.raises(ValueError, match=r"continuous batching .* cannot run sparse"):
            call()
    mms.densify(model)
    assert model.config._attn_implementation == "sdpa"
    assert model.init_continuous_batching(generation_config=options) is not None
