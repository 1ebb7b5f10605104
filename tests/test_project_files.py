"""What stands beside the code is complete and agrees with it: documents, metadata, workflows."""

import re
import tomllib
from pathlib import Path

import yaml  # type: ignore[import-untyped]

import flexmask

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
LINK = re.compile(r'(?:\]\(|src=")(?![a-z]+:)(?P<target>[^)"#\s]*)(?:#(?P<heading>[^)"\s]+))?')
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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


def test_actions_test_every_python_and_the_oldest_versions_that_the_package_names():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    named = [line.rpartition(" :: ")[2] for line in PROJECT["classifiers"] if "3." in line]
    assert matrix["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"
    oldest, newest = matrix["include"]
    for package in ("torch", "transformers"):
        lowest = oldest[package].removeprefix(f"{package}==").removesuffix(".*")
        assert f"{package}>={lowest}" in PROJECT["dependencies"]
        assert newest[package] == package


def test_actions_have_the_permissions_they_need_and_no_others():
    writing = {"publish": {"id-token"}, "deploy": {"pages", "id-token"}}
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] in ({}, {"contents": "read"}), path
        for name, job in workflow["jobs"].items():
            granted = job.get("permissions", workflow["permissions"])
            writes = {scope for scope, access in granted.items() if access == "write"}
            assert writes == writing.get(name, set()), (path, name)
