"""Embedding prompts, clustering a corpus, and the cluster store."""
