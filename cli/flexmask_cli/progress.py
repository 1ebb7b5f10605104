"""A progress bar on stderr, where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexmask.engine import GenerationRun
    from flexmask.generation import Generation


def track(generations: GenerationRun, total: int) -> Iterator[Generation]:
    """Pass ``generations`` on and show rows, tokens per second and time left."""
    if not sys.stderr.isatty():
        yield from generations
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows  {task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, speed="compiling")
        for generation in generations:
            speed = f"{generations.stats.tokens_per_s:.0f} tokens/s"
            progress.update(task, advance=1, speed=speed)
            yield generation
