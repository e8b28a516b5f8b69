"""What steps of a sparsified model in a graph need, written down when a layer has its size.

B batch, C keys that a prefill left, R tokens to come
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mm_sparse.integrations.hf.attention import options_of
from mm_sparse.integrations.hf.decoding import prepare_steps
from mm_sparse.integrations.hf.lazy_mask import LazyMask
from mm_sparse.integrations.hf.mask_spans import MaskRecipe
from mm_sparse.integrations.layer import LAYER
from mm_sparse.integrations.sparse_cache.fixed_layer import FixedSparseCacheLayer


class StepMasks:
    """Masks of the newest token of one prefill, shared by layers that hold equally many keys."""

    def __init__(self) -> None:
        self._masks: dict[int, LazyMask] = {}

    def __deepcopy__(self, memo: Any) -> StepMasks:
        # A copy of the cache has keys of its own.
        return StepMasks()

    def prepare(
        self, module: nn.Module, layer: FixedSparseCacheLayer, q: Tensor, valid: Tensor | None,
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        """Nothing for a model that is not sparsified.

        Args:
            q: (B, H, N, D) of the prefill.
            valid: (B, C) bool, False on padding; None without any.
        """
        sparse = getattr(module, LAYER, None)
        if sparse is None:
            return
        mask = self._mask(layer, len(q), valid)
        newest = q[:, :, -1:]
        prepare_steps(sparse, newest, layer.keys, layer.values, mask, options_of(options))

    def _mask(self, layer: FixedSparseCacheLayer, rows: int, valid: Tensor | None) -> LazyMask:
        from transformers.masking_utils import causal_mask_function

        keys = layer.keys.shape[-2]
        if keys not in self._masks:
            recipe = MaskRecipe(
                batch_size=rows, q_length=1, kv_length=keys, q_offset=layer.left - 1, kv_offset=0,
                mask_function=causal_mask_function, attention_mask=valid, device=layer.keys.device,
            )  # fmt: skip
            recipe.released = layer.released
            self._masks[keys] = LazyMask(recipe)
        return self._masks[keys]
