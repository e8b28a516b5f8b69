from .call import AttentionCall as AttentionCall
from .context import (
    capture_attention as capture_attention,
    override_attention as override_attention,
    override_config as override_config,
    override_scorers as override_scorers,
    set_modality as set_modality,
)
from .discovery import scorer_shape as scorer_shape
from .layer import SparseLayer as SparseLayer
from .patching import (
    densify as densify,
    find_all as find_all,
    sparse as sparse,
    sparsify as sparsify,
)
from .scorers import (
    device_of as device_of,
    hold_scorers as hold_scorers,
    make_scorer as make_scorer,
)
from .sparse_cache.cache_report import (
    CacheLayerRow as CacheLayerRow,
    CacheReport as CacheReport,
)
from .sparse_cache.sparse_cache import SparseCache as SparseCache
from .sparse_cache.spread import spread_keep as spread_keep
from .state import (
    State as State,
    attention_layers as attention_layers,
    is_sparsified as is_sparsified,
    scorer_parameters as scorer_parameters,
    scorers_of as scorers_of,
    sparse_config as sparse_config,
    state_of as state_of,
)
from .tower_tokens import TowerTokens as TowerTokens
from .towers.adapters import (
    ModuleAdapter as ModuleAdapter,
    TowerAdapter as TowerAdapter,
    register_adapter as register_adapter,
)
from .ulysses.gradients import sum_gradients as sum_gradients
from .ulysses.head_part import HeadPart as HeadPart
from .ulysses.sequence import (
    SequenceParallel as SequenceParallel,
    sequence_parallel as sequence_parallel,
)
