"""Renders Jinja templates of tasks, sandboxed and bounded in time and size.

A template is a program from a file that may not be trusted. Jinja's sandbox isolates it from the
machine, but lets it loop for hours or build ``"x" * 10**12``. Here every loop, call, filter and
operator of a template draws on a budget, which works in any thread; signals do not.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.meta import find_undeclared_variables
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from flexmask.errors import FlexMaskError

MAX_SECONDS = 1.0
"""Limit of the CPU time (not wall time) that the templates of a row may take together."""

MAX_CHARACTERS = 16 * 2**20
"""Limit of the characters and list items that the templates of a row may create together."""

MAX_NUMBER = 10**6
"""Limit of the number to which one call may pad or repeat text."""

_MAX_BITS = 10**5
_MAX_WRAPPED = 50_000
"""Limit of the characters that ``wordwrap`` takes, because its time is quadratic in them."""

_REMOVED_GLOBALS = ("lipsum", "cycler")
_REMOVED_FILTERS = ("urlize",)
"""Globals and filters that prompts do not need, or whose time or output cannot be charged."""

_REMOVED_METHODS = ("encode", "expandtabs", "from_bytes", "maketrans", "to_bytes", "translate")
"""Methods of texts and numbers whose output may be much larger than their arguments."""

_BY_ITEM = frozenset(
    "batch groupby list map max min reject rejectattr select selectattr sort sum unique".split()
)
"""Filters that iterate over the items of a value; each item checks the budget."""

_HOLDERS = (list, tuple, dict, MappingView)
_STEPS = "__steps"
_TOO_LONG = f"it makes more than {MAX_CHARACTERS:,} characters for one row; make it shorter"
_LONG_NUMBER = re.compile(r"\d{7,}")
_NUMBER = re.compile(r"\d+")
_NESTED_FIELD = re.compile(r"\{[^{}]*\{")


class TemplateSyntaxFault(Exception):
    """A template cannot be compiled; the message gives line and reason."""


class TemplateFault(Exception):
    """A template cannot be rendered; the message gives the reason."""


class _LimitError(FlexMaskError):
    """A template exceeds its budget."""


class Budget:
    """The remaining time and size that the templates of one row may use."""

    def __init__(self) -> None:
        """Start with the full budget."""
        self._ends_at = time.thread_time() + MAX_SECONDS
        self._left = MAX_CHARACTERS

    def spend(self, size: int = 0) -> None:
        """Subtract ``size`` characters, and check the CPU time.

        Raises:
            FlexMaskError: If either is used up.
        """
        self._left -= size
        if self._left < 0:
            raise _LimitError(_TOO_LONG)
        if time.thread_time() > self._ends_at:
            raise _LimitError(
                f"it takes more than {MAX_SECONDS:g} s of CPU time for one row; make it simpler"
            )


_budget: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def one_row() -> Iterator[None]:
    """Let all templates rendered in this context share one budget."""
    token = _budget.set(Budget())
    try:
        yield
    finally:
        _budget.reset(token)


class RowTemplate:
    """A compiled template, rendered from the columns of a row."""

    def __init__(self, source: str) -> None:
        """Compile a template.

        Raises:
            TemplateSyntaxFault: If it cannot be compiled.
        """
        environment = _BoundedEnvironment()
        try:
            self._names = find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except (RecursionError, MemoryError, IndentationError):
            # From the parser, and from Python's compiler, which reports a hundred levels of
            # blocks as an error of indentation if the recursion limit of the process is high.
            raise TemplateSyntaxFault("nested too deep; write it flatter") from None
        except (TemplateError, SyntaxError) as error:
            line = getattr(error, "lineno", None)
            reason = error.message if isinstance(error, TemplateSyntaxError) else str(error)
            raise TemplateSyntaxFault(f"line {line}: {reason}" if line else reason) from None

    def render(self, columns: Mapping[str, Any], **more: str) -> str:
        """Render the template; columns that it does not name are not read.

        Args:
            columns: Columns of the row.
            **more: More variables, which take precedence over columns of the same name.

        Raises:
            TemplateFault: If rendering fails or exceeds the budget.
            RequestError: If a column cannot be read.
        """
        if _budget.get(None) is None:
            with one_row():
                return self.render(columns, **more)
        values = {name: columns[name] for name in self._names if name in columns}
        values |= {name: text for name, text in more.items() if name in self._names}
        parts: list[str] = []
        try:
            for part in self._template.generate(values):
                _spend(len(part))
                parts.append(part)
        except _LimitError as error:
            raise TemplateFault(str(error)) from None
        except RecursionError:
            raise TemplateFault("it calls itself, or prints a list, too deep") from None
        except Exception as error:  # a template is a program: it may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            defined = ", ".join(dict.fromkeys([*columns, *more]))
            raise TemplateFault(f"{reason}; defined: {defined}") from None
        return "".join(parts)


class _BoundedCode(CodeGenerator):
    """Generates the Python code of templates, in which ``~`` and ``[…]`` draw on the budget."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(environment.printed, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._made(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._made(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._made(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _made(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")


