"""Attention layers of towers that timm, open_clip and torchaudio build, and what serves them."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor, nn

from mm_sparse.integrations.discovery import (
    Found,
    defining_class,
    forward_source,
    is_one_of,
    prefixes,
)
from mm_sparse.integrations.layer import LAYER, Layer, Shared
from mm_sparse.integrations.layout_cache import Placed
from mm_sparse.integrations.towers.call_layout import Tower, TowerSource
from mm_sparse.layout.patch_order import ordered_layout
from mm_sparse.modality import Modality

LIBRARIES = ("timm", "open_clip", "torchaudio")
FUSED = "scaled_dot_product_attention"
# Attributes of modules that say what the arguments of the call do not say before it is made.
UNFUSED = ("fused_attn", "use_fsdpa")
BIASES = ("relative_position_bias_table", "rel_pos", "use_rel_pos", "has_position_bias")
# Give each token what it would get in any other order of the tokens, and ask for no positions.
EQUIVARIANT = frozenset(
    ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
)
CHANNELS = ("XCA", "CrossCovarianceAttn", "ChannelAttention", "ChannelAttentionV2")


@dataclass(frozen=True)
class TowerFound(Found):
    """An attention module of a tower."""

    tower: Tower


class TowerLayer(Layer):
    """Serves an attention module of a tower, by a forward that stands before its own."""

    def __init__(self, found: TowerFound, shared: Shared) -> None:
        super().__init__(found, shared, TowerSource(found.tower, shared.plain, shared.masked))

    def attach(self) -> None:
        if self.refusal is not None or self.cross:
            return
        # Both turn torch.compile away, which takes a second to import.
        from mm_sparse.integrations.towers.multihead import MultiheadForward
        from mm_sparse.integrations.towers.sdpa_redirect import RedirectedForward

        multihead = isinstance(self.module, nn.MultiheadAttention)
        forward = MultiheadForward if multihead else RedirectedForward
        own = vars(self.module)
        own[LAYER], own["forward"] = self, forward(self, own.get("forward"))

    def detach(self) -> None:
        own = vars(self.module)
        if LAYER not in own:
            return
        forward: Any = own.get("forward")
        if getattr(forward, "layer", None) is not self:
            raise ValueError(
                f"{self.name}.forward must be as `sparsify` left it, got {forward!r}: undo what "
                "replaced it first"
            )
        del own["forward"], own[LAYER]
        if forward.before is not None:
            own["forward"] = forward.before

    def place_in_order(self, tokens: Tensor) -> Placed | None:
        """Where (B, N, C) tokens would be in patch order, if the module may be given them so.

        Then two gathers do, of what comes in and what goes out, where q, k, v and the output take
        four. Nobody must look on: what is inside of the module is in patch order, too.
        """
        shared, module = self.shared, self.module
        if tokens.dim() != 3 or shared.watchers or shared.instead:
            return None
        if not is_one_of(type(module), EQUIVARIANT):
            return None
        if any(part._forward_hooks or part._forward_pre_hooks for part in module.children()):
            return None
        if self.early_mode(tokens.shape[1], tokens.device)[0] != "sparse":
            return None
        heads: Any = module.num_heads
        q = tokens[:, None, :, :1].expand(-1, heads, -1, -1)
        placed = self.source.place(module, q, q, None, {})
        layout = ordered_layout(
            placed.layout, self._where(placed)[0], num_queries=q.shape[2], query_offset=placed.first
        )
        return None if layout is placed.layout else replace(placed, layout=layout)

    def _in_view(self, q: Tensor, k: Tensor, mask: Any, options: dict[str, Any]) -> int | None:
        queries, keys = q.shape[-2], k.shape[-2]
        return keys if queries == keys and not options.get("cross") else None

    def _problem(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> str | None:
        if options.get("need_weights"):
            return "it is asked for the attention weights (`need_weights`)"
        if q.dim() != 4:
            return f"queries must be (batch, heads, tokens, head dim), got {tuple(q.shape)}"
        if mask is not None and options.get("is_causal"):
            return "it came with a mask and with `is_causal`"
        return super()._problem(q, k, v, mask, options)


def find_towers(model: nn.Module) -> list[TowerFound]:
    """Every module of `model` that is attention of one of the `LIBRARIES`, in order."""
    modules = dict(model.named_modules())
    towers: dict[Any, Tower] = {}
    found: list[TowerFound] = []
    for name, module in modules.items():
        around = [modules[p] for p in prefixes(name) if modules[p] is not module]
        home = _library(module, around)
        inside = any(f.module is owner for f in found for owner in around)
        if home is None or inside or not _computes_attention(type(module)):
            continue
        key, tower = _tower(home, name, around)
        tower = towers.setdefault(key, tower)
        cross = _is_pooling(type(module)) or any(_is_pooling(type(m)) for m in around[-1:])
        refusal = None if cross else _refusal(module)
        found.append(TowerFound(name, module, tower.modality, refusal, cross, tower))
    return found


def _library(module: nn.Module, around: list[nn.Module]) -> str | None:
    """Which library wrote a module; for torch's own attention, the module around it."""
    if isinstance(module, nn.MultiheadAttention):
        homes = [_home(type(owner)) for owner in around]
        return next((home for home in reversed(homes) if home is not None), None)
    return _home(type(module))


