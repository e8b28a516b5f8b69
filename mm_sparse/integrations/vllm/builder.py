"""Builds what layers of an engine are told of a step.

N tokens of a step, R requests, A pages in memory, K KV heads, S tokens of a page, D head dim
"""

# vLLM is no dependency of this package.
# pyright: reportMissingImports=false
from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from mm_sparse.integrations.vllm.metadata import DensePart, SparseMetadata, part_of_step
from mm_sparse.integrations.vllm.modality_ranges import token_modality, watch_runner
from mm_sparse.integrations.vllm.served_layers import LayerPlan, ServedLayers, plan_layer
from mm_sparse.integrations.vllm.settings import serving_settings

RUNNER = "vllm.v1.worker.gpu_model_runner"


class SparseMetadataBuilder(FlashAttentionMetadataBuilder):
    """That of FlashAttention, whose kernels serve what is dense, and the sparse part of a step.

    Steps of decoding alone may be recorded in CUDA graphs; prefill runs between their pieces.

    Raises:
        ValueError: the engine splits sequences among ranks, speculates, or sees images in both
            directions.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    # Metadata holds tables of pages, and pages hold descriptors of one group of layers.
    supports_update_block_table = False

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        reason = _refusal(vllm_config)
        if reason is not None:
            raise ValueError(f"the backend of mm_sparse cannot serve {reason}")
        # Steps of decoding come first in a batch.
        self._init_reorder_batch_threshold(1)
        self.plans = self._plan_layers()
        self.served: ServedLayers | None = None
        self._recorded = False
        model = vllm_config.model_config
        if self.plans and getattr(model, "is_multimodal_model", False):
            if getattr(vllm_config, "use_v2_model_runner", False):
                raise ValueError(
                    "the backend of mm_sparse learns where images stand from vLLM's first model "
                    "runner; set VLLM_USE_V2_MODEL_RUNNER=0"
                )
            if RUNNER in sys.modules:
                watch_runner(sys.modules[RUNNER].GPUModelRunner)

    def _plan_layers(self) -> dict[str, LayerPlan]:
        """Config and scorer of the layers of this group that run sparse."""
        config, parallel = self.vllm_config, self.vllm_config.parallel_config
        settings = serving_settings(config.additional_config)
        ranks, rank = parallel.tensor_parallel_size, _rank_of_heads()
        plans = {}
        for name in self.layer_names:
            layer = self.compilation_config.static_forward_context[name]
            if getattr(layer.impl, "stays_dense", "another backend") is not None:
                continue
            shape = (
                layer.num_heads * ranks,
                config.model_config.get_total_num_kv_heads(),
                layer.head_size,
            )
            plan = plan_layer(name, settings, shape, rank, ranks)
            if plan is not None:
                plans[name] = plan
        return plans

    def _served_layers(self, pages: int) -> ServedLayers | None:
        """The sparse layers, once the engine has given them memory.

        Args:
            pages: most pages of a sequence.
        """
        if self.served is None and self.plans:
            context = self.compilation_config.static_forward_context
            layer = context[next(iter(self.plans))]
            memory, heads, page, _ = layer.kv_cache.shape
            self.served = ServedLayers(
                self.plans, group=layer.num_heads // heads, page=page,
                rows=max(
                    self.vllm_config.scheduler_config.max_num_seqs, self.max_cudagraph_size or 0
                ),
                pages=pages, memory=memory, device=self.device,
            )  # fmt: skip
        return self.served

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttentionMetadata:
        common = common_attn_metadata
        dense = super().build(common_prefix_len, common, fast_build)
        served = self._served_layers(common.block_table_tensor.shape[1])
        if served is None:
            return dense
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        bound = common.seq_lens_cpu_upper_bound
        lengths = (common.seq_lens if bound is None else bound)[: common.num_reqs].tolist()
        kinds = token_modality(starts, lengths)
        step = served.geometry.step(
            starts, lengths, common.seq_lens, common.block_table_tensor,
            modality=None if kinds is None else kinds.to(self.device), recorded=self._recorded,
        )  # fmt: skip
        parts: list[DensePart] = []
        if step.rows:
            for run in step.dense:
                part = part_of_step(common, run, starts, lengths)
                tokens = slice(starts[run.start], starts[run.stop])
                parts.append(DensePart(tokens, super().build(0, part, fast_build=True)))
        return SparseMetadata.of(dense, served=served, step=step, dense_parts=tuple(parts))

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> FlashAttentionMetadata:
        self._recorded = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        finally:
            self._recorded = False

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Requests with a common prefix select from it each for themselves."""
        return False if self.plans else super().use_cascade_attention(*args, **kwargs)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        return cls._cudagraph_support


def _refusal(config: Any) -> str | None:
    """What of an engine's config cannot be served; None if all can."""
    parallel, model = config.parallel_config, config.model_config
    if config.speculative_config is not None:
        return "speculative decoding: how long a sequence is, the device alone would know"
    if parallel.decode_context_parallel_size > 1:
        return "decode context parallelism: a rank would rank the keys that it holds alone"
    if parallel.prefill_context_parallel_size > 1:
        return "prefill context parallelism: a rank would rank the keys that it holds alone"
    if parallel.use_ubatching:
        return "micro-batches: each would describe pages of its own"
    if getattr(model, "rswa_window", None) is not None:
        return "reference sliding window attention"
    return None


def _rank_of_heads() -> int:
    """Rank of tensor parallelism, 0 where there is none."""
    from vllm.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return 0
    return parallel_state.get_tensor_model_parallel_rank()
