"""The backend against the engine's own classes, on a CPU; run where vLLM 0.26 is installed."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="needs vLLM 0.26.0 in an environment of its own (docs/how-to/serve.md)",
    ),
    # The engine's own.
    pytest.mark.filterwarnings("ignore"),
]
LAYERS = [f"model.layers.{i}.self_attn.attn" for i in range(2)]
PAGE, PAGES, MEMORY = 32, 16, 24


@pytest.fixture(scope="module")
def engine_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The engine's config of a small model, on a CPU."""
    from tests.support import vllm_engine

    vllm_engine.on_cpu()
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=128, max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    from mm_sparse.integrations.vllm import register

    register()
    register()
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
        attention_backend="CUSTOM", dtype="float16", max_model_len=PAGE * PAGES, max_num_seqs=6,
        block_size=PAGE, kv_cache_memory_bytes=1 << 24,
        additional_config={"mm_sparse": {"ratio": 0.3, "config": {"dense_below": 100}}},
    ).create_engine_config()  # fmt: skip


@pytest.fixture
def layers(engine_config: Any) -> dict[str, Any]:
    """The engine's attention layers, with memory for their pages."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    context = engine_config.compilation_config.static_forward_context
    context.clear()
    with set_current_vllm_config(engine_config):
        for name in LAYERS:
            layer = Attention(
                4, 32, 32**-0.5, num_kv_heads=2, cache_config=engine_config.cache_config,
                prefix=name,
            )  # fmt: skip
            shape = layer.attn_backend.get_kv_cache_shape(MEMORY, PAGE, 2, 32)
            order = layer.attn_backend.get_kv_cache_stride_order()
            memory = torch.zeros([shape[i] for i in order], dtype=torch.float16)
            layer.kv_cache = memory.permute([order.index(i) for i in range(4)])
    return dict(context)


def builder_of(config: Any, layers: dict[str, Any]) -> Any:
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(config):
        spec = layers[LAYERS[0]].get_kv_cache_spec(config)
        cls = layers[LAYERS[0]].attn_backend.get_builder_cls()
        return cls(spec, LAYERS, config, torch.device("cpu"))


def step_of(queries: list[int], lengths: list[int]) -> Any:
    """A step as the engine's runner tells it; sequence i holds the pages from 6 i + 1 on."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    table = torch.zeros(len(queries), PAGES, dtype=torch.int32)
    for i, length in enumerate(lengths):
        held = -(-length // PAGE)
        table[i, :held] = torch.arange(held) + 6 * i + 1
    slots = [
        table[i, at // PAGE].item() * PAGE + at % PAGE
        for i, (count, length) in enumerate(zip(queries, lengths, strict=True))
        for at in range(length - count, length)
    ]
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32), num_reqs=len(queries),
        num_actual_tokens=sum(queries), max_query_len=max(queries), max_seq_len=max(lengths),
        block_table_tensor=table, slot_mapping=torch.tensor(slots),
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
    )  # fmt: skip


