"""Measures the cost of a cell while it runs, and stores it beside the result file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Self

from flexmask.errors import OutputError
from flexmask.results.whole_file import replacing

if TYPE_CHECKING:
    from flexmask.engine import RunStats

_TOKEN_COUNTS = ("prompt_tokens", "computed_tokens", "generated_tokens")


@dataclass(frozen=True)
class Measurement:
    """Counts and times of one cell, summed over the runs that completed it.

    Times of the first prompts, and of those that were in flight when something was compiled, are
    left out; the rows are counted.

    Attributes:
        machine: Device and versions; times measured on another machine are not added.
        batch_size: Prompts that run together.
        rows: Rows generated.
        prompt_tokens: Prompt tokens, including copies of the prefix.
        computed_tokens: Prompt tokens that prefill computed; the others were reused from the
            prefix cache.
        generated_tokens: Tokens generated; 0 where choices were scored.
        compiling_s: Seconds of prefill and decode that were left out.
        timed_rows: Rows that finished in the other seconds.
        timed_tokens: Tokens of these rows.
        timed_s: These other seconds.
        first_token_s: Seconds from the start of a prefill to the first tokens of its prompts,
            several values if there are many prefills; none where choices were scored.
        peak_bytes: Peak device memory, including weights; 0 on a CPU.
    """

    machine: Mapping[str, Any]
    batch_size: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    compiling_s: float = 0.0
    timed_rows: int = 0
    timed_tokens: int = 0
    timed_s: float = 0.0
    first_token_s: tuple[float, ...] = ()
    peak_bytes: int = 0

    @property
    def tokens_per_s(self) -> float | None:
        """Generated tokens per second; None if none was timed."""
        return self.timed_tokens / self.timed_s if self.timed_tokens else None

    @property
    def ms_per_row(self) -> float | None:
        """Milliseconds per row; None if nothing was timed."""
        return 1e3 * self.timed_s / self.timed_rows if self.timed_rows else None

    @property
    def first_token_ms(self) -> float | None:
        """Median milliseconds from the start of a prefill to the first tokens of its prompts."""
        return 1e3 * median(self.first_token_s) if self.first_token_s else None

    def plus(self, later: Measurement) -> Measurement:
        """Add a later run: its counts, and its times if machine and batch size are the same."""
        names = ["rows", *_TOKEN_COUNTS, "compiling_s"]
        if (self.machine, self.batch_size) == (later.machine, later.batch_size):
            names += ["timed_rows", "timed_tokens", "timed_s", "first_token_s"]
        sums: dict[str, Any] = {name: getattr(self, name) + getattr(later, name) for name in names}
        return replace(later, peak_bytes=max(self.peak_bytes, later.peak_bytes), **sums)

    def without_counts(self) -> Measurement:
        """Return the times only, for rows that are counted already."""
        return replace(self, rows=0, prompt_tokens=0, computed_tokens=0, generated_tokens=0)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read a file that `write` wrote; return None if there is none.

        Raises:
            OutputError: If the file is something else.
        """
        try:
            values = json.loads(path.read_bytes())
            return cls(**values | {"first_token_s": tuple(values["first_token_s"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise OutputError(f"{path}: not the times of a cell ({error}); remove it") from None

    def write(self, path: Path) -> None:
        """Write the measurement as JSON, atomically.

        Raises:
            OutputError: If the file cannot be written.
        """
        with replacing(path) as file:
            file.write(json.dumps(asdict(self), indent=2).encode() + b"\n")


class Stopwatch:
    """Collects a measurement from the statistics of a run, as its rows finish."""

    def __init__(self, machine: Mapping[str, Any], *, is_warm: bool = False) -> None:
        """Start before the run.

        Args:
            machine: Device and versions.
            is_warm: Whether everything is compiled already, so that the first prompts are timed
                too.
        """
        self.measurement = Measurement(machine)
        self._last: RunStats | None = None
        self._is_warm = is_warm

    def note(self, stats: RunStats) -> None:
        """Add the rows that have just finished, given the run's statistics so far."""
        last, self._last = self._last, stats

        def added(name: str) -> Any:
            return getattr(stats, name) - (getattr(last, name) if last else 0)

        seconds = added("prefill_s") + added("decode_s")
        is_cold = not self._is_warm and (last is None or last.cold_groups > 0)
        if is_cold or added("compilations") or added("halvings"):
            times: dict[str, Any] = {"compiling_s": seconds}
        else:
            prefills, first_token_s = added("prefills"), added("first_token_s")
            times = {
                "timed_rows": added("generations"),
                "timed_tokens": added("generated_tokens"),
                "timed_s": seconds,
                "first_token_s": (first_token_s / prefills,) if first_token_s else (),
            }
        rows = Measurement(
            self.measurement.machine,
            stats.batch_size,
            peak_bytes=max(stats.prefill_peak_bytes, stats.decode_peak_bytes),
            rows=added("generations"),
            **{name: added(name) for name in _TOKEN_COUNTS},
            **times,
        )
        self.measurement = rows if last is None else self.measurement.plus(rows)
