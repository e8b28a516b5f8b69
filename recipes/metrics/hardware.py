"""What figures were measured on."""

from __future__ import annotations

import platform

import lightning as L
import torch


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU"
    return {"device": name, "torch": torch.__version__, "lightning": L.__version__}
