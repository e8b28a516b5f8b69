from . import encoders as encoders
from . import kernels as kernels
from . import recipes as recipes
from .analysis import (
    Report as Report,
)
from .analysis import (
    kept_frames as kept_frames,
)
from .analysis import (
    kept_patches as kept_patches,
)
from .analysis import (
    report as report,
)
from .analysis import (
    write_page as write_page,
)
from .attention import (
    attend as attend,
)
from .attention import (
    attention_reference as attention_reference,
)
from .attention import (
    sparse_attention as sparse_attention,
)
from .checkpoints import (
    list_pretrained as list_pretrained,
)
from .checkpoints import (
    load_scorers as load_scorers,
)
from .checkpoints import (
    save_scorers as save_scorers,
)
from .config import SparseConfig as SparseConfig
from .distillation import (
    DistillationLosses as DistillationLosses,
)
from .distillation import (
    attention_kl as attention_kl,
)
from .distillation import (
    distillation_losses as distillation_losses,
)
from .distillation import (
    dropped_mass as dropped_mass,
)
from .distillation import (
    soft_topk as soft_topk,
)
from .integrations import (
    AttentionCall as AttentionCall,
)
from .integrations import (
    attention_layers as attention_layers,
)
from .integrations import (
    capture_attention as capture_attention,
)
from .integrations import (
    densify as densify,
)
from .integrations import (
    override_attention as override_attention,
)
from .integrations import (
    override_config as override_config,
)
from .integrations import (
    override_scorers as override_scorers,
)
from .integrations import (
    scorer_parameters as scorer_parameters,
)
from .integrations import (
    scorers_of as scorers_of,
)
from .integrations import (
    set_modality as set_modality,
)
from .integrations import (
    sparse as sparse,
)
from .integrations import (
    sparse_config as sparse_config,
)
from .integrations import (
    sparsify as sparsify,
)
from .layout import CallLayout as CallLayout
from .layout import Plan as Plan
from .layout import TokenLayout as TokenLayout
from .modality import Modality as Modality
from .scorers import (
    BigBird as BigBird,
)
from .scorers import (
    DescriptorCache as DescriptorCache,
)
from .scorers import (
    FineScorer as FineScorer,
)
from .scorers import (
    OracleScorer as OracleScorer,
)
from .scorers import (
    PooledScorer as PooledScorer,
)
from .scorers import (
    RelevanceScorer as RelevanceScorer,
)
from .scorers import (
    Scorer as Scorer,
)
from .scorers import (
    SlidingWindow as SlidingWindow,
)
from .scorers import (
    unit_mass as unit_mass,
)
from .selection import Scores as Scores
from .selection import Selection as Selection
from .selection import select as select

__version__: str
