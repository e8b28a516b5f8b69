"""Which modules of a transformers model compute attention, and which of them cannot be served."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

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


@dataclass(frozen=True)
class Found:
    """An attention module of a model."""

    name: str
    module: nn.Module
    owners: tuple[Any, ...]
    """The transformers models around it, outermost first."""
    modality: Modality | None
    """What its tokens are; None where each token of a sequence may be something else."""
    refusal: str | None
    """Why it cannot be served, as far as can be known before it is called."""
    cross: bool
    """Whether its keys come from another sequence."""

    @property
    def root(self) -> Any:
        """The outermost of `owners`."""
        return self.owners[0]


def find_layers(model: nn.Module) -> list[Found]:
    """Every module of `model` that computes attention, in order."""
    from transformers import PreTrainedModel

    found: list[Found] = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        owners = [modules[p] for p in _prefixes(name) if isinstance(modules[p], PreTrainedModel)]
        if not owners or not _computes_attention(module):
            continue
        inside = any(found and name.startswith(f.name + ".") for f in found)
        if inside and not dispatches(type(module)):
            continue
        found.append(
            Found(
                name,
                module,
                tuple(owners),
                _modality(name, module, owners),
                _refusal(module),
                _is_cross(name, module),
            )
        )
    return found


@cache
def dispatches(cls: type) -> bool:
    """Whether the class's forward asks transformers' attention interface what to call."""
    return DISPATCH in _source(cls)


def defining_class(cls: type) -> type:
    """The class among `cls` and its bases that writes the forward."""
    return next(base for base in cls.__mro__ if "forward" in vars(base))


@cache
def _source(cls: type) -> str:
    forward = vars(defining_class(cls)).get("forward")
    try:
        return inspect.getsource(inspect.unwrap(forward)) if callable(forward) else ""
    except (OSError, TypeError):
        return ""


def _computes_attention(module: nn.Module) -> bool:
    cls = type(module)
    if dispatches(cls):
        return True
    looks = re.search(r"Attention|Attn", cls.__name__) and not re.search(
        r"Output|Norm|Rotary|Embedding|Layer$|Block$|Model$", cls.__name__
    )
    if not looks:
        return False
    # A wrapper leaves the arithmetic to a module inside it.
    inner = [m for m in module.modules() if m is not module]
    return not any(dispatches(type(m)) for m in inner)


def _refusal(module: nn.Module) -> str | None:
    cls = type(module)
    if _is_pooling(module):
        return None
    if not dispatches(cls):
        return "it does not dispatch through transformers' attention interface"
    source = _source(cls)
    for argument, meaning in UNSERVED.items():
        given = re.search(rf"\b{argument}=(self\.(\w+)|\w+)", source)
        if given is None or given[1] == "None" or argument in ("indices", "attention_bias"):
            continue
        if given[2] is None and argument != "position_bias":
            continue
        if given[2] is None or getattr(module, given[2], None) is not None:
            return f"it needs {meaning} (`{argument}`)"
    return None


def _is_cross(name: str, module: nn.Module) -> bool:
    text = f"{name.rsplit('.', 1)[-1]} {type(module).__name__}".lower()
    return "cross" in text or "encoder_attn" in text or _is_pooling(module)


def _is_pooling(module: nn.Module) -> bool:
    """A probe that attends to a picture once: nothing to save."""
    return "Pooling" in type(module).__name__


def _modality(name: str, module: nn.Module, owners: list[nn.Module]) -> Modality | None:
    kinds: Any = getattr(owners[-1], "input_modalities", "text")
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    if kinds == {"text"}:
        return None
    if not kinds & {"text", "time"}:
        return Modality.AUDIO if "audio" in kinds else Modality.IMAGE
    text = f"{name} {type(module).__name__}".lower()
    if re.search(r"audio|speech", text):
        return Modality.AUDIO
    if re.search(r"vision|visual|image", text):
        return Modality.IMAGE
    return None


def scorer_shape(module: nn.Module) -> tuple[int, int, int]:
    """Query heads, KV heads and head dim of an attention module.

    Raises:
        ValueError: the module does not say.
    """
    config = getattr(module, "config", None)

    def first(*names: str) -> int | None:
        for owner in (module, config):
            for name in names:
                value = getattr(owner, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    heads = first("num_heads", "num_attention_heads", "n_heads", "encoder_attention_heads")
    width = first("embed_dim", "hidden_size", "d_model", "dim")
    dim = first("head_dim", "qk_head_dim", "attention_head_size")
    projected = getattr(getattr(module, "q_proj", None), "out_features", None)
    if dim is None and heads and (projected or width):
        dim = (projected or width or 0) // heads
    # A gate may be part of the projection: what the module or config says comes first.
    if heads is None and projected and dim:
        heads = projected // dim
    keys = getattr(getattr(module, "k_proj", None), "out_features", None)
    kv_heads = keys // dim if keys and dim else first("num_key_value_heads", "num_kv_heads")
    if heads is None or dim is None:
        raise ValueError(f"{type(module).__name__} does not say its number of heads and head dim")
    return heads, kv_heads or heads, dim


def _prefixes(name: str) -> Iterator[str]:
    """Names of the modules around `name`, outermost first, itself last."""
    yield ""
    parts = name.split(".") if name else []
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])
