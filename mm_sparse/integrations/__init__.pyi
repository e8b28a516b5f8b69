from .call import AttentionCall as AttentionCall
from .context import (
    capture_attention as capture_attention,
)
from .context import (
    override_attention as override_attention,
)
from .context import (
    override_config as override_config,
)
from .context import (
    override_scorers as override_scorers,
)
from .context import (
    set_modality as set_modality,
)
from .discovery import scorer_shape as scorer_shape
from .layer import SparseLayer as SparseLayer
from .patching import (
    densify as densify,
)
from .patching import (
    find_all as find_all,
)
from .patching import (
    sparse as sparse,
)
from .patching import (
    sparsify as sparsify,
)
from .scorers import make_scorer as make_scorer
from .state import (
    STATE as STATE,
)
from .state import (
    attention_layers as attention_layers,
)
from .state import (
    scorer_parameters as scorer_parameters,
)
from .state import (
    scorers_of as scorers_of,
)
from .state import (
    sparse_config as sparse_config,
)
from .state import (
    state_of as state_of,
)
