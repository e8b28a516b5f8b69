"""What the tokens of an engine's step are: its requests say where images and sounds stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from mm_sparse.modality import Modality

_RUNNER: ContextVar[Any] = ContextVar("mm_sparse_vllm_runner", default=None)
_KINDS = {"image": Modality.IMAGE, "video": Modality.VIDEO, "audio": Modality.AUDIO}


def watch_runner(runner_class: type) -> None:
    """Have steps know the model runner that builds them, in whose requests the ranges are.

    Raises:
        ValueError: it does not build steps as that of vLLM 0.26 does.
    """
    build = getattr(runner_class, "_build_attention_metadata", None)
    if build is None:
        raise ValueError(
            f"{runner_class.__name__} must have _build_attention_metadata, as in vLLM 0.26"
        )
    if getattr(build, "_mm_sparse", False):
        return

    @wraps(build)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        with runner_of_step(self):
            return build(self, *args, **kwargs)

    watched._mm_sparse = True  # type: ignore[attr-defined]
    runner_class._build_attention_metadata = watched  # type: ignore[attr-defined]


@contextmanager
def runner_of_step(runner: Any) -> Iterator[None]:
    """Say which runner builds the steps within."""
    token = _RUNNER.set(runner)
    try:
        yield
    finally:
        _RUNNER.reset(token)


def token_modality(starts: Sequence[int], lengths: Sequence[int]) -> Tensor | None:
    """(N,) int8: modality of each token of a step; None if all are text.

    Args:
        starts: first token of each request's queries, and behind the last.
        lengths: keys of each request, those of the step included.
    Raises:
        ValueError: an item is of a modality that scorers do not know.
    """
    runner = _RUNNER.get()
    if runner is None:
        return None
    found = None
    names = runner.input_batch.req_ids
    for i, name in enumerate(names[: len(lengths)]):
        count = starts[i + 1] - starts[i]
        features = getattr(runner.requests.get(name), "mm_features", None)
        if count < 2 or not features:
            continue
        first = lengths[i] - count
        for feature in features:
            for low, high, kind in _ranges(feature):
                low, high = max(low - first, 0), min(high - first, count)
                if low >= high:
                    continue
                if found is None:
                    found = torch.full((starts[-1],), int(Modality.TEXT), dtype=torch.int8)
                found[starts[i] + low : starts[i] + high] = int(kind)
    return found


def _ranges(feature: Any) -> Iterator[tuple[int, int, Modality]]:
    """Half-open ranges of the tokens of an item that stand for it, and its modality."""
    kind = _KINDS.get(feature.modality)
    if kind is None:
        if feature.modality == "prompt_embeds":
            return
        raise ValueError(
            f"modality of an item must be one of {sorted(_KINDS)}, got {feature.modality!r}"
        )
    for low, high in feature.mm_position.extract_embeds_range():
        # The engine's ranges hold their last token.
        yield low, high + 1, kind
