"""Checkpoints: where a model's files are, what may be wrong with them, and how that is said."""