def run(layer: Any, metadata: Any, dense: list[tuple]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of a layer for new tokens; FlashAttention's calls are noted, not made."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    from tests.support.vllm_engine import write_pages

    torch.manual_seed(0)
    n = metadata.num_actual_tokens
    q = torch.randn(n, 4, 32, dtype=torch.float16)
    k, v = torch.randn(2, n, 2, 32, dtype=torch.float16)
    write_pages(layer.impl, layer, k, v, layer.kv_cache, metadata.slot_mapping)
    out = torch.full_like(q, float("nan"))
    before = FlashAttentionImpl.forward
    FlashAttentionImpl.forward = lambda self, layer, q, k, v, pages, step, out, *_: (
        dense.append((len(q), step)) or out.fill_(7)
    )
    try:
        assert layer.impl.forward(layer, q, k, v, layer.kv_cache, metadata, out) is out
    finally:
        FlashAttentionImpl.forward = before
    return q, k, v, out


def test_the_engine_selects_the_backend_by_its_name(layers: dict[str, Any]) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from mm_sparse.integrations.vllm.backend import SparseBackend
    from mm_sparse.integrations.vllm.implementation import SparseAttention

    layer = layers[LAYERS[0]]
    assert AttentionBackendEnum.CUSTOM.get_class() is SparseBackend
    assert layer.attn_backend is SparseBackend
    assert layer.backend is AttentionBackendEnum.CUSTOM
    assert isinstance(layer.impl, SparseAttention)
    assert layer.impl.stays_dense is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"block_size": 128}, None),
        ({"has_sliding_window": True}, None),
        ({"block_size": 24}, "block_size"),
        ({"head_size": 512}, "head"),
        ({"use_mm_prefix": True}, "multimodal"),
        ({"use_mla": True}, "MLA"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"use_batch_invariant": True}, "batch invariance"),
        ({"use_kv_connector": True}, "KV connector"),
    ],
)
def test_what_the_engine_asks_before_it_selects(changes: dict, reason: str | None) -> None:
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from mm_sparse.integrations.vllm.backend import SparseBackend

    asked = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16}
    config = AttentionSelectorConfig(**{**asked, **changes})
    reasons = SparseBackend.validate_configuration(
        device_capability=DeviceCapability(9, 0), **config._asdict()
    )
    assert (reasons == []) if reason is None else any(reason in x for x in reasons), reasons


def test_layers_that_cannot_run_sparse_say_why(engine_config: Any) -> None:
    from vllm.config import set_current_vllm_config

    from mm_sparse.integrations.vllm.implementation import SparseAttention

    with set_current_vllm_config(engine_config):
        for options, reason in (
            ({"sliding_window": 128}, "sliding window"),
            ({"logits_soft_cap": 30.0}, "soft cap"),
            ({"alibi_slopes": [1.0] * 4}, "ALiBi"),
            ({"attn_type": "encoder_only"}, "encoder_only"),
            ({"kv_sharing_target_layer_name": "x"}, "another layer"),
            ({}, None),
        ):
            found = SparseAttention(4, 32, 0.2, 2, **options).stays_dense
            assert (found is None) if reason is None else reason in str(found)


def test_a_mixed_step(engine_config: Any, layers: dict[str, Any]) -> None:
    """Two steps of decoding, a short prompt and a long one: shapes, dtypes, who serves what."""
    import mm_sparse as mms
    from mm_sparse.integrations.vllm.metadata import SparseMetadata

    builder = builder_of(engine_config, layers)
    assert builder.reorder_batch_threshold == 1
    layer, dense = layers[LAYERS[1]], []
    first = builder.build(0, step_of([120, 40], [120, 40]))
    assert isinstance(first, SparseMetadata)
    *_, k0, v0, out = run(layer, first, dense)
    assert not out[:120].isnan().any()
    assert (out[120:] == 7).all()
    assert [count for count, _ in dense] == [40]
    step = dense[0][1]
    assert (step.num_actual_tokens, step.max_query_len, step.max_seq_len) == (40, 40, 40)
    assert step.query_start_loc.tolist() == [0, 40]
    assert step.seq_lens.tolist() == [40]
    assert step.block_table[0, :2].tolist() == [7, 8]
    dense.clear()
    mixed = builder.build(0, step_of([1, 1, 30, 130], [121, 41, 30, 130]))
    assert mixed.step.dense == [slice(2, 3)]
    q, k, v, out = run(layer, mixed, dense)
    assert out.dtype == torch.float16
    assert [count for count, _ in dense] == [30]
    assert (out[2:32] == 7).all()
    config = builder.plans[LAYERS[1]].config

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        layout = mms.TokenLayout.text(1, k.shape[2])
        return mms.sparse_attention(
            q, k, v, layout=layout, config=config, scorer=mms.PooledScorer()
        )[0].transpose(0, 1)

    want = alone(q[32:], k[32:], v[32:])
    torch.testing.assert_close(out[32:], want, atol=2e-3, rtol=2e-3)
    keys, values = torch.cat([k0[:120], k[:1]]), torch.cat([v0[:120], v[:1]])
    torch.testing.assert_close(out[:1], alone(q[:1], keys, values), atol=2e-3, rtol=2e-3)
    # The short one keeps all of its keys.
    keys, values = torch.cat([k0[120:], k[1:2]]), torch.cat([v0[120:], v[1:2]])
    torch.testing.assert_close(out[1:2], alone(q[1:2], keys, values), atol=2e-3, rtol=2e-3)


