"""`nn.MultiheadAttention` on its own parameters, with a layer in place of its attention.

Its forward calls attention below Python, where no mode sees it, so its lines are written out.

B batch, H heads, N query tokens, M key tokens, E width, D head dim
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from mm_sparse.integrations.forward_context import refuse_export, uncompiled
from mm_sparse.integrations.options import AttentionOptions
from mm_sparse.integrations.towers.call_layout import MultiheadMasks
from mm_sparse.integrations.towers.forward import Forward


class MultiheadForward(Forward):
    """Stands before the forward of an `nn.MultiheadAttention`."""

    @uncompiled
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        refuse_export()
        layer = self.layer
        module: Any = layer.module
        batched = query.dim() == 3
        time = 1 if batched and module.batch_first else 0
        own = query is key and key is value
        short = own and layer.is_short(query.shape[time], key.shape[time], query.device)

        def original() -> tuple[Tensor, Tensor | None]:
            return self.original(
                query, key, value, key_padding_mask=key_padding_mask, need_weights=need_weights,
                attn_mask=attn_mask, average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )  # fmt: skip

        if short or (is_causal and attn_mask is None):
            return original()  # which says what is missing of a mask
        early = layer.early_mode(key.shape[time] if own else None, query.device)
        if early[0] != "sparse" and not (batched and layer.shared.settings.watchers):
            layer.note(early, query.shape[time], key.shape[time])
            return original()
        if not batched:
            problem = f"its input must be (batch, tokens, width), got {tuple(query.shape)}"
            layer.note(layer.refuse(problem), len(query), len(key))
            return original()
        q, k, v = _heads(module, query, key, value)
        masks = MultiheadMasks(attn_mask, key_padding_mask)
        options = AttentionOptions(dropout=module.dropout, need_weights=need_weights, cross=not own)

        def format_output(out: Tensor) -> tuple[Tensor, None]:
            out = linear(out.flatten(2), module.out_proj.weight, module.out_proj.bias)  # (B, N, E)
            return out if module.batch_first else out.transpose(0, 1), None

        out, _ = layer.run(
            q, k, v, masks if masks.parts() else None, options, original, format_output
        )
        return out


def _heads(module: Any, *states: Tensor) -> list[Tensor]:
    """Queries, keys and values of (B, N, E) or, time first, (N, B, E) states: (B, H, N, D) each."""
    biases: Any = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    if module._qkv_same_embed_dim:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    if states[0] is states[1] is states[2] and module._qkv_same_embed_dim:
        projected = linear(states[0], module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    else:
        projected = [linear(*parts) for parts in zip(states, weights, biases, strict=True)]
    if not module.batch_first:
        projected = [x.transpose(0, 1) for x in projected]
    return [x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in projected]