class _Namespace(Namespace):
    """The object that ``namespace()`` makes, whose representation does not include its content."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which everything that takes time or creates text draws on the budget."""

    code_generator_class = _BoundedCode
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        # Not optimized, because constant folding would evaluate expressions outside the budget.
        super().__init__(
            undefined=StrictUndefined,
            keep_trailing_newline=True,
            autoescape=False,
            optimized=False,
            finalize=self.printed,
        )
        for name in _REMOVED_GLOBALS:
            del self.globals[name]
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        self.globals["namespace"] = _Namespace
        for name, filter_ in self.filters.items():
            self.filters[name] = _metered(name, filter_)
        self.filters[_STEPS] = _steps

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        for loop in source.find_all(nodes.For):
            loop.iter = nodes.Filter(
                loop.iter, _STEPS, [], [], None, None, lineno=loop.iter.lineno
            )
        return super()._generate(source, *arguments, **options)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        is_removed = attr in _REMOVED_METHODS and isinstance(obj, str | bytes | int | type)
        return not is_removed and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return _made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, *arguments: Any, **options: Any) -> Any:
        _spend()
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int):
            name = getattr(method, "__name__", "")
            _check_call(name, [owner, *arguments, *options.values()])
            if name == "join" and arguments:
                arguments = (_texts_of(arguments[0], owner), *arguments[1:])
        return _made(super().call(context, function, *arguments, **options))

    def made(self, value: Any) -> Any:
        """Charge the size of a value; called by the generated code."""
        return _made(value)

    def printed(self, value: Any) -> str:
        """Convert a value to text; the size of a container is charged first."""
        if isinstance(value, _HOLDERS):
            _made(value)
        return str(value)

    def concat(self, parts: Iterable[str]) -> str:
        """Join the output of a macro or a block."""
        kept = []
        for part in parts:
            _spend(len(part))
            kept.append(part)
        return "".join(kept)


def _spend(size: int = 0) -> None:
    budget = _budget.get(None)
    if budget is not None:
        budget.spend(size)


def _made(value: Any) -> Any:
    """Charge the length of a text, or of everything nested in a container.

    An iterator checks the budget for each item that is read from it.
    Lists that each hold the next one twice are small to build, but exponentially large when they
    are printed or compared.
    """
    if isinstance(value, Iterator):
        return _steps(value)
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise _LimitError(f"it computes a number of more than {_MAX_BITS:,} bits")
    if isinstance(value, _HOLDERS):
        holders = [value]
        while holders:
            held: Any = holders.pop()
            items = [*held, *held.values()] if isinstance(held, dict) else [*held]
            _spend(len(items) + sum(len(item) for item in items if isinstance(item, str | bytes)))
            holders += [item for item in items if isinstance(item, _HOLDERS)]
    elif isinstance(value, Sized):
        _spend(len(value))
    return value


