"""A model by name: a hub id, a folder, or a GGUF file."""

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
    """Where the files of a model are; made by `find`.

    Attributes:
        name: As the user gave it.
        location: What transformers loads from: a hub id or a folder.
        folder: The folder; None for a hub id.
        gguf: The GGUF file; None where weights are in safetensors.
    """

    name: str
    location: str
    folder: Path | None = None
    gguf: Path | None = None

    @classmethod
    def find(cls, model: str) -> Self:
        """Find out what a name means.

        Raises:
            ModelError: If there is nothing of that name, or it needs a package that is absent.
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
        """What ``from_pretrained`` takes beside the location."""
        # By its whole path: a file of that name in the working folder would go first.
        return {} if self.gguf is None else {"gguf_file": str(self.gguf)}

    def file(self, name: str, *, must_exist: bool = False) -> Path | None:
        """Find one file of a model that is not a GGUF file; None where it has none of that name.

        Raises:
            OSError: If it is on the hub, must exist, and does not or cannot be had.
        """
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_file() else None
        return find_model_file(self.location, name, must_exist=must_exist)

    def read_json(self, name: str, *, must_exist: bool = False) -> dict[str, Any] | None:
        """Read one file of a model as a JSON object; None where it has none of that name.

        Raises:
            ModelError: If it is not one.
            OSError: As from `file`.
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
    """Find out whether a file is what Git LFS leaves in its place.

    Raises:
        ModelError: If so.
    """
    with path.open("rb") as file:
        if file.read(len(_LFS_BEGINNING)) == _LFS_BEGINNING:
            raise ModelError(
                f"{path.name} of model {shown(model)} is a Git LFS pointer, not the file itself; "
                "run git lfs pull there"
            )
