"""The file formats of pictures, and a check that a file can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from flexmask.errors import OutputError

PAGE_EXTENSIONS = (".html", ".htm")
FIGURE_EXTENSIONS = (".png", ".svg", ".pdf")


def is_page(path: Path) -> bool:
    """Return True if the extension is that of a page, False for a figure."""
    return path.suffix.lower() in PAGE_EXTENSIONS


def check_picture_path(path: Path) -> None:
    """Check that a picture can be written, before anything is computed.

    A missing folder is created.

    Raises:
        OutputError: If the extension is unknown or the file cannot be written.
        FlexMaskError: If the format needs matplotlib, which is not installed.
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
