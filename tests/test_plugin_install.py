"""Builds and installs flexmask, its example and what ``flexmask new`` makes, without network."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyarrow import feather

import flexmask
from flexmask.plugins.new_plugin import PluginNames, write_plugin
from plugin_site import BUILT_IN

ROOT = Path(__file__).parents[1]
EXAMPLE = "plugins/flexmask-example"
PIP = ["-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-index", "--no-deps"]
LINK = re.compile(r'(?:\]\(|src=")([^)"\s]+)')

NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs")


@dataclass(frozen=True)
class Installation:
    """Three distributions, installed in a folder of their own.

    Attributes:
        source: A copy of the checkout.
        started: A plugin that ``flexmask new acme-masks`` wrote.
        sdist: Source distribution of flexmask.
        wheel: Wheel of flexmask, built from `sdist`.
        site: The folder with flexmask, the example and the new plugin.
    """

    source: Path
    started: Path
    sdist: Path
    wheel: Path
    site: Path

    def run(self, *arguments):
        """Run Python with `site` before what else is installed."""
        plugins = {"FLEXMASK_LOAD_PLUGINS": "flexmask-example,acme-masks"}
        environment = os.environ | plugins | {"PYTHONPATH": str(self.site)}
        return run_python("-P", *arguments, cwd=self.site.parent, env=environment)

    def files(self, folder):
        """Names of the files in a folder of `source`, relative to the folder above it."""
        above = (self.source / folder).parent
        paths = (self.source / folder).rglob("*")
        return {path.relative_to(above).as_posix() for path in paths if path.is_file()}


def run_python(*arguments, stderr=subprocess.PIPE, **options):
    """Run Python and return what it prints to stdout, and to ``stderr`` if that is STDOUT."""
    command = [sys.executable, *map(str, arguments)]
    options |= {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
    result = subprocess.run(command, **options)
    assert result.returncode == 0, f"{result.stdout}{result.stderr or ''}"
    return result.stdout


@pytest.fixture(scope="module")
def installation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("installation")
    source, example, started, dist, site = (
        folder / name for name in ("source", "example", "started", "dist", "site")
    )
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    shutil.copytree(source / EXAMPLE, example)
    write_plugin(PluginNames.of("acme-masks"), started)

    run_python("-m", "build", "--sdist", "--no-isolation", "--outdir", dist, source)
    (sdist,) = dist.iterdir()
    run_python(
        *PIP, "wheel", *OFFLINE, "--no-build-isolation", "-w", dist, sdist, example, started
    )
    run_python(*PIP, "install", *OFFLINE, "--target", site, *dist.glob("*.whl"))
    (wheel,) = dist.glob("flexmask-*.whl")
    return Installation(source, started, sdist, wheel, site)


def test_the_wheel_holds_the_three_packages_and_nothing_else(installation):
    with zipfile.ZipFile(installation.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == (
        installation.files("flexmask")
        | installation.files("cli/flexmask_cli")
        | installation.files("plugins/flexmask_strategies")
        | {f"flexmask/plugin_template/{path.name}" for path in (ROOT / EXAMPLE).glob("*.*")}
    )
    assert "flexmask/py.typed" in names


def test_the_source_distribution_holds_the_example_and_the_benchmarks(installation):
    with tarfile.open(installation.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    example = {f"plugins/{name}" for name in installation.files(EXAMPLE)}
    assert f"{EXAMPLE}/pyproject.toml" in example
    assert example | installation.files("benchmarks") <= names


@pytest.mark.parametrize("command", [["wheel"], ["install", "--editable"]])
def test_installing_a_checkout_prints_no_warnings(tmp_path, command):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    place = {"wheel": "--wheel-dir", "install": "--target"}[command[0]]
    options = [*OFFLINE, "--no-build-isolation", place, tmp_path / "place"]
    printed = run_python(
        *PIP, command[0], *options, *command[1:], source, stderr=subprocess.STDOUT
    )
    assert re.findall(r"\w*Warning: .*", printed) == []


def test_both_distributions_carry_the_licence(installation):
    with zipfile.ZipFile(installation.wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/licenses/LICENSE"))
        in_wheel = archive.read(name)
    with tarfile.open(installation.sdist) as archive:
        (name,) = (name for name in archive.getnames() if re.fullmatch("[^/]+/LICENSE", name))
        member = archive.extractfile(name)
        assert member is not None
        in_sdist = member.read()
    assert in_wheel == in_sdist == (ROOT / "LICENSE").read_bytes()


def test_links_of_the_description_hold_outside_the_repository(installation):
    (metadata,) = installation.site.glob("flexmask-*.dist-info/METADATA")
    links = LINK.findall(metadata.read_text().partition("\n\n")[2])
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    for link, written in zip(links, LINK.findall((ROOT / "README.md").read_text()), strict=True):
        view = "raw" if written.endswith((".png", ".svg")) else "blob"
        file = f"https://github.com/flexmask/flexmask/{view}/v{flexmask.__version__}/{written}"
        assert link == (written if written.startswith(("https://", "#")) else file)


def test_the_installed_copy_is_the_one_that_runs(installation):
    printed = installation.run("-c", "import flexmask; print(flexmask.__file__)")
    assert Path(printed.strip()).is_relative_to(installation.site)


def test_each_plugin_of_the_three_distributions_loads_once(installation):
    plugins = json.loads(installation.run("-m", "flexmask_cli", "plugins", "--json"))
    assert [plugin for plugin in plugins if plugin["error"]] == []
    loaded = [(plugin["distribution"], plugin["entry_point"]) for plugin in plugins]
    assert len(loaded) == len(set(loaded))
    assert loaded[:-2] == [("flexmask", name) for name in BUILT_IN]
    assert loaded[-2:] == [
        ("acme-masks", "acme_masks"),
        ("flexmask-example", "recent_segments"),
    ]


def test_each_strategy_is_listed_once_with_its_distribution(installation):
    strategies = json.loads(installation.run("-m", "flexmask_cli", "strategies", "--json"))
    owners = [(item["name"], item["distribution"]) for item in strategies]
    assert owners == sorted(set(owners))
    assert {
        ("causal", "flexmask"),
        ("recent_segments", "flexmask-example"),
        ("acme_masks", "acme-masks"),
    } <= set(owners)


def test_the_installed_new_writes_what_the_checkout_writes(installation, tmp_path):
    again = tmp_path / "again"
    command = "from flexmask_cli.app import main; main()"
    printed = installation.run("-c", command, "new", "flexmask-again", "--directory", again)
    assert printed.startswith(f"wrote {again}: strategy 'again' in flexmask_again.py")
    write_plugin(PluginNames.of("flexmask-again"), tmp_path / "from_checkout")
    for path in (tmp_path / "from_checkout").iterdir():
        assert (again / path.name).read_text() == path.read_text()


def test_a_new_plugin_passes_its_own_tests(installation):
    installation.run("-m", "pytest", "-q", "-p", "no:cacheprovider", installation.started)


def test_a_new_plugin_passes_the_check(installation):
    (checked,) = json.loads(
        installation.run("-m", "flexmask_cli", "check", "acme_masks", "--json")
    )
    assert checked["strategy"] == "acme_masks"
    assert {rule["status"] for rule in checked["rules"]} == {"ok"}


def test_an_installed_strategy_generates(installation, tmp_path):
    output = tmp_path / "out.feather"
    limits = ["--limit", "2", "--max-new-tokens", "4", "--output", output]
    installation.run("-m", "flexmask_cli", "generate", "--strategy", "acme_masks", *limits)
    assert feather.read_table(output).num_rows == 2
