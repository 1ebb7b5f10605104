"""Tensor parallelism: the shard of a model that one rank holds, and the sums over ranks."""
