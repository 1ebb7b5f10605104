"""``--config run.toml``: options from a file, which those on the command line override."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from flexmask.error_text import did_you_mean
from flexmask.errors import OptionError
from flexmask.inputs.bounded_file import read_whole_or_pipe

CONFIG_NAME = "config"


def _use_config(context: typer.Context, value: str | None) -> None:
    """Use the values in a file as the defaults of the command's options.

    Raises:
        OptionError: If the file cannot be read, or names an option that the command does not
            have or a value that the option cannot have.
    """
    if value is not None and not context.resilient_parsing:
        context.default_map = read_config(Path(value), _options(context))


ConfigPath = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="PATH",
        is_eager=True,
        callback=_use_config,
        help="TOML file with options, such as max-new-tokens = 8. Options on the command line "
        "override it.",
    ),
]


def read_config(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Read options from a TOML file.

    Args:
        path: The file. Its keys are names of options without the dashes.
        options: The options of the command by name.

    Returns:
        Values by the names of the options' parameters.

    Raises:
        OptionError: With file and key, if the file cannot be read or an entry cannot be used.
    """
    try:
        table = tomllib.loads(read_whole_or_pipe(path).decode())
    except OSError as error:
        raise OptionError(f"--config {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"--config {path}: not UTF-8 text ({error.reason})") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise OptionError(f"--config {path}: not TOML ({error})") from None
    values = {}
    for key, value in table.items():
        name = key.replace("_", "-")
        if name not in options:
            close = did_you_mean(name, options)
            raise OptionError(f"{path}: {key!r} is not an option of this command{close}")
        if wanted := _wrong_type(options[name], value):
            raise OptionError(f"{path}: {key} must be {wanted}, got {value!r}")
        values[options[name].name] = value
    return values


def _options(context: typer.Context) -> dict[str, Any]:
    """Return the options of a command by their longest name, except for ``--config``."""
    found = {}
    for parameter in context.command.params:
        if parameter.param_type_name == "option" and parameter.name != CONFIG_NAME:
            found[max(parameter.opts, key=len).lstrip("-")] = parameter
    return found


def _wrong_type(parameter: Any, value: object) -> str:
    """Return what the value of an option must be, or an empty text if it is that."""
    if parameter.is_flag:
        return "" if isinstance(value, bool) else "true or false"
    if parameter.multiple:
        is_list = isinstance(value, list) and all(map(_is_scalar, value))
        return "" if is_list else "a list of texts"
    return "" if _is_scalar(value) else "a text or a number"


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)
