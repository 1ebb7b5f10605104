"""What stands beside the code is complete and agrees with it: documents, metadata."""

import re
from pathlib import Path

import flexmask

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
LINK = re.compile(r'(?:\]\(|src=")(?![a-z]+:)(?P<target>[^)"#\s]*)(?:#(?P<heading>[^)"\s]+))?')


def headings(text):
    """The names by which GitHub links to the headings of a document."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_between_files_of_the_repository_lead_somewhere():
    links = 0
    for document in DOCUMENTS:
        for link in LINK.finditer(document.read_text()):
            target = document.parent / link["target"] if link["target"] else document
            assert target.exists(), (document.name, link[0])
            if link["heading"]:
                assert link["heading"] in headings(target.read_text()), (document.name, link[0])
            links += 1
    assert links > 20


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^::: flexmask\.(\w+)$", text, re.MULTILINE)
    assert sorted(["__version__", *listed]) == sorted(flexmask.__all__)
