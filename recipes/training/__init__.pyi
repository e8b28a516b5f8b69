from .clipping import clip_gradients as clip_gradients
from .fsdp import (
    average as average,
    gather_embeddings as gather_embeddings,
    hide_embeddings as hide_embeddings,
    shard as shard,
    shard_decoder as shard_decoder,
)
from .objectives import WHOLE as WHOLE, Objectives as Objectives
from .optimizer import OptimizerConfig as OptimizerConfig, optimize as optimize
from .sequence_strategy import (
    SequenceParallelStrategy as SequenceParallelStrategy,
    whole_tensors as whole_tensors,
)
from .sharded_checkpoints import (
    is_sharded as is_sharded,
    join_checkpoint as join_checkpoint,
    read_checkpoint as read_checkpoint,
    read_rest as read_rest,
)
from .shared_sequences import (
    SharedSequences as SharedSequences,
    SharedTraining as SharedTraining,
    share_sequences as share_sequences,
    share_sequences_alone as share_sequences_alone,
)
