from .budget_search import Place as Place, layer_ratios as layer_ratios
from .distiller import DistillationConfig as DistillationConfig
from .first_order_budgets import (
    QUERY_LEVELS as QUERY_LEVELS,
    choose_budgets as choose_budgets,
    first_order_costs as first_order_costs,
    pair_weights as pair_weights,
)
from .joint import OwnScorers as OwnScorers, fresh as fresh, train_jointly as train_jointly
