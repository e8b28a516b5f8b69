from . import encoders as encoders, kernels as kernels, recipes as recipes
from .analysis import (
    Report as Report,
    kept_frames as kept_frames,
    kept_patches as kept_patches,
    report as report,
    write_page as write_page,
)
from .attention import (
    attend as attend,
    attention_reference as attention_reference,
    sparse_attention as sparse_attention,
)
from .checkpoints import (
    LightningScorerCallback as LightningScorerCallback,
    TrainerScorerCallback as TrainerScorerCallback,
    average_scorer_gradients as average_scorer_gradients,
    list_pretrained as list_pretrained,
    load_scorer_state as load_scorer_state,
    load_scorers as load_scorers,
    register_scorers as register_scorers,
    save_scorers as save_scorers,
    scorer_state as scorer_state,
)
from .config import SparseConfig as SparseConfig
from .distillation import (
    DistillationLosses as DistillationLosses,
    attention_kl as attention_kl,
    distillation_losses as distillation_losses,
    dropped_mass as dropped_mass,
    soft_topk as soft_topk,
)
from .integrations import (
    AttentionCall as AttentionCall,
    CacheLayerRow as CacheLayerRow,
    CacheReport as CacheReport,
    SequenceParallel as SequenceParallel,
    SparseCache as SparseCache,
    TowerAdapter as TowerAdapter,
    TowerTokens as TowerTokens,
    attention_layers as attention_layers,
    capture_attention as capture_attention,
    densify as densify,
    override_attention as override_attention,
    override_config as override_config,
    override_scorers as override_scorers,
    register_adapter as register_adapter,
    scorer_parameters as scorer_parameters,
    scorers_of as scorers_of,
    sequence_parallel as sequence_parallel,
    set_modality as set_modality,
    sparse as sparse,
    sparse_config as sparse_config,
    sparsify as sparsify,
    spread_keep as spread_keep,
)
from .layout import (
    CallLayout as CallLayout,
    Plan as Plan,
    TokenLayout as TokenLayout,
    arrange as arrange,
    ordered_layout as ordered_layout,
    restore as restore,
)
from .modality import Modality as Modality
from .scorers import (
    BigBird as BigBird,
    DescriptorCache as DescriptorCache,
    FineScorer as FineScorer,
    OracleScorer as OracleScorer,
    PooledScorer as PooledScorer,
    RelevanceScorer as RelevanceScorer,
    Scorer as Scorer,
    SlidingWindow as SlidingWindow,
    register_scorer as register_scorer,
    unit_mass as unit_mass,
)
from .selection import Scores as Scores, Selection as Selection, select as select

__version__: str
