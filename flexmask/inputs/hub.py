"""Streams data sets from the hub through the ``datasets`` library, an optional extra."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa

from flexmask.errors import RequestError

_ROWS_PER_BATCH = 64
"""Small, because the first row arrives only once its whole batch has been streamed."""


def open_hub_dataset(
    dataset_id: str, config: str | None, split: str | None
) -> Callable[[], Iterator[pa.RecordBatch]]:
    """Open a split of a data set for streaming.

    Args:
        dataset_id: ``owner/name``.
        config: A configuration, if the data set has several.
        split: Such as ``test``; None if there is only one.

    Returns:
        A function that streams the rows from the beginning, in record batches.

    Raises:
        RequestError: If ``datasets`` is not installed, or there is no such data set,
            configuration or split.
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
    except (OSError, ValueError, RuntimeError) as error:  # datasets raises one of these
        reason = " ".join(str(error).split())
        raise RequestError(f"{dataset_id}: no such file, nor a data set: {reason}") from None
    if isinstance(found, dict):
        if len(found) > 1:
            raise RequestError(
                f"{dataset_id}: which split? name one as {dataset_id}:SPLIT, "
                f"of {', '.join(map(str, found))}"
            )
        (found,) = found.values()

    # In Arrow format, images and audio in unused columns are not decoded.
    tables = found.with_format("arrow")

    def batches() -> Iterator[pa.RecordBatch]:
        for table in tables.iter(_ROWS_PER_BATCH):
            yield from table.to_batches()

    return batches
