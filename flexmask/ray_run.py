"""Runs a data set on a Ray cluster: one worker per GPU or CPU slot, and shards on a shared folder.

Workers are plain actors, not a Ray Data pipeline. Rows do not pass through the object store: each
worker reads the rows of its shards from the input and writes their journals, as ``--shard`` does,
and the driver holds the numbers of shards. It knows which worker died with which rows in flight,
so a death costs these rows' time only. `flexmask.ray_data.Predictor` is for pipelines.

    driver ── survey of the input, number of shards ──► queue (an actor without a CPU)
                                                          │ next shard    ▲ rows written
                                                          ▼               │
    out.feather ◄── merge ◄── out.feather.shards/ ◄── workers (an engine each)
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import ray
    from ray.exceptions import RayActorError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ModuleNotFoundError:
    from flexmask.errors import OptionError

    raise OptionError("Ray is not installed; run pip install 'flexmask[ray]'") from None

from flexmask.errors import (
    FlexMaskError,
    OptionError,
    OutputError,
    RankError,
    RequestError,
)
from flexmask.plugins.registry import LOAD_PLUGINS
from flexmask.results.dataset_run import DatasetJob
from flexmask.results.journal import Journal
from flexmask.results.merge import Part, matching_parts, write_merged
from flexmask.results.output_path import writable_path
from flexmask.results.result_writer import ResultSummary
from flexmask.results.resume import OutputMode
from flexmask.results.shard_files import ShardFolder, rows_in_flight, shard_folder
from flexmask.results.shard_queue import Assignment, Progress, ShardQueue
from flexmask.results.shard_worker import ShardWorker
from flexmask.tasks.input_survey import survey

if TYPE_CHECKING:
    from flexmask.engine import RunStats

SHARDS_PER_WORKER = 32
"""Most shards per worker. When the queue is empty, workers wait for the last shards of others."""

LEAST_ROWS = 256
"""Rows of a shard, unless workers would get fewer than `LEAST_SHARDS` then. A worker writes the
rows that finish together to as many journals as they have shards, and syncs each."""

LEAST_SHARDS = 4
"""Fewest shards per worker, if there are as many rows."""

POLL_S = 0.5
"""Seconds between two looks at the progress."""


@dataclass(frozen=True)
class Cluster:
    """The workers to start.

    Attributes:
        address: Address of the cluster; None for ``RAY_ADDRESS``, or if it is not set, for a
            cluster of this machine alone that ends with the run.
        workers: Number of workers; None for as many as the cluster has GPUs or CPUs.
        device: Device of the workers: ``auto`` takes GPUs if the cluster has some.
        ranks: GPUs of each worker, which hold the model together (``tensor_parallel``).
    """

    address: str | None = None
    workers: int | None = None
    device: str = "auto"
    ranks: int = 1


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        summary: Counts over the rows of the result file; of those finished so far if it was
            stopped.
        stats: Counts and times of the workers together; None if no row was left. Those of
            workers that died are missing.
        is_complete: Whether the result file was written.
    """

    summary: ResultSummary
    stats: RunStats | None
    is_complete: bool


@dataclass(frozen=True)
class Hooks:
    """Calls into the caller while a run goes on.

    Attributes:
        progress: Called now and then with the progress and the number of workers; returns True to
            stop the run once the prompts in flight have finished.
        warn: Called with each warning, once.
        note: Called with what happens to the workers.
    """

    progress: Callable[[Progress, int], bool]
    warn: Callable[[str], None]
    note: Callable[[str], None]


