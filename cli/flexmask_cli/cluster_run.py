"""``--engine ray``: a run on a Ray cluster, as the terminal shows it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmask.errors import OptionError
from flexmask.request import Request
from flexmask_cli.interrupt import Interrupt
from flexmask_cli.progress import SECONDS_PER_LINE
from flexmask_cli.render.lines import print_note, print_warnings
from flexmask_cli.scaling_options import ScalingOptions
from flexmask_cli.strategy_choice import stdout_to_stderr
from flexmask_cli.streams import write_note

if TYPE_CHECKING:
    from flexmask.ray_run import Outcome
    from flexmask.results.dataset_run import DatasetJob
    from flexmask.results.resume import OutputMode
    from flexmask.results.shard_queue import Progress


class ClusterProgress:
    """Shows the progress of a run on a cluster, a line every few seconds."""

    def __init__(self, interrupt: Interrupt, *, is_quiet: bool) -> None:
        """Start the clock.

        Args:
            interrupt: Stops the run, if requested.
            is_quiet: True to show nothing.
        """
        self._interrupt = interrupt
        self._is_quiet = is_quiet
        self._shown_at = time.monotonic()
        self._since: tuple[float, int, int] | None = None

    def __call__(self, progress: Progress, workers: int) -> bool:
        """Show a line if it is time; return True if the run shall stop."""
        now = time.monotonic()
        has_started = progress.workers_with_rows >= workers
        if self._since is None and has_started:  # rates leave out loading and compiling
            self._since = (now, progress.rows, progress.tokens)
        if not self._is_quiet and now - self._shown_at >= SECONDS_PER_LINE:
            self._shown_at = now
            write_note(self._line(progress, workers, now))
        return self._interrupt.is_requested

    def _line(self, progress: Progress, workers: int, now: float) -> str:
        start, rows, tokens = self._since or (now, 0, 0)
        seconds = now - start
        rows_per_s, tokens_per_s = (
            (count / seconds if seconds else 0.0)
            for count in (progress.rows - rows, progress.tokens - tokens)
        )
        return (
            f"{progress.finished:,} of {progress.shards:,} shards, {progress.rows:,} rows, "
            f"{rows_per_s:.1f} rows/s, {tokens_per_s:,.0f} tokens/s, {workers} workers"
        )


def run_on_cluster(
    job: DatasetJob[Any],
    output: Path,
    mode: OutputMode,
    scaling: ScalingOptions,
    device: str,
    *,
    ranks: int,
    is_quiet: bool,
    is_verbose: bool,
) -> Outcome:
    """Run a job on a cluster, and write its result file.

    Raises:
        FlexMaskError: As from `flexmask.ray_run.run_on_ray`.
        KeyboardInterrupt: If the run was interrupted; finished rows are kept.
    """
    with stdout_to_stderr():  # Ray prints to both
        from flexmask.ray_run import Cluster, Hooks, run_on_ray

        interrupt = Interrupt()
        hooks = Hooks(
            progress=ClusterProgress(interrupt, is_quiet=is_quiet),
            warn=lambda message: print_warnings([message]),
            note=print_note if is_verbose else lambda _: None,
        )
        cluster = Cluster(scaling.address, scaling.workers, device, ranks)
        with interrupt:
            outcome = run_on_ray(job, output, mode, cluster, hooks)
    if not outcome.is_complete:
        print_warnings(
            [f"interrupted; {outcome.summary.rows} rows are kept, --resume does the rest"]
        )
        raise KeyboardInterrupt
    return outcome


def check_input(input: str | None) -> None:
    """Check that workers can read the input themselves.

    Raises:
        OptionError: If it is standard input or a pipe.
    """
    from flexmask.inputs.bounded_file import inherited_pipe

    if input is not None and (input == "-" or inherited_pipe(Path(input)) is not None):
        raise OptionError(
            "--engine ray: workers cannot read the standard input or a pipe of this process; "
            "write the rows to a file"
        )


def first_rows(output: Path, count: int) -> list[dict[str, Any]]:
    """Read the first rows of a result file that did not fail."""
    from flexmask.results.formats import open_rows

    rows = (row for batch in open_rows(output) for row in batch.slice(0, count).to_pylist())
    return list(islice((row for row in rows if row["error"] is None), count))


def request_of(row: Mapping[str, Any]) -> Request:
    """Return the request of a row of a result file, as far as it is printed."""
    request = Request(
        segments=tuple(row["paraphrases"]),
        prefix=row["prefix"],
        suffix=row["suffix"],
        answers=tuple(row["answers"]),
        uuid=row["uuid"],
        choices=tuple(row.get("choices", ())),
        answer=row.get("answer"),
    )
    return replace(request, segment=row["segment"], sample=row.get("sample", 0))
