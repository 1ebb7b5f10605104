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

    Called once, when strategies are first looked up. Import torch only inside functions, because
    listings load plugins too. Printed text is not sent to stdout but reported; a changed working
    directory and closed streams are restored and reported.

    A plugin that fails does not stop the others. Some effects cannot be contained within one
    process: ``os._exit``, a crash in C code, threads that a plugin leaves running, global settings
    of libraries such as torch's default dtype, and an import that never ends. Exclude such a
    plugin by ``flexmask --no-plugins`` or ``FLEXMASK_LOAD_PLUGINS``.
    """
    raise NotImplementedError
