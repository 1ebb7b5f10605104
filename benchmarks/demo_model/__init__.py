"""The program that trained the bundled model, and the synthetic world of its questions."""
