"""transformers' continuous batching: refused for sparsified models, before it begins."""

from __future__ import annotations

from functools import wraps
from typing import Any

from mm_sparse.integrations.layer import LAYER

REASON = (
    "continuous batching (generate_batch) cannot run sparse: it lays sequences end to end, and "
    "hands layers keys that it has gathered from its pages, without descriptors of them. Serve "
    "the model with vLLM (docs/how-to/serve.md), or mms.densify(model) before"
)


def refuse_continuous_batching() -> None:
    """Have transformers ask before it makes a manager of continuous batching; again is harmless.

    Else it would look for a paged implementation of a name that it does not know or, where it finds
    FlashAttention, take that in place of sparse attention.
    """
    try:
        from transformers.generation.continuous_batching.continuous_api import ContinuousMixin
    except ImportError:
        # Releases before it have nothing to refuse.
        return
    make = ContinuousMixin.init_continuous_batching
    if getattr(make, "_mm_sparse", False):
        return

    @wraps(make)
    def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(LAYER in vars(module) for module in self.modules()):
            raise ValueError(REASON)
        return make(self, *args, **kwargs)

    asked._mm_sparse = True  # type: ignore[attr-defined]
    ContinuousMixin.init_continuous_batching = asked  # type: ignore[method-assign]
