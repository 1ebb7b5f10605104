"""Puts plugins/flexmask-example into the wheel, as the template of ``flexmask new``.

Everything else about the build stands in pyproject.toml.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

EXAMPLE = Path("plugins/flexmask-example")


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


setup(cmdclass={"build_py": BuildWithTemplate})
