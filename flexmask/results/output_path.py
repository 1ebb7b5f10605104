"""Chooses and checks the paths of result files."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from flexmask.errors import OutputError
from flexmask.results.formats import EXTENSIONS
from flexmask.results.whole_file import target_of
from flexmask.tasks.shards import Shard


def default_output_path(
    stem: str,
    model: str,
    strategy: str,
    num_segments: int | None,
    fusion: str = "attention",
    shard: Shard | None = None,
    adapter: str | None = None,
    quantize: str | None = None,
) -> Path:
    """Return the default path of a result file, relative to the working folder.

    Args:
        stem: Short name of the input.
        model: Hub id, folder or GGUF file.
        strategy: Name of the strategy.
        num_segments: Segments kept of each request; None for all.
        fusion: Name of the fusion; part of the file name unless it is ``attention``.
        shard: The shard that is run; None for the whole input.
        adapter: Folder of the adapter that is merged into the model.
        quantize: What the model's weights are rounded to; None to keep them.

    Example:
        >>> str(default_output_path("webqa", "org/Model-3B", "causal", 5))
        'outputs/webqa/Model-3B/causal-5.feather'
    """
    count = "all" if num_segments is None else num_segments
    how = "" if fusion == "attention" else f"-{fusion}"
    part = "" if shard is None else f".{shard.number}-of-{shard.count}"
    folder = default_folder(stem, model, adapter, quantize)
    return folder / f"{path_safe(strategy)}{how}-{count}{part}.feather"


def default_folder(
    stem: str, model: str, adapter: str | None = None, quantize: str | None = None
) -> Path:
    """Return the folder of `default_output_path`; of a GGUF file the extension is dropped."""
    name = Path(model).name.removesuffix(".gguf")
    if adapter is not None:
        name += f"+{Path(adapter).absolute().name}"
    if quantize is not None:
        name += f"+{quantize}"
    return Path("outputs", path_safe(stem), path_safe(name))


def path_safe(text: str) -> str:
    """Turn ``text`` into a file name that is valid on every system."""
    return re.sub(r"[^\w.+-]+", "_", text).lstrip(".") or "_"


def writable_path(path: Path) -> Path:
    """Resolve an output path, create its folder, and check that files can be written there.

    Returns:
        The absolute path of the file to write; symbolic links are resolved.

    Raises:
        OutputError: If the folder is not writable, the output is a folder or has an unknown
            extension, or its name is not valid UTF-8.
    """
    output = target_of(path)
    for each in dict.fromkeys((path, output)):
        check_output_name(each)
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
            f"{output.parent}: nothing can be written there ({reason}); choose another `output`"
        ) from None
    return output.absolute()  # plugin code may change the working directory later


def check_output_name(path: Path) -> None:
    """Check an output path without writing: name, extension, and that it is not a folder.

    Raises:
        OutputError: If it is a folder or has an unknown extension, or its name is not valid UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise OutputError(f"{path}: a name that is not UTF-8; choose another `output`") from None
    if "\0" in str(path):
        raise OutputError(f"{path}: no file can have this name; choose another `output`")
    if os.path.isdir(path):  # unlike Path.is_dir, quiet about folders that may not be read
        raise OutputError(f"{path}: a folder; name a file in it: {path / 'results.feather'}")
    if path.suffix.lower() not in EXTENSIONS:
        raise OutputError(
            f"{path}: unknown extension {path.suffix!r}; name it {', '.join(EXTENSIONS)}"
        )
