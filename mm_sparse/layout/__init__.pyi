from .call_layout import CallLayout as CallLayout
from .partition import part_sizes as part_sizes
from .patch_order import (
    arrange as arrange,
    in_patch_order as in_patch_order,
    ordered_layout as ordered_layout,
    restore as restore,
)
from .plan import Plan as Plan
from .token_layout import PAD as PAD, TokenLayout as TokenLayout
