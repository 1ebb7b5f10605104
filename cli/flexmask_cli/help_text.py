"""Formats ``--help``: whole sentences, and options under the heading of their group."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

OTHER = "Options"
"""Heading of options whose group has none."""

WHOLE = 10_000
"""A number of characters longer than the first sentence of any command's help."""


class Command(TyperCommand):
    """A command whose ``--help`` lists arguments first, then each group of options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options; those without a heading come last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(heading_of(parameter), []).append(record)
        others = sections.pop(OTHER, [])
        for heading, records in [*sections.items(), (OTHER, others)]:
            with formatter.section(heading):
                formatter.write_dl(records)


class Group(TyperGroup):
    """The group of all commands; ``--help`` shows the whole first sentence of each."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the name and first sentence of each command."""
        commands = (self.get_command(ctx, name) for name in self.list_commands(ctx))
        rows = [(it.name, it.get_short_help_str(WHOLE)) for it in commands if it is not None]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def heading_of(parameter: Any) -> str:
    """Return the heading of an argument or option."""
    if parameter.param_type_name == "argument":
        return "Arguments"
    return getattr(parameter, "rich_help_panel", None) or OTHER
