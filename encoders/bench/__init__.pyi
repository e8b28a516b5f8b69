from .profiling import spent as spent
