from .discovery import prefix_tokens as prefix_tokens
