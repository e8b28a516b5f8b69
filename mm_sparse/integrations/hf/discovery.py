"""Which modules of a transformers model compute attention, and which of them cannot be served."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from mm_sparse.integrations.discovery import AttentionModule, forward_source, prefixes
from mm_sparse.integrations.hf.known_classes import known_refusal
from mm_sparse.integrations.hf.packed_tower import attends_within_bounds, joins_images
from mm_sparse.integrations.hf.token_limits import patches_of_config, position_rows
from mm_sparse.integrations.tower_tokens import TowerTokens
from mm_sparse.modality import Modality

DISPATCH = "ALL_ATTENTION_FUNCTIONS"
# Arguments of an attention call that change its result in ways the kernels do not know.
UNSERVED = {
    "softcap": "soft-capped logits",
    "s_aux": "learned attention sinks",
    "position_bias": "a bias on the logits",
    "attention_bias": "a bias on the logits",
    "head_mask": "a mask over heads",
    "indices": "a selection of keys of the model's own",
    "block_indices": "a selection of keys of the model's own",
}
# Those of them that a forward hands over in every call if it hands them over at all.
ALWAYS = ("position_bias", "indices", "block_indices")


@dataclass(frozen=True)
class HFAttentionModule(AttentionModule):
    """An attention module of a transformers model."""

    owners: tuple[Any, ...]
    """The transformers models around it, outermost first."""
    tower: TowerTokens | None
    """What is known of its tokens if it reads images or videos."""

    @property
    def packed(self) -> bool:
        """Whether it attends within the sequences of a packed row, whose bounds it is given."""
        own, owner = type(self.module), type(self.owners[-1])
        return attends_within_bounds(own) or joins_images(owner)

    @property
    def most_tokens(self) -> int | None:
        if self.packed:
            return None
        return position_rows(self.owners[-1]) if self.tower is None else self.tower.most_tokens

    @property
    def root(self) -> Any:
        """The outermost of `owners`."""
        return self.owners[0]


def find_layers(model: nn.Module) -> list[HFAttentionModule]:
    """Every module inside a transformers model that computes attention, in order."""
    if "transformers.modeling_utils" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    layers: list[HFAttentionModule] = []
    towers: dict[int, TowerTokens | None] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        owners = [modules[p] for p in prefixes(name) if isinstance(modules[p], PreTrainedModel)]
        if not owners or not _computes_attention(module):
            continue
        inside = any(layers and name.startswith(f.name + ".") for f in layers)
        if inside and not uses_attention_interface(type(module)):
            continue
        modality = _modality(name, module, owners)
        tower = None
        if modality is not None and modality in (Modality.IMAGE, Modality.VIDEO):
            tower = towers.setdefault(id(owners[-1]), _tower(owners, modality))
        refusal, cross = _refusal(module), _is_cross(name, module)
        layers.append(
            HFAttentionModule(name, module, modality, refusal, cross, tuple(owners), tower)
        )
    return layers


def prefix_tokens(embeddings: nn.Module) -> int:
    """Class and register tokens that the embeddings of a vision model put in front."""
    count = 0
    for name in ("cls_token", "distillation_token", "register_tokens", "class_embedding"):
        value = getattr(embeddings, name, None)
        if isinstance(value, Tensor):
            count += value.numel() // value.shape[-1]
    return count


def _tower(owners: list[Any], modality: Modality) -> TowerTokens | None:
    """What vision models around a layer say of its tokens; None if none cuts patches itself."""
    for owner in reversed(owners):
        embeddings = getattr(owner, "embeddings", None)
        if embeddings is None and modality == Modality.VIDEO:
            embeddings = getattr(getattr(owner, "encoder", None), "embeddings", None)
        patch = getattr(owner.config, "patch_size", None)
        tubelet = getattr(owner.config, "tubelet_size", None)
        if not isinstance(tubelet, int | None):
            # Of ViViT: frames, height and width.
            tubelet, *patch = tubelet
        if isinstance(embeddings, nn.Module) and patch is not None:
            height, width = (patch, patch) if isinstance(patch, int) else patch
            prefix = prefix_tokens(embeddings)
            patches = patches_of_config(owner.config, (height, width), tubelet)
            return TowerTokens(
                modality, prefix, None, embeddings, (height, width), tubelet, owner=owner,
                most_tokens=None if patches is None else patches + prefix,
            )  # fmt: skip
    return None


@cache
def uses_attention_interface(cls: type) -> bool:
    """Whether the class's forward asks transformers' attention interface what to call."""
    return DISPATCH in forward_source(cls)


def _computes_attention(module: nn.Module) -> bool:
    cls = type(module)
    if uses_attention_interface(cls):
        return True
    looks = re.search(r"Attention|Attn", cls.__name__) and not re.search(
        r"Output|Norm|Rotary|Embedding|Layer$|Block$|Model$", cls.__name__
    )
    if not looks:
        return False
    # A wrapper leaves the arithmetic to a module inside it.
    inner = [m for m in module.modules() if m is not module]
    return not any(uses_attention_interface(type(m)) for m in inner)


def _refusal(module: nn.Module) -> str | None:
    cls = type(module)
    if _is_pooling(module):
        return None
    if not uses_attention_interface(cls):
        return "it does not dispatch through transformers' attention interface"
    return known_refusal(module) or _refusal_by_source(module)


def _refusal_by_source(module: nn.Module) -> str | None:
    """What the call of attention in a module's forward hands over that is not honoured."""
    source = forward_source(type(module))
    for argument, meaning in UNSERVED.items():
        for given in re.finditer(rf"\b{argument}=(self\.(\w+)|\w+)", source):
            if given[1] == "None" or argument == "attention_bias":
                continue
            # Of the others, a local name may hold None: a call says then what it needs.
            if given[2] is None and argument not in ALWAYS:
                continue
            if given[2] is None or getattr(module, given[2], None) is not None:
                return f"it needs {meaning} (`{argument}`)"
    return None


def _is_cross(name: str, module: nn.Module) -> bool:
    text = f"{name.rsplit('.', 1)[-1]} {type(module).__name__}".lower()
    return "cross" in text or "encoder_attn" in text or _is_pooling(module)


def _is_pooling(module: nn.Module) -> bool:
    """A probe that attends to an image once: nothing to save."""
    return "Pooling" in type(module).__name__


def _modality(name: str, module: nn.Module, owners: list[nn.Module]) -> Modality | None:
    kinds: Any = getattr(owners[-1], "input_modalities", "text")
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    if kinds == {"text"}:
        return None
    if not kinds & {"text", "time"}:
        if kinds == {"video"}:
            return Modality.VIDEO
        return Modality.AUDIO if "audio" in kinds else Modality.IMAGE
    text = f"{name} {type(module).__name__}".lower()
    if re.search(r"audio|speech", text):
        return Modality.AUDIO
    if re.search(r"vision|visual|image", text):
        return Modality.IMAGE
    return None
