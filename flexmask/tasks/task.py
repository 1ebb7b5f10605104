"""Loads task files, which say how a row becomes a request and how its answer is judged.

A task is a TOML file; docs/datasets.md explains every key. Those in ``tasks/shipped/`` come with
flexmask and are known by name.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

from flexmask.error_text import did_you_mean
from flexmask.errors import FlexMaskError, OptionError, TaskError
from flexmask.inputs.bounded_file import read_whole
from flexmask.inputs.rows import printable
from flexmask.inputs.text_rows import is_deeper
from flexmask.request import SegmentTurns
from flexmask.tasks.judge import CUTS, Judge
from flexmask.tasks.metric import FunctionMetric, parse_metric
from flexmask.tasks.paraphrases import ParaphraseSelection
from flexmask.tasks.toml_section import Section

SHIPPED = Path(__file__).parent / "shipped"
_MAX_BYTES = 2**20
"""Size limit of a task file: room for some thousand examples, a second of parsing in Python."""
_MAX_DEPTH = 20
"""Nesting limit of tables and lists; a task has five levels, and its rows may have more."""
TURNS = get_args(SegmentTurns)
EXAMPLE = "Q: {{ paraphrase }}\nA: {{ answer }}\n\n"
CHOICE = "{{ choice }}"


@dataclass(frozen=True)
class Examples:
    """Few-shot examples, from one of three sources: ``rows``, ``file`` or ``split``.

    Attributes:
        count: Number of examples; 0 for none.
        template: Jinja template of an example, with ``paraphrase`` and ``answer``, each the first
            of its row.
        user: Template of its question, where examples are turns; empty where they are text.
        assistant: Template of its answer, where examples are turns.
        seed: Seed of the draw, if there are more rows than needed.
        rows: Rows in the task file itself.
        file: A separate input (`flexmask.inputs.input_files.open_input`).
        split: Name of another split of the input.
    """

    count: int = 0
    template: str = EXAMPLE
    user: str = ""
    assistant: str = ""
    seed: int = 42
    rows: tuple[Mapping[str, Any], ...] = ()
    file: str = ""
    split: str = ""


@dataclass(frozen=True)
class Task:
    """A task: turns rows into requests and judges the answers.

    Attributes:
        path: Path of the task file.
        summary: One-line description.
        instruction: Text that the templates may use.
        columns: For a column of the task, the columns of the data that it is read from.
        groups: Columns of each group of paraphrases; a column holds a text or a list of texts.
        select: Selection of the paraphrases that become segments.
        examples: Few-shot examples.
        prefix: Jinja template of the prefix, with ``instruction``, ``examples`` and the row.
        segment: Template of a segment, with ``paraphrase``, ``instruction`` and the row.
        suffix: Template of the suffix, with ``instruction`` and the row.
        choice: Template of a choice, with ``choice``, a text of the row's column ``choices``.
        system: Template of the system turn, with ``instruction`` and the row.
        answer_prefix: Template of the start of the answer, likewise.
        messages: Column of the turns before the request; empty if there are none.
        segment_turns: The user turns that segments stand in (`Request.segment_turns`).
        chat_template: Whether the request is put into the tokenizer's chat template.
        judge: Extracts answers from generations and scores them.
        sample: Sample rows, used if there is no input.
    """

    path: Path
    groups: Mapping[str, tuple[str, ...]]
    segment: str
    summary: str = ""
    instruction: str = ""
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    select: ParaphraseSelection = ParaphraseSelection()
    examples: Examples = Examples()
    prefix: str = ""
    suffix: str = ""
    choice: str = CHOICE
    system: str = ""
    answer_prefix: str = ""
    messages: str = ""
    segment_turns: SegmentTurns = "one"
    chat_template: bool = False
    judge: Judge = Judge()
    sample: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Name of the task file, without extension."""
        return self.path.stem

    def record(self) -> dict[str, Any]:
        """Return the settings that affect requests, as JSON values."""
        fields = asdict(self)
        recorded = (
            *("instruction", "columns", "groups", "prefix", "segment", "suffix", "examples"),
            *("system", "answer_prefix", "messages", "segment_turns"),
        )
        return {
            "name": self.name,
            "select": str(self.select),
            **{name: fields[name] for name in recorded},
        }


def load_task(name: str) -> Task:
    """Load a task that comes with flexmask by name, or any task by the path of its file.

    Raises:
        TaskError: If there is no such task, or it is invalid; the message names file and key.
    """
    path = SHIPPED / f"{name}.toml"
    if "/" in name or not os.path.isfile(path):
        path = Path(name)
        if path.suffix != ".toml":
            known = shipped_names()
            raise TaskError(
                f"unknown task {name!r}; known: {', '.join(known)}, or the path of a .toml file"
                f"{did_you_mean(name, known)}"
            )
    return _read_task(path)


