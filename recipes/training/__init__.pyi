from .fsdp import average as average
from .fsdp import shard as shard
from .objectives import Objectives as Objectives
from .optimizer import OptimizerConfig as OptimizerConfig
from .optimizer import optimize as optimize
