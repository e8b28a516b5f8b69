from .api import load_scorers as load_scorers, save_scorers as save_scorers
from .format import StoredScorers as StoredScorers, read_scorers as read_scorers
from .lightning_callback import LightningScorerCallback as LightningScorerCallback
from .pretrained import (
    list_pretrained as list_pretrained,
    read_card as read_card,
    scorers_folder as scorers_folder,
)
from .trainer_callback import TrainerScorerCallback as TrainerScorerCallback
from .training import (
    average_scorer_gradients as average_scorer_gradients,
    load_scorer_state as load_scorer_state,
    register_scorers as register_scorers,
    scorer_state as scorer_state,
)
