"""Makes requests from rows by a task: Jinja templates, paraphrases, few-shot examples."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from flexmask.errors import RequestError, TaskError
from flexmask.inputs.columns import Columns, MissingColumnError
from flexmask.inputs.input_files import open_input
from flexmask.inputs.rows import Input, Row, rows_in_memory
from flexmask.inputs.text_format import TextFormat
from flexmask.request import ROLES, Message, Request
from flexmask.tasks.request_source import answer_of, choices_of
from flexmask.tasks.task import Task
from flexmask.tasks.templates import RowTemplate, TemplateFault, TemplateSyntaxFault, one_row

_SPARE_EXAMPLES = 8
"""Spare examples beyond one per example, for questions that occur in the data several times."""


@dataclass(frozen=True)
class Example:
    """A few-shot example.

    Attributes:
        text: Its text in the prompt; empty if it is turns.
        turns: Its turns; none if it is text.
        questions: The paraphrases of its row.
    """

    text: str
    turns: tuple[Message, ...]
    questions: frozenset[str]

    def asks(self, questions: Collection[str]) -> bool:
        """Return True if the example asks one of ``questions``."""
        return not self.questions.isdisjoint(questions)


class TaskPrompts:
    """Makes requests from rows by the templates of a task.

    Attributes:
        columns: Renamed columns of the task.
    """

    def __init__(
        self,
        task: Task,
        data: Input,
        *,
        prefix: str | None = None,
        system: str | None = None,
        reads_weights: bool = False,
        reads_choices: bool = False,
        chosen_columns: Collection[str] = (),
        examples_format: TextFormat = TextFormat(),  # noqa: B008 (frozen)
    ) -> None:
        """Compile the templates of ``task``, and draw its examples.

        Args:
            task: The task.
            data: The input, for examples that come from another split of it.
            prefix: Replaces the rendered prefix template.
            system: Replaces the rendered system template.
            reads_weights: Whether to read the column ``weights``, a number for each paraphrase of
                the row; those of the selected paraphrases are used.
            reads_choices: Whether to read the columns ``choices`` and ``answer``.
            chosen_columns: Columns of the task that the user has mapped to columns of the data;
                the other columns of their group may then be missing.
            examples_format: Delimiter and encoding of the file of examples.

        Raises:
            TaskError: If a template is invalid, or an example cannot be used.
            RequestError: If the input of the examples cannot be read.
        """
        self.columns = task.columns
        self._task = task
        self._data = data
        self._fixed_prefix = prefix
        self._fixed_system = system
        self._reads_weights = reads_weights
        self._reads_choices = reads_choices
        self._chosen_columns = frozenset(chosen_columns)
        self._examples_format = examples_format
        self._prefix = _template(task, "prompt.prefix", task.prefix)
        self._segment = _template(task, "prompt.segment", task.segment)
        self._suffix = _template(task, "prompt.suffix", task.suffix)
        self._choice = _template(task, "prompt.choice", task.choice)
        self._system = _template(task, "prompt.system", task.system)
        self._answer_prefix = _template(task, "prompt.answer_prefix", task.answer_prefix)
        self._example = _template(task, "examples.template", task.examples.template)
        self._example_turns = [
            (role, f"examples.{role}", _template(task, f"examples.{role}", template))
            for role, template in zip(
                ROLES, (task.examples.user, task.examples.assistant), strict=True
            )
            if template
        ]
        self._examples: list[Example] = []
        self._spares: list[Example] = []
        self._undrawn: Iterator[Example] = iter(())
        if prefix is None and task.examples.count:
            self._draw_examples()

    def __call__(self, row: Row) -> Request:
        """Make the request of a row.

        Raises:
            RequestError: If the row cannot be used.
        """
        columns = Columns(row.values, self._task.columns)
        uuid = columns.uuid(str(row.number))
        groups = self._groups(columns)
        selected = self._task.select.choose(self._weighted(groups, columns), uuid)
        for number, (text, _) in enumerate(selected, start=1):
            if not text.strip():
                raise RequestError(f"paraphrase {number} of those selected is empty")
        shared = {"instruction": self._task.instruction}
        with one_row():
            examples = self._examples_beside({text for texts in groups.values() for text in texts})
            return Request(
                uuid=uuid,
                prefix=self._prefix_of(columns, examples),
                system=self._system_of(columns),
                messages=(
                    *(turn for example in examples for turn in example.turns),
                    *(self._messages_of(columns)),
                ),
                answer_prefix=self._render(
                    self._answer_prefix, "prompt.answer_prefix", columns, **shared
                ),
                segment_turns=self._task.segment_turns,
                segments=tuple(
                    self._render(
                        self._segment, "prompt.segment", columns, **shared, paraphrase=text
                    )
                    for text, _ in selected
                ),
                suffix=self._render(self._suffix, "prompt.suffix", columns, **shared),
                answers=columns.answers(),
                weights=tuple(weight for _, weight in selected) if self._reads_weights else (),
                choices=self._choices_of(columns, shared),
                answer=answer_of(columns) if self._reads_choices else None,
            )

    def _choices_of(self, columns: Columns, shared: Mapping[str, str]) -> tuple[str, ...]:
        if not self._reads_choices:
            return ()
        return tuple(
            self._render(self._choice, "prompt.choice", columns, **shared, choice=choice)
            for choice in choices_of(columns)
        )

    def check_columns(self, columns: Collection[str]) -> None:
        """Check that the rows have the columns of the paraphrases.

        Args:
            columns: All columns of the rows.

        Raises:
            RequestError: If a column of paraphrases is missing.
        """
        known = {*columns, *self._task.columns}
        for group, names in self._task.groups.items():
            missing = [name for name in names if name not in known]
            if missing and self._chosen_columns.isdisjoint(names):
                raise MissingColumnError(
                    f"{self._data.name}: no row has the column {missing[0]!r} of the {group} "
                    f"paraphrases of task {self._task.name!r}; its columns: "
                    f"{', '.join(columns) or 'none'}; `column={missing[0]}=COLUMN` reads it "
                    f"from another{self._data.advice}"
                )

    def _system_of(self, columns: Columns) -> str:
        if self._fixed_system is not None:
            return self._fixed_system
        instruction = self._task.instruction
        return self._render(self._system, "prompt.system", columns, instruction=instruction)

    def _messages_of(self, columns: Columns) -> tuple[Any, ...]:
        name = self._task.messages
        if not name:
            return ()
        if name not in columns:
            raise MissingColumnError(
                f"no column {name!r} of messages; its columns: {', '.join(columns) or 'none'}"
            )
        return Columns({"messages": columns[name]}).messages()

    def _prefix_of(self, columns: Columns, examples: Sequence[Example]) -> str:
        if self._fixed_prefix is not None:
            return self._fixed_prefix
        return self._render(
            self._prefix,
            "prompt.prefix",
            columns,
            instruction=self._task.instruction,
            examples="".join(example.text for example in examples),
        )

    def _examples_beside(self, questions: Collection[str]) -> list[Example]:
        """Return the task's number of examples, none of which asks one of ``questions``."""
        examples = [example for example in self._examples if not example.asks(questions)]
        wanted = len(self._examples) - len(examples)
        if not wanted:
            return examples
        examples += islice(
            (spare for spare in self._all_spares() if not spare.asks(questions)), wanted
        )
        if len(examples) < len(self._examples):
            raise RequestError(
                f"task {self._task.name!r}: its question is one of the examples, and there are "
                f"only {len(examples)} others of the {len(self._examples)} wanted; name more "
                f"with `examples`, or pass `num_examples={len(examples)}`"
            )
        return examples

    def _all_spares(self) -> Iterator[Example]:
        """Yield the spare examples, always in the same order."""
        yield from self._spares
        for spare in self._undrawn:
            self._spares.append(spare)
            yield spare

    def _groups(self, columns: Columns) -> dict[str, list[str]]:
        groups = {}
        for group, names in self._task.groups.items():
            if not any(name in columns for name in names):
                raise MissingColumnError(
                    f"none of the columns of the {group} paraphrases exists "
                    f"({', '.join(names)}); its columns: {', '.join(columns) or 'none'}"
                )
            groups[group] = [text for name in names for text in columns.texts(name)]
        return groups

    def _weighted(
        self, groups: Mapping[str, Sequence[str]], columns: Columns
    ) -> dict[str, list[tuple[str, float]]]:
        """Pair each paraphrase with its weight, which is 1 if weights are not read."""
        count = sum(map(len, groups.values()))
        names = [name for names in self._task.groups.values() for name in names]
        weights = columns.weights(names) if self._reads_weights else (1.0,) * count
        if len(weights) != count:
            raise RequestError(
                f"weights must be a number for each of its {count} paraphrases, got {len(weights)}"
            )
        unused = iter(weights)
        return {name: [(text, next(unused)) for text in texts] for name, texts in groups.items()}

    def _draw_examples(self) -> None:
        examples = self._task.examples
        drawn, spare = _draw(self._example_rows(), examples.count, examples.seed)
        self._examples = [self._example_of(row) for row in drawn]
        self._undrawn = map(self._example_of, spare)

    def _example_rows(self) -> Input:
        examples = self._task.examples
        if examples.rows:
            return rows_in_memory(examples.rows, f"{self._task.name}.toml examples")
        if examples.file:
            return open_input(examples.file, self._examples_format)
        if self._data.split_of is None:
            raise TaskError(
                f"task {self._task.name!r} takes {examples.count} examples from the split "
                f"{examples.split!r}, but {self._data.name} has no splits; name others with "
                "`examples`, or give the whole prefix with `prefix_file`"
            )
        return self._data.split_of(examples.split)

    def _example_of(self, row: Row) -> Example:
        try:
            if row.error:
                raise RequestError(row.error)
            # A column that the template needs and the example lacks raises in the template.
            present = {
                name: sources
                for name, sources in self._task.columns.items()
                if all(source in row.values for source in sources)
            }
            columns = Columns(row.values, present)
            names = [name for group in self._task.groups.values() for name in group]
            paraphrases = [text for name in names for text in columns.texts(name)]
            firsts = {"paraphrase": paraphrases[:1], "answer": columns.answers()[:1]}
            more = {name: texts[0] for name, texts in firsts.items() if texts}
            turns = tuple(
                Message(role, self._render(template, key, columns, **more))
                for role, key, template in self._example_turns
            )
            text = (
                "" if turns else self._render(self._example, "examples.template", columns, **more)
            )
        except RequestError as error:
            raise TaskError(f"example {row.where}: {error}") from None
        return Example(text, turns, frozenset(paraphrases))

    def _render(self, template: RowTemplate, key: str, columns: Columns, **more: str) -> str:
        try:
            return template.render(columns, **more)
        except TemplateFault as fault:
            raise RequestError(f"task {self._task.name!r}, {key}: {fault}") from None


def _template(task: Task, key: str, source: str) -> RowTemplate:
    try:
        return RowTemplate(source)
    except TemplateSyntaxFault as fault:
        raise TaskError(f"task {task.name!r}, {key}: {fault}") from None


def _draw(rows: Input, count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Draw ``count`` rows without replacement; exactly ``count`` rows keep their order.

    Returns:
        The drawn rows, and spare ones for prompts whose question is among them.

    Raises:
        TaskError: If there are too few rows.
    """
    total = sum(1 for _ in rows)
    if total < count:
        raise TaskError(f"{rows.name}: {count} examples wanted, but it has {total} rows")
    generator = random.Random(seed)
    indices = list(range(count)) if total == count else generator.sample(range(total), count)
    wanted = dict.fromkeys(indices)
    while len(wanted) < min(total, 2 * count + _SPARE_EXAMPLES):
        wanted[generator.randrange(total)] = None
    found = {index: row for index, row in enumerate(rows) if index in wanted}
    drawn = [found[index] for index in wanted]
    return drawn[:count], drawn[count:]
