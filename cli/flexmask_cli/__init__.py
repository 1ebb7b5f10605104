"""The ``flexmask`` command."""
