from .attention_mass import OracleScorer as OracleScorer, unit_mass as unit_mass
from .base import Scorer as Scorer
from .block_scores import Descriptors as Descriptors, described_units as described_units
from .descriptor_cache import (
    DescriptorCache as DescriptorCache,
    cached_descriptors as cached_descriptors,
)
from .descriptors import gather_pieces as gather_pieces
from .fine import FineScorer as FineScorer
from .patterns import (
    BigBird as BigBird,
    SlidingWindow as SlidingWindow,
)
from .pooled import PooledScorer as PooledScorer
from .registry import (
    register_scorer as register_scorer,
    registered_scorers as registered_scorers,
    scorer_class as scorer_class,
)
from .relevance import RelevanceScorer as RelevanceScorer
from .scorer_part import ScorerPart as ScorerPart
