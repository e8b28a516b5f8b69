"""Tiny random models of any model type of transformers, and inputs for them.

Configs are shrunk by the names of their fields, so that a model type that a release adds needs no
line here. A few types need words of their own: `OVERRIDES`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

VOCABULARY, TOKENS, ROWS, LARGEST = 256, 48, 2, 120_000_000
# By name of a field that holds a whole number: what it becomes if it is larger. First match counts.
NUMBERS = (
    (r"vocab_size|vocabulary_size|num_embeddings|codebook_size", VOCABULARY),
    (r"^qk_head_dim$", None),  # Of two others.
    (r"rope_head_dim$|rotary_dim$", 8),
    (r"head_dim$|d_kv$|d_head$|head_size$|kv_channels$", 16),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|lora_rank", 16),
    (r"index_topk|topk_blocks", 16),
    (r"(n_group|topk_group|n_groups|num_groups|expert_groups?)$", 1),
    (r"(experts_per_tok|top_?k|moe_topk|moe_k)", 2),
    (r"num_kv_shared_layers", 0),
    (r"(num|n)_.*experts$|num_experts|moe_num_experts|num_local_experts", 4),
    (r"key_value_heads|kv_heads|n_head_kv", 2),
    (r"(num|n)_.*heads?$|attention_heads$|^heads$|n_head$|num_heads", 4),
    (r"num_(feat_extract|conv|nextn)_?\w*layers|num_adapter_layers", None),
    (r"first_k_dense_replace|num_nextn_predict_layers|num_hash_layers", 1),
    (r"(num|n)_\w*(layers?|blocks)$|^(layers|depth|num_layers|n_layer)$|(encoder|decoder)_layers$"
     r"|\w*_depth$|num_blocks|hidden_layers", 2),
    (r"(intermediate|ffn|mlp|inner|feed_?forward)\w*(size|dim|hidden)\w*$", 64),
    (r"n_inner|d_ff$|dim_ff", 64),
    (r"(hidden|embed|embedding|model|proj|projection|output|attention|bottleneck|depth)\w*"
     r"_(size|dim|width|channels)$|^d_model$|^n_embd$|^dim$|^width$|_width$|^embed_dim$"
     r"|hidden_dim|embed_dim|d_model|^emb_dim$|^model_dim|hidden_size", 64),
    (r"(ssm_state_size|d_state|state_size|chunk_size|time_step_rank)$", 16),
    (r"sliding_window|attention_window|attention_chunk_size|local_window", 16),
    (r"num_mel_bins|feature_size|num_mels|input_feat_per_channel", 16),
    (r"max_source_positions", 50),
    (r"^(image_size|img_size|input_size|pretrain_image_size)$", 64),
    (r"^patch_size$", 8),
    (r"max_position_embeddings|n_positions|max_seq_len|n_ctx|max_sequence_length", 2048),
    (r"num_queries|num_query_tokens|num_latents|n_latents", 16),
)  # fmt: skip

# Fields by model type, for types whose numbers must fit each other in ways of their own.
# What configs call the number of features of a frame of sound.
MELS = (
    "num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "input_dim", "num_mels",
    "feature_projection_input_dim",
)  # fmt: skip
_HEADS = {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_EXPERTS = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 250},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "chameleon": {"vocabulary_map": {"<image>": 250}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}},
    "deepseek_v2": _EXPERTS,
    "dots1": {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "emu3": {"vocabulary_map": {"<image>": 250}},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "gemma": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "instructblip": {"image_token_index": 250},
    "instructblipvideo": {"video_token_index": 250},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mimi": {"upsample_groups": 64},
    "moonshine": _HEADS,
    "nemotron": {"num_key_value_heads": 4},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba2": {
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "num_hidden_layers": 2,
        "layer_types": ["mamba", "hybrid"],
    },
}


def config_of(model_type: str) -> Any:
    """A small config of a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type in PAIRS:
        return PAIRS[model_type]()
    return shrunk(CONFIG_MAPPING[model_type](), {})


