"""Reads rows of input files (JSON Lines, CSV, Parquet, Feather) and of data sets on the hub."""
