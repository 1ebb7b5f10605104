"""Data sets on the hub, through the ``datasets`` library (an optional extra)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa

from flexmask.errors import RequestError

_ROWS_PER_BATCH = 64
"""Rows are streamed, and those that come with the first are waited for."""


def open_hub_dataset(
    dataset_id: str, config: str | None, split: str | None
) -> Callable[[], Iterator[pa.RecordBatch]]:
    """Stream the rows of a split, which need not be named where there is only one.

    Args:
        dataset_id: As in ``owner/name``.
        config: One of its configurations, where it has several.
        split: Such as ``test``.

    Returns:
        A function that reads the rows from the beginning, in batches.

    Raises:
        RequestError: If ``datasets`` is missing, or the data set, configuration or split.
    """
    try:
        import datasets
    except ImportError:
        raise RequestError(
            f"{dataset_id}: no such file; if it is a data set on the hub, "
            "pip install 'flexmask[datasets]'"
        ) from None
    try:
        found = datasets.load_dataset(dataset_id, config, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:  # what datasets raises is one of these
        reason = " ".join(str(error).split())
        raise RequestError(f"{dataset_id}: no such file, nor a data set: {reason}") from None
    if isinstance(found, dict):
        if len(found) > 1:
            raise RequestError(
                f"{dataset_id}: which split? name one as {dataset_id}:SPLIT, "
                f"of {', '.join(map(str, found))}"
            )
        (found,) = found.values()

    # As Arrow, images and sounds in columns that nobody uses are not decoded.
    tables = found.with_format("arrow")

    def batches() -> Iterator[pa.RecordBatch]:
        for table in tables.iter(_ROWS_PER_BATCH):
            yield from table.to_batches()

    return batches
