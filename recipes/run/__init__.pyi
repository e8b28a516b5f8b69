from .inspection import scene as scene
from .language_options import (
    add_options as add_options,
)
from .language_options import (
    changes_of as changes_of,
)
from .language_options import (
    prepared as prepared,
)
from .lightning_cli import main as main
from .sparse_vs_dense import (
    RUNS as RUNS,
)
from .sparse_vs_dense import (
    on_device as on_device,
)
from .sparse_vs_dense import (
    prepare as prepare,
)
from .sparse_vs_dense import (
    validation_of as validation_of,
)
