"""An attention module of somebody else's model, and what is known of it before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from mm_sparse.modality import Modality


@dataclass(frozen=True)
class AttentionModule:
    """An attention module of a model."""

    name: str
    module: nn.Module
    modality: Modality | None
    """What its tokens are; None where each token of a sequence may be something else."""
    refusal: str | None
    """Why it cannot be served, as far as can be known before it is called."""
    cross: bool
    """Whether its keys come from another sequence."""

    @property
    def most_tokens(self) -> int | None:
        """In a call, of inputs that the model is made for; None where it takes any number."""
        return None


def defining_class(cls: type) -> type:
    """The class among `cls` and its bases that writes the forward."""
    return next(base for base in cls.__mro__ if "forward" in vars(base))


@cache
def forward_source(cls: type) -> str:
    """Text of the forward of a class; empty where there is none to read."""
    forward = vars(defining_class(cls)).get("forward")
    try:
        return inspect.getsource(inspect.unwrap(forward)) if callable(forward) else ""
    except (OSError, TypeError):
        return ""


_PARAMETERS: dict[type, list[str]] = {}


def note_parameters(cls: type) -> None:
    """Read the names of the arguments of a class's forward, for `parameters_of`."""
    _PARAMETERS[cls] = list(inspect.signature(cls.forward).parameters)[1:]


def parameters_of(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's forward, without self.

    A compiled graph reads the dict: classes are noted when hooks are set. Later come those of a
    model that another process pickled, and those that FSDP2 derives from the classes that it meets.
    """
    if type(module) not in _PARAMETERS:
        note_parameters(type(module))
    return _PARAMETERS[type(module)]


def argument_of(module: nn.Module, args: Any, kwargs: dict[str, Any], name: str) -> Any:
    """An argument of a call of a module's forward; None where it is not given."""
    if name in kwargs:
        return kwargs[name]
    names = parameters_of(module)
    at = names.index(name) if name in names else len(args)
    return args[at] if at < len(args) else None


@cache
def is_one_of(cls: type, names: frozenset[str]) -> bool:
    """Whether a class, not one of its bases, is one of those of these full names."""
    return f"{cls.__module__}.{cls.__qualname__}" in names


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
    packed = getattr(getattr(module, "qkv", None), "out_features", None)
    if dim is None and heads and packed:
        dim = packed // 3 // heads
    keys = getattr(getattr(module, "k_proj", None), "out_features", None)
    kv_heads = keys // dim if keys and dim else first("num_key_value_heads", "num_kv_heads")
    if heads is None or dim is None:
        raise ValueError(f"{type(module).__name__} does not say its number of heads and head dim")
    return heads, kv_heads or heads, dim


def prefixes(name: str) -> Iterator[str]:
    """Names of the modules around `name`, outermost first, itself last."""
    yield ""
    parts = name.split(".") if name else []
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])
