"""Attention under a mask: the backend registered with transformers, and its masks."""
