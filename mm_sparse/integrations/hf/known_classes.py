"""Attention classes of transformers that are known not to fit, by name, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

SELECTS = "it selects keys by itself (natively sparse attention)"
BIAS = "it adds a bias to the logits"
RELATIVE = "it adds a bias by relative position to the logits"
MERGED = "it attends to its own tokens and to another sequence at once"


def _always(module: Any) -> bool:
    return True


def _has_indexer(module: Any) -> bool:
    return getattr(module, "indexer", None) is not None


def _is_relative(module: Any) -> bool:
    return getattr(module, "position_embeddings_type", None) in ("relative", "relative_key")


def _has_bias_in_config(module: Any) -> bool:
    config = getattr(module, "config", None)
    names = ("use_relative_position_bias", "use_shared_relative_position_bias")
    return any(getattr(config, name, False) for name in names)


Rule = tuple[str, Callable[[Any], bool]]

# By name of the class: why, and for which of its modules.
REFUSED: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "AXK2Attention",
            "DeepseekV32Attention",
            "DeepseekV4Attention",
            "Glm5NextTextAttention",
            "GlmMoeDsaAttention",
            "HYV4Attention",
            "Qwen4ExpTextAttention",
        ),
        (SELECTS, _always),
    ),
    "MiniMaxM3VLAttention": (SELECTS, _has_indexer),
    "T5Gemma2MergedAttention": (MERGED, _always),
    **dict.fromkeys(
        (
            "LongT5Attention",
            "MT5Attention",
            "Pix2StructTextAttention",
            "Pop2PianoAttention",
            "SwitchTransformersAttention",
            "T5Attention",
            "UMT5Attention",
            "UdopAttention",
            "DogeAttention",
            "InklingAttention",
            "GraniteSpeech5EncoderAttention",
        ),
        (BIAS, _always),
    ),
    **dict.fromkeys(("BeitAttention", "Data2VecVisionAttention"), (BIAS, _has_bias_in_config)),
    **dict.fromkeys(
        ("NemotronAsrStreamingEncoderAttention", "ParakeetEncoderAttention"), (RELATIVE, _always)
    ),
    **dict.fromkeys(
        (
            "SeamlessM4TConformerSelfAttention",
            "SeamlessM4Tv2ConformerSelfAttention",
            "Wav2Vec2BertSelfAttention",
            "Wav2Vec2ConformerSelfAttention",
        ),
        (RELATIVE, _is_relative),
    ),
}


# What modules call the parameters of a bias that depends on the distance of two tokens.
BIAS_PARAMETERS = ("relative_position_bias", "relative_attention_bias", "rel_pos_h")


def known_refusal(module: nn.Module) -> str | None:
    """Why a module cannot run sparse, None if it is not known not to."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("transformers.models.") and cls.__name__ in REFUSED:
            reason, applies = REFUSED[cls.__name__]
            return reason if applies(module) else None
    if any(name in parameter for name in BIAS_PARAMETERS for parameter in module.state_dict()):
        return BIAS
    return None
