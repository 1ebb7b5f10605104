"""Where results are written."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from flexmask.errors import OutputError
from flexmask.results.formats import EXTENSIONS
from flexmask.results.whole_file import target_of


def default_output_path(
    stem: str, model: str, strategy: str, num_segments: int | None, fusion: str = "attention"
) -> Path:
    """Where a result goes when no place is given, relative to the working folder.

    Args:
        stem: Short name of the input.
        model: Hub id, folder or GGUF file.
        strategy: Its name.
        num_segments: Segments kept of each request; None for all.
        fusion: What they have to do with each other; part of the name unless it is attention.

    Example:
        >>> str(default_output_path("webqa", "org/Model-3B", "causal", 5))
        'outputs/webqa/Model-3B/causal-5.feather'
    """
    count = "all" if num_segments is None else num_segments
    how = "" if fusion == "attention" else f"-{fusion}"
    return default_folder(stem, model) / f"{path_safe(strategy)}{how}-{count}.feather"


def default_folder(stem: str, model: str) -> Path:
    """The folder of `default_output_path`; a GGUF file counts by its name without extension."""
    return Path("outputs", path_safe(stem), path_safe(Path(model).name.removesuffix(".gguf")))


def path_safe(text: str) -> str:
    """A file name that reads like ``text`` and is one everywhere."""
    return re.sub(r"[^\w.+-]+", "_", text).lstrip(".") or "_"


def check_place(path: Path) -> Path:
    """Write a file in the folder of an output, which is made where it is missing.

    Returns:
        The file to write, from the root: ``path``, or where the link leads that stands there.

    Raises:
        OutputError: If that fails, or the output is a folder, of no known extension, or no name
            that every format and message can hold.
    """
    output = target_of(path)
    for each in dict.fromkeys((path, output)):
        _check_name(each)
    if output.suffix.lower() != path.suffix.lower():
        raise OutputError(
            f"{path}: a link to {output}, which has another extension; name that file itself"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent, buffering=0) as trial:
            trial.write(b"flexmask")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{output.parent}: nothing can be written there ({reason}); choose another place with "
            "--output"
        ) from None
    return output.absolute()  # code of others may change the working directory later on


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise OutputError(f"{path}: a name that is not UTF-8; choose another --output") from None
    if "\0" in str(path):
        raise OutputError(f"{path}: no file can have this name; choose another --output")
    if os.path.isdir(path):  # unlike Path.is_dir, quiet about folders that may not be read
        raise OutputError(f"{path}: a folder; name a file in it: {path / 'results.feather'}")
    if path.suffix.lower() not in EXTENSIONS:
        raise OutputError(
            f"{path}: unknown extension {path.suffix!r}; name it {', '.join(EXTENSIONS)}"
        )
