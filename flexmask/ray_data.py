"""`Predictor`: generates for the batches of a Ray Data pipeline, or of any other.

It imports nothing of Ray. ``flexmask generate --engine ray`` runs shards on actors of its own
(`flexmask.ray_run`), because only that way a death can be counted for the rows in flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from flexmask.demo import model_path
from flexmask.errors import OptionError, RequestError
from flexmask.fusion import Fusion
from flexmask.inputs.columns import Columns
from flexmask.inputs.rows import Row
from flexmask.plugins.registry import make_strategy
from flexmask.request import Request
from flexmask.results.dataset_run import DatasetRun
from flexmask.results.schema import SCHEMA, Result, row_of
from flexmask.sampling import Sampling
from flexmask.strategy import Strategy
from flexmask.tasks.judge import Judge
from flexmask.tasks.request_source import BadRow, PlainRequests

if TYPE_CHECKING:
    from flexmask.engine import Engine

NEW_COLUMNS = (
    *("prediction", "generation", "prompt_tokens", "generated_tokens", "finish_reason"),
    *("correct", "score", "error"),
)
"""Columns that a batch gets; docs/datasets.md describes them."""

Batch = Mapping[str, Any] | pa.Table
"""A batch of rows: arrays by column, or a table of Arrow."""


class Predictor:
    """Generates for batches of rows; each instance holds one engine.

    Rows have the columns that an input without a task has: ``segments`` (a list of texts), and
    optionally ``uuid``, ``prefix``, ``suffix``, ``answers`` and ``weights``. A batch comes back
    with its columns and those of `NEW_COLUMNS`. A row that cannot be used has the reason in
    ``error``, which is null for all others, and does not end the pipeline.

    Example::

        rows = ray.data.read_parquet("questions.parquet").repartition(64)
        answered = rows.map_batches(
            Predictor,
            fn_constructor_kwargs={"model": "meta-llama/Llama-3.2-3B-Instruct"},
            batch_size=1024,
            compute=ray.data.ActorPoolStrategy(size=8),
            num_gpus=1,
        )
        answered.write_parquet("answers")
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        strategy: Strategy | str = "ensemble_isolation",
        parameters: Mapping[str, str] | None = None,
        fusion: Fusion | str = "attention",
        columns: Mapping[str, str | Sequence[str]] | None = None,
        judge: Judge | None = None,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        adapter: str | None = None,
        tensor_parallel: int = 1,
        quantize: str | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> None:
        """Load the model.

        Args:
            model: Hub id, folder or GGUF file; None for the model that comes with flexmask.
            strategy: The mask strategy, or the name of one.
            parameters: Parameters of a strategy that is given by name.
            fusion: The fusion; ``each`` and samples that do not vote are refused, because they
                give a row several generations.
            columns: Names of a row's columns, or of several, to read in place of others, such as
                ``{"segments": ["question", "paraphrase"]}``.
            judge: Extracts answers and scores them.
            device: As for `flexmask.Engine.from_pretrained`.
            dtype: As for `flexmask.Engine.from_pretrained`.
            trust_remote_code: As for `flexmask.Engine.from_pretrained`.
            adapter: As for `flexmask.Engine.from_pretrained`.
            tensor_parallel: As for `flexmask.Engine.from_pretrained`; pass as many ``num_gpus``.
            quantize: As for `flexmask.Engine.from_pretrained`.
            sampling: The way tokens are chosen; None takes the most likely. Random numbers of a
                row depend on its uuid, so sampled rows need one.
            **options: Other options of `flexmask.Engine.generate`, such as ``max_new_tokens``.

        Raises:
            OptionError: If an option cannot be used.
            FlexMaskError: As from `flexmask.Engine.from_pretrained`.
        """
        self._fusion = Fusion(fusion) if isinstance(fusion, str) else fusion
        if self._fusion.name == "each":
            raise OptionError("fusion 'each' gives a row several generations; explode the rows")
        if self._fusion.has_sample_rows:
            raise OptionError(
                f"{self._fusion.samples} samples give a row several generations; explode the rows"
            )
        refused = {"on_refused", "answer_of", "samples", "segment_attention"}
        if unusable := refused.intersection(options):
            raise OptionError(f"{min(unusable)} is not an option of Predictor")
        names = {
            name: (source,) if isinstance(source, str) else tuple(source)
            for name, source in (columns or {}).items()
        }
        self._make = PlainRequests(names, reads_weights=self._fusion.weights == "column")
        self._judge = judge or Judge()
        self._judge.check()
        if isinstance(strategy, str):
            strategy = make_strategy(strategy, parameters or {})
        elif parameters:
            raise OptionError("parameters go with the name of a strategy")
        self._strategy = strategy
        self._needs_uuid = sampling is not None and not sampling.is_greedy
        self._options = {**options, "sampling": sampling}

        self._engine = self.load_engine(
            model or str(model_path()),
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            adapter=adapter,
            tensor_parallel=tensor_parallel,
            quantize=quantize,
        )

    def load_engine(self, model: str, **options: Any) -> Engine:
        """Load the engine, as `flexmask.Engine.from_pretrained` does."""
        from flexmask.engine import Engine  # slow to import

        return Engine.from_pretrained(model, **options)

    def __call__(self, batch: Batch) -> Batch:
        """Generate for a batch of rows.

        Args:
            batch: Its columns, as Ray Data passes them with the batch format ``numpy`` or
                ``pyarrow``.

        Returns:
            The batch in the same format, in the same order, with the columns of `NEW_COLUMNS`.
        """
        rows = _rows_of(batch)
        results = _Results(map(self._request, rows), self._fusion, self._judge)
        if results.remaining:
            run = DatasetRun.generating(
                self._engine, self._strategy, results, on_error="skip", **self._options
            )
            for _ in run.batches(lambda: False):
                pass
        found = results.rows()
        return _with_columns(batch, {name: [row[name] for row in found] for name in NEW_COLUMNS})

    def _request(self, row: Row) -> Request | BadRow:
        try:
            if self._needs_uuid and not Columns(row.values, self._make.columns).uuid(""):
                raise RequestError("a sampled row needs a uuid, which seeds its random numbers")
            request = self._make(row)
            self._fusion.check(request)
        except RequestError as error:
            return BadRow(row.where, str(error))
        return self._fusion.expand(request)[0]


