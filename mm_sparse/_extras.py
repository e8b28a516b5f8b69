"""Which extra of this package installs what an import lacks."""

from __future__ import annotations

import sys
from typing import Any

EXTRAS = {
    "lm": ("transformers",),
    "vision": ("timm", "open_clip", "torchvision", "PIL"),
    "audio": ("torchaudio", "soundfile"),
    "train": (
        "lightning",
        "jsonargparse",
        "rich",
        "tensorboard",
        "peft",
        "jiwer",
        "sklearn",
        "matplotlib",
    ),
    "quantize": ("bitsandbytes",),
    "voxtral": ("mistral_common",),
    "vllm": ("vllm",),
}
"""Packages that the extras of this one install, as they are imported."""


def extra_of(error: BaseException) -> str:
    """What installs the package that an import lacks; nothing if no extra does or it is said."""
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    extra = next((extra for extra, names in EXTRAS.items() if missing in names), None)
    if extra is None or "pip install" in str(error):
        return ""
    return f'; pip install "mm-sparse[{extra}]" brings it'


def explain_missing(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """For `sys.excepthook`: a package that an extra installs is missing, in one sentence."""
    if isinstance(error, ImportError) and extra_of(error):
        sys.stderr.write(f"error: {error}{extra_of(error)}\n")
    else:
        sys.__excepthook__(kind, error, trace)
