"""Attention under a mask: the backend that transformers calls, and its masks."""

BACKEND = "flexmask"
DENSE_BACKEND = "flexmask_dense"
