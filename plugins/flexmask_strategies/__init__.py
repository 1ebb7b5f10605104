"""flexmask's own mask strategies, one a file, registered as any plugin's are."""
