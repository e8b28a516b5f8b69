"""A KV cache whose layers keep the keys that matter and give the memory of the rest back."""
