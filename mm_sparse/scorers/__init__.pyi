from .attention_mass import OracleScorer as OracleScorer
from .attention_mass import unit_mass as unit_mass
from .base import Scorer as Scorer
from .descriptor_cache import (
    DescriptorCache as DescriptorCache,
)
from .descriptor_cache import (
    cached_descriptors as cached_descriptors,
)
from .descriptors import gather_pieces as gather_pieces
from .fine import FineScorer as FineScorer
from .patterns import (
    BigBird as BigBird,
)
from .patterns import (
    Nearest as Nearest,
)
from .patterns import (
    NearestAndRandom as NearestAndRandom,
)
from .patterns import (
    SlidingWindow as SlidingWindow,
)
from .pooled import PooledScorer as PooledScorer
from .registry import SCORERS as SCORERS
from .relevance import RelevanceScorer as RelevanceScorer
from .two_stage import candidates as candidates
