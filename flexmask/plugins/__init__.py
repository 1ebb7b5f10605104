"""Plugins: the hook, the registry of strategies, and the loading of other people's code."""
