"""What encoders of images and of audio have in common."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from mm_sparse.config import SparseConfig
from mm_sparse.encoders.interleaving import TokenSpec
from mm_sparse.integrations import sparsify

E = TypeVar("E", bound="Encoder")


class Encoder(nn.Module):
    """A backbone of another library that gives tokens and the `TokenSpec` that describes them.

    `backbone` keeps its own keys in the state dict, behind "backbone."; `sparsify`, `densify` and
    `report` take the encoder as they take any model.
    """

    backbone: Any

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def width(self) -> int:
        """Channels of a token."""
        raise NotImplementedError

    def forward(self, *inputs: Any) -> tuple[Tensor, TokenSpec]:
        """Tokens (B, N, C) and what they are."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each layer again in the backward pass instead of keeping what is inside it.

        Raises:
            ValueError: the backbone has no such switch.
        """
        if hasattr(self.backbone, "set_grad_checkpointing"):
            self.backbone.set_grad_checkpointing(enable)
        elif hasattr(self.backbone, "gradient_checkpointing_enable"):
            switch = "enable" if enable else "disable"
            getattr(self.backbone, f"gradient_checkpointing_{switch}")()
        else:
            raise ValueError(
                f"backbone must have a switch for gradient checkpointing, "
                f"{type(self.backbone).__name__} has none: call the encoder through "
                "torch.utils.checkpoint.checkpoint"
            )


def made_sparse(encoder: E, sparse: SparseConfig | None, **options: Any) -> E:
    """`sparsify` unless `sparse` is None; options are `strict` and `scorer`."""
    return encoder if sparse is None else sparsify(encoder, sparse, **options)


def choose(name: str, value: str, choices: dict[str, Any]) -> Any:
    """The entry of `choices`, or an error that lists them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")
    return choices[value]
