"""Programs that train scorers and spread budgets."""
