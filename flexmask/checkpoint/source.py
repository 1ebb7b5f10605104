"""The source of a model's files: a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from flexmask.checkpoint.model_name import check_model_name, shown
from flexmask.errors import ModelError
from flexmask.transformers_internals import find_model_file

_LFS_BEGINNING = b"version https://git-lfs.github.com/"


@dataclass(frozen=True)
class CheckpointSource:
    """The place of a model's files; `find` creates it.

    Attributes:
        name: The name that the user gave.
        location: The hub id or folder that transformers loads from.
        folder: The folder; None for a hub id.
        gguf: The GGUF file; None if the weights are in safetensors.
    """

    name: str
    location: str
    folder: Path | None = None
    gguf: Path | None = None

    @classmethod
    def find(cls, model: str) -> Self:
        """Find the model of a name.

        Raises:
            ModelError: If there is none, or it needs a package that is not installed.
        """
        name = os.fspath(model)
        check_model_name(name)
        path = Path(name)
        # Unlike pathlib, os.path takes what cannot be a name, or looked at, for absent.
        if os.path.isdir(path):
            return cls(name, name, folder=path)
        if path.suffix == ".gguf":
            path = path.absolute()
            return cls(name, str(path.parent), gguf=path)
        return cls(name, name)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` besides the location."""
        # The absolute path: transformers prefers a file of that name in the working directory.
        return {} if self.gguf is None else {"gguf_file": str(self.gguf)}

    def file(self, name: str, *, must_exist: bool = False) -> Path | None:
        """Return the path of one file of a model in safetensors; None if there is no such file.

        Raises:
            OSError: If it must exist on the hub, and does not or cannot be downloaded.
        """
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_file() else None
        return find_model_file(self.location, name, must_exist=must_exist)

    def read_json(self, name: str, *, must_exist: bool = False) -> dict[str, Any] | None:
        """Read one file of a model as a JSON object; None if there is no such file.

        Raises:
            ModelError: If it is not a JSON object.
            OSError: As `file`.
        """
        path = self.file(name, must_exist=must_exist)
        if path is None:
            return None
        check_is_no_pointer(path, self.name)
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise ModelError(f"{name} of model {shown(self.name)} is not JSON: {error}") from None
        if not isinstance(content, dict):
            raise ModelError(
                f"{name} of model {shown(self.name)} must be a JSON object, "
                f"got a {type(content).__name__}"
            )
        return content


def check_is_no_pointer(path: Path, model: str) -> None:
    """Check that a file is not a Git LFS pointer, which stands for a file not downloaded.

    Raises:
        ModelError: If it is one.
    """
    with path.open("rb") as file:
        if file.read(len(_LFS_BEGINNING)) == _LFS_BEGINNING:
            raise ModelError(
                f"{path.name} of model {shown(model)} is a Git LFS pointer, not the file itself; "
                "run git lfs pull there"
            )