def test_short_steps_are_the_dense_backends(engine_config: Any, layers: dict[str, Any]) -> None:
    builder = builder_of(engine_config, layers)
    dense: list = []
    metadata = builder.build(0, step_of([20, 40], [20, 40]))
    run(layers[LAYERS[0]], metadata, dense)
    assert dense == [(60, metadata)]
    assert builder.served.layers[LAYERS[0]].units is not None


def test_steps_of_decoding_may_be_recorded(engine_config: Any, layers: dict[str, Any]) -> None:
    """Nothing of them is dense then, and what only fills the batch is nobody's."""
    from vllm.v1.attention.backend import AttentionCGSupport

    builder = builder_of(engine_config, layers)
    support = builder.get_cudagraph_support(engine_config, builder.kv_cache_spec)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    captured = builder.build_for_cudagraph_capture(step_of([1, 1, 1], [300, 300, 300]))
    assert captured.step.dense == []
    recorded = captured.step.rows[0].plan
    dense: list = []
    run(layers[LAYERS[0]], captured, dense)
    assert dense == []
    # Two requests in a graph of three: the third has no query.
    filled = step_of([1, 1, 0], [150, 40, 0])
    builder.build(0, filled)
    assert recorded.span[:, 0, 1].tolist() == [150, 40, 0]
    assert recorded.head_budget[:, 0, 0].tolist() == [45, 40, 0]
    assert builder.served.geometry._size.tolist()[2] == 0
    # And one in the same graph, of which the engine tells one row alone.
    builder.build(0, step_of([1], [151]))
    assert recorded.span[:, 0, 1].tolist() == [151, 0, 0]


@pytest.mark.parametrize(
    ("part", "field", "value", "reason"),
    [
        (None, "speculative_config", SimpleNamespace(), "speculative decoding"),
        ("parallel_config", "decode_context_parallel_size", 2, "decode context parallelism"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill context parallelism"),
        ("parallel_config", "enable_dbo", True, "micro-batches"),
    ],
)
def test_engines_that_cannot_be_served_are_refused_by_name(
    engine_config: Any, monkeypatch: pytest.MonkeyPatch, part: str | None, field: str,
    value: Any, reason: str,
) -> None:  # fmt: skip
    from mm_sparse.integrations.vllm import builder

    assert builder._refusal(engine_config) is None
    owner = engine_config if part is None else getattr(engine_config, part)
    monkeypatch.setattr(owner, field, value)
    assert reason in builder._refusal(engine_config)


def test_the_engines_own_ranges_of_items() -> None:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    from mm_sparse.integrations.vllm.modality_ranges import runner_of_step, token_modality

    position = PlaceholderRange(2, 5, torch.tensor([False, True, False, True, True]))
    feature = MultiModalFeatureSpec(None, "image", "x", position)
    request = SimpleNamespace(mm_features=[feature])
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["a"]), requests={"a": request})
    with runner_of_step(runner):
        found = token_modality([0, 8], [8])
    assert found is not None
    assert found.tolist() == [0, 0, 0, 1, 0, 1, 1, 0]


def test_the_engines_runner_has_what_is_watched() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from mm_sparse.integrations.vllm.modality_ranges import watch_runner

    watch_runner(GPUModelRunner)
    assert GPUModelRunner._build_attention_metadata._mm_sparse
