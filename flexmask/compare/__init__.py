"""Strategies and fusions side by side on one data set. docs/compare.md says what is compared."""