def _pair(model_type: str, **parts: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = {name: config_of(part) for name, part in parts.items()}
    if "decoder" in made:
        made["decoder"].is_decoder = made["decoder"].add_cross_attention = True
    config = CONFIG_MAPPING[model_type](**{name: part.to_dict() for name, part in made.items()})
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return config


# Types that have no config by default: which others they are made of.
PAIRS: dict[str, Any] = {
    "encoder-decoder": lambda: _pair("encoder-decoder", encoder="bert", decoder="bert"),
    "vision-encoder-decoder": lambda: _pair(
        "vision-encoder-decoder", encoder="vit", decoder="bert"
    ),
    "speech-encoder-decoder": lambda: _pair(
        "speech-encoder-decoder", encoder="wav2vec2", decoder="bert"
    ),
    "vision-text-dual-encoder": lambda: _pair(
        "vision-text-dual-encoder", vision_config="vit", text_config="bert"
    ),
}


def shrunk(config: Any, ids: dict[int, int]) -> Any:
    """A config of the same class, with small numbers, also in the configs inside it.

    Args:
        ids: special tokens, what they were and what they are; filled.
    """
    given = OVERRIDES.get(config.model_type, {})
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_") or name in given or name in _INHERITED:
            continue
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            changes[name] = shrunk(value, ids)
        else:
            small = _small(name, value, ids)
            if small is not value:
                changes[name] = small
    kinds = vars(config).get("layer_types")
    if isinstance(kinds, (list, tuple)) and "layer_types" not in given and kinds:
        few = list(dict.fromkeys(kinds))
        few = (few * 2)[: max(2, len(few))]
        changes["layer_types"] = few
        for name in ("num_hidden_layers", "num_layers", "n_layer"):
            if hasattr(config, name):
                changes[name] = len(few)
                break
        layers = len(kinds)
        for name, value in vars(config).items():
            if name.endswith("_types") and isinstance(value, list) and len(value) == layers:
                changes[name] = (list(dict.fromkeys(value)) * len(few))[: len(few)]
    if vars(config).get("head_dim", 0) is None and not hasattr(config, "qk_rope_head_dim"):
        changes["head_dim"] = 16
    if vars(config).get("head_dim", 0) == getattr(config, "qk_rope_head_dim", -1):
        changes["head_dim"] = 8
    stages = vars(config).get("num_heads")
    if isinstance(stages, (list, tuple)) and isinstance(vars(config).get("embed_dim"), int):
        changes["embed_dim"] = stages[0] * 8
        changes.pop("hidden_size", None)
    heads = next((changes[n] for n in ("num_attention_heads", "n_head") if n in changes), None)
    pairs = getattr(config, "num_key_value_heads", None)
    if pairs is not None and pairs == getattr(config, "num_attention_heads", None) and heads:
        changes["num_key_value_heads"] = heads
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_parameters" not in given:
        changes["rope_parameters"] = _rope(rope)
        if "rope_type" in rope and "mrope_section" in (
            getattr(config, "ignore_keys_at_rope_validation", None) or ()
        ):
            half = int(16 * (rope.get("partial_rotary_factor") or 1)) // 2
            third = half * 3 // 8
            changes["rope_parameters"]["mrope_section"] = [half - 2 * third, third, third]
    changes.update(given)
    cls = type(config)
    try:
        return cls(**changes)
    except Exception:
        plain = {n: v.to_dict() if hasattr(v, "to_dict") else v for n, v in changes.items()}
        return cls(**plain)


# What every config has and no model reads to be built.
_INHERITED = {
    "transformers_version",
    "architectures",
    "id2label",
    "label2id",
    "dtype",
    "num_labels",
}


def _small(name: str, value: Any, ids: dict[int, int]) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if re.search(r"token_(id|index)$|_id$|_index$|_tokens?_ids?$", name):
            return _token(value, ids)
        for pattern, most in NUMBERS:
            if re.search(pattern, name):
                return value if most is None or value <= most else most
        return value
    if not isinstance(value, (list, tuple)) or not value:
        return value
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return value
    kind = type(value)
    if re.search(r"token_ids?$|eos_token", name):
        return kind(_token(v, ids) for v in value)
    if re.search(r"depths|num_blocks|^layers|encoder_layers|num_layers", name):
        return kind(min(v, 1) for v in value)
    if re.search(r"hidden_sizes|embed_dims|encoder_hidden_sizes|dims$|channels$|widths", name):
        factor = max(1, min(v for v in value if v > 0) // 16) if min(value) > 0 else 1
        return kind(max(1, v // factor) for v in value)
    if re.search(r"conv_dim", name):
        return kind(16 for _ in value)
    if re.search(r"^(image_size|img_size|input_size)$", name):
        return kind(64 if v > 64 else v for v in value)
    return value


def _token(value: int, ids: dict[int, int]) -> int:
    if value < 200:
        return value
    if value not in ids:
        ids[value] = VOCABULARY - 1 - len(ids)
    return ids[value]


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    return {n: _rope(v) if isinstance(v, dict) else v for n, v in rope.items()}


def build(cls: Any, config: Any) -> Any:
    """A random float32 model in eval mode; weights of N(0, 0.1)."""
    torch.manual_seed(0)
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
    except Exception:
        size = 0  # Some models compute while they are built.
    if size > LARGEST:
        raise MemoryError(f"the shrunk config still has {size / 1e6:.0f} million parameters")
    model = cls(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id = None
    return model


def class_of(name: str, model_type: str) -> Any:
    """A model class by name, as the auto classes find it."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    home = f"transformers.models.{model_type_to_module_name(model_type)}"
    module = import_module(home)
    found = getattr(module, name, None)
    return found if found is not None else getattr(import_module("transformers"), name)


def random(*shape: int) -> Tensor:
    """The same numbers for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def random_ids(model: Any, tokens: int = TOKENS) -> Tensor:
    """Ids that no special token has."""
    text = model.config.get_text_config()
    known, length = getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", 0)
    tokens = min(tokens, length) if isinstance(length, int) and length > 4 else tokens
    most = min(190, known) if isinstance(known, int) else 190
    return torch.randint(8, most, (ROWS, tokens), generator=torch.Generator().manual_seed(3))


def inputs_of(model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Inputs to try, the richest first: their modalities and the arguments of a forward."""
    takes = inspect.signature(model.forward).parameters
    config = model.config
    decoder = {"decoder_input_ids": random_ids(model, 20)} if "decoder_input_ids" in takes else {}
    if "qformer_input_ids" in takes:
        decoder["qformer_input_ids"] = random_ids(model, 12)
    if "bbox" in takes:
        decoder["bbox"] = torch.zeros(ROWS, TOKENS, 4, dtype=torch.long)
    text = "input_ids" in takes and getattr(model, "main_input_name", "") != "pixel_values"
    ids = {"input_ids": random_ids(model)} if "input_ids" in takes else {}
    for kind, media in _media(takes, config):
        if ids:
            yield f"text, {kind}", {**ids, **media, **decoder}
        if not text:
            yield kind, {**media, **decoder}
    if ids:
        yield "text", {**ids, **decoder}
        if decoder:
            yield "text", ids
    elif "decoder_input_ids" in takes:
        yield "text", decoder
    if "inputs" in takes:
        yield "text", {"inputs": random_ids(model)}


def _media(takes: Any, config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    eyes = _first(config, ("vision_config", "vision_encoder_config", "backbone_config"), None)
    eyes = eyes or _first(config, ("encoder",), config)
    pixels = "hidden_states" in takes and "grid_thw" in takes
    if "pixel_values" in takes or pixels:
        channels = _first(eyes, ("num_channels", "in_channels", "in_chans", "image_channels"), 3)
        size = _first(eyes, ("image_size", "img_size", "input_size"), None)
        size = size or _first(config, ("image_size",), 64)
        high, wide = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        patch = _first(eyes, ("patch_size", "spatial_patch_size"), 8)
        patch = patch if isinstance(patch, int) else patch[-1]
        time = _first(eyes, ("temporal_patch_size",), 1)
        if "image_grid_thw" in takes or "grid_thw" in takes:
            name = "image_grid_thw" if "image_grid_thw" in takes else "grid_thw"
            grid = {name: torch.tensor([[1, 8, 8]] * ROWS)}
            for flat in (
                (ROWS * 64, channels * time * patch * patch), (ROWS * 64, channels, patch, patch),
            ):  # fmt: skip
                yield (
                    "images",
                    {"hidden_states" if pixels else "pixel_values": random(*flat), **grid},
                )
        sizes = {"image_sizes": torch.tensor([[high, wide]] * ROWS)}
        sizes = sizes if "image_sizes" in takes else {}
        flat = random(ROWS, channels, high, wide)
        yield "images", {"pixel_values": flat, **sizes}
        yield "images", {"pixel_values": flat[:, None], **sizes}
        if "spatial_shapes" in takes:
            shape = (ROWS, 64, channels * patch * patch)
            mask = {"pixel_attention_mask": torch.ones(ROWS, 64, dtype=torch.long)}
            shapes = {"spatial_shapes": torch.tensor([[8, 8]] * ROWS)}
            yield "images", {"pixel_values": random(*shape), **mask, **shapes}
        frames = _first(eyes, ("num_frames",), 4)
        yield "video", {"pixel_values": random(ROWS, frames, channels, high, wide)}
        if sizes:
            yield "images", {"pixel_values": torch.stack([flat, flat], 1), **sizes}
    if "pixel_values_videos" in takes and "pixel_values" not in takes:
        size = _first(eyes, ("image_size", "crop_size"), 64)
        frames = _first(eyes, ("num_frames", "frames_per_clip"), 4)
        yield "video", {"pixel_values_videos": random(ROWS, frames, 3, size, size)}
    ears = _first(config, ("audio_config", "encoder_config", "encoder", "speech_config"), config)
    if "input_features" in takes:
        mels = _first(ears, MELS, 16)
        frames = 2 * _first(ears, ("max_source_positions",), 50)
        whole = torch.ones(ROWS, frames, dtype=torch.long)
        names = ("feature_attention_mask", "input_features_mask")
        masks = {n: whole for n in names if n in takes}
        for shape in ((ROWS, mels, frames), (ROWS, frames, mels)):
            yield "audio", {"input_features": random(*shape), **masks}
            yield "audio", {"input_features": random(*shape)}
            if masks:
                booleans = {n: m.bool() for n, m in masks.items()}
                yield "audio", {"input_features": random(*shape), **booleans}
    if "input_values" in takes:
        yield "audio", {"input_values": random(ROWS, 12_000)}
        yield "audio", {"input_values": random(ROWS, 1, 12_000)}
        high = _first(config, ("max_length",), 1024)
        yield "audio", {"input_values": random(ROWS, high, _first(config, ("num_mel_bins",), 16))}
    if "audio_values" in takes:
        yield "audio", {"audio_values": random(ROWS, 12_000)}


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    return next((v for n in names if (v := getattr(config, n, None)) is not None), default)


def settled(model: Any) -> tuple[str, dict[str, Any]]:
    """The richest inputs that a model accepts: their modalities and arguments.

    Raises:
        Exception: it accepts none; the error is that of the plainest.
    """
    problem: Exception = ValueError("its inputs are of no kind that is known here")
    first: Exception | None = None
    for kind, inputs in inputs_of(model):
        try:
            return kind, _with_placeholders(model, kind, inputs)
        except Exception as error:
            first = first or error
            problem = error
    raise first or problem


def _with_placeholders(model: Any, kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs that a forward accepts: with as many placeholders as its errors ask for."""
    takes = inspect.signature(model.forward).parameters
    config, count, last = model.config, 1, -1
    tokens = [
        v
        for n in (("audio_token_id", "audio_token_index") if "audio" in kind else
                  ("image_token_id", "image_token_index", "im_token_id", "video_token_id"))
        if isinstance(v := getattr(config, n, None), int)
    ]  # fmt: skip
    placed = "text," in kind and bool(tokens)
    while True:
        given = dict(inputs)
        if placed:
            ids = random_ids(model, TOKENS + count)
            ids[:, 5 : 5 + count] = tokens[0]
            given["input_ids"] = ids
            for name in ("mm_token_type_ids", "token_type_ids"):
                # PaliGemma's say what is causal.
                if name in takes and config.model_type != "paligemma":
                    given[name] = (ids == tokens[0]).long()
        given = {n: v for n, v in given.items() if n in takes}
        try:
            torch.manual_seed(0)
            with torch.no_grad():
                model(**given)
            return given
        except Exception as error:
            found = re.search(r"tokens:? ?(\d+).*features:? ?(\d+)", str(error))
            if not placed or not found or last == count:
                raise
            last, count = count, int(found[2]) // ROWS
            if count == last:
                raise
