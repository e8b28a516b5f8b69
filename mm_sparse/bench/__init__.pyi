from .baselines import Shape as Shape
from .estimate import (
    Estimate as Estimate,
    estimate_model as estimate_model,
    estimate_table as estimate_table,
)
from .model_bench import (
    ModelTiming as ModelTiming,
    as_records as as_records,
    model_table as model_table,
    run_models as run_models,
)
from .model_shapes import MODEL_SHAPES as MODEL_SHAPES, ModelShape as ModelShape
from .overhead import measure_overhead as measure_overhead, overhead_table as overhead_table
from .results import (
    FAMILIES as FAMILIES,
    Session as Session,
    aligned as aligned,
    machine as machine,
    median_ms as median_ms,
    reason as reason,
)
from .runner import Runner as Runner
from .scenarios import (
    DecodeBench as DecodeBench,
    LongBench as LongBench,
    MemoryBench as MemoryBench,
    bench_shapes as bench_shapes,
    growth as growth,
)