def run_on_ray(
    job: DatasetJob[Any], output: Path, mode: OutputMode, cluster: Cluster, hooks: Hooks
) -> Outcome:
    """Run a data set with the workers of a Ray cluster, and write its result file.

    The result file is the one that one process writes. A run that is stopped or killed leaves its
    shards beside the output, and resumes from them.

    Args:
        job: The run; pickled for the workers.
        output: The result file, in a folder that all machines of the cluster share.
        mode: What to do if there is a result already, or an unfinished run.
        cluster: The workers.
        hooks: Calls into the caller.

    Raises:
        OptionError: If there is no cluster at the address, or it has no room for the workers.
        OutputError: If the output cannot be written, or exists and ``mode`` does not allow it.
        RequestError: If the input cannot be read; at a bad row, or a row that three workers died
            of, unless bad rows are skipped.
        FlexMaskError: If workers cannot load the model.
    """
    target = writable_path(output)
    journal = Journal.acquire(target)  # so that no other process writes there meanwhile
    is_written = False
    try:
        if journal.read().rows.num_rows and mode != "overwrite":
            raise OutputError(
                f"{journal.path}: holds finished rows of a run in one process; resume it without "
                "`engine=ray`, or pass `overwrite`"
            )
        if target.exists() and mode == "new":
            raise OutputError(
                f"{output}: exists; pass `resume` to add missing rows, `overwrite` to replace it, "
                "or another `output`"
            )
        if target.exists() and mode == "resume" and not shard_folder(target).exists():
            journal.close()
            return _finished_outcome(job, target)
        found = survey(job.open_requests())
        with connected(cluster.address):
            run = _Run(job, target, mode, cluster, hooks, found)
            outcome = run.carry_out()
        is_written = outcome.is_complete
        return outcome
    finally:
        if not journal.is_closed:
            journal.close(keep=not is_written)


def _finished_outcome(job: DatasetJob[Any], output: Path) -> Outcome:
    """Return the outcome of a run that resumes a complete file, which it leaves as it is."""
    with job.open_writer(output, job.open_requests(), "resume") as writer:
        if not writer.is_complete:
            raise OutputError(
                f"{output}: complete, but {len(writer.remaining):,} of its rows are new or have "
                "failed; run them without `engine=ray`"
            )
    return Outcome(writer.summary, None, is_complete=True)


