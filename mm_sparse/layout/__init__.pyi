from .call_layout import CallLayout as CallLayout
from .partition import part_sizes as part_sizes
from .patch_order import (
    arrange as arrange,
)
from .patch_order import (
    in_patch_order as in_patch_order,
)
from .patch_order import (
    ordered_layout as ordered_layout,
)
from .patch_order import (
    restore as restore,
)
from .plan import Plan as Plan
from .token_layout import PAD as PAD
from .token_layout import TokenLayout as TokenLayout
