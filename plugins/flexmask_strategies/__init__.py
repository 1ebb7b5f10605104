"""The built-in mask strategies, one per file, registered through the same hook as plugins."""
