"""Operators of the decode step; modules named ``*_kernel`` import triton, so only on CUDA."""
