"""Templates of tasks: what they are filled in from, and their bounds."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from flexmask.tasks import templates
from flexmask.tasks.templates import RowTemplate, TemplateFault, TemplateSyntaxFault, one_row

LONG = "it makes more than"
SLOW = "s of CPU time"
LARGE = "is given a number of more than"


class Watched(Mapping[str, Any]):
    """Columns that remember which were read."""

    def __init__(self, **values: Any) -> None:
        self._values = values
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Any:
        self.read.append(name)
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def test_only_the_columns_that_a_template_names_are_read() -> None:
    columns = Watched(a="x", b="y", c="z")
    template = RowTemplate("{{ a }}{% if c is defined %}{{ more }}{% endif %}")
    assert template.render(columns, more="!") == "x!"
    assert sorted(columns.read) == ["a", "c"]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ q | upper }}, {{ q ~ 1 }}", "HÉLLO, héllo1"),
        ("{{ [1, 2] | join(', ') }} {{ '-'.join(['a', 'b']) }}", "1, 2 a-b"),
        ("{{ 2**10 }} {{ '%s' % q }} {{ 'a{}'.format(q) }}", "1024 héllo ahéllo"),
        ("{% set a, b = 1, 2 %}{% for x, y in [(a, b)] %}{{ x + y }}{% endfor %}", "3"),
        ("{% for x in [[1], [2]] recursive %}{{ loop.length }}{% endfor %}", "22"),
        ("{{ {'b': 1, 'a': 2} | dictsort }}", "[('a', 2), ('b', 1)]"),
        ("{{ q | replace('l', 'L') }}", "héLLo"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(q) }}", "<héllo>"),
        ("{{ '{:,}, {}'.format(20000000, q) }}", "20,000,000, héllo"),
        ("{{ '%d' % 20000000 }}", "20000000"),
        ("{{ q | default(20000000) }} {{ none | default(20000000, true) }}", "héllo 20000000"),
        ("{{ q[1:3] }} {{ ['a', 'b'][1:] }} {{ namespace(a=q) }}", "él ['b'] <Namespace>"),
        ("{{ [3, 1, 2] | sort | list }} {{ 'aab' | unique | join }}", "[1, 2, 3] ab"),
        ("{{ [1, 2, 3] | select('odd') | sum }} {{ [1, 2] | map('string') | join }}", "4 12"),
        ("{{ 'a b c' | wordwrap(1) | indent(2) }}", "a\n  b\n  c"),
        ("{{ 2.567 | round(1) }} {{ 1234 | round(-2) | int }}", "2.6 1200"),
        ("{{ q | truncate(4, true, leeway=0) | center(6) }}|", " h... |"),
    ],
)  # fmt: skip
def test_what_templates_are_used_for_works(source: str, text: str) -> None:
    assert RowTemplate(source).render({"q": "héllo"}) == text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'x' * 10**9 }}", LONG),
        ("{{ [1] * 10**9 }}", LONG),
        ("{{ 'x' | center(1000000000) }}", LARGE),
        ("{{ 'x'.center(1000000000) }}", LARGE),
        ("{{ [1] | batch(1000000000, 1) | list }}", LARGE),
        ("{{ '%1000000000d' % 1 }}", "it pads text"),
        ("{{ '%*d' % (1000000000, 1) }}", LARGE),
        ("{{ '{:1000000000}'.format(1) }}", "it pads text"),
        ("{{ ('x' * 1000000) | replace('x', 'y' * 1000) }}", LONG),
        ("{{ ('y' * 1000).join(range(100000) | map('string')) }}", LONG),
        ("{{ range(100000) | map('string') | join('y' * 1000) }}", LONG),
        ("{{ 9 ** 999999 }}", "it computes a number"),
        ("{% for a in range(100000) %}{{ 'a' * 100000 }}{% endfor %}", LONG),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself"),
        ("{{ lipsum(1000) }}", "'lipsum' is undefined; defined: q"),
        ("{{ cycler(q).items }}", "'cycler' is undefined"),
        ("{{ 1 | round(-999999999) }}", LARGE),
        ("{{ q.encode('idna') }}", "access to attribute 'encode' of 'str' object is unsafe"),
        ("{{ (1).to_bytes(1000000000) }}", "'to_bytes' of 'int' object is unsafe"),
        ("{{ q.translate({120: 'y' * 1000}) }}", "'translate' of 'str' object is unsafe"),
        ("{{ q.expandtabs(1000000) }}", "'expandtabs' of 'str' object is unsafe"),
        ("{{ ('x' * 99999) | wordwrap(1) }}", "wordwrap is given more than 50,000 characters"),
        ("{{ ('x ' * 999) | wordwrap(1, true, 'y' * 99999) }}", LONG),
        ("{{ ('\n' * 1000) | indent(1000000) }}", LONG),
        ("{{ ('\n' * 1000) | indent('y' * 100000) }}", LONG),
        ("{{ ('{0:.999999f}' * 20).format(1.0) }}", LONG),
        ("{{ '{:{}}'.format(q, 1000000000) }}", LARGE),
        ("{{ ('f' * 999999) | int(0, 16) % 3 }}", "it computes a number of more than"),
        ("{% set n = namespace(a=3) %}{% for i in range(99999) %}"
         "{% set n.a = n.a * n.a %}{% endfor %}", "it computes a number of more than"),
        *((f"{{% set t = 'y' * 1000000 %}}{rest}", LONG) for rest in (
            "{{ [t] * 99 }}",
            "{{ " + " ~ ".join(["t"] * 99) + " }}",
            "{{ [" + ", ".join(["t"] * 99) + "] }}",
            "{{ ({'a': t}.values() | list) * 99 }}",
            "{% macro m() %}{{ varargs }}{% endmacro %}{{ m(" + ", ".join(["t"] * 99) + ") }}",
            "{% macro m() %}{{ varargs ~ 1 }}{% endmacro %}{{ m(" + ", ".join(["t"] * 99) + ") }}",
            "{% macro m() %}{{ '{}'.format(varargs) }}{% endmacro %}"
            "{{ m(" + ", ".join(["t"] * 99) + ") }}",
            "{% macro m() %}{{ kwargs | tojson }}{% endmacro %}"
            "{{ m(" + ", ".join(f"a{n}=t" for n in range(99)) + ") }}",
            "".join(f"{{% set a{n} = t[1:] %}}" for n in range(99)),
        )),
        *(
            (f"{{% set n = namespace(x='ab') %}}{{% for i in range(60) %}}"
             f"{{% set n.x = n.x {op} n.x %}}{{% endfor %}}{{{{ n.x }}}}", LONG)
            for op in "~+"
        ),
    ],
)  # fmt: skip
def test_a_template_that_makes_too_much_is_stopped_in_any_thread(
    source: str, message: str
) -> None:
    template = RowTemplate(source)
    with ThreadPoolExecutor(1) as pool, pytest.raises(TemplateFault, match=message):
        pool.submit(template.render, {"q": "x"}).result()


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in q %}{% for k in q %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
        "{% set n = namespace(l=[1]) %}{% for i in range(70) %}{% set n.l = [n.l, n.l] %}"
        "{% endfor %}{{ n.l }}",
        "{{ ('x' * 9999999) | sort }}",
        "{{ ('x' * 9999999) | reject('eq', 'x') | list }}",
        "{{ range(99999) | map('center', 100) | map('upper') | select('in', [1]) | list }}"
        "{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
    ],
)  # fmt: skip
def test_a_template_that_goes_on_for_hours_is_stopped(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.05)
    with pytest.raises(TemplateFault, match=f"{SLOW}|{LONG}"):
        RowTemplate(source).render({"q": "x" * 999})


def test_the_templates_of_a_row_share_one_budget() -> None:
    half = RowTemplate("{% for i in range(6) %}{{ 'x' * 1000000 }}{% endfor %}")
    assert len(half.render({})) == len(half.render({})) == 6_000_000
    with one_row(), pytest.raises(TemplateFault, match=LONG):
        half.render({})
        half.render({})


@pytest.mark.parametrize(
    "source", ["{{ " + "[" * 9999 + "]" * 9999 + " }}", "{{ " + "-" * 9999 + "1 }}"]
)
def test_a_template_nested_too_deep_is_refused(source: str) -> None:
    with pytest.raises(TemplateSyntaxFault, match="nested too deep"):
        RowTemplate(source)


def test_blocks_nested_too_deep_are_refused_whatever_the_recursion_limit() -> None:
    limit = sys.getrecursionlimit()
    try:
        for some in (limit, 20 * limit):  # torch's compiler raises it
            sys.setrecursionlimit(some)
            with pytest.raises(TemplateSyntaxFault, match="nested too deep"):
                RowTemplate("{% if 1 %}" * 300 + "{% endif %}" * 300)
    finally:
        sys.setrecursionlimit(limit)
