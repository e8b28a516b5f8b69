from .api import load_scorers as load_scorers, save_scorers as save_scorers
from .format import read_scorers as read_scorers
from .pretrained import (
    list_pretrained as list_pretrained,
    read_card as read_card,
    scorers_folder as scorers_folder,
)
