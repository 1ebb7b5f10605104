"""Tasks, inputs, bad rows and judging, as a user meets them on the command line."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow.feather
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from command import run_command
from flexmask.demo import model_path
from flexmask.generation import Generation
from flexmask.request import Request
from flexmask.results.result_writer import ResultWriter, read_run_config
from flexmask.results.run_config import RunConfig
from flexmask_cli import progress
from flexmask_cli.app import main
from flexmask_cli.interrupt import Interrupt

COMMAND = [sys.executable, "-m", "flexmask_cli"]


@pytest.fixture
def flexmask(monkeypatch, capsys):
    """Runs a command in this process; gives what it prints to stdout."""

    def get(*arguments):
        monkeypatch.setattr(sys, "argv", ["flexmask", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code in (0, None), exit_.value.code
        return capsys.readouterr().out

    return get


@pytest.fixture
def error_of(monkeypatch):
    def get(*arguments):
        monkeypatch.setattr(sys, "argv", ["flexmask", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert isinstance(exit_.value.code, str)
        return exit_.value.code

    return get


def test_the_tasks_are_listed(flexmask):
    listed = flexmask("tasks")
    assert "myriadlama" in listed
    assert "webqa" in listed
    myriadlama, webqa = json.loads(flexmask("tasks", "--json"))
    assert (myriadlama["name"], webqa["name"]) == ("myriadlama", "webqa")
    assert myriadlama["reads"] == ["uuid", "manual_paraphrases", "auto_paraphrases", "answers"]
    assert webqa["groups"] == {"question": [f"paraphrase{n}" for n in range(6)]}
    assert myriadlama["select"] == "first 5"


MARKED = """\
== 1 ({path}:2)
<prefix>Be brief.
</prefix>
<segment 1>Q: Who?</segment 1>
<segment 2>Q: Whoever?</segment 2>
<suffix>
A:</suffix>
accepted: I | me

"""


def test_a_dry_run_prints_the_exact_prompts(flexmask, tmp_path):
    path, prefix = tmp_path / "rows.csv", tmp_path / "prefix.txt"
    path.write_text('p0,p1,label\nWho?,Whoever?,"[""I"", ""me""]"\nWhat?,Which?,it\n')
    prefix.write_text("Be brief.\n")
    printed = flexmask(
        "generate", "--task", "webqa", "--input", path, "--prefix-file", prefix, "--dry-run",
        "-n", 1, "--column", "paraphrase0=p0,p1", "--column", "answers=label",
        "--paraphrases", "all",
    )  # fmt: skip
    assert printed == MARKED.format(path=path)


def test_a_dry_run_reads_csv_in_its_encoding_between_its_delimiters(flexmask, tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("segments|answers\nOù?|là\n", encoding="cp1252")
    options = ["--delimiter", "|", "--encoding", "cp1252"]
    printed = flexmask("generate", "--input", path, *options, "--dry-run")
    assert "<segment 1>Où?</segment 1>" in printed
    assert "accepted: là" in printed


def test_a_prefix_and_rows_from_pipes_of_the_shell_are_read(tmp_path):
    shell = (
        '"$0" -m flexmask_cli generate --dry-run -i <(cat rows) --prefix-file <(echo Be brief.)'
    )
    (tmp_path / "rows").write_text('{"segments": ["x"]}\n' * 2000)
    result = subprocess.run(
        ["bash", "-c", shell, sys.executable],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("<prefix>Be brief.\n</prefix>") == 2000


@pytest.mark.parametrize(
    "arguments", [["show", ""], ["eval", ""], ["warmup", "--model", ""], ["bench", "--input", ""]]
)
def test_an_empty_name_is_refused_by_every_command(error_of, arguments):
    assert "is empty; name something or leave it out" in error_of(*arguments)


@pytest.mark.parametrize("command", ["eval", "show"])
def test_a_result_that_is_no_file_is_refused_at_once(error_of, tmp_path, command):
    os.mkfifo(tmp_path / "out.feather")
    assert "not a file but a pipe or device" in error_of(command, tmp_path / "out.feather")


ALONE = """\
== a, segment 1, weight 2 ({path}:1)
<prefix></prefix>
<segment 1>Who?</segment 1>
<suffix> A:</suffix>

