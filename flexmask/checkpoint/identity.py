"""Identifies a model and its adapter: by digests of files on disk, or a commit on the hub."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from flexmask.checkpoint.model_name import ADAPTER_CONFIG, ADAPTER_WEIGHTS

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf")
"""Names of files of weights, and of their index."""

OTHERS = (
    *("config.json", "generation_config.json", "*.py"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template.json", "chat_template.jinja", "*/*.jinja"),
)
"""Names of other files that affect tokens: configuration, code, tokenizer, templates."""

OF_ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
"""Names of the files of an adapter."""

HASHED_BYTES = 64 << 20
"""Up to this size all of a file is hashed, in less than a tenth of a second."""

HEAD_BYTES = 1 << 20
"""Bytes that are hashed of a larger file: the list of its tensors, and the first of them."""


@cache
def model_files(
    model: str, adapter: str | None = None, quantize: str | None = None
) -> Mapping[str, str]:
    """Return what identifies each file of a model, by file name; computed once per process.

    Args:
        model: Hub id, folder, or file.
        adapter: Folder of the adapter that is merged into it; its files are named
            ``adapter/…``.
        quantize: What its weights are rounded to at loading; stands beside the files.

    Returns:
        For each file its size and SHA-256; for a large file its size, the time of its last change
        and the SHA-256 of its beginning. For a model of the hub its commit. An empty mapping for a
        model that cannot be found, since loading it raises the error.
    """
    if quantize is not None:
        return {**model_files(model, adapter), "quantize": quantize}
    if adapter is not None:
        found = _files(Path(adapter), OF_ADAPTER)
        return {**model_files(model), **{f"adapter/{name}": one for name, one in found.items()}}
    path = Path(model)
    if os.path.isfile(path):
        return {path.name: _identity(path)}
    if os.path.isdir(path):
        return _files(path, (*WEIGHTS, *OTHERS))
    commit = _commit(model)
    return {} if commit is None else {"commit": commit}


def _files(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    found = {file for pattern in patterns for file in folder.glob(pattern)}
    return {
        file.relative_to(folder).as_posix(): _identity(file)
        for file in sorted(found)
        if file.is_file()
    }


def _identity(file: Path) -> str:
    status = file.stat()
    with file.open("rb") as content:
        if status.st_size <= HASHED_BYTES:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
            return f"{status.st_size} bytes, sha256 {digest[:16]}"
        digest = hashlib.sha256(content.read(HEAD_BYTES)).hexdigest()
    seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
    changed = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09}Z"
    return f"{status.st_size} bytes, changed {changed}, begins with sha256 {digest[:16]}"


def _commit(model: str) -> str | None:
    """Return the commit of a model of the hub, from the name of its folder in the cache."""
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        return None
    from transformers.utils.hub import cached_file  # slow to import

    try:
        config = cached_file(model, "config.json")
    except (OSError, ValueError):
        return None
    return None if config is None else Path(config).parent.name
