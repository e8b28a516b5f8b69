from .losses import (
    DistillationLosses as DistillationLosses,
)
from .losses import (
    attention_kl as attention_kl,
)
from .losses import (
    distillation_losses as distillation_losses,
)
from .soft_attention import (
    unit_error as unit_error,
)
from .soft_attention import (
    unit_weights as unit_weights,
)
from .soft_attention import (
    weighted_attention as weighted_attention,
)
from .topk_relaxation import dropped_mass as dropped_mass
from .topk_relaxation import soft_topk as soft_topk