== a, segment 2, weight 0.5 ({path}:1)
<prefix></prefix>
<segment 2>Whoever?</segment 2>
<suffix> A:</suffix>

"""


def test_a_dry_run_prints_every_prompt_that_runs_alone(flexmask, tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"uuid": "a", "segments": ["Who?", "Whoever?"], "suffix": " A:", "w": [2, 0.5]}
    path.write_text(json.dumps(row) + "\n")
    options = ["generate", "--input", path, "--dry-run", "--fusion"]
    by_column = ["weighted_max", "--fusion-weights", "column", "--column", "weights=w"]
    printed = ALONE.format(path=path)
    assert flexmask(*options, *by_column) == printed
    plain = printed.replace(", weight 2 ", " ").replace(", weight 0.5 ", " ")
    for name in ("mean", "each", "vote"):
        assert flexmask(*options, name) == plain
    assert flexmask(*options, "none") == plain.partition("== a, segment 2")[0]


def test_a_dry_run_loads_neither_torch_nor_the_model(tmp_path):
    program = (
        "import sys; from flexmask_cli.app import build_app\n"
        "build_app()(['generate', '--task', 'myriadlama', '--dry-run', '-n', '2',"
        " '--model', 'no-such/model'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.count("<segment 5>") == 2
    assert result.stdout.endswith("[]\n")


@pytest.fixture
def chat_tokenizer(tmp_path):
    """A folder with a tokenizer that has a chat template, and no model."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_a_dry_run_shows_what_the_chat_template_writes(flexmask, chat_tokenizer, tmp_path):
    task = tmp_path / "chat.toml"
    task.write_text(
        "[paraphrases.groups]\nq = 'q'\n[prompt]\nchat_template = true\n"
        "prefix = 'Answer.'\nsegment = ' {{ paraphrase }}'\nsuffix = ' A:'\n"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": ["Who?", "Whoever?"]}\n')
    options = ["generate", "--task", task, "--input", rows, "--model", chat_tokenizer, "--dry-run"]
    printed = flexmask(*options)
    assert "<prefix><user>Answer.</prefix>" in printed
    assert "<segment 2> Whoever?</segment 2>" in printed
    assert "<suffix> A:</user>\n<assistant></suffix>" in printed
    assert "<prefix>Answer.</prefix>" in flexmask(*options, "--no-chat-template")


def test_show_draws_the_prompt_that_generate_would_run(
    flexmask, chat_tokenizer, tmp_path, monkeypatch
):
    task, rows = tmp_path / "chat.toml", tmp_path / "rows.csv"
    task.write_text(
        "[paraphrases.groups]\nq = 'q'\n[prompt]\nchat_template = true\n"
        "prefix = 'Answer.'\nsegment = ' {{ paraphrase }}'\nsuffix = ' A:'\n"
    )
    rows.write_text("a;b\nWho?;Whoever?\nWhat?;What ever?\n")
    options = ["--task", task, "--input", rows, "--model", chat_tokenizer, "--column", "q=a,b"]
    written = flexmask("generate", *options, "--dry-run").split("== ")[2]
    drawn = []
    monkeypatch.setattr(
        "flexmask_cli.commands.show.print_pictures",
        lambda subject, pictures, **_: drawn.append(subject),
    )
    flexmask("show", *options, "--row", "2")
    flexmask("show", *options, "--row", "2", "--no-chat-template")
    subject, plain = drawn
    assert subject.heading == "rows.csv, row 2: 2"
    tokens = subject.shown.tokens
    decode = AutoTokenizer.from_pretrained(chat_tokenizer).decode
    assert f"<prefix>{decode(tokens.prefix)}</prefix>" in written
    assert [
        f"<segment {n}>{decode(ids)}</segment {n}>" in written
        for n, ids in enumerate(tokens.segments, start=1)
    ] == [True, True]
    assert f"<suffix>{decode(tokens.tail)}</suffix>" in written
    assert decode(plain.shown.tokens.prefix) == "<bos>Answer."


def test_show_and_bench_read_every_kind_of_input(flexmask, error_of, tmp_path):
    table = pyarrow.table({"segments": [["Q: one?", "Q: two?"], ["Q: three?", "Q: four?"]]})
    for name, write in (
        ("rows.feather", pyarrow.feather.write_feather),
        ("rows.parquet", pyarrow.parquet.write_table),
    ):
        write(table, tmp_path / name)
        options = ["--input", tmp_path / name, "--row", "2"]
        assert f"{name}, row 2: 2" in flexmask("show", *options, "--num-segments", "1")
        assert "--row must be 1 to 2, got 3" in error_of("show", *options[:2], "--row", "3")
    assert "webqa-sample, row 1: " in flexmask("show", "--task", "webqa")
    (tmp_path / "rows.csv").write_text("segments|answers\nOù?|là\n", encoding="cp1252")
    options = ["--input", tmp_path / "rows.csv", "--delimiter", "|", "--encoding", "cp1252"]
    assert "rows.csv, row 1: 1" in flexmask("show", *options)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('no') }}",
            "error: the chat template fails: TemplateError: no; leave",
        ),
        ("{% for m in messages %}{{ m }", "error: the chat template fails: TemplateSyntaxError: "),
        ("{{ messages | tojson }}", "error: the chat template does not write the text of a user "),
        (
            "{{ messages[0].content.replace('A', 'B') }}",
            "error: {rows}:1: the chat template changes the text of its prefix or suffix; leave",
        ),
    ],
)
def test_a_chat_template_that_cannot_be_used_ends_a_dry_run_in_one_line(
    error_of, chat_tokenizer, tmp_path, template, message
):
    (chat_tokenizer / "chat_template.jinja").write_text(template)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"segments": ["Who?"], "suffix": " A:"}\n')
    line = error_of(
        "generate", "--input", rows, "--model", chat_tokenizer, "--dry-run", "--chat-template"
    )
    assert line.startswith(message.replace("{rows}", str(rows)))
    assert "\n" not in line


