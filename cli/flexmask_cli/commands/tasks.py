"""``flexmask tasks``: lists the tasks that ``--task`` accepts by name."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flexmask_cli.option_groups import takes_options
from flexmask_cli.options import ListingOptions
from flexmask_cli.render.lines import print_json
from flexmask_cli.render.table import print_table

if TYPE_CHECKING:
    from flexmask.tasks.task import Task


@takes_options
def tasks(*, options: ListingOptions) -> None:
    """List the tasks that come with flexmask."""
    from flexmask.tasks.task import shipped_tasks

    if options.as_json:
        print_json([_fields(task) for task in shipped_tasks()])
    else:
        print_table([_row(task) for task in shipped_tasks()], wrapped=["what", "columns"])


def _fields(task: Task) -> dict[str, Any]:
    return {
        **task.record(),
        "summary": task.summary,
        "path": str(task.path),
        "reads": _columns(task),
        "chat_template": task.chat_template,
        "judge": asdict(task.judge),
    }


def _row(task: Task) -> dict[str, str]:
    return {
        "task": task.name,
        "what": task.summary,
        "columns": ", ".join(_columns(task)),
        "paraphrases": str(task.select),
        "examples": str(task.examples.count),
        "judge": task.judge.metric,
    }


def _columns(task: Task) -> list[str]:
    paraphrases = [column for columns in task.groups.values() for column in columns]
    return ["uuid", *paraphrases, "answers"]
