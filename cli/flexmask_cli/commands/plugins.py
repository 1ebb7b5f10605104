"""``flexmask plugins``: lists plugins, and errors of those that failed to load."""

from __future__ import annotations

from typing import Any

from flexmask.plugins.distribution_loading import PluginRecord
from flexmask.plugins.registry import Registry
from flexmask_cli.option_groups import takes_options
from flexmask_cli.options import ListingOptions
from flexmask_cli.render.lines import print_json
from flexmask_cli.render.table import print_table
from flexmask_cli.strategy_choice import quietly_loaded_plugins


@takes_options
def plugins(*, options: ListingOptions) -> None:
    """List plugins; the status of one that failed to load is its error."""
    registry = quietly_loaded_plugins()
    if options.as_json:
        print_json([_fields(plugin, registry) for plugin in registry.plugins])
    else:
        rows = [_row(plugin, registry) for plugin in registry.plugins]
        print_table(rows, wrapped=["status"])


def _fields(plugin: PluginRecord, registry: Registry) -> dict[str, Any]:
    return {
        "distribution": plugin.distribution,
        "version": plugin.version,
        "entry_point": plugin.entry_point,
        "value": plugin.value,
        "strategies": [cls.name for cls in plugin.strategies],
        "error": registry.error_of(plugin),
        "place": plugin.place,
        "notes": list(plugin.notes),
    }


def _row(plugin: PluginRecord, registry: Registry) -> dict[str, str]:
    error = plugin.error_with_place or registry.error_of(plugin)
    return {
        "distribution": plugin.distribution,
        "version": plugin.version,
        "entry point": plugin.entry_point,
        "status": "; ".join([error or "ok", *plugin.notes]),
    }
