"""Self-contained HTML pages: nothing is loaded from anywhere, and no text becomes markup."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any


def fill_page(package: str, parts: Mapping[str, str], data: Any, scripts: Iterable[str]) -> str:
    """Fill the ``templates/page.html`` of a package.

    Its places are ``{{NAME}}``: those of ``parts``, and ``STYLE``, ``DATA`` and ``SCRIPT``, which
    this function fills with the package's ``page.css``, ``data`` and ``scripts``.

    Args:
        package: Such as ``flexmask.show``.
        parts: Markup by place; ``STYLE`` may be among them and then comes first.
        data: JSON values for the scripts.
        scripts: Names of templates; each uses names of those before it.
    """
    own = files(package) / "templates"
    base = files("flexmask") / "templates" / "base.css"
    style = base.read_text(encoding="utf-8") + (own / "page.css").read_text(encoding="utf-8")
    filled = {
        **parts,
        "STYLE": parts.get("STYLE", "") + style,
        "DATA": script_json(data),
        "SCRIPT": "\n".join((own / name).read_text(encoding="utf-8") for name in scripts),
    }
    before, *rest = (own / "page.html").read_text(encoding="utf-8").split("{{")
    pieces = (piece.split("}}", 1) for piece in rest)
    return before + "".join(filled[name] + text for name, text in pieces)


def script_json(value: Any) -> str:
    """JSON that may stand in a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
