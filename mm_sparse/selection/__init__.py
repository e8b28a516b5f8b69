"""From scores to lists of key blocks: budgets, top-k, sampling."""
