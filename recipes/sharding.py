"""FSDP2: which modules of a recipe's model are sharded, each whole while it runs."""

from typing import Any


def shard(model: Any, mesh: Any) -> None:
    """Shard towers, projectors, scorers and language model over a mesh, in place.

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
    for part in [*towers, *model.scorers.values(), *blocks, *rest]:
        if part is not None and next(part.parameters(), None) is not None:
            fully_shard(part, mesh=mesh)
