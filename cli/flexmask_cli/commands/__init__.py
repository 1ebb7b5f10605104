"""One module per command: its options, one call into the core, and what it prints."""
