"""Attention modules of timm, open_clip and torchaudio, and which of them cannot run sparse."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from torch import Tensor, nn

from mm_sparse.integrations.discovery import (
    AttentionModule,
    defining_class,
    forward_source,
    prefixes,
)
from mm_sparse.integrations.tower_tokens import TowerTokens
from mm_sparse.integrations.towers.adapters import FUSED, TowerAdapter, registered_adapters
from mm_sparse.modality import Modality

LIBRARIES = ("timm", "open_clip", "torchaudio")


# Attributes of modules that say what the arguments of the call do not say before it is made.
UNFUSED = ("fused_attn", "use_fsdpa")


BIASES = ("relative_position_bias_table", "rel_pos", "use_rel_pos", "has_position_bias")


CHANNELS = ("XCA", "CrossCovarianceAttn", "ChannelAttention", "ChannelAttentionV2")

# Classes whose windows are a fifth dimension of the queries, and the attribute that says when.
WINDOWS = {"LocallyGroupedAttn": "", "MaskUnitAttention": "use_mask_unit_attn"}


@dataclass(frozen=True)
class TowerAttentionModule(AttentionModule):
    """An attention module of a tower."""

    tower: TowerTokens

    @property
    def most_tokens(self) -> int | None:
        return self.tower.most_tokens


def find_towers(
    model: nn.Module, adapters: Sequence[TowerAdapter] = ()
) -> list[TowerAttentionModule]:
    """Every module of `model` that is attention of a tower, in order.

    Args:
        adapters: asked first, then the registered ones, then the `LIBRARIES` of this package.
    """
    modules = dict(model.named_modules())
    towers: dict[Any, TowerTokens] = {}
    layers: list[TowerAttentionModule] = []
    asked = (*adapters, *registered_adapters())
    for name, module in modules.items():
        around = [modules[p] for p in prefixes(name) if modules[p] is not module]
        if any(f.module is owner for f in layers for owner in around):
            continue
        adapter = next((a for a in asked if a.matches(name, module, around)), None)
        if adapter is not None:
            tower = adapter.tokens(name, module, around)
            refusal = adapter.refusal(module)
            layers.append(TowerAttentionModule(name, module, tower.modality, refusal, False, tower))
            continue
        home = _library(module, around)
        if home is None or not _computes_attention(type(module)):
            continue
        key, tower = _tower(home, name, around)
        tower = towers.setdefault(key, tower)
        cross = _is_pooling(type(module)) or any(_is_pooling(type(m)) for m in around[-1:])
        refusal = None if cross else _refusal(module)
        layers.append(TowerAttentionModule(name, module, tower.modality, refusal, cross, tower))
    return layers


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
    if cls.__name__ in WINDOWS and getattr(module, WINDOWS[cls.__name__], True):
        return "it attends in windows, a fifth dimension of its queries"
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


def _tower(home: str, name: str, around: list[nn.Module]) -> tuple[Any, TowerTokens]:
    """The tower around a layer: what tells it from others, and what is known of its tokens."""
    image = home == "timm" or (home == "open_clip" and "visual" in name.split("."))
    for owner in reversed(around):
        prefix = getattr(owner, "num_prefix_tokens", None)
        if home == "timm" and isinstance(prefix, int):
            embed = getattr(owner, "patch_embed", None) or getattr(owner, "embeds", None)
            embed = embed if hasattr(embed, "dynamic_feat_size") else None
            patches = None if embed is None else getattr(embed, "num_patches", None)
            most = patches + prefix if isinstance(patches, int) else None
            return id(owner), TowerTokens(
                Modality.IMAGE, prefix, embed=embed, owner=owner, most_tokens=most
            )
        if home == "open_clip" and hasattr(owner, "class_embedding"):
            grid = getattr(owner, "grid_size", None)
            # It adds a vector to each patch, of which there are as many.
            most = None if grid is None else prod(grid) + 1
            return id(owner), TowerTokens(Modality.IMAGE, 1, grid, most_tokens=most)
    other = Modality.AUDIO if home == "torchaudio" else Modality.TEXT
    return (home, image), TowerTokens(Modality.IMAGE if image else other)