def number_of_shards(rows: int, workers: int) -> int:
    """Return the number of shards of an input.

    Example:
        >>> [number_of_shards(rows, 2) for rows in (3, 24, 20_000, 1_000_000)]
        [3, 8, 64, 64]
    """
    wanted = min(SHARDS_PER_WORKER * workers, rows // LEAST_ROWS)
    return max(1, min(rows, max(wanted, LEAST_SHARDS * workers)))


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster, unless this process is connected; start one of this machine if none.

    Raises:
        OptionError: If there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(address="local", include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(f"no Ray cluster at {address or 'this machine'!r} ({reason})") from None
    try:
        yield
    finally:
        ray.shutdown()


def chosen_workers(cluster: Cluster, machines: Sequence[Mapping[str, float]]) -> tuple[int, bool]:
    """Return the number of workers, and whether they have GPUs.

    Args:
        cluster: The workers that are asked for.
        machines: The resources of each machine by Ray's names.

    Raises:
        OptionError: If the cluster has no room for them, or the device names one GPU.
    """
    if cluster.device.startswith("cuda:"):
        raise OptionError(
            f"each worker has a GPU of its own; pass `device=cuda`, got {cluster.device!r}"
        )
    counts = [(int(one.get("GPU", 0)), int(one.get("CPU", 0))) for one in machines]
    is_any = cluster.device == "auto" and any(gpus for gpus, _ in counts)
    has_gpu = cluster.device == "cuda" or is_any
    room, ranks = 0, cluster.ranks
    for gpus, cpus in counts:  # the GPUs of a worker are of one machine
        room += min(gpus // ranks, cpus) if has_gpu else cpus // ranks
    kind = "GPU" if has_gpu else "CPU"
    each = f"a {kind}" if ranks == 1 else f"{ranks} {kind}s of one machine"
    if not room:
        raise OptionError(
            f"the cluster has no room for a worker with {each}; start its machines first"
        )
    if (cluster.workers or 1) > room:
        raise OptionError(
            f"the cluster has room for {room} workers with {each}, too few for "
            f"`workers={cluster.workers}`"
        )
    return cluster.workers or room, has_gpu


class RemoteAssignments:
    """The queue of shards, in another process, as one worker sees it."""

    def __init__(self, queue: Any, worker: str) -> None:
        """Wrap the handle of a `ShardQueue`."""
        self._queue = queue
        self._worker = worker

    def take(self, *, may_be_alone: bool) -> Assignment | None:
        """Return the next shard to run; None if there is none."""
        taken: Assignment | None = ray.get(
            self._queue.take.remote(self._worker, may_be_alone=may_be_alone)
        )
        return taken

    def opened(self, number: int, resumed: int) -> None:
        """Record the rows that a shard has already."""
        self._queue.opened.remote(number, resumed)

    def report(self, rows: int, tokens: int) -> bool:
        """Count rows; return True if the worker shall stop."""
        return bool(ray.get(self._queue.report.remote(self._worker, rows, tokens)))

    def finish(self, number: int) -> None:
        """Record that a shard has its result file."""
        ray.get(self._queue.finish.remote(self._worker, number))

    def give_back(self, number: int) -> None:
        """Return a shard whose rows to run alone are finished."""
        ray.get(self._queue.give_back.remote(self._worker, number))

    def warn(self, message: str) -> None:
        """Pass on a warning."""
        self._queue.warn.remote(message)


@dataclass(frozen=True)
class Place:
    """Working folder and environment of the driver, which workers take over.

    Attributes:
        folder: The working folder, to which relative paths refer.
        environment: Variables that change what flexmask does.
    """

    folder: str
    environment: Mapping[str, str]

    @classmethod
    def here(cls) -> Place:
        """Return those of this process."""
        names = [LOAD_PLUGINS, "HF_HOME", "HF_HUB_OFFLINE"]
        return cls(os.getcwd(), {name: os.environ[name] for name in names if name in os.environ})

    def enter(self) -> None:
        """Take them over.

        Raises:
            OptionError: If the folder does not exist on this machine.
        """
        os.environ.update(self.environment)
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise OptionError(
                f"{self.folder}: not on {os.uname().nodename} ({error.strerror}); start the run "
                "in a folder that all machines of the cluster share"
            ) from None


class RayWorker:
    """The actor around a `ShardWorker`; its engine is kept from one call to the next."""

    def __init__(
        self, job: DatasetJob[Any], folder: ShardFolder, queue: Any, name: str, place: Place
    ) -> None:
        """Keep the arguments; an error here would hide its cause from the driver."""
        self._worker = ShardWorker(job, folder, RemoteAssignments(queue, name))
        self._place = place

    def run(self) -> RunStats | None:
        """Run shards until none is left."""
        self._place.enter()
        return self._worker.run()


class _Run:
    """One run of a driver."""

    def __init__(
        self,
        job: DatasetJob[Any],
        output: Path,
        mode: OutputMode,
        cluster: Cluster,
        hooks: Hooks,
        found: Any,
    ) -> None:
        self._job, self._output, self._hooks = job, output, hooks
        workers, self._has_gpu = chosen_workers(
            cluster, [node["Resources"] for node in ray.nodes() if node["Alive"]]
        )
        self._ranks = cluster.ranks
        self._folder = ShardFolder.open(
            output, mode, found, lambda rows: number_of_shards(rows, workers)
        )
        self._num_workers = min(workers, self._folder.count)
        here = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )  # the queue does not survive the driver, and shall not die before it
        queue = ray.remote(num_cpus=0, scheduling_strategy=here)(ShardQueue)
        self._queue = queue.remote(self._folder.count)
        self._job_ref = ray.put(job)
        self._running: dict[Any, tuple[str, Any]] = {}
        self._idle: deque[tuple[str, Any]] = deque()
        self._num_started = 0
        self._shown_warnings: set[str] = set()
        self._stats: RunStats | None = None
        self._is_stopped = False

    def carry_out(self) -> Outcome:
        """Run all shards and merge them."""
        try:
            for _ in range(self._num_workers):
                self._start()
            while self._running:
                done, _ = ray.wait([*self._running], num_returns=1, timeout=POLL_S)
                self._look()
                for ref in done:
                    self._settle(ref, *self._running.pop(ref))
            resumed = ray.get(self._queue.resumed_rows.remote())
            progress = self._look()
        finally:
            for _, worker in (*self._running.values(), *self._idle):
                ray.kill(worker)
            ray.kill(self._queue)
        if self._is_stopped and progress.finished < self._folder.count:
            counts = ResultSummary(resumed + progress.rows, resumed, 0, 0)
            return Outcome(counts, self._stats, is_complete=False)
        parts = matching_parts([Part.open(path) for path in self._folder.files()])
        summary = write_merged(parts, self._output)
        self._folder.remove()
        counts = ResultSummary(
            summary.rows, resumed, summary.judged, summary.correct, summary.failed
        )
        return Outcome(counts, self._stats, is_complete=True)

    def _start(self) -> None:
        """Let an idle worker run, or start a new one."""
        if self._idle:
            name, worker = self._idle.popleft()
        else:
            self._num_started += 1
            name = f"worker {self._num_started}"
            # max_restarts=0: a death has to be counted before its rows run again.
            actor = ray.remote(
                num_cpus=1 if self._has_gpu else self._ranks,
                num_gpus=self._ranks if self._has_gpu else 0,
                max_restarts=0,
                scheduling_strategy="SPREAD",
            )(RayWorker)
            worker = actor.remote(self._job_ref, self._folder, self._queue, name, Place.here())
            self._hooks.note(f"{name} starts")
        self._running[worker.run.remote()] = name, worker

    def _look(self) -> Progress:
        """Show the progress and new warnings; stop if the caller asks for it."""
        progress: Progress = ray.get(self._queue.progress.remote())
        for message in progress.warnings:
            if message not in self._shown_warnings:
                self._shown_warnings.add(message)
                self._hooks.warn(message)
        if self._hooks.progress(progress, len(self._running)) and not self._is_stopped:
            self._is_stopped = True
            ray.get(self._queue.stop.remote())
        return progress

    def _settle(self, ref: Any, name: str, worker: Any) -> None:
        """Take the outcome of a worker; after a death, let another one go on.

        Raises:
            FlexMaskError: If the run cannot go on.
        """
        try:
            stats = ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, FlexMaskError) and not isinstance(cause, RankError):
                raise cause from None
            # After an error of CUDA, or without its other ranks, its process is of no more use.
            ray.kill(worker)
            self._lose(name, f"{type(cause).__name__}: {cause}")
        except RayActorError as error:
            ray.kill(worker)
            self._lose(name, _reason(error))
        else:
            if stats is not None:
                self._stats = stats if self._stats is None else self._stats.plus(stats)
            self._idle.append((name, worker))
        while ray.get(self._queue.has_more.remote()) and len(self._running) < self._num_workers:
            self._start()

    def _lose(self, name: str, reason: str) -> None:
        """Count the death of a worker.

        Raises:
            RequestError: If a row is given up, and bad rows stop the run.
            FlexMaskError: If workers die before they have started a row.
        """
        held: list[int] = ray.get(self._queue.held_by.remote(name))
        in_flight = {number: rows_in_flight(self._folder.file(number)) for number in held}
        given_up, cannot_start = ray.get(self._queue.lose.remote(name, in_flight, reason))
        rows = sum(map(len, in_flight.values()))
        self._hooks.warn(f"{name} died with {rows:,} rows in flight ({reason}); others go on")
        if given_up is not None and self._job.on_error == "stop":
            raise RequestError(
                f"uuid {given_up[0]!r}: three workers died while they computed it; "
                "`on_error=skip` keeps it as a failed row"
            )
        if cannot_start:
            raise FlexMaskError(
                f"three workers died before they started a row; the last: {reason}"
            )


def _reason(error: RayActorError) -> str:
    """Return the sentence of Ray's message that says how a worker died."""
    text = " ".join(str(error).split())
    _, _, detail = text.partition("Worker exit detail: ")
    return (detail or text).partition(". ")[0]