@cache
def _home(cls: type) -> str | None:
    roots = [base.__module__.partition(".")[0] for base in cls.__mro__]
    return next((root for root in roots if root in LIBRARIES), None)


@cache
def _computes_attention(cls: type) -> bool:
    if issubclass(cls, nn.MultiheadAttention) or _calls_fused(cls):
        return True
    try:
        source = inspect.getsource(defining_class(cls))
    except (OSError, TypeError):
        return False
    if "multi_head_attention_forward(" in source:
        return True
    looks = re.search(r"Attention|Attn", cls.__name__) or "num_heads" in source
    return bool(looks and "softmax" in source and re.search(r" @ |matmul|bmm|einsum", source))


def _calls_fused(cls: type) -> bool:
    return f"{FUSED}(" in forward_source(cls)


def _is_pooling(cls: type) -> bool:
    """A few probes that attend to all tokens once: nothing to save."""
    return re.search(r"Pool|ClassAtt", cls.__name__) is not None


def _refusal(module: nn.Module) -> str | None:
    cls = type(module)
    if isinstance(module, nn.MultiheadAttention):
        if cls.forward is not nn.MultiheadAttention.forward:
            return "its class writes another forward than torch's"
        if module.bias_k is not None or module.add_zero_attn:
            return "it adds a key of its own (`add_bias_kv` or `add_zero_attn`)"
        return None
    if cls.__name__ in CHANNELS:
        return "it attends over channels, not over tokens"
    for flag in UNFUSED:
        if getattr(module, flag, True) is False:
            return f"it computes attention without {FUSED} (`{flag}` is False)"
    for bias in BIASES:
        value = getattr(module, bias, None)
        if isinstance(value, (Tensor, nn.Module)) or value is True:
            return f"it adds a position bias to the logits (`{bias}`)"
    if getattr(module, "scaled_cosine", False):
        return f"it computes attention without {FUSED} (`scaled_cosine`)"
    return None if _calls_fused(cls) else f"it computes attention without {FUSED}"


def _tower(home: str, name: str, around: list[nn.Module]) -> tuple[Any, Tower]:
    """The tower around a layer: what tells it from others, and what is known of its tokens."""
    image = home == "timm" or (home == "open_clip" and "visual" in name.split("."))
    for owner in reversed(around):
        prefix = getattr(owner, "num_prefix_tokens", None)
        if home == "timm" and isinstance(prefix, int):
            embed = getattr(owner, "patch_embed", None) or getattr(owner, "embeds", None)
            embed = embed if hasattr(embed, "dynamic_feat_size") else None
            return id(owner), Tower(Modality.IMAGE, prefix, embed=embed)
        if home == "open_clip" and hasattr(owner, "class_embedding"):
            return id(owner), Tower(Modality.IMAGE, 1, getattr(owner, "grid_size", None))
    other = Modality.AUDIO if home == "torchaudio" else Modality.TEXT
    return (home, image), Tower(Modality.IMAGE if image else other)
