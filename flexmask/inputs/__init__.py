"""Reading the rows of input files: JSON Lines, CSV, Parquet, Feather, and data sets of the hub."""
