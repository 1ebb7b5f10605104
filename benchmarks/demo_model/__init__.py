"""Trains the bundled model, and generates the synthetic world of its questions."""
