"""Tokenization: encodes the pieces of a prompt apart, and decodes generated tokens."""
