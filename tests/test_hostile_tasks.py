"""Task files that are odd, damaged or made to do harm: right prompts, or one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import run_command
from sampling_of_cases import sampled

TOUCH = "touch PWNED"
GROUPS = '[paraphrases.groups]\nq = "q"\n'
PROMPT = '[prompt]\nsegment = "{{ q }}"\n'
WHOLE = GROUPS + PROMPT
ONE = "[examples]\ncount = 1\n"
ROWS = 'rows = [{q = "a", answers = "b"}]\n'
BOOLEAN = "must be true or false"
COUNT = "must be an integer of at least 0"
TEXTS = "must be a string or a list of strings"
NOT_TOML = "not TOML: "
UNSAFE = "is unsafe"
DEEP = "nested more than 20 levels deep"
MADE = "it makes more than 16,777,216 characters"


def template(source: str) -> str:
    """A task whose segments are made by ``source``."""
    return f"{GROUPS}[prompt]\nsegment = {json.dumps(source)}\n"


def refused(*lines: tuple[str, str]) -> dict[str, tuple[str | bytes, str]]:
    return {ascii(line)[:60]: (template(line), message) for line, message in lines}


FILES: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "paraphrases.groups must name at least one column"),
    "bytes": (b"\xff\xfe", NOT_TOML),
    "UTF-16": (WHOLE.encode("utf-16"), NOT_TOML),
    "a mark of byte order": ("\ufeff" + WHOLE, NOT_TOML),
    "a zero": ("a = \0", NOT_TOML),
    "a bell": (WHOLE + 'suffix = "\7"', NOT_TOML),
    "YAML": ("prompt:\n  segment: x\n", NOT_TOML),
    "JSON": ('{"prompt": {"segment": "x"}}', NOT_TOML),
    "a key twice": (WHOLE + 'segment = "x"\n', NOT_TOML),
    "a table twice": (WHOLE + WHOLE, NOT_TOML),
    "an array of tables for a table": ("[[prompt]]\nsegment = 'x'\n", "prompt must be a table"),
    "an escape that is none": (WHOLE + 'suffix = "\\q"', NOT_TOML),
    "half a pair": (WHOLE + 'suffix = "\\ud800"', NOT_TOML),
    "a megabyte": (WHOLE + "#" * 2**20, "longer than 1,048,576 bytes"),
    "5,000 tables in each other": (f"[{'.'.join('a' * 5000)}]\nb = 1", DEEP),
    "100,000 brackets": ("a = " + "[" * 100_000, DEEP),
    "3,000 inline tables": ("a = " + "{a = " * 3000, DEEP),
    "20,000 keys": ("".join(f"k{n} = 1\n" for n in range(20_000)), "k0 is not known"),
    "a key of 100,000 letters": ("k" * 100_000 + " = 1\n" + WHOLE, "kkk … kkk|kk … kk"),
    "escapes of a terminal": (WHOLE + '"\\u001b[2J" = 1', r"prompt.\x1b[2J is not known"),
    "an integer of 5,000 digits": (WHOLE + ONE.replace("1", "9" * 5000), NOT_TOML),
    "10^20 examples": (WHOLE + ONE.replace("1", "1" + "0" * 20) + ROWS, "wanted, but it has"),
    "a part of an example": (WHOLE + ONE.replace("1", "1.5") + ROWS, COUNT),
    "NaN examples": (WHOLE + ONE.replace("1", "nan") + ROWS, COUNT),
    "true examples": (WHOLE + ONE.replace("1", "true") + ROWS, COUNT),
    "a seed below 0": (WHOLE + "[examples]\nseed = -1", COUNT),
    "a date": (WHOLE + "suffix = 1979-05-27", "prompt.suffix must be a string"),
    "a text for a flag": (WHOLE + "chat_template = 'yes'", BOOLEAN),
    "a list for the summary": ("summary = []\n" + WHOLE, "summary must be a string"),
    "a number for the instruction": ("instruction = 3\n" + WHOLE, "instruction must be a string"),
    "a text for the sample": ("sample = 'x'\n" + WHOLE, "sample must be an array of tables"),
    "a text for the groups": ("[paraphrases]\ngroups = 'q'\n" + PROMPT, "must be a table"),
    "a number for a group": ("[paraphrases.groups]\nq = 3\n" + PROMPT, TEXTS),
    "no column in a group": ("[paraphrases.groups]\nq = []\n" + PROMPT, TEXTS),
    "a list in a group": ('[paraphrases.groups]\nq = [["q"]]\n' + PROMPT, TEXTS),
    "a column that is not there": (
        WHOLE.replace('= "q"', '= "r"'),
        "none of the columns of the q",
    ),
    "a column for another that is not there": (WHOLE + '[columns]\nq = "r"', "no column 'r' for"),
    "too many paraphrases": ('[paraphrases]\nselect = "first 2"\n' + WHOLE, "but the row has 1"),
    "10^20 paraphrases": (f'[paraphrases]\nselect = "first 1{"0" * 20}"\n' + WHOLE, "1,000,000"),
    "paraphrases below 0": ('[paraphrases]\nselect = "indices -1"\n' + WHOLE, "'indices I J …'"),
    "an attribute as a group": (
        '[paraphrases]\nselect = "sample 1 __class__"\n' + WHOLE,
        "names the group '__class__'",
    ),
    "a selection of 100,000 letters": (
        f'[paraphrases]\nselect = "{"x" * 100_000}"\n' + WHOLE,
        "xxx…",
    ),
    "a cut that is none": (WHOLE + "[answer]\ncut = 'x'", "answer.cut must be one of"),
    "a number for the judge": (WHOLE + "[answer]\njudge = 3", "answer.judge must be a string"),
    "examples of a secret file": (WHOLE + ONE + 'file = "/etc/passwd"', "/etc/passwd:"),
    "examples of a device": (WHOLE + ONE + 'file = "/dev/zero"', "a pipe or device"),
    "examples of a folder": (WHOLE + ONE + 'file = "."', "not a folder that the datasets"),
    "examples of the task itself": (WHOLE + ONE + 'file = "task.toml"', "example task.toml:"),
    "examples of an address": (WHOLE + ONE + 'file = "http://x/a.jsonl"', "No such file"),
    "examples of a name with a zero": (
        WHOLE + ONE + 'file = "a\\u0000b"',
        "not a valid file name",
    ),
    "examples of a split that is not there": (WHOLE + ONE + 'split = "x"', "has no splits"),
    "examples that are numbers": (WHOLE + ONE + "rows = [1]", "must be an array of tables"),
    "examples of two places": (WHOLE + ONE + ROWS + "file = 'x'", "got rows and file"),
    "an example without columns": (WHOLE + ONE + "rows = [{}]", "'paraphrase' is undefined"),
    "an example whose template is none": (WHOLE + ONE + ROWS + "template = '{{'", "line 1: "),
}

TEMPLATES = refused(
    ("{{ q", "line 1: unexpected end of template"),
    ("{% nope %}", "line 1: Encountered unknown tag 'nope'."),
    ("{{ q | nope }}", "line 1: No filter named 'nope'."),
    ("{{ q is nope }}", "line 1: No test named 'nope'."),
    ("{{ (lambda: 1)() }}", "line 1: expected token ')'"),
    ("{{ nope }}", "'nope' is undefined"),
    ("{{ " + "n" * 100_000 + " }}", "nnn … "),
    ("\x1b[2J{{ nope }}", "'nope' is undefined"),
    ("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "nested too deep"),
    ("{% if 1 %}" * 300 + "{% endif %}" * 300, "nested too deep"),
    ("{{ q.__class__.__mro__ }}", UNSAFE),
    ("{{ q['__class__'] }}", UNSAFE),
    ("{{ q | attr('__class__') }}", UNSAFE),
    ("{{ '{0.__class__}'.format(q) }}", UNSAFE),
    ("{{ '{q.__class__}'.format_map({'q': q}) }}", UNSAFE),
    ("{{ [q] | selectattr('__class__') | list }}", UNSAFE),
    ("{{ [q, q] | sort(attribute='__class__') }}", UNSAFE),
    ("{{ [q] | join(attribute='__class__') }}", UNSAFE),
    (f"{{{{ joiner.__init__.__globals__.os.system('{TOUCH}') }}}}", UNSAFE),
    (f"{{{{ namespace.__init__.__globals__.os.system('{TOUCH}') }}}}", UNSAFE),
    (f"{{{{ self.__init__.__globals__.os.system('{TOUCH}') }}}}", UNSAFE),
    ("{{ self._TemplateReference__context }}", UNSAFE),
    ("{% for x in [1] %}{{ loop._iterator }}{% endfor %}", UNSAFE),
    ("{{ dict.__base__.__subclasses__() }}", UNSAFE),
    ("{% macro m() %}{% endmacro %}{{ m.__globals__ }}", "has no attribute '__globals__'"),
    ("{% set l = [] %}{{ l.append(1) }}", UNSAFE),
    ("{% import 'os' as os %}", "no loader"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{% extends '/etc/passwd' %}", "no loader"),
    ("{{ range(10**9) | list }}", "Range too big"),
    ("{{ q * 999999999 }}", MADE),
    ("{% set n = namespace(a='x') %}{% for i in range(40) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
     MADE),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "it calls itself"),
    ("{{ 9 ** 999999 }}", "it computes a number of more than"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ q + 1 }}", "can only concatenate str"),
    ("{{ 10**400 | float }}", "out of range|too large"),
    ("", "segment 1 is empty"),
    (" \t\n", "segment 1 is empty"),
    ("{{ '\\ud800' }}", "half of a surrogate pair"),
)  # fmt: skip

GOOD: dict[str, tuple[str, str]] = {
    "carriage returns": (WHOLE.replace("\n", "\r\n"), "what?"),
    "dotted keys": ('paraphrases.groups.q = "q"\nprompt.segment = "{{ q }}"', "what?"),
    "a column for itself": (WHOLE + '[columns]\nq = "q"', "what?"),
    "names of attributes as columns": (
        WHOLE + '[columns]\n__class__ = "q"\nself = "q"',
        "what?",
    ),
    "a name that a set takes": (template("{% set q = 3 %}{{ q }}"), "3"),
    "markup": (template("<script>{{ q }}</script>"), "<script>what?</script>"),
    "what a map hides": (template("{{ [q] | map(attribute='__class__') | list }}"), "[Undefined]"),
    "text of a template in a row": (template("{{ evil }}"), f"{{{{ 1 + 1 }}}} {TOUCH}"),
}


@pytest.fixture
def run_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    row = {"q": "what?", "answers": ["x"], "evil": f"{{{{ 1 + 1 }}}} {TOUCH}"}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")

    def run_task(content: str | bytes):
        Path("task.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
        outcome = run_command("generate", "--dry-run", "-t", "task.toml", "-i", "rows.jsonl")
        assert not Path("PWNED").exists()
        return outcome

    return run_task


@pytest.mark.parametrize(("content", "message"), sampled(FILES | TEMPLATES))
def test_a_hostile_task_is_refused_in_one_line(run_task, content: str | bytes, message: str):
    error = run_task(content).error
    assert any(part in error for part in message.split("|")), error


@pytest.mark.parametrize(("content", "segment"), sampled(GOOD))
def test_an_odd_task_makes_right_prompts(run_task, content: str, segment: str):
    outcome = run_task(content)
    assert outcome.status == 0, outcome.err
    assert f"<segment 1>{segment}</segment 1>" in outcome.out
