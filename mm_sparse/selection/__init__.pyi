from .block_lists import lists_to_mask as lists_to_mask
from .density import count_pairs as count_pairs
from .sampling import Sample as Sample
from .scores import Runs as Runs, Scores as Scores
from .selection import Selection as Selection, select as select, select_units as select_units
from .topk import topk_lists as topk_lists
