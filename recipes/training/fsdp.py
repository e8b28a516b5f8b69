"""FSDP2: which modules of a recipe's model are sharded, each whole while it runs."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def shard(model: Any, mesh: Any) -> None:
    """Shard towers, projectors and language model over a mesh, in place; scorers stay whole.

    Layers of the language model are gathered one by one.
    """
    from torch.distributed.fsdp import fully_shard

    language = model.language
    table, head = language.get_input_embeddings(), language.get_output_embeddings()
    if head is not None and head.weight is table.weight:
        raise ValueError(
            "language must not tie its embeddings to be sharded, set tie_word_embeddings to false "
            "or use DDP"
        )
    blocks = [m for m in language.modules() if type(m).__name__.endswith("DecoderLayer")]
    inside = {id(m) for block in blocks for m in block.modules()}
    # The table is called before the model that it belongs to: without a common root, each part is
    # gathered when it runs.
    rest = [
        m
        for m in language.modules()
        if id(m) not in inside and next(m.parameters(False), None) is not None
    ]
    towers = [model.vision, model.projector, model.audio, model.audio_projector]
    for part in [*towers, *blocks, *rest]:
        if part is not None and next(part.parameters(), None) is not None:
            # Each part is a root: left whole after a forward, it would miss the next update.
            fully_shard(part, mesh=mesh, reshard_after_forward=True)


def average(parameters: Iterable[Tensor]) -> None:
    """Mean over processes of the gradients of parameters that are not sharded: the scorers'.

    What a scorer returns is no tensor, so FSDP2 would not see its backward pass.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()