class _Results:
    """Keeps the results of one batch, as a row writer of `DatasetRun`."""

    def __init__(self, requests: Iterable[Request | BadRow], fusion: Fusion, judge: Judge) -> None:
        self._requests = list(requests)
        self.remaining = [each for each in self._requests if isinstance(each, Request)]
        self.fusion = fusion.after_expansion
        self.judge = judge
        # By identity: uuids may repeat within a batch.
        self._result_of: dict[int, Result] = {}

    def write(self, results: Iterable[Result]) -> None:
        for result in results:
            self._result_of[id(result.request)] = result

    def rows(self) -> list[dict[str, Any]]:
        """Return the row of each request, in their order."""
        results = (
            each if isinstance(each, BadRow) else self._result_of[id(each)]
            for each in self._requests
        )
        return [row_of(result, self.judge) for result in results]


def _rows_of(batch: Batch) -> list[Row]:
    if isinstance(batch, pa.Table):
        values = batch.to_pylist()
    else:
        lists = {name: [_plain(value) for value in column] for name, column in batch.items()}
        values = [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    return [Row(f"row {number}", number, row) for number, row in enumerate(values, start=1)]


def _plain(value: Any) -> Any:
    """Return a value of an array as a value of Python."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _with_columns(batch: Batch, columns: Mapping[str, list[Any]]) -> Batch:
    if isinstance(batch, pa.Table):
        for name, values in columns.items():
            if name in batch.column_names:
                batch = batch.drop_columns([name])
            batch = batch.append_column(name, pa.array(values, SCHEMA.field(name).type))
        return batch
    arrays = {name: _array(values) for name, values in columns.items()}
    return {**batch, **arrays}


def _array(values: list[Any]) -> Any:
    """Return an array, of objects if a value is missing."""
    is_whole = all(isinstance(value, int | float) for value in values)
    return np.array(values, dtype=None if is_whole else object)
