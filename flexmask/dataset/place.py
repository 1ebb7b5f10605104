"""Where results are written."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from flexmask.dataset.formats import EXTENSIONS
from flexmask.errors import OutputError


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


def check_place(output: Path) -> None:
    """Write a file in the folder of ``output``, which is made where it is missing.

    Raises:
        OutputError: If that fails, or ``output`` is a folder or of no known extension.
    """
    if os.path.isdir(output):  # unlike Path.is_dir, quiet about folders that may not be read
        raise OutputError(f"{output}: a folder; name a file in it: {output / 'results.feather'}")
    if output.suffix.lower() not in EXTENSIONS:
        raise OutputError(
            f"{output}: unknown extension {output.suffix!r}; name it {', '.join(EXTENSIONS)}"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent, buffering=0) as trial:
            trial.write(b"flexmask")
    except OSError as error:
        raise OutputError(
            f"{output.parent}: nothing can be written there ({error.strerror}); choose another "
            "place with --output"
        ) from None
