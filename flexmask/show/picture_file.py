"""Pictures as files: which formats there are, and whether a file can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from flexmask.errors import OutputError

PAGE_EXTENSIONS = (".html", ".htm")
FIGURE_EXTENSIONS = (".png", ".svg", ".pdf")


def is_page(path: Path) -> bool:
    """Whether a path asks for a page, and not for a figure."""
    return path.suffix.lower() in PAGE_EXTENSIONS


def check_picture_path(path: Path) -> None:
    """Find out whether a picture could be written, before anything is computed.

    A missing folder is created.

    Raises:
        OutputError: If the extension is unknown or nothing can be written there.
        FlexMaskError: If the format needs matplotlib, and that is not installed.
    """
    if path.suffix.lower() not in (*PAGE_EXTENSIONS, *FIGURE_EXTENSIONS):
        known = ", ".join((".html", *FIGURE_EXTENSIONS))
        raise OutputError(f"{path}: unknown extension {path.suffix!r}; name it {known}")
    if os.path.isdir(path):
        raise OutputError(f"{path}: a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None
    if not is_page(path):
        from flexmask.show.plotting import check_matplotlib

        check_matplotlib()
