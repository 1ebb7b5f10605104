"""From the rows of a task to requests: Jinja templates, paraphrases, few-shot examples."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flexmask.dataset.columns import numbers_of, renamed, texts_of, uuid_of
from flexmask.dataset.inputs import open_input
from flexmask.dataset.rows import Input, Row, rows_in_memory
from flexmask.dataset.task import Task
from flexmask.errors import RequestError, TaskError
from flexmask.request import Request


class TaskPrompts:
    """Turns rows into requests as a task says.

    Attributes:
        columns: Those of the task.
    """

    def __init__(
        self,
        task: Task,
        data: Input,
        *,
        prefix: str | None = None,
        reads_weights: bool = False,
    ) -> None:
        """Compile the templates of ``task``, and draw its examples.

        Args:
            task: What to do with a row.
            data: The input, for examples that come from another split of it.
            prefix: Takes the place of what the task's prefix template would give.
            reads_weights: Whether to read the column ``weights``, one for each paraphrase of the
                row; those of the selected ones count.

        Raises:
            TaskError: If a template is not one, or an example cannot be used.
            RequestError: If the input of the examples cannot be read.
        """
        self.columns = task.columns
        self._task = task
        self._data = data
        self._fixed_prefix = prefix
        self._reads_weights = reads_weights
        self._prefix = _template(task, "prompt.prefix", task.prefix)
        self._segment = _template(task, "prompt.segment", task.segment)
        self._suffix = _template(task, "prompt.suffix", task.suffix)
        self._example = _template(task, "examples.template", task.examples.template)
        self._examples = self._draw_examples() if prefix is None else ""

    def __call__(self, row: Row) -> Request:
        """Make the request of a row.

        Raises:
            RequestError: If the row cannot be used.
        """
        values = renamed(row.values, self._task.columns)
        uuid = uuid_of(values, str(row.number))
        shared = {**values, "instruction": self._task.instruction}
        selected = self._task.select.choose(self._weighted(self._groups(values), values), uuid)
        for number, (text, _) in enumerate(selected, start=1):
            if not text.strip():
                raise RequestError(f"paraphrase {number} of those selected is empty")
        return Request(
            uuid=uuid,
            prefix=self._prefix_of(shared),
            segments=tuple(
                self._render(self._segment, "prompt.segment", {**shared, "paraphrase": text})
                for text, _ in selected
            ),
            suffix=self._render(self._suffix, "prompt.suffix", shared),
            answers=texts_of(values, "answers"),
            weights=tuple(weight for _, weight in selected) if self._reads_weights else (),
        )

    def _prefix_of(self, shared: Mapping[str, Any]) -> str:
        if self._fixed_prefix is not None:
            return self._fixed_prefix
        return self._render(self._prefix, "prompt.prefix", {**shared, "examples": self._examples})

    def _groups(self, values: Mapping[str, Any]) -> dict[str, list[str]]:
        groups = {}
        for group, columns in self._task.groups.items():
            if not any(column in values for column in columns):
                raise RequestError(
                    f"none of the columns of the {group} paraphrases is there "
                    f"({', '.join(columns)}); its columns: {', '.join(values) or 'none'}"
                )
            groups[group] = [text for column in columns for text in texts_of(values, column)]
        return groups

    def _weighted(
        self, groups: Mapping[str, Sequence[str]], values: Mapping[str, Any]
    ) -> dict[str, list[tuple[str, float]]]:
        """Each paraphrase with its weight, which is 1 where none are read."""
        count = sum(map(len, groups.values()))
        weights = numbers_of(values, "weights") if self._reads_weights else (1.0,) * count
        if len(weights) != count:
            raise RequestError(
                f"weights must be a number for each of its {count} paraphrases, got {len(weights)}"
            )
        unused = iter(weights)
        return {name: [(text, next(unused)) for text in texts] for name, texts in groups.items()}

    def _draw_examples(self) -> str:
        examples = self._task.examples
        if not examples.count:
            return ""
        drawn = _draw(self._example_rows(), examples.count, examples.seed)
        return "".join(self._rendered_example(row) for row in drawn)

    def _example_rows(self) -> Input:
        examples = self._task.examples
        if examples.rows:
            return rows_in_memory(examples.rows, f"{self._task.name}.toml examples")
        if examples.file:
            return open_input(examples.file)
        if self._data.split_of is None:
            raise TaskError(
                f"task {self._task.name!r} takes {examples.count} examples from the split "
                f"{examples.split!r}, but {self._data.name} has no splits; name others with "
                "--examples, or give the whole prefix with --prefix-file"
            )
        return self._data.split_of(examples.split)

    def _rendered_example(self, row: Row) -> str:
        try:
            if row.error:
                raise RequestError(row.error)
            # What an example lacks and its template wants is an error of the template.
            there = {
                name: columns
                for name, columns in self._task.columns.items()
                if row.values.keys() >= set(columns)
            }
            values = renamed(row.values, there)
            columns = [column for group in self._task.groups.values() for column in group]
            paraphrases = [text for column in columns for text in texts_of(values, column)]
            content = dict(values)
            if paraphrases:
                content["paraphrase"] = paraphrases[0]
            if answers := texts_of(values, "answers"):
                content["answer"] = answers[0]
            return self._render(self._example, "examples.template", content)
        except RequestError as error:
            raise TaskError(f"example {row.where}: {error}") from None

    def _render(self, template: Template, key: str, values: Mapping[str, Any]) -> str:
        try:
            return template.render(values)
        except Exception as error:  # a template is a program: it may raise anything
            raise RequestError(
                f"task {self._task.name!r}, {key}: {error}; at hand: {', '.join(values)}"
            ) from None


def _template(task: Task, key: str, source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise TaskError(f"task {task.name!r}, {key}: line {error.lineno}: {error}") from None


def _draw(rows: Input, count: int, seed: int) -> list[Row]:
    """Draw ``count`` rows without replacement; all in their order if there are no more."""
    total = sum(1 for _ in rows)
    if total < count:
        raise TaskError(f"{rows.name}: {count} examples wanted, it has {total} rows")
    if total == count:
        return list(islice(rows, count))
    indices = random.Random(seed).sample(range(total), count)
    wanted = set(indices)
    found = {index: row for index, row in enumerate(rows) if index in wanted}
    return [found[index] for index in indices]
