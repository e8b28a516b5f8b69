from .discovery import prefix_tokens as prefix_tokens
from .modality_tracker import special_tokens as special_tokens
