from .fsdp import average as average, shard as shard
from .objectives import Objectives as Objectives
from .optimizer import OptimizerConfig as OptimizerConfig, optimize as optimize
