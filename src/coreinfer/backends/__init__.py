"""Backends: what runs a model. `hf` wraps a Hugging Face model in place."""
