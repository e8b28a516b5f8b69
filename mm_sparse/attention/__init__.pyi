from .dense import dense_attention as dense_attention, dense_length as dense_length
from .functional import (
    attention_reference as attention_reference,
    sparse_attention as sparse_attention,
)
from .pipeline import rank_and_attend as rank_and_attend
from .selected import attend as attend