def test_a_dry_run_that_skips_shows_why_the_template_takes_a_request_not(
    flexmask, chat_tokenizer, tmp_path
):
    (chat_tokenizer / "chat_template.jinja").write_text(
        "{{ messages[0].content.replace('A', '')}}"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"segments": ["Who?"], "suffix": "A:"}\n{"segments": ["Who?"]}\n')
    printed = flexmask(
        "generate", "--input", rows, "--model", chat_tokenizer, "--dry-run", "--chat-template",
        "--on-error", "skip",
    )  # fmt: skip
    assert f"== 1\nfailed: {rows}:1: the chat template changes the text of its prefix" in printed
    assert "== 2 (" in printed


def test_text_of_special_tokens_is_counted_and_can_be_allowed(tmp_path):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.feather"
    rows.write_text('{"segments": ["Q: <eos> who", "Q: who"], "suffix": " A:"}\n' * 1)
    options = ["generate", "--input", rows, "--device", "cpu", "--batch-size", "2", "--output"]
    options += [output, "--max-new-tokens", "2", "--overwrite"]
    for more, warned in (([], 1), (["--allow-special-tokens"], 0)):
        result = run_command(*options, *more)
        assert result.status == 0, result.err
        assert result.err.count("warning: 1 request holds the text of a special tok") == warned
        assert read_run_config(output).run["allow_special_tokens"] is not bool(warned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "webq"], "unknown task 'webq'; known: myriadlama, webqa"),
        (["--examples", "x.jsonl"], "--examples needs a --task"),
        (["--num-examples", "3"], "--num-examples needs a --task"),
        (["--paraphrases", "all"], "--paraphrases needs a --task"),
        (
            ["--task", "webqa", "--paraphrases", "best"],
            "paraphrases are selected by 'all', 'first",
        ),
        (["--task", "webqa", "--prefix-file", "nowhere"], "--prefix-file nowhere: "),
        (
            ["--task", "webqa", "--prefix-file", "x", "--examples", "y"],
            "--prefix-file leaves no p",
        ),
        (["--task", "webqa", "--examples", "nowhere.csv"], "nowhere.csv: No such file"),
        (["--task", "webqa", "--num-examples", "6"], "6 examples wanted, but it has 5 rows"),
        (["--column", "answers"], "--column takes NAME=COLUMN, got 'answers'"),
        (["--column", "question=q"], "no column 'question' to be read from another"),
        (["--column", "answers=label"], "no column 'label' for answers; its columns: 'uuid'"),
        *(
            (
                [option, ""],
                f"{option} is empty; name something or leave it out (an unset variable?)",
            )
            for option in (
                *("--input", "--model", "--prefix-file", "--output", "--task", "--examples"),
            )
        ),
        (["--prefix-file", "/dev/zero"], "--prefix-file /dev/zero: not a regular file"),
        (["--delimiter", ";"], "--delimiter and --encoding need an --input"),
        (["--input", "x.csv", "--encoding", "utf-0"], "the encoding must be one that Python kno"),
        (
            ["--task", "webqa", "--input", "-", "--examples", "-"],
            "--input and --examples cannot both be standard input",
        ),
        (
            ["--task", "webqa", "--paraphrases", f"first {10**20}"],
            "with numbers below 1,000,000",
        ),
        (["--batch-size", "9" * 5000], "--batch-size must be at most 2,147,483,647"),
        (["--output", "out.csv"], "out.csv: unknown extension '.csv'; name it .feather, .arrow"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    error_of, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    line = error_of("generate", *arguments)
    assert message in line
    assert "\n" not in line
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


ROWS = [
    {"id": "good", "q": "Where was Rispo Dror born?", "answers": ["Fumholm"]},
    {"id": "empty", "q": " "},
    {"id": "long", "q": "Q " * 3000, "answers": ["x"]},
    {"id": "good", "q": "twice"},
    {"id": "last", "q": "Tell me, where was Rispo Dror born?", "answers": ["Fumholm"]},
]
TASK = """
[columns]
uuid = "id"
[paraphrases.groups]
q = "q"
[prompt]
segment = "Q: {{ paraphrase }}"
suffix = "\\nA:"
[answer]
judge = "f1"
"""


def test_rows_that_cannot_be_used_stand_in_the_output_with_their_reason(tmp_path, error_of):
    path, task, output = (tmp_path / name for name in ("r.jsonl", "t.toml", "out.parquet"))
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task.write_text(TASK)
    options = ["--task", task, "--input", path, "--device", "cpu", "--batch-size", "2"]
    options += ["--max-new-tokens", "6", "--output", output]
    assert f"{path}:2: paraphrase 1 of those selected is empty" in error_of("generate", *options)
    assert not output.exists()

    result = run_command("generate", *options, "--on-error", "skip")
    assert result.status == 0, result.err
    assert "failed: 3 rows; the column 'error' says why" in result.out
    assert "f1: " in result.out
    rows = pyarrow.parquet.read_table(output).to_pylist()
    assert [row["uuid"] for row in rows] == ["good", "empty", "long", f"{path}:4", "last"]
    assert [row["finish_reason"] == "error" for row in rows] == [False, True, True, True, False]
    assert f"{path}:3: needs positions up to" in rows[2]["error"]
    assert rows[2]["correct"] is False
    assert rows[3]["error"].endswith(
        ":4: uuid 'good' is already used by row 1; each row needs its own"
    )
    assert rows[0]["generation"]
    assert rows[4]["error"] is None
    run = read_run_config(output).run
    assert (run["task"]["name"], run["judge"]["metric"]) == ("t", "f1")

    task.write_text(TASK.replace("Q: ", "Question: "))
    assert "(task.segment: 'Q: {{ paraphrase }}' → 'Question: {{" in error_of(
        "generate", *options, "--resume"
    )


def write_result(path, right):
    requests = [Request(uuid=str(n), segments=("?",), answers=("yes",)) for n in range(20)]
    with ResultWriter.open(path, config=RunConfig({}), requests=requests) as writer:
        for number, request in enumerate(requests):
            text = "yes" if number < right else "yes but no"
            writer.write([Generation(request, text, (1,), "eos", 1)])


def test_result_files_are_judged_and_compared(flexmask, error_of, tmp_path):
    pytest.importorskip("simplemma")
    first, second = tmp_path / "a.feather", tmp_path / "b.jsonl"
    write_result(first, 5)
    write_result(second, 10)
    printed = flexmask("eval", first, second)
    assert "25.0% [10.0, 45.0]" in printed
    assert "+25.0% [+10.0, +45.0]" in printed
    found = json.loads(flexmask("eval", first, second, "--lemma", "--json"))
    assert [file["judged"] for file in found["files"]] == [20, 20]
    assert found["files"][1]["metrics"]["exact"]["mean"] == 0.5
    assert set(found["files"][0]["metrics"]) == {"exact", "f1", "lemma"}
    exact, *_ = found["comparisons"]
    assert (exact["metric"], exact["first_better"], exact["second_better"]) == ("exact", 0, 5)
    assert json.loads(flexmask("eval", first, "--json"))["comparisons"] == []
    assert "nowhere.feather: cannot be read (No such file" in error_of("eval", "nowhere.feather")


class FakeRun:
    """A run of four batches that takes as long as a clock says."""

    def __init__(self, clock, batch_s):
        stats = SimpleNamespace(generated_tokens=0, computed_tokens=0, batch_size=2, cold_groups=0)
        self.engine_run = SimpleNamespace(stats=stats)
        self._clock, self._batch_s = clock, batch_s

    def batches(self, should_stop):
        for _ in range(4):
            self._clock.now += self._batch_s
            self.engine_run.stats.generated_tokens += 20
            yield ["row"] * 2
            if should_stop():
                return


def fake_run(clock, batch_s) -> Any:
    return FakeRun(clock, batch_s)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_away_from_a_terminal_progress_is_a_plain_line_every_few_seconds(clock, capsys):
    interrupt = Interrupt()
    rows = [*progress.track(fake_run(clock, 4), 8, interrupt, is_quiet=False)]
    assert len(rows) == 4
    assert capsys.readouterr().err.splitlines() == [
        "4 of 8 rows, 0.5 rows/s, 5 tokens/s, batches of 2, 0:08 left",
        "8 of 8 rows, 0.5 rows/s, 5 tokens/s, batches of 2, 0:00 left",
    ]


def test_quiet_shows_no_progress(clock, capsys):
    assert len([*progress.track(fake_run(clock, 9), 8, Interrupt(), is_quiet=True)]) == 4
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(clock, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for _ in progress.track(fake_run(clock, 4), 8, Interrupt(), is_quiet=False):
        pass
    assert "compiling, then the first batch" in terminal.getvalue()
    assert "8 of 8 rows, 0.5 rows/s, 5 tokens/s, batches of 2, 0:00 left" in terminal.getvalue()


def test_a_run_of_several_is_named_in_the_bar_or_in_a_line(clock, monkeypatch, capsys):
    def run():
        named: dict[str, Any] = {"is_quiet": False, "title": "1 of 2: mean (all)"}
        assert len([*progress.track(fake_run(clock, 1), 8, Interrupt(), **named)]) == 4

    run()
    assert capsys.readouterr().err == "note: 1 of 2: mean (all)\n"
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    run()
    assert "1 of 2: mean (all): compiling, then the first batch" in terminal.getvalue()
    assert "note" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[1A\x1b[2K")  # the bar's line is erased


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """As in a terminal; what a shell starts in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_the_first_ctrl_c_ends_the_run_in_order_and_the_second_ends_it_at_once(clock, capsys):
    interrupt = Interrupt()
    batches = 0
    with interrupt:
        for _ in progress.track(fake_run(clock, 1), 8, interrupt, is_quiet=False):
            batches += 1
            signal.raise_signal(signal.SIGINT)
        assert batches == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "prompts in flight finish first; Ctrl-C again ends at once" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
