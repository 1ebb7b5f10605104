"""``flexmask precompute``: keys and values of documents, computed into a folder for later runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from flexmask.errors import OptionError, RequestError
from flexmask.limits import shown_bytes
from flexmask_cli.dataset_options import RequestOptions
from flexmask_cli.engine_loading import load_engine
from flexmask_cli.interrupt import Interrupt
from flexmask_cli.option_groups import takes_options
from flexmask_cli.options import (
    AsJson,
    BatchSizeOptions,
    CachedEngineOptions,
    ChatOptions,
    Quiet,
    RowOptions,
    RunModelOptions,
    StrategyOptions,
    Verbose,
)
from flexmask_cli.progress import track
from flexmask_cli.render.generation import print_notes
from flexmask_cli.render.lines import print_json, print_line, print_warnings, warnings_as_lines
from flexmask_cli.render.scores import print_prefill_kernel
from flexmask_cli.strategy_choice import choose_strategy
from flexmask_cli.streams import run_goes_on

if TYPE_CHECKING:
    from flexmask.engine import RunStats
    from flexmask.engine.precomputing import PrecomputingRun
    from flexmask.kv_store.counters import FolderCounters
    from flexmask.request import Request
    from flexmask.tasks.request_source import RequestSource

SHOWN_ROWS = 5
"""Most rows that cannot be used whose reasons are printed; --json has all."""


@dataclass(frozen=True)
class SummaryOptions:
    """The choice of what is printed: notes, a summary, JSON."""

    heading: ClassVar[str] = "Output"

    verbose: Verbose = False
    quiet: Quiet = False
    as_json: AsJson = False


@dataclass(frozen=True)
class PrecomputeOptions:
    """The rows, model and device, and what is printed."""

    rows: RowOptions
    model: RunModelOptions
    chat: ChatOptions
    batch: BatchSizeOptions
    engine: CachedEngineOptions
    summary: SummaryOptions


@takes_options
def precompute(*, strategy: StrategyOptions, data: RequestOptions, run: PrecomputeOptions) -> None:
    """Compute keys and values of documents and prefixes into a folder, for later runs.

    Rows become prompts as in generate, and what the folder does not have of their documents and
    prefixes is computed. A row of one segment is a document of prompts with several. After a kill
    or Ctrl-C, the same command does the rest.
    """
    folder = run.engine.kv_cache
    if folder is None:
        raise OptionError("precompute needs a folder to write to; name one: --kv-cache FOLDER")
    chosen = choose_strategy(strategy.strategy, strategy.parameters)
    opened = data.open(
        num_segments=data.num_segments, limit=run.rows.limit, on_bad_row=run.rows.on_bad_row
    )

    from flexmask.device import resolve_device, resolve_dtype

    resolve_dtype(run.engine.dtype, resolve_device(run.engine.device))
    uses_template = run.chat.uses_template(opened.task)
    with run_goes_on(), warnings_as_lines():
        rows = _Rows.of(replace(opened.requests, is_chat=uses_template))
        with load_engine(run.model, run.engine) as engine:
            engine_run = engine.precompute(
                rows.requests,
                chosen.strategy,
                batch_size=run.batch.rows_at_once,
                chat_template=uses_template,
                allow_special_tokens=run.chat.allow_special_tokens,
                on_refused=rows.refuse if run.rows.on_bad_row == "skip" else None,
            )
            if run.summary.verbose:
                print_notes(engine, chosen.strategy)
            _compute(engine_run, len(rows.requests), is_quiet=run.summary.quiet)
            if run.summary.verbose:
                print_prefill_kernel(engine)
        summary = _Summary(folder, rows.failed, engine_run.stats, engine_run.written)
        print_warnings(summary.problems())
    if run.summary.as_json:
        print_json(summary.figures())
    elif not run.summary.quiet:
        for line in summary.lines():
            print_line(line)


@dataclass(frozen=True)
class _Rows:
    """The rows of an input.

    Attributes:
        requests: The requests.
        failed: What is wrong with the other rows, and with those that the model cannot take.
    """

    requests: list[Request]
    failed: list[str]

    @classmethod
    def of(cls, source: RequestSource) -> Self:
        """Read all rows."""
        from flexmask.request import Request

        rows = list(source)
        requests = [row for row in rows if isinstance(row, Request)]
        return cls(requests, [row.error for row in rows if not isinstance(row, Request)])

    def refuse(self, request: Request, error: RequestError) -> None:
        """Note that the model cannot take a request."""
        self.failed.append(str(error))


@dataclass(frozen=True)
class _Tracked:
    """A run as `track` shows it."""

    engine_run: PrecomputingRun

    def batches(self, should_stop: Callable[[], bool]) -> Iterator[Sequence[Request]]:
        """Yield requests as their documents are computed."""
        for finished in self.engine_run.batches():
            yield finished
            if should_stop():
                self.engine_run.stop()


def _compute(run: PrecomputingRun, total: int, *, is_quiet: bool) -> None:
    """Run, and show the progress.

    Raises:
        KeyboardInterrupt: If Ctrl-C was pressed; all that was computed is in the folder.
    """
    interrupt = Interrupt()
    with interrupt:
        for _ in track(_Tracked(run), total, interrupt, is_quiet=is_quiet):
            pass
    if interrupt.is_requested and run.stats.generations < total:
        print_warnings(["interrupted; what is computed is kept, the same command does the rest"])
        raise KeyboardInterrupt


@dataclass(frozen=True)
class _Summary:
    """The end of a run.

    Attributes:
        folder: The folder.
        failed: What is wrong with rows that could not be used.
        stats: Counts and times.
        written: Counts of the folder.
    """

    folder: Path
    failed: Sequence[str]
    stats: RunStats
    written: FolderCounters

    def problems(self) -> Iterator[str]:
        """Yield warnings."""
        yield from self.failed[:SHOWN_ROWS]
        if (more := len(self.failed) - SHOWN_ROWS) > 0:
            yield f"{more:,} more rows cannot be used"
        if removed := self.written.evictions:
            yield (
                f"{removed:,} spans left the folder to make room; raise --kv-cache-folder-size if "
                "later runs need them"
            )
        if too_large := self.written.too_large:
            yield f"{too_large:,} spans are larger than --kv-cache-folder-size, and not kept"

    def figures(self) -> dict[str, Any]:
        """Return all figures as JSON values."""
        return {
            "folder": str(self.folder),
            "rows": self.stats.generations,
            "failed": list(self.failed),
            "spans_found": self.stats.cached_spans,
            "spans_computed": self.stats.kept_spans,
            "bytes_written": self.written.bytes_in,
            "spans_removed": self.written.evictions,
            "run": vars(self.stats),
        }

    def lines(self) -> Iterator[str]:
        """Yield the figures for people."""
        stats = self.stats
        failed = f", {len(self.failed):,} failed" if self.failed else ""
        yield f"rows: {stats.generations:,}{failed}"
        yield (
            f"spans of prefixes and documents: {stats.cached_spans:,} found, "
            f"{stats.kept_spans:,} computed"
        )
        if stats.prefills:
            yield (
                f"tokens: {stats.computed_tokens:,} computed in {stats.prefill_s:.2f} s, "
                f"{stats.computed_tokens / stats.prefill_s:,.1f} tokens/s, in {stats.prefills} "
                f"batches of up to {stats.batch_size} prompts"
            )
        yield f"{shown_bytes(self.written.bytes_in)} written to {self.folder}"
