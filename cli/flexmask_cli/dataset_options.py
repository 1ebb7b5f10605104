"""Options that say what to generate for, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexmask.demo import questions_path
from flexmask.errors import OptionError
from flexmask.fusion import Fusion
from flexmask.limits import LARGEST_SIZE
from flexmask.tasks.paraphrases import SYNTAX, Selection
from flexmask_cli.options import path_of, refuse_empty, split_pairs

if TYPE_CHECKING:  # --help need not wait for Arrow and Jinja
    from flexmask.inputs.rows import Input
    from flexmask.inputs.text_format import TextFormat
    from flexmask.tasks.request_source import OnError, RequestSource
    from flexmask.tasks.task import Examples, Task

TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        "-t",
        callback=refuse_empty,
        help="How a row becomes a request: a name of 'flexmask tasks' or a TOML file.",
    ),
]
InputSource = Annotated[
    str | None,
    typer.Option(
        "--input",
        "-i",
        callback=refuse_empty,
        help="JSON Lines, CSV, Parquet, Feather or Arrow; a folder saved by datasets, or a hub "
        "id, either with :split; - for JSON Lines on standard input. Without a task it has "
        "segments and, as wanted, uuid, prefix, suffix, answers, weights. "
        "Default: the task's sample, else the bundled questions.",
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="NAME=COLUMN", help="Read NAME from another column, or A,B,C of them."
    ),
]
Delimiter = Annotated[
    str | None,
    typer.Option(
        metavar="CHARACTER",
        help="What stands between the cells of a CSV input, such as ';' or '\\t'. Default: the "
        "comma, semicolon or tab that divides its first lines.",
    ),
]
Encoding = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Encoding of a text input, such as cp1252 or utf-16. Default: UTF-8."
    ),
]
ExamplesSource = Annotated[
    str | None,
    typer.Option(
        "--examples",
        callback=refuse_empty,
        help="Input to draw the task's few-shot examples from; never the question itself.",
    ),
]
NumExamples = Annotated[
    int | None, typer.Option(min=0, max=LARGEST_SIZE, help="How many few-shot examples.")
]
Paraphrases = Annotated[
    str | None, typer.Option(metavar="SELECTION", help=f"Which paraphrases: {SYNTAX}.")
]
PrefixFile = Annotated[
    Path | None,
    typer.Option(
        parser=path_of("--prefix-file"),
        metavar="PATH",
        help="Its text, as it is, takes the place of every prefix.",
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", "-n", min=1, max=LARGEST_SIZE, help="Only the first rows.")
]
NumSegments = Annotated[
    int | None,
    typer.Option(min=1, max=LARGEST_SIZE, help="Only the first segments of each request."),
]


@dataclass(frozen=True)
class DatasetOptions:
    """What was asked for."""

    task: str | None
    input: str | None
    columns: Sequence[str]
    examples: str | None
    num_examples: int | None
    paraphrases: str | None
    prefix_file: Path | None
    limit: int | None
    num_segments: int | None
    on_error: OnError
    delimiter: str | None = None
    encoding: str | None = None
    fusion: Fusion = Fusion()

    def load_task(self) -> Task | None:
        """The task, with what other options change in it.

        Raises:
            OptionError: If an option needs a task and there is none, or has a wrong value.
            TaskError: If the task cannot be used.
        """
        from flexmask.tasks.task import load_task

        if self.task is None:
            for name in ("examples", "num_examples", "paraphrases"):
                if getattr(self, name) is not None:
                    raise OptionError(f"--{name.replace('_', '-')} needs a --task")
            return None
        task = load_task(self.task)
        select = task.select if self.paraphrases is None else Selection.parse(self.paraphrases)
        return replace(
            task,
            columns={**task.columns, **self._column_map()},
            select=select,
            examples=self._change_examples(task.examples),
        )

    def open(self, task: Task | None) -> tuple[Input, RequestSource]:
        """The input, and the requests of it.

        Raises:
            RequestError: If the input cannot be opened.
            OptionError: If the prefix cannot be read.
        """
        from flexmask.tasks.request_source import PlainRequests, RequestSource
        from flexmask.tasks.task_requests import TaskPrompts

        rows = self._rows(task)
        prefix = None if self.prefix_file is None else _read_prefix(self.prefix_file)
        by_column = self.fusion.weights == "column"
        make = (
            PlainRequests(self._column_map(), prefix, by_column)
            if task is None
            else TaskPrompts(
                task,
                rows,
                prefix=prefix,
                reads_weights=by_column,
                chosen_columns=self._column_map(),
                examples_format=self._examples_format(),
            )
        )
        return rows, RequestSource(
            rows, make, self.limit, self.num_segments, self.on_error, self.fusion
        )

    def _column_map(self) -> dict[str, tuple[str, ...]]:
        pairs = split_pairs(self.columns, "--column", "NAME=COLUMN")
        if "weights" in pairs and self.fusion.weights != "column":
            raise OptionError("--column weights=… is read with --fusion-weights column only")
        return {name: tuple(columns.split(",")) for name, columns in pairs.items()}

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
        """As that of the input, for examples in a file of the same kind."""
        from flexmask.inputs.text_format import TextFormat

        if self.input is None or self.examples is None:
            return TextFormat()
        is_same_kind = Path(self.input).suffix.lower() == Path(self.examples).suffix.lower()
        return self._text_format() if is_same_kind else TextFormat()


def _read_prefix(path: Path) -> str:
    from flexmask.inputs.bounded_file import read_whole_or_pipe
    from flexmask.inputs.rows import printable

    try:
        return read_whole_or_pipe(path).decode()
    except OSError as error:
        reason = error.strerror or error
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text ({error.reason} at byte {error.start})"
    raise OptionError(f"--prefix-file {printable(path)}: {reason}; name a text file")
