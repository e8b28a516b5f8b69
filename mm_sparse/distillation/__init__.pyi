from .divergence import attention_kl as attention_kl
from .losses import (
    DistillationLosses as DistillationLosses,
    distillation_losses as distillation_losses,
)
from .soft_attention import (
    unit_error as unit_error,
    unit_weights as unit_weights,
    weighted_attention as weighted_attention,
)
from .topk_relaxation import dropped_mass as dropped_mass, soft_topk as soft_topk
