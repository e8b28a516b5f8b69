"""What layers of an engine are told of a step: the dense backend's own, and the sparse part.

N tokens of a step, R requests
"""

# vLLM is no dependency of this package.
# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

from mm_sparse.attention import PagedStep
from mm_sparse.integrations.vllm.served_layers import ServedLayers


@dataclass(frozen=True)
class DensePart:
    """Requests of a mixed step that are too short to run sparse."""

    tokens: slice
    metadata: FlashAttentionMetadata


@dataclass
class SparseMetadata(FlashAttentionMetadata):
    """A step for layers of which some run sparse; to all others it is the dense backend's."""

    served: ServedLayers | None = None
    step: PagedStep | None = None
    dense_parts: tuple[DensePart, ...] = ()

    @classmethod
    def of(cls, dense: FlashAttentionMetadata, **more: Any) -> SparseMetadata:
        """The dense backend's metadata with a sparse part."""
        return cls(**{f.name: getattr(dense, f.name) for f in fields(dense)}, **more)


def part_of_step(
    common: CommonAttentionMetadata, requests: slice, starts: Sequence[int], lengths: Sequence[int]
) -> CommonAttentionMetadata:
    """The engine's metadata of a run of requests, as if they were a step of their own.

    Args:
        starts: R + 1, first token of each request.
        lengths: R, keys of each.
    """
    first, last = requests.start, requests.stop
    own = slice(first, last + 1)
    queries = [starts[i + 1] - starts[i] for i in range(first, last)]
    bound = common.seq_lens_cpu_upper_bound
    return CommonAttentionMetadata(
        query_start_loc=common.query_start_loc[own] - starts[first],
        query_start_loc_cpu=common.query_start_loc_cpu[own] - starts[first],
        seq_lens=common.seq_lens[requests],
        num_reqs=last - first,
        num_actual_tokens=sum(queries),
        max_query_len=max(queries),
        max_seq_len=max(lengths[requests]),
        block_table_tensor=common.block_table_tensor[requests],
        slot_mapping=common.slot_mapping[starts[first] : starts[last]],
        causal=common.causal,
        seq_lens_cpu_upper_bound=None if bound is None else bound[requests],
    )