def _steps(items: Iterable[Any]) -> Iterator[Any]:
    """Yield the items of a loop; each checks the budget."""
    for item in items:
        _spend()
        yield item


def _texts_of(items: Any, separator: Any) -> Iterator[Any]:
    """Yield the items to be joined; each is charged by its length."""
    beside = len(separator) if isinstance(separator, Sized) else 0
    for item in items:
        _spend(beside + (len(item) if isinstance(item, Sized) else 0))
        yield item


def _metered(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that it draws on the budget."""
    position = int(hasattr(filter_, "jinja_pass_arg"))  # of the value, which follows the context

    def metered(*arguments: Any, **options: Any) -> Any:
        _spend()
        before, value, more = arguments[:position], arguments[position], arguments[position + 1 :]
        if name == "join":
            separator = more[0] if more else options.get("d", "")
            value = _texts_of(value, separator)
        else:
            _check_call(name, [value, *more, *options.values()])
            if name in _BY_ITEM:
                value = _steps(value)
        return _made(filter_(*before, value, *more, **options))

    for key, value in getattr(filter_, "__dict__", {}).items():
        setattr(metered, key, value)  # such as the marker that makes Jinja pass its context
    return metered


def _check_call(name: str, values: list[Any]) -> None:
    """Refuse a call before it creates text beyond the limits.

    Args:
        name: Name of the method or filter.
        values: The object that it is called on, and the arguments.
    """
    for value in values:
        if isinstance(value, _HOLDERS) and not isinstance(value, list):
            _made(value)  # such as the arguments of a macro, which have not been charged yet
    texts = [_text_of(value) for value in values if isinstance(value, str | bytes)]
    if name in ("d", "default") or not (texts or name in ("batch", "slice", "round")):
        return
    if name in ("format", "format_map"):
        _check_format(texts[0], values)
        return
    _check_numbers(name, values)
    lengths = [*map(len, texts)]
    if name == "replace" and len(texts) > 2:
        _check_size(texts[0].count(texts[1]) * lengths[2])
    elif name == "indent":
        widths = [value for value in values if isinstance(value, int)]
        _check_size(texts[0].count("\n") * max([*widths, *lengths[1:], 4]))
    elif name == "wordwrap":
        if lengths[0] > _MAX_WRAPPED:
            raise _LimitError(f"wordwrap is given more than {_MAX_WRAPPED:,} characters")
        _check_size(lengths[0] * max(lengths[1:], default=1))


def _text_of(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def _check_numbers(name: str, values: Iterable[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > MAX_NUMBER for value in values):
        raise _LimitError(f"{name} is given a number of more than {MAX_NUMBER:,}; make it smaller")


def _check_format(text: str, values: list[Any]) -> None:
    """Refuse a format whose fields are too wide; ``*`` and nested fields take widths as values."""
    if _LONG_NUMBER.search(text):
        raise _LimitError(f"it pads text to more than {MAX_NUMBER:,}; make it shorter")
    widths = [*map(int, _NUMBER.findall(text))]
    if "*" in text or _NESTED_FIELD.search(text):
        _check_numbers("a format", values)
        widths += [abs(value) for value in values if isinstance(value, int)]
    lengths = [len(value) for value in values if isinstance(value, Sized)]
    _check_size((text.count("%") + text.count("{")) * max([*widths, *lengths], default=0))


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise _LimitError(_TOO_LONG)


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "*":
        for value, number in ((left, right), (right, left)):
            if isinstance(value, Sized) and isinstance(number, int):
                _check_size(len(value) * number)
    elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
        _check_size(len(left) + len(right))
    elif operator == "%" and isinstance(left, str | bytes):
        _check_format(_text_of(left), [*right] if isinstance(right, tuple) else [right])
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        bits = bits * max(right, 1) if operator == "**" else bits + right.bit_length()
        if bits > _MAX_BITS:
            raise _LimitError(f"it computes a number of more than {_MAX_BITS:,} bits")
