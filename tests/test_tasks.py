"""From the rows of a task to requests."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pytest

from flexmask.errors import OptionError, RequestError, TaskError
from flexmask.inputs.input_files import open_input
from flexmask.inputs.rows import Row, rows_in_memory
from flexmask.request import Request
from flexmask.tasks.judge import Judge
from flexmask.tasks.paraphrases import ParaphraseSelection
from flexmask.tasks.request_source import OnError, RequestSource
from flexmask.tasks.task import Task, load_task, shipped_tasks
from flexmask.tasks.task_requests import TaskPrompts

SHARED = Path(__file__).parents[2] / "shared" / "data"

MINIMAL = """
[paraphrases.groups]
q = "q"
[prompt]
segment = "{{ paraphrase }}"
"""


@pytest.fixture
def task_of(tmp_path: Path) -> Callable[[str], Task]:
    def load(text: str) -> Task:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return load_task(str(path))

    return load


def request_of(task: Task, values: dict[str, Any], **options: Any) -> Request:
    row = Row("rows.jsonl:7", 7, values)
    return TaskPrompts(task, rows_in_memory([values], "rows.jsonl"), **options)(row)


def test_the_shipped_tasks_make_requests_of_their_samples() -> None:
    tasks = shipped_tasks()
    assert [task.name for task in tasks] == ["myriadlama", "webqa"]
    for task in tasks:
        rows = rows_in_memory(task.sample, "sample")
        for request in RequestSource(rows, TaskPrompts(task, rows)):
            assert isinstance(request, Request)
            assert len(request.segments) == 5
            assert all(segment.startswith("Q: ") for segment in request.segments)
            assert request.suffix == "\nA:"
            assert request.prefix.startswith(task.instruction + "\n\nQ: ")
            assert request.prefix.count("\nA: ") == 5
            assert request.prefix.endswith("\n\n")
            assert request.answers
        assert task.summary


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_myriadlama_with_a_prefix_file_reproduces_the_earlier_prompts() -> None:
    prefix = (SHARED / "myriadlama_prefix.txt").read_text()
    rows = open_input(str(SHARED / "myriadlama_1000.jsonl"))
    requests = list(RequestSource(rows, TaskPrompts(load_task("myriadlama"), rows, prefix=prefix)))
    assert len(requests) == 1000
    for row, request in zip(rows, requests, strict=True):
        assert isinstance(request, Request)
        paraphrases = row.values["manual_paraphrases"] + row.values["auto_paraphrases"]
        prompts = [request.prefix + segment + request.suffix for segment in request.segments]
        assert prompts == [f"{prefix}Q: {text}\nA:" for text in paraphrases[:5]]
        assert request.answers == tuple(row.values["answers"])
        assert request.uuid == row.values["uuid"]


def test_webqa_takes_the_question_and_its_paraphrases() -> None:
    row = {f"paraphrase{n}": f"how {n}?" for n in range(6)} | {"question": "?", "answers": ["x"]}
    request = request_of(load_task("webqa"), row)
    assert request.segments == tuple(f"Q: how {n}?" for n in range(5))
    assert request.uuid == "7"


def test_the_templates_see_the_row_the_instruction_and_the_examples(
    task_of: Callable[[str], Task],
) -> None:
    task = task_of(
        """
        instruction = "Answer."
        [columns]
        question = "text"
        uuid = "id"
        [paraphrases.groups]
        asked = ["question", "more"]
        [prompt]
        prefix = "{{ instruction }} {{ topic | upper }}\\n{{ examples }}"
        segment = "<{{ paraphrase }}>"
        suffix = "({{ topic }})\\n"
        [examples]
        count = 2
        template = "{{ paraphrase }} = {{ answer }}; "
        rows = [{text = "1+1", answers = ["2"]}, {text = "1+2", answers = ["3", "three"]}]
        """
    )
    values = {"id": 5, "text": "2+2?", "more": ["and", "so"], "topic": "sums", "answers": "4"}
    assert request_of(task, values) == Request(
        uuid="5",
        prefix="Answer. SUMS\n1+1 = 2; 1+2 = 3; ",
        segments=("<2+2?>", "<and>", "<so>"),
        suffix="(sums)\n",
        answers=("4",),
    )


def test_examples_are_drawn_with_the_seed(task_of: Callable[[str], Task], tmp_path: Path) -> None:
    train = [{"q": f"q{n}", "answers": [str(n)]} for n in range(50)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    text = MINIMAL + 'prefix = "{{ examples }}"\n[examples]\ncount = 3\nseed = 42\n'
    text += 'template = "{{ paraphrase }} "\nfile = "train.jsonl"\n'
    indices = random.Random(42).sample(range(50), 3)
    drawn = "".join(f"q{index} " for index in indices)
    assert request_of(task_of(text), {"q": "x"}).prefix == drawn
    assert request_of(task_of(text.replace("42", "43")), {"q": "x"}).prefix != drawn
    with pytest.raises(TaskError, match=r"train.jsonl: 51 examples wanted, but it has 50 rows"):
        request_of(task_of(text.replace("count = 3", "count = 51")), {"q": "x"})


def test_examples_may_come_from_another_split_of_the_input(
    task_of: Callable[[str], Task], tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {
        name: datasets.Dataset.from_list([{"q": f"{name} {n}", "answers": ["x"]} for n in (1, 2)])
        for name in ("train", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    text = MINIMAL + 'prefix = "{{ examples }}"\n[examples]\ncount = 2\nsplit = "train"\n'
    rows = open_input(f"{tmp_path / 'saved'}:test")
    first, second = RequestSource(rows, TaskPrompts(task_of(text), rows))
    assert first.prefix == "Q: train 1\nA: x\n\nQ: train 2\nA: x\n\n"  # type: ignore[union-attr]
    assert second.segments == ("test 2",)  # type: ignore[union-attr]
    with pytest.raises(
        TaskError, match=r"'train', but rows.jsonl has no splits; name others with"
    ):
        request_of(task_of(text), {"q": "x"})


GROUPS = {"manual": ["m0", "m1", "m2", "m3"], "auto": ["a0", "a1", "a2"]}


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", ["m0", "m1", "m2", "m3", "a0", "a1", "a2"]),
        ("first 5", ["m0", "m1", "m2", "m3", "a0"]),
        ("indices 6 0 4", ["a2", "m0", "a0"]),
    ],
)
def test_paraphrases_are_counted_through_the_groups(text: str, chosen: list[str]) -> None:
    selection = ParaphraseSelection.parse(text)
    assert selection.choose(GROUPS, "u") == chosen
    assert str(selection) == text


def test_sampled_paraphrases_depend_on_the_uuid_alone() -> None:
    selection = ParaphraseSelection.parse("sample 2 manual + 1 auto")
    assert str(selection) == "sample 2 manual + 1 auto"
    generator = random.Random("uuid")
    expected = generator.sample(GROUPS["manual"], 2) + generator.sample(GROUPS["auto"], 1)
    assert selection.choose(GROUPS, "uuid") == expected
    chosen = {tuple(selection.choose(GROUPS, str(n))) for n in range(20)}
    assert len(chosen) > 5
    assert all(a[0] == "m" and b[0] == "m" and a != b and c[0] == "a" for a, b, c in chosen)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("first 8", "first 8 selected, but the row has 7"),
        ("indices 0 7", "indices 0 7 selected, but the row has 7"),
        ("sample 4 auto", "sample 4 auto: the row has 3 auto paraphrases"),
        ("sample 1 other", "no group 'other' of paraphrases; groups: manual, auto"),
    ],
)
def test_too_few_paraphrases_are_an_error(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ParaphraseSelection.parse(text).choose(GROUPS, "u")


@pytest.mark.parametrize(
    "text", ["", "first", "first 0", "first -1", "indices", "indices a", "sample", "sample 2", "x"]
)
def test_a_selection_that_is_none_shows_the_syntax(text: str) -> None:
    with pytest.raises(OptionError, match="'first N', 'indices I J …' or 'sample N GROUP"):
        ParaphraseSelection.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = ", "mine.toml: not TOML: "),
        ("", "paraphrases.groups must name at least one column of paraphrases"),
        (MINIMAL + "sufix = ''", "prompt.sufix is not known; known here: prefix, segment, suffix, "
         "choice, system, answer_prefix, messages, segment_turns, chat_template; "
         "did you mean 'suffix'?"),
        (MINIMAL.replace("[prompt]", "[promt]"), "promt is not known; .* did you mean 'prompt'?"),
        ("[paraphrases.groups]\nq = 'q'", "prompt.segment is missing; it must be a string"),
        (MINIMAL + "suffix = 3", "prompt.suffix must be a string, got 3"),
        (MINIMAL + "chat_template = 1", "prompt.chat_template must be true or false, got 1"),
        ("[paraphrases]\nselect = 'best'\n" + MINIMAL, "paraphrases.select cannot be used: "),
        ("[paraphrases]\nselect = 'sample 1 r'\n" + MINIMAL, "names the group 'r'; groups: q"),
        (MINIMAL + "[answer]\njudge = 'bleu'", "answer.judge must be one of exact, f1, lemma, c"),
        (MINIMAL + "[answer]\ncut = 'two'", "answer.cut must be one of first line, all, got 'two"),
        (MINIMAL + "[examples]\ncount = 1", "examples need a source: set one of rows"),
        (MINIMAL + "[examples]\ncount = -1", "examples.count must be an integer of at least 0"),
        (MINIMAL + "[examples]\ncount = true", "examples.count must be an integer of at least 0"),
        (MINIMAL + "[columns]\na = 3", "columns.a must be a string or a list of strings, got 3"),
        ("sample = 3\n" + MINIMAL, "sample must be an array of tables"),
    ],
)  # fmt: skip
def test_a_wrong_task_file_is_named_with_the_key_and_what_is_allowed(
    task_of: Callable[[str], Task], text: str, message: str
) -> None:
    with pytest.raises(TaskError, match=message) as raised:
        task_of(text)
    assert "mine.toml: " in str(raised.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ paraphras }}", "'paraphras' is undefined; defined: q, instruction, paraphrase"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ paraphrase | batch }}", "missing 1 required positional argument"),
        ("{{ paraphrase.__class__ }}", "unsafe"),
    ],
)
def test_a_template_that_cannot_be_filled_in_is_an_error_of_the_row(
    task_of: Callable[[str], Task], template: str, message: str
) -> None:
    task = task_of(MINIMAL.replace("{{ paraphrase }}", template))
    with pytest.raises(RequestError, match=message):
        request_of(task, {"q": "x"})


def test_a_template_with_a_wrong_syntax_names_its_line(task_of: Callable[[str], Task]) -> None:
    task = task_of(MINIMAL.replace("{{ paraphrase }}", "\\n{{ paraphrase"))
    with pytest.raises(TaskError, match=r"task 'mine', prompt.segment: line 2: "):
        request_of(task, {"q": "x"})


def test_a_row_without_paraphrases_names_its_columns(task_of: Callable[[str], Task]) -> None:
    with pytest.raises(RequestError, match=r"the q paraphrases exists \(q\); its columns: text"):
        request_of(task_of(MINIMAL), {"text": "x"})


def test_an_unknown_task_lists_those_there_are() -> None:
    with pytest.raises(TaskError, match="unknown task 'webq'; known: myriadlama, webqa, or the p"):
        load_task("webq")
    with pytest.raises(TaskError, match=r"nowhere.toml: No such file"):
        load_task("nowhere.toml")


def test_the_answer_section_makes_the_judge(task_of: Callable[[str], Task]) -> None:
    task = task_of(MINIMAL + "[answer]\ncut = 'all'\njudge = 'lemma'\nlanguage = 'de'")
    assert task.judge == Judge("all", "lemma", "de")


def test_weights_go_with_the_paraphrases_that_are_selected(task_of: Callable[[str], Task]) -> None:
    text = MINIMAL.replace('q = "q"', 'a = "a"\nb = ["b", "c"]')
    values = {"a": ["0", "1"], "b": "2", "c": ["3", "4"], "w": [0, 1, 2, 3, 4]}
    for select in ("all", "indices 4 1", "sample 1 a + 2 b"):
        selected = f'[columns]\nweights = "w"\n[paraphrases]\nselect = "{select}"\n{text}'
        request = request_of(task_of(selected), values, reads_weights=True)
        assert request.segments == tuple(str(int(weight)) for weight in request.weights)
        plain = request_of(task_of(selected), values)
        assert (plain.segments, plain.weights) == (request.segments, ())


def test_as_many_weights_as_paraphrases_are_needed(task_of: Callable[[str], Task]) -> None:
    task = task_of(MINIMAL.replace("[prompt]", '[paraphrases]\nselect = "first 1"\n[prompt]'))
    with pytest.raises(RequestError, match="a number for each of its 2 paraphrases, got 1"):
        request_of(task, {"q": ["x", "y"], "weights": [1]}, reads_weights=True)


EXAMPLES_OF_ALL = 'prefix = "{{ examples }}"\n[examples]\ntemplate = "<{{ paraphrase }}>"\n'


def test_examples_never_include_the_row_that_is_asked(
    task_of: Callable[[str], Task], tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f'{{"q": ["q{n}?", "q{n}!"]}}\n' for n in range(9)))
    task = task_of(MINIMAL + EXAMPLES_OF_ALL + 'count = 4\nfile = "train.jsonl"\n')
    rows = open_input(str(path))
    usual = request_of(task, {"q": "other"}).prefix
    changed = 0
    for number, request in enumerate(RequestSource(rows, TaskPrompts(task, rows))):
        assert isinstance(request, Request)
        assert f"q{number}" not in request.prefix
        assert len(set(request.prefix.split("<"))) == 5
        changed += request.prefix != usual
        assert request.prefix == request_of(task, {"q": f"q{number}!"}).prefix
    assert changed == 4


def test_examples_that_are_too_few_beside_the_row_that_is_asked_are_an_error(
    task_of: Callable[[str], Task],
) -> None:
    task = task_of(MINIMAL + EXAMPLES_OF_ALL + 'count = 2\nrows = [{q = "a"}, {q = "b"}]\n')
    assert request_of(task, {"q": "c"}).prefix == "<a><b>"
    with pytest.raises(RequestError, match=r"only 1 others of the 2 wanted; .*`num_examples=1`"):
        request_of(task, {"q": "b"})


TWO_COLUMNS = MINIMAL.replace('q = "q"', 'q = ["q", "reworded"]')


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_column_of_paraphrases_that_no_row_has_is_an_error(
    task_of: Callable[[str], Task], tmp_path: Path, on_error: OnError
) -> None:
    task = task_of(TWO_COLUMNS)
    for name, text in {"a.jsonl": '{"q": "x"}\n' * 3, "a.csv": "q,rewordet\nx,y\n"}.items():
        (tmp_path / name).write_text(text)
        rows = open_input(str(tmp_path / name))
        with pytest.raises(RequestError, match="no row has the column 'reworded' of the q para"):
            list(RequestSource(rows, TaskPrompts(task, rows), on_error=on_error))


def test_a_column_of_paraphrases_may_be_in_some_rows_only(task_of: Callable[[str], Task]) -> None:
    rows = rows_in_memory([{"q": "x"}, {"q": "y", "reworded": "z"}], "rows.jsonl")
    prompts = TaskPrompts(task_of(TWO_COLUMNS), rows)
    assert len(list(RequestSource(rows, prompts))) == 2
    assert len(list(RequestSource(rows, prompts, limit=1))) == 1  # who knows what comes
    (request,) = RequestSource(
        rows_in_memory([{"q": "x"}], "rows.jsonl"),
        TaskPrompts(task_of(TWO_COLUMNS), rows, chosen_columns=["q"]),
    )
    assert isinstance(request, Request)
    assert request.segments == ("x",)


def test_numbers_beyond_all_measure_are_refused_at_once(task_of: Callable[[str], Task]) -> None:
    many = 10**6 - 1
    assert str(ParaphraseSelection.parse(f"first {many}")) == f"first {many}"
    for text in (f"first {many}", f"indices 0 {many}", f"sample {many} auto"):
        with pytest.raises(RequestError, match=f"{many}"):
            ParaphraseSelection.parse(text).choose(GROUPS, "u")
    for text in (f"first {10**20}", "first " + "9" * 5000, "sample " + "9" * 5000 + " auto"):
        with pytest.raises(OptionError, match="paraphrases are selected by"):
            ParaphraseSelection.parse(text)
    rows = rows_in_memory([{"q": "x"}], "rows.jsonl")
    assert len(list(RequestSource(rows, TaskPrompts(task_of(MINIMAL), rows), limit=many))) == 1
    count = MINIMAL + f'[examples]\ncount = {many}\nrows = [{{q = "a"}}]\n'
    with pytest.raises(TaskError, match=f"{many} examples wanted, but it has 1 rows"):
        request_of(task_of(count), {"q": "x"})


@pytest.mark.parametrize("depth", [30, 200, 100_000])
def test_a_task_nested_too_deep_is_one_line(task_of: Callable[[str], Task], depth: int) -> None:
    nested = "[" * depth + "]" * depth
    with pytest.raises(
        TaskError, match=r"mine.toml: nested more than 20 levels deep; write it flatter"
    ):
        task_of(MINIMAL + f"[examples]\nrows = [{{a = {nested}}}]\n")


def test_a_task_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    for name, message in (
        ("fifo", "not a regular file"),
        ("zero", "not a regular"),
        ("bytes", "UTF|utf"),
    ):
        with pytest.raises(TaskError, match=message):
            load_task(str(tmp_path / f"{name}.toml"))


@pytest.mark.parametrize("key", ["prompt.segment", "prompt.suffix", "examples.template"])
def test_a_template_beyond_its_bounds_is_named(task_of: Callable[[str], Task], key: str) -> None:
    section, name = key.split(".")
    endless = "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}"
    text = MINIMAL.replace('segment = "{{ paraphrase }}"', "")
    parts = {
        "prompt": {"segment": "{{ paraphrase }}", "prefix": "{{ examples }}"},
        "examples": {"template": "{{ paraphrase }}"},
    }
    parts[section][name] = endless
    text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in parts["prompt"].items())
    text += '[examples]\ncount = 1\nrows = [{q = "a"}]\n'
    text += f"template = {json.dumps(parts['examples']['template'])}\n"
    with pytest.raises((RequestError, TaskError), match=f"task 'mine', {key}: it makes more than"):
        request_of(task_of(text), {"q": "x"})


def test_a_template_leaves_columns_alone_that_it_does_not_name(
    task_of: Callable[[str], Task], tmp_path: Path
) -> None:
    days = pa.array([10**9], pa.int32()).cast(pa.date32())
    path = tmp_path / "rows.feather"
    pyarrow.feather.write_feather(pa.table({"q": ["x"], "topic": ["t"], "day": days}), str(path))
    rows = open_input(str(path))
    task = task_of(MINIMAL + 'suffix = "{{ topic }}"')
    (request,) = RequestSource(rows, TaskPrompts(task, rows))
    assert isinstance(request, Request)
    assert request.suffix == "t"
    task = task_of(MINIMAL + 'suffix = "{{ day }}"')
    with pytest.raises(RequestError, match="the column 'day' holds a date32"):
        list(RequestSource(rows, TaskPrompts(task, rows)))
