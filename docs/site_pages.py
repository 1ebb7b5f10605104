"""Hooks of mkdocs that add documents of the repository's root as pages, and rewrite links.

In the repository, links are relative paths of files. On the site, a link to another document
becomes a link to its page, and a link to any other file a link to that file on GitHub.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "DESIGN.md": "design.md",
    "SECURITY.md": "security.md",
}
"""Documents of the root, and their pages."""

log = get_plugin_logger(__name__)

LINK = re.compile(r'(?P<start>\]\(|src=")(?P<target>(?![a-z]+:|#)[^)"#\s]+)')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each document of the root."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a document to pages of the site, or to files on GitHub.

    A broken link is a warning, which ``--strict`` turns into an error.
    """
    source = {name: document for document, name in PAGES.items()}.get(page.file.src_uri)
    folder = ROOT / "docs" if source is None else ROOT

    def on_site(link: re.Match[str]) -> str:
        path = os.path.relpath(folder / link["target"], ROOT)
        if not (ROOT / path).exists():
            log.warning("%s: there is no %s", page.file.src_uri, link["target"])
        if path in PAGES:
            return link["start"] + PAGES[path]
        if path.startswith("docs/"):
            return link["start"] + path.removeprefix("docs/")
        return f"{link['start']}{config.repo_url}/blob/main/{path}"

    return LINK.sub(on_site, markdown)
