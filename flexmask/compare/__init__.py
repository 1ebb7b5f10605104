"""Compares strategies and fusions on one data set; explained in docs/compare.md."""
