"""FSDP2: which modules of a recipe's model are sharded, each whole while it runs."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mm_sparse.integrations import sum_gradients


def shard_decoder(model: Any, decoder: nn.Module, mesh: Any) -> None:
    """Shard a checkpoint's model over a mesh, in place: blocks of its decoder, and all the rest.

    Weights that are tied, and towers, are in the group of the rest, which is whole while the model
    runs. `model.generate` gathers it, too.

    Args:
        model: of transformers, or what peft wraps around it.
        decoder: the part of it that has the blocks.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in getattr(decoder, "layers", ()):
        fully_shard(block, mesh=mesh)
    # Else it would stay whole after a forward without gradients, and miss the next update.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "generate")


def shard(model: Any, mesh: Any) -> None:
    """Shard towers, projectors and language model over a mesh, in place; scorers stay whole.

    Layers of the language model are gathered one by one.
    """
    from torch.distributed.fsdp import fully_shard

    language = model.language
    table, head = language.get_input_embeddings(), language.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    blocks = [m for m in language.modules() if type(m).__name__.endswith("DecoderLayer")]
    inside = {id(m) for block in blocks for m in block.modules()}
    if tied:
        # One group has both, that of the language model: `gather_embeddings` before its forward.
        language.register_forward_pre_hook(_show, with_kwargs=True, prepend=True)
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(language, mesh=mesh, reshard_after_forward=True)
        blocks, inside = [], {id(m) for m in language.modules()}
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


def gather_embeddings(language: Any) -> None:
    """Before the table of a language model is read outside of its forward: make it whole.

    Only where table and head are tied, and so are in the group of the language model.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(language, FSDPModule):
        language.unshard()


class _Hidden:
    """A tensor among the inputs of a module that FSDP does not see."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def hide_embeddings(language: Any, embedded: Tensor) -> Any:
    """Embeddings as the forward of a language model is given them after `gather_embeddings`.

    FSDP reduces the gradients of a module when those of its inputs are there: too early for a table
    that was read before the module ran. It does so at the end of the backward pass for a module
    without inputs that have a gradient.
    """
    from torch.distributed.fsdp import FSDPModule

    return _Hidden(embedded) if isinstance(language, FSDPModule) else embedded


def _show(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook behind that of FSDP, which puts its own first."""
    return args, {n: x.x if isinstance(x, _Hidden) else x for n, x in kwargs.items()}


def average(parameters: Iterable[nn.Parameter]) -> None:
    """Mean over processes of the gradients of parameters that are not sharded: the scorers'.

    What a scorer returns is no tensor, so FSDP2 would not see its backward pass.
    """
    import torch.distributed as dist

    sum_gradients(parameters, divisor=dist.get_world_size())
