from .dense import dense_attention as dense_attention
from .dense import dense_length as dense_length
from .functional import (
    attention_reference as attention_reference,
)
from .functional import (
    sparse_attention as sparse_attention,
)
from .pipeline import rank_and_attend as rank_and_attend
from .selected import attend as attend
