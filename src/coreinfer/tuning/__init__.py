"""Which bytes serve best: budgets by layer from measured errors."""
