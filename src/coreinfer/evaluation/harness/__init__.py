"""CoreInfer as a model type of lm-evaluation-harness, and its tasks on local data."""
