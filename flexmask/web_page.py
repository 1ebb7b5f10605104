"""Self-contained HTML pages, rendered by Jinja with automatic escaping; a page loads nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render_page(package: str, scripts: Iterable[str], style: str, data: Any, **values: Any) -> str:
    """Render the ``templates/page.html`` of a package, which extends ``page_base.html``.

    Args:
        package: Name of the package, such as ``flexmask.show``.
        scripts: Names of the package's scripts; each uses names of those before it.
        style: CSS that stands before ``base.css`` and the package's ``page.css``.
        data: JSON values for the scripts.
        values: What else the template asks for; text is escaped.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("flexmask")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}

    def source(name: str) -> Markup:
        assert environment.loader is not None
        return Markup(environment.loader.get_source(environment, name)[0])

    return environment.get_template("page.html").render(
        style=Markup(style) + source("base.css") + source("page.css"),
        script=Markup("\n").join(map(source, scripts)),
        data=data,
        **values,
    )
