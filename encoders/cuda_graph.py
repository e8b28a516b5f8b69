"""An encoder's forward as a CUDA graph: for inputs of one shape, without the host's part in it."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_sparse.cuda_graph import capture
from mm_sparse.encoders.base import Encoder
from mm_sparse.encoders.interleaving import TokenSpec


class CUDAGraphEncoder:
    """Replays one forward of an encoder, dense or sparse, in inference mode.

    Launching a sparse layer takes the host longer than a dense one. Where that is longer than the
    GPU computes, as with short inputs or a slow processor, a graph takes the host out of it.
    The weights are those of the encoder; what is selected is computed anew in every replay.

    Args:
        encoder: on a CUDA device; its config, mode and weights' places must not change afterwards.
        inputs: an example of what it will be called with.
    Raises:
        ValueError: inputs that are not on a CUDA device.
    """

    def __init__(self, encoder: Encoder, *inputs: Tensor) -> None:
        for number, x in enumerate(inputs):
            if not isinstance(x, Tensor) or x.device.type != "cuda":
                where = f"a tensor on {x.device}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"inputs[{number}] must be a tensor on a CUDA device, got {where}")
        self.encoder = encoder
        self._inputs = [x.clone() for x in inputs]
        with torch.inference_mode():
            self._replay = capture(lambda: encoder(*self._inputs))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, TokenSpec]:
        """Tokens and their spec, as the encoder gives them; the next call overwrites the tokens.

        Raises:
            ValueError: not as many inputs as were captured, or of another shape or dtype.
        """
        if len(inputs) != len(self._inputs):
            raise ValueError(f"inputs must be {len(self._inputs)} tensors, got {len(inputs)}")
        for number, (x, own) in enumerate(zip(inputs, self._inputs, strict=True)):
            if x.shape != own.shape or x.dtype != own.dtype:
                raise ValueError(
                    f"inputs[{number}] must be {own.dtype} {tuple(own.shape)} as captured, "
                    f"got {x.dtype} {tuple(x.shape)}"
                )
            own.copy_(x)
        return self._replay()
