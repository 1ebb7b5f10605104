"""Surveys an input before its shards are run: counts its rows and finds uuids that repeat."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np

from flexmask.errors import RequestError
from flexmask.tasks.request_source import RequestSource
from flexmask.tasks.shards import InputSurvey


def survey(source: RequestSource) -> InputSurvey:
    """Read an input once for what its shards have to know about each other.

    No request is made. Eight bytes per row are held, and as many again for a moment.

    Args:
        source: The requests of the whole input.

    Raises:
        RequestError: If there are no rows, the input cannot be read, or no row has a column that
            is needed.
    """
    digest = hashlib.blake2b(digest_size=8)
    hashes = array("q")
    columns: set[str] = set()
    for row in source.limited_rows():
        if not row.error and not columns.issuperset(row.values):
            columns.update(row.values)
        uuid = source.uuid_of(row)
        hashes.append(hash(uuid))
        digest.update(uuid.encode(errors="backslashreplace") + b"\n")
    if not hashes:
        raise RequestError(f"{source.rows.name}: no rows in it")
    if source.limit is None or len(hashes) < source.limit:
        source.make.check_columns(columns)
    return InputSurvey(len(hashes), digest.hexdigest(), _repeated(source, hashes))


def _repeated(source: RequestSource, hashes: array[int]) -> dict[str, tuple[int, int]]:
    """Return the uuids that several rows have, with index and number of the first of them.

    Only where hashes are equal is the input read again.
    """
    in_order = np.sort(np.frombuffer(hashes, np.int64))
    equal = {int(value) for value in in_order[1:][in_order[1:] == in_order[:-1]]}
    first: dict[str, tuple[int, int]] = {}
    repeated: dict[str, tuple[int, int]] = {}
    if equal:
        for index, row in enumerate(source.limited_rows()):
            if hashes[index] in equal:
                uuid = source.uuid_of(row)
                if uuid in first:
                    repeated[uuid] = first[uuid]
                first.setdefault(uuid, (index, row.number))
    return repeated
