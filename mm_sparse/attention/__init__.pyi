from .decoding import (
    DecodingGeometry as DecodingGeometry,
    LayerDecoding as LayerDecoding,
    capacity_for as capacity_for,
    decodes_in_place as decodes_in_place,
)
from .dense import (
    BREAK_EVEN as BREAK_EVEN,
    dense_attention as dense_attention,
    dense_length as dense_length,
)
from .functional import (
    attention_reference as attention_reference,
    sparse_attention as sparse_attention,
)
from .packed import PackedBounds as PackedBounds, packed_attention as packed_attention
from .paged_geometry import (
    PagedGeometry as PagedGeometry,
    PagedStep as PagedStep,
    serves_pages as serves_pages,
)
from .paged_layer import PagedLayer as PagedLayer
from .pipeline import score_select_attend as score_select_attend
from .selected import attend as attend
