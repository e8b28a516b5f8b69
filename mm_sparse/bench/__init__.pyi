from .baselines import Shape as Shape
from .results import (
    FAMILIES as FAMILIES,
)
from .results import (
    Session as Session,
)
from .results import (
    aligned as aligned,
)
from .results import (
    machine as machine,
)
from .results import (
    median_ms as median_ms,
)
from .results import (
    reason as reason,
)
from .runner import Runner as Runner
from .scenarios import (
    DecodeBench as DecodeBench,
)
from .scenarios import (
    LongBench as LongBench,
)
from .scenarios import (
    MemoryBench as MemoryBench,
)
from .scenarios import (
    bench_shapes as bench_shapes,
)
from .scenarios import (
    growth as growth,
)
