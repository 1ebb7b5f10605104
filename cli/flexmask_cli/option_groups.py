"""Passes options to commands as objects: dataclasses whose fields are annotated for Typer."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Annotated, Any, get_args, get_type_hints

from flexmask_cli.config_file import CONFIG_NAME, ConfigPath


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let Typer call a command whose parameters are option groups.

    An option group is a frozen dataclass. Its fields are annotated like the parameters of a Typer
    command, or are option groups themselves. The class variable ``heading`` is the title of the
    group in ``--help``. If a parameter of the command has a default, the values of that object are
    the defaults of its options.

    Example::

        @dataclass(frozen=True)
        class DeviceOptions:
            heading: ClassVar[str] = "Device"
            device: Annotated[str, typer.Option(help="Where to run.")] = "auto"


        @takes_options
        def doctor(*, device: DeviceOptions) -> None:
            print(device.device)

    Args:
        command: A function whose parameters are keyword-only and annotated with option groups.

    Returns:
        A function with one parameter per option and ``config``, for `typer.Typer.command`.

    Raises:
        TypeError: If two options have the same name.
    """
    groups = get_type_hints(command)
    groups.pop("return", None)
    given = inspect.signature(command).parameters
    parameters: dict[str, inspect.Parameter] = {}
    for name, group in groups.items():
        for parameter in _parameters(group, given[name].default):
            if parameter.name in parameters:
                raise TypeError(f"{command.__name__}: two options are called {parameter.name!r}")
            parameters[parameter.name] = parameter
    parameters[CONFIG_NAME] = _parameter(CONFIG_NAME, ConfigPath, None)

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        command(**{name: _made(group, values) for name, group in groups.items()})

    flat.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    flat.__annotations__ = {name: each.annotation for name, each in parameters.items()}
    return flat


def changed_options(group: Any) -> list[str]:
    """Return the names, such as ``--task``, of options of a group that are not their defaults."""
    hints = _hints(group.__class__)
    return [
        _longest_name(field.name, hints[field.name])
        for field in dataclasses.fields(group)
        if getattr(group, field.name) != _default(field, inspect.Parameter.empty)
    ]


def _parameters(group: Any, defaults: Any) -> Iterator[inspect.Parameter]:
    hints = _hints(group)
    for field in dataclasses.fields(group):
        hint, default = hints[field.name], _default(field, defaults)
        if dataclasses.is_dataclass(hint):
            yield from _parameters(hint, default)
        else:
            yield _parameter(field.name, hint, default, getattr(group, "heading", None))


def _default(field: dataclasses.Field[Any], defaults: Any) -> Any:
    if defaults is not inspect.Parameter.empty:
        return getattr(defaults, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    missing = field.default is dataclasses.MISSING
    return inspect.Parameter.empty if missing else field.default


def _parameter(
    name: str, annotation: Any, default: Any, heading: str | None = None
) -> inspect.Parameter:
    kind, declared = get_args(annotation)
    declared = copy(declared)
    declared.rich_help_panel = heading
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated.__class_getitem__((kind, declared)),  # type: ignore[attr-defined]
    )


def _longest_name(name: str, hint: Any) -> str:
    _, declared = get_args(hint)
    names = [
        declared.default,
        *(declared.param_decls or ()),
    ]  # Typer stores the first one as default
    own = (each.partition("/")[0] for each in names if isinstance(each, str))
    return max(own, key=len, default=f"--{name.replace('_', '-')}")


def _made(group: Any, values: Mapping[str, Any]) -> Any:
    hints = _hints(group)
    return group(
        **{
            field.name: _made(hints[field.name], values)
            if dataclasses.is_dataclass(hints[field.name])
            else values[field.name]
            for field in dataclasses.fields(group)
        }
    )


@functools.cache
def _hints(group: Any) -> dict[str, Any]:
    return get_type_hints(group, include_extras=True)
