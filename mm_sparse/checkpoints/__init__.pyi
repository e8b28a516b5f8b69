from .api import load_scorers as load_scorers
from .api import save_scorers as save_scorers
from .format import read_scorers as read_scorers
from .pretrained import (
    list_pretrained as list_pretrained,
)
from .pretrained import (
    read_card as read_card,
)
from .pretrained import (
    scorers_folder as scorers_folder,
)
