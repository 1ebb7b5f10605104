"""The plugin API: one hook, in the entry-point group ``flexmask``.

A plugin is a distribution whose ``pyproject.toml`` names a module or object with hook
implementations::

    [project.entry-points.flexmask]
    my_strategy = "my_package.my_strategy"
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from flexmask.strategy import Strategy

ENTRY_POINT_GROUP = "flexmask"

hookspec = pluggy.HookspecMarker("flexmask")
hookimpl = pluggy.HookimplMarker("flexmask")


@hookspec
def register_strategies() -> Iterable[type[Strategy]]:
    """Return the strategy classes that this plugin offers.

    Called once, when strategies are first looked up. Import torch inside functions only: listings
    load plugins too. Text printed here is kept off stdout and reported; another working directory
    and closed streams are undone and reported.

    One plugin that fails stops no other. What cannot be contained in one process: ``os._exit``, a
    crash in C code, threads that a plugin leaves running, global settings of libraries such as
    torch's default dtype, and an import that never ends. ``flexmask --no-plugins`` and
    ``FLEXMASK_LOAD_PLUGINS`` leave such a plugin out.
    """
    raise NotImplementedError
