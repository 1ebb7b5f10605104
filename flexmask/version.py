"""The version of flexmask, and those of torch and transformers that its tests run with."""

__version__ = "0.1.0"

TESTED = {"torch": ("2.11", "2.13", "2.14"), "transformers": ("5.17", "5.24")}
"""The first version of each is the oldest supported one; other newer versions may work too."""
