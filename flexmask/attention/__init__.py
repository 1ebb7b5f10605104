"""Attention under a mask: the backend registered with transformers, and its masks."""

BACKEND = "flexmask"
DENSE_BACKEND = "flexmask_dense"
