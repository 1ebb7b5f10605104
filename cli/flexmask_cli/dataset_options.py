"""Options of the input, and the requests that it contains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from flexmask.demo import questions_path
from flexmask.errors import OptionError
from flexmask.fusion import Fusion
from flexmask.tasks.paraphrases import SYNTAX, ParaphraseSelection
from flexmask_cli import completion
from flexmask_cli.option_kinds import Pair, pairs, path, size, text

if TYPE_CHECKING:  # Arrow and Jinja are slow to import
    from flexmask.inputs.rows import Input
    from flexmask.inputs.text_format import TextFormat
    from flexmask.tasks.request_source import OnError, RequestSource
    from flexmask.tasks.task import Examples, Task

DEMO = "demo"
"""The recorded name of the bundled model, and of the bundled questions in output folders."""


@dataclass(frozen=True)
class OpenInput:
    """An input and the requests that its rows become.

    Attributes:
        task: Converts rows into requests; None if rows are requests already.
        name: Name of the input in the record of a run.
        stem: A short name for output folders.
        requests: The requests; every iteration reads the input again.
    """

    task: Task | None
    name: str
    stem: str
    requests: RequestSource


@dataclass(frozen=True)
class InputOptions:
    """The input, and how its rows are converted into requests."""

    heading: ClassVar[str] = "Input"

    task: Annotated[
        str | None,
        text(
            "--task",
            "-t",
            completion=completion.tasks,
            help="How a row becomes a request: a task of 'flexmask tasks', or a TOML file.",
        ),
    ] = None
    input: Annotated[
        str | None,
        text(
            "--input",
            "-i",
            metavar="INPUT",
            help="A JSON Lines, CSV, Parquet, Feather or Arrow file; a folder saved by datasets "
            "or a hub id, either with :split; or - for JSON Lines on standard input. Without a "
            "task its rows have the column segments and may have uuid, prefix, suffix, answers, "
            "weights and, for score, choices and answer. Default: the sample rows of the task; "
            "without a task, the questions that come with flexmask.",
        ),
    ] = None
    column: Annotated[
        list[Pair],
        pairs(
            "--column",
            metavar="NAME=COLUMN",
            help="Read NAME from another column, or from several: NAME=A,B,C. Repeatable.",
        ),
    ] = field(default_factory=list)
    delimiter: Annotated[
        str | None,
        typer.Option(
            metavar="CHARACTER",
            help="Character between the cells of a CSV input, such as ';' or '\\t'. Default: the "
            "comma, semicolon or tab that divides its first lines.",
        ),
    ] = None
    encoding: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Encoding of a text input, such as cp1252 or utf-16. Default: UTF-8.",
        ),
    ] = None
    paraphrases: Annotated[
        str | None,
        typer.Option(metavar="SELECTION", help=f"Which paraphrases become segments: {SYNTAX}."),
    ] = None
    examples: Annotated[
        str | None,
        text(
            "--examples",
            metavar="INPUT",
            help="Input from which the task's few-shot examples are drawn; the row's own "
            "question is never among them.",
        ),
    ] = None
    num_examples: Annotated[
        int | None, size("--num-examples", least=0, help="How many few-shot examples to draw.")
    ] = None
    prefix_file: Annotated[
        Path | None,
        path("--prefix-file", help="A text file that replaces the prefix of every request."),
    ] = None

    system: Annotated[
        str | None,
        text(
            "--system",
            metavar="TEXT",
            help="Text of the system turn of every request; needs a chat template.",
        ),
    ] = None
    system_file: Annotated[
        Path | None,
        path("--system-file", help="A text file that holds the system turn of every request."),
    ] = None

    def open(
        self,
        *,
        fusion: Fusion = Fusion(),
        num_segments: int | None = None,
        limit: int | None = None,
        on_bad_row: OnError = "stop",
        reads_choices: bool = False,
    ) -> OpenInput:
        """Load the task and open the input; no row is read yet.

        Args:
            fusion: The fusion; some need a weight for each segment.
            num_segments: Number of segments to keep of each request; None for all.
            limit: Number of rows to read; None for all.
            on_bad_row: ``stop`` raises at a bad row; ``skip`` yields it as a `BadRow`.
            reads_choices: Read the columns ``choices``, which is required then, and ``answer``.

        Raises:
            OptionError: If an option needs a task and there is none, or has a wrong value.
            TaskError: If the task cannot be used.
            RequestError: If the input cannot be opened.
        """
        from flexmask.tasks.request_source import PlainRequests, RequestSource
        from flexmask.tasks.task_requests import TaskPrompts

        by_column = fusion.weights == "column"
        columns = self._columns(by_column, reads_choices)
        task = self._load_task(columns)
        rows = self._rows(task)
        prefix = _read_text("--prefix-file", self.prefix_file)
        if self.system is not None and self.system_file is not None:
            raise OptionError("--system and --system-file exclude each other")
        system = _read_text("--system-file", self.system_file) or self.system
        make = (
            PlainRequests(columns, prefix, by_column, system, reads_choices)
            if task is None
            else TaskPrompts(
                task,
                rows,
                prefix=prefix,
                system=system,
                reads_weights=by_column,
                reads_choices=reads_choices,
                chosen_columns=columns,
                examples_format=self._examples_format(),
            )
        )
        requests = RequestSource(rows, make, limit, num_segments, on_bad_row, fusion)
        stem = rows.stem if self.input or self.task else DEMO
        return OpenInput(task, rows.name, stem, requests)

    def _load_task(self, columns: Mapping[str, tuple[str, ...]]) -> Task | None:
        """Return the task, as changed by other options."""
        from flexmask.tasks.task import load_task

        if self.task is None:
            for name in ("examples", "num_examples", "paraphrases"):
                if getattr(self, name) is not None:
                    raise OptionError(f"--{name.replace('_', '-')} needs a --task")
            return None
        task = load_task(self.task)
        select = (
            task.select
            if self.paraphrases is None
            else ParaphraseSelection.parse(self.paraphrases)
        )
        return replace(
            task,
            columns={**task.columns, **columns},
            select=select,
            examples=self._change_examples(task.examples),
        )

    def _columns(self, reads_weights: bool, reads_choices: bool) -> dict[str, tuple[str, ...]]:
        """Return the columns to read instead of each name."""
        columns = {name: tuple(columns.split(",")) for name, columns in self.column}
        if "weights" in columns and not reads_weights:
            raise OptionError("--column weights=… is read with --fusion-weights column only")
        for name in ("choices", "answer"):
            if name in columns and not reads_choices and self.task is None:
                raise OptionError(f"--column {name}=… is read only where choices are scored")
        return columns

    def _change_examples(self, examples: Examples) -> Examples:
        if self.prefix_file is not None and (self.examples, self.num_examples) != (None, None):
            raise OptionError("--prefix-file leaves no place for --examples or --num-examples")
        if self.examples is not None:
            examples = replace(examples, file=self.examples, rows=(), split="")
        if self.num_examples is not None:
            examples = replace(examples, count=self.num_examples)
        if self.examples == self.input == "-":
            raise OptionError("--input and --examples cannot both be standard input")
        if self.examples is not None and not examples.count:
            raise OptionError("--examples are drawn, but how many? say --num-examples")
        return examples

    def _rows(self, task: Task | None) -> Input:
        from flexmask.inputs.input_files import open_input
        from flexmask.inputs.rows import rows_in_memory

        if self.input is not None:
            return open_input(self.input, self._text_format())
        if self._text_format().is_given:
            raise OptionError("--delimiter and --encoding need an --input that they tell of")
        if task is None:
            return open_input(str(questions_path()))
        if not task.sample:
            raise OptionError(f"task {task.name!r} has no sample rows; name an --input")
        return rows_in_memory(task.sample, f"{task.name}-sample")

    def _text_format(self) -> TextFormat:
        from flexmask.inputs.text_format import TextFormat

        delimiter = self.delimiter and self.delimiter.replace("\\t", "\t")
        return TextFormat(delimiter, self.encoding)

    def _examples_format(self) -> TextFormat:
        """Return the format of the input if the examples are in a file of the same extension."""
        from flexmask.inputs.text_format import TextFormat

        if self.input is None or self.examples is None:
            return TextFormat()
        is_same_kind = Path(self.input).suffix.lower() == Path(self.examples).suffix.lower()
        return self._text_format() if is_same_kind else TextFormat()


@dataclass(frozen=True)
class RequestOptions(InputOptions):
    """The options of `InputOptions`, and the number of segments to use."""

    num_segments: Annotated[
        int | None, size("--num-segments", help="Use only the first N segments of each request.")
    ] = None


def _read_text(name: str, path: Path | None) -> str | None:
    """Read the text file of an option; None if it is not given."""
    if path is None:
        return None
    from flexmask.inputs.bounded_file import read_whole_or_pipe
    from flexmask.inputs.rows import printable

    try:
        return read_whole_or_pipe(path).decode()
    except OSError as error:
        reason = error.strerror or error
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text ({error.reason} at byte {error.start})"
    raise OptionError(f"{name} {printable(path)}: {reason}; name a text file")
