"""Checkpoints: finds a model's files and checks them, with errors of one line."""
