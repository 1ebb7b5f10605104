"""Triton kernels of the decode step; their modules import triton, so import them on CUDA only."""
