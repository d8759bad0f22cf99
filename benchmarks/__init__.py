"""Commands that reproduce what is in `benchmarks/results`."""
