"""What the build needs code for; everything else about it stands in pyproject.toml.

The wheel carries plugins/flexmask-example as the template of ``flexmask new``, and its description
is README.md with absolute links, because a package index resolves no relative ones.
"""

import re
import runpy
import tomllib
import warnings
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

EXAMPLE = Path("plugins/flexmask-example")
RELATIVE_LINK = re.compile(r'(?P<start>\]\(|src=")(?P<target>(?![a-z]+:|#)[^)"#\s]+)')


class BuildWithTemplate(build_py):
    """Copies the example's files into the package; an editable install reads them in place."""

    def run(self) -> None:
        """Build the packages, then copy."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "flexmask", "plugin_template")
            target.mkdir(parents=True, exist_ok=True)
            for path in EXAMPLE.iterdir():
                if path.is_file() and not path.name.startswith("."):
                    self.copy_file(str(path), str(target / path.name))


def description() -> str:
    """README.md with links to the files of this version in the repository."""
    urls = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    version = runpy.run_path("flexmask/version.py")["__version__"]

    def absolute(link: re.Match[str]) -> str:
        view = "raw" if link["target"].endswith((".png", ".svg")) else "blob"
        return f"{link['start']}{urls['Repository']}/{view}/v{version}/{link['target']}"

    return RELATIVE_LINK.sub(absolute, Path("README.md").read_text(encoding="utf-8"))


# setuptools tells of it at each editable install of packages that lie in several folders.
warnings.filterwarnings("ignore", message="Editable installation")

setup(
    cmdclass={"build_py": BuildWithTemplate},
    long_description=description(),
    long_description_content_type="text/markdown",
)
