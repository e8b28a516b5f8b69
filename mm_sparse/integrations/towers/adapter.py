"""Attention layers of towers that timm, open_clip and torchaudio build, and what serves them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mm_sparse.integrations.discovery import (
    is_one_of,
)
from mm_sparse.integrations.layer import SparseLayer
from mm_sparse.integrations.options import AttentionOptions
from mm_sparse.integrations.shared_state import Shared
from mm_sparse.integrations.towers.call_layout import TowerLayoutSource
from mm_sparse.integrations.towers.discovery import TowerAttentionModule
from mm_sparse.layout import CallLayout, ordered_layout

# Give each token what it would get in any other order of the tokens, and ask for no positions.
EQUIVARIANT = frozenset(
    ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
)


class TowerLayer(SparseLayer):
    """Serves an attention module of a tower, by a forward that stands before its own."""

    def __init__(self, item: TowerAttentionModule, shared: Shared) -> None:
        super().__init__(item, shared, TowerLayoutSource(item.tower, shared.plain, shared.masked))
        self._forward: Any = None
        """What stands before the forward of the module."""

    def attach(self) -> None:
        if self.standby is None:
            self.wrap()

    def wrap(self) -> None:
        if self.refusal is not None or self.cross or self._forward is not None:
            return
        # Both turn torch.compile away, which takes a second to import.
        from mm_sparse.integrations.towers.multihead import MultiheadForward
        from mm_sparse.integrations.towers.sdpa_redirect import RedirectedForward

        multihead = isinstance(self.module, nn.MultiheadAttention)
        make = MultiheadForward if multihead else RedirectedForward
        own = vars(self.module)
        self._forward = own["forward"] = make(self, own.get("forward"))

    def detach(self) -> None:
        if self._forward is not None:
            self.check_detachable()
            self.unwrap()

    def unwrap(self) -> None:
        own = vars(self.module)
        if self._forward is None or own.get("forward") is not self._forward:
            return
        before = self._forward.before
        del own["forward"]
        self._forward = None
        if before is not None:
            own["forward"] = before

    def check_detachable(self) -> None:
        """Raise where others replaced the forward that `attach` set.

        Raises:
            ValueError: they did; the message names the module.
        """
        forward = vars(self.module).get("forward")
        if self._forward is not None and forward is not self._forward:
            raise ValueError(
                f"{self.name}.forward must be as `sparsify` left it, got {forward!r}: undo what "
                "replaced it first"
            )

    def layout_in_patch_order(self, tokens: Tensor) -> CallLayout | None:
        """Where (B, N, C) tokens would be in patch order, if the module may be given them so.

        Then two gathers do, of what comes in and what goes out, where q, k, v and the output take
        four. Nobody must look on: what is inside of the module is in patch order, too.
        """
        shared, module = self.shared, self.module
        settings = shared.settings
        if tokens.dim() != 3 or settings.watchers or settings.attention_override:
            return None
        if not is_one_of(type(module), EQUIVARIANT):
            return None
        if any(part._forward_hooks or part._forward_pre_hooks for part in module.children()):
            return None
        if self.early_mode(tokens.shape[1], tokens.device)[0] != "sparse":
            return None
        heads: Any = module.num_heads
        q = tokens[:, None, :, :1].expand(-1, heads, -1, -1)
        call_layout = self.source.layout_of_call(module, q, q, None, AttentionOptions())
        layout = ordered_layout(
            call_layout.layout,
            shared.layer_config(self.index, self.name, call_layout.prefix),
            num_queries=q.shape[2],
            query_offset=call_layout.first,
        )
        return None if layout is call_layout.layout else replace(call_layout, layout=layout)

    def _in_view(self, q: Tensor, k: Tensor, mask: Any, options: AttentionOptions) -> int | None:
        queries, keys = q.shape[-2], k.shape[-2]
        return keys if queries == keys and not options.cross else None

    def problem(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: AttentionOptions
    ) -> str | None:
        if options.need_weights:
            return "it is asked for the attention weights (`need_weights`)"
        if q.dim() != 4:
            return f"queries must be (batch, heads, tokens, head dim), got {tuple(q.shape)}"
        if mask is not None and options.is_causal:
            return "it came with a mask and with `is_causal`"
        return super().problem(q, k, v, mask, options)
