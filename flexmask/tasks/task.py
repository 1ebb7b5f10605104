"""Tasks: how a row of a data set becomes a request, and how its answer is judged.

A task is a TOML file; docs/datasets.md explains every key. Those in ``tasks/`` come with
flexmask and are known by name.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flexmask.error_text import did_you_mean
from flexmask.errors import FlexMaskError, TaskError
from flexmask.inputs.bounded_file import read_whole
from flexmask.inputs.rows import printable
from flexmask.inputs.text_rows import is_deeper
from flexmask.tasks.judge import CUTS, METRICS, Judge
from flexmask.tasks.paraphrases import Selection
from flexmask.tasks.toml_section import Section

SHIPPED = Path(__file__).parent / "shipped"
_MAX_BYTES = 2**20
"""Of a task file, which some thousand examples do not fill; Python reads a megabyte a second."""
_MAX_DEPTH = 20
"""Tables and lists within each other; a task has five, and its rows may have some."""
EXAMPLE = "Q: {{ paraphrase }}\nA: {{ answer }}\n\n"


@dataclass(frozen=True)
class Examples:
    """Few-shot examples, from one of three places.

    Attributes:
        count: How many; 0 for none.
        template: Jinja template of one, with ``paraphrase`` and ``answer``, each the row's first.
        seed: Seeds the draw, where there are more rows than wanted.
        rows: They stand in the task file.
        file: An input of its own, as `flexmask.inputs.input_files.open_input` takes it.
        split: A split of the input.
    """

    count: int = 0
    template: str = EXAMPLE
    seed: int = 42
    rows: tuple[Mapping[str, Any], ...] = ()
    file: str = ""
    split: str = ""


@dataclass(frozen=True)
class Task:
    """How a row becomes a request.

    Attributes:
        path: Its file.
        summary: What it is, in one line.
        instruction: For the templates to use.
        columns: What the task calls a column, and the columns of the data it is read from.
        groups: Columns of each group of paraphrases; a column holds a text or a list of texts.
        select: Which paraphrases become segments.
        examples: Few-shot examples.
        prefix: Jinja template of the prefix, with ``instruction``, ``examples`` and the row.
        segment: Template of a segment, with ``paraphrase``, ``instruction`` and the row.
        suffix: Template of the suffix, with ``instruction`` and the row.
        chat_template: Whether the request goes into the tokenizer's chat template.
        judge: How an answer is cut from a generation, and judged.
        sample: Rows to try the task with.
    """

    path: Path
    groups: Mapping[str, tuple[str, ...]]
    segment: str
    summary: str = ""
    instruction: str = ""
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    select: Selection = Selection()
    examples: Examples = Examples()
    prefix: str = ""
    suffix: str = ""
    chat_template: bool = False
    judge: Judge = Judge()
    sample: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The name of its file."""
        return self.path.stem

    def record(self) -> dict[str, Any]:
        """What of it changes requests, as JSON values."""
        fields = asdict(self)
        recorded = ("instruction", "columns", "groups", "prefix", "segment", "suffix", "examples")
        return {
            "name": self.name,
            "select": str(self.select),
            **{name: fields[name] for name in recorded},
        }


def load_task(name: str) -> Task:
    """Load a task that comes with flexmask by name, another by the path of its file.

    Raises:
        TaskError: If there is none, or it cannot be used; the message names file and key.
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
    """The tasks that come with flexmask, sorted by name."""
    return [_read_task(SHIPPED / f"{name}.toml") for name in shipped_names()]


def _read_task(path: Path) -> Task:
    file = printable(path)
    try:
        table = tomllib.loads(read_whole(path, _MAX_BYTES).decode())
    except OSError as error:
        raise TaskError(f"{file}: {error.strerror}; --task takes a name or a TOML file") from None
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
        chat_template=prompt.flag("chat_template", False),
        judge=Judge(
            cut=answer.choice("cut", CUTS, CUTS[0]),
            metric=answer.choice("judge", METRICS, METRICS[0]),
            language=answer.text("language", "en"),
        ),
        sample=sample,
    )
    for section in (prompt, paraphrases, answer):
        section.check_all_asked()
    return task


def _too_deep(file: str) -> TaskError:
    return TaskError(f"{file}: nested more than {_MAX_DEPTH} deep; write it flatter")


def _selection(paraphrases: Section) -> Selection:
    try:
        selection = Selection.parse(paraphrases.text("select", "all"))
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
    places = [key for key in ("rows", "file", "split") if section.has(key)]
    examples = Examples(
        count=section.count("count", 0),
        template=section.text("template", EXAMPLE),
        seed=section.count("seed", 42),
        rows=section.rows("rows"),
        file=section.text("file", ""),
        split=section.text("split", ""),
    )
    section.check_all_asked()
    if examples.count and len(places) != 1:
        raise section.error(
            "count",
            f"is {examples.count}, so one of rows, file and split must say whence; "
            f"got {' and '.join(places) or 'none'}",
        )
    if examples.file and (folder / examples.file).exists():
        return replace(examples, file=str(folder / examples.file))
    return examples
