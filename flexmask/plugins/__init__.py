"""Plugins: the hook, the registry of strategies, and the loading of third-party code."""
