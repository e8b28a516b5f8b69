from .answers import exact_match as exact_match, token_f1 as token_f1
from .budgets import budgets_of as budgets_of
from .density import densities as densities
from .layers import kept_units as kept_units, layer_figures as layer_figures
from .logits import (
    change_of as change_of,
    logit_change as logit_change,
    output_kl as output_kl,
    predictions as predictions,
    spread_logits as spread_logits,
    spread_predictions as spread_predictions,
)
from .ranking_methods import METHODS as METHODS
from .word_error_rate import ErrorCounts as ErrorCounts, plain as plain