def shipped_names() -> list[str]:
    """Names of the tasks that come with flexmask, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def shipped_tasks() -> list[Task]:
    """Return the tasks that come with flexmask, sorted by name."""
    return [_read_task(SHIPPED / f"{name}.toml") for name in shipped_names()]


def _read_task(path: Path) -> Task:
    file = printable(path)
    try:
        table = tomllib.loads(read_whole(path, _MAX_BYTES).decode())
    except OSError as error:
        raise TaskError(f"{file}: {error.strerror}; `task` takes a name or a TOML file") from None
    except ValueError as error:  # not TOML, not UTF-8, an integer of too many digits
        raise TaskError(f"{file}: not TOML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise _too_deep(file) from None
    if is_deeper(table, _MAX_DEPTH):
        raise _too_deep(file)
    root = Section(file, "", table)
    sections = ("prompt", "paraphrases", "answer", "columns", "examples")
    prompt, paraphrases, answer, columns, examples = map(root.section, sections)
    summary, instruction = root.text("summary", ""), root.text("instruction", "")
    sample = root.rows("sample")
    root.check_all_asked()
    groups = paraphrases.section("groups").texts_by_name()
    if not groups:
        raise paraphrases.error("groups", "must name at least one column of paraphrases")
    task = Task(
        path=path,
        summary=summary,
        instruction=instruction,
        columns=columns.texts_by_name(),
        groups=groups,
        select=_selection(paraphrases),
        examples=_examples(examples, path.parent),
        prefix=prompt.text("prefix", ""),
        segment=prompt.text("segment"),
        suffix=prompt.text("suffix", ""),
        choice=prompt.text("choice", CHOICE),
        system=prompt.text("system", ""),
        answer_prefix=prompt.text("answer_prefix", ""),
        messages=prompt.text("messages", ""),
        segment_turns=cast("SegmentTurns", prompt.choice("segment_turns", TURNS, TURNS[0])),
        chat_template=prompt.flag("chat_template", False),
        judge=_judge(answer),
        sample=sample,
    )
    for section in (prompt, paraphrases, answer):
        section.check_all_asked()
    return task


def _too_deep(file: str) -> TaskError:
    return TaskError(f"{file}: nested more than {_MAX_DEPTH} levels deep; write it flatter")


def _judge(answer: Section) -> Judge:
    metric, language = answer.text("judge", "exact"), answer.text("language", "en")
    try:
        parsed = parse_metric(metric, language)
    except OptionError as error:
        raise answer.error("judge", str(error)) from None
    if isinstance(parsed, FunctionMetric):
        raise answer.error(
            "judge",
            f"cannot be a Python function, because a task runs no code; pass `judge={metric}`",
        )
    return Judge(answer.choice("cut", CUTS, CUTS[0]), metric, language)


def _selection(paraphrases: Section) -> ParaphraseSelection:
    try:
        selection = ParaphraseSelection.parse(paraphrases.text("select", "all"))
    except FlexMaskError as error:
        raise paraphrases.error("select", f"cannot be used: {error}") from None
    groups = paraphrases.section("groups").texts_by_name()
    for _, group in selection.samples:
        if group not in groups:
            raise paraphrases.error(
                "select", f"names the group {group!r}; groups: {', '.join(groups)}"
            )
    return selection


def _examples(section: Section, folder: Path) -> Examples:
    sources = [key for key in ("rows", "file", "split") if section.has(key)]
    examples = Examples(
        count=section.count("count", 0),
        template=section.text("template", EXAMPLE),
        user=section.text("user", ""),
        assistant=section.text("assistant", ""),
        seed=section.count("seed", 42),
        rows=section.rows("rows"),
        file=section.text("file", ""),
        split=section.text("split", ""),
    )
    section.check_all_asked()
    if bool(examples.user) != bool(examples.assistant):
        raise section.error(
            "user", "and examples.assistant make an example two turns; set both or neither"
        )
    if examples.user and section.has("template"):
        raise section.error("template", "is for examples that are text; leave it out beside user")
    if examples.count and len(sources) != 1:
        raise section.error(
            "count",
            f"is {examples.count}, and examples need a source: set one of rows, file or split, "
            f"got {' and '.join(sources) or 'none'}",
        )
    if examples.file and (folder / examples.file).exists():
        return replace(examples, file=str(folder / examples.file))
    return examples
