"""`mask_strategy`: makes a strategy from a single function that builds a mask."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import make_dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_type_hints, overload

from flexmask.errors import StrategyError
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod

    MaskModFactory = Callable[..., MaskMod]
    """``(batch, *, window: int = …) -> mask_mod``."""


@overload
def mask_strategy(factory: MaskModFactory) -> type[Strategy]: ...
@overload
def mask_strategy(*, is_causal: bool) -> Callable[[MaskModFactory], type[Strategy]]: ...
def mask_strategy(
    factory: MaskModFactory | None = None, *, is_causal: bool = True
) -> type[Strategy] | Callable[[MaskModFactory], type[Strategy]]:
    """Make a strategy class from a function that builds its mask_mod.

    The strategy has the function's name; listings show the first line of its docstring; its
    keyword-only arguments are the parameters. Layout and positions are those of ``causal``.

    Example::

        @mask_strategy
        def sliding(batch, *, window: int = parameter(1024, help="Tokens back.", minimum=1)):
            \"\"\"Each token sees the window that ends with it.\"\"\"
            return and_masks(causal, within_window(batch, window))

    Args:
        factory: As `Strategy.mask_mod`, with parameters; ``(batch, *, …) -> mask_mod``.
        is_causal: False if a token may see later tokens other than the tail.

    Raises:
        StrategyError: If an argument cannot be a parameter; the message says how to correct it.
    """
    if factory is None:
        return functools.partial(_make_class, is_causal=is_causal)
    return _make_class(factory, is_causal)


def _make_class(factory: MaskModFactory, is_causal: bool) -> type[Strategy]:
    @functools.wraps(factory)
    def mask_mod(self: Strategy, batch: LayoutBatch) -> MaskMod:
        return factory(batch, **self.parameter_values())

    namespace = {
        "__doc__": factory.__doc__,
        "name": factory.__name__,
        "is_causal": is_causal,
        "mask_mod": mask_mod,
    }
    cls = make_dataclass(
        factory.__name__, _fields(factory), bases=(Strategy,), namespace=namespace, frozen=True
    )
    # Python 3.12 would set the module of its caller, this one; 3.11 has no argument for it.
    cls.__module__, cls.__qualname__ = factory.__module__, factory.__qualname__
    return cls


def _fields(factory: MaskModFactory) -> list[tuple[str, Any, Any]]:
    """Return name, type and default of each parameter."""
    owner = f"strategy {factory.__name__!r}"
    arguments = list(inspect.signature(factory).parameters.values())
    if not arguments or arguments[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise StrategyError(f"{owner} does not take the batch as its first argument")
    batch, *parameters = arguments
    if len(arguments) == 4 and not any(item.kind is item.KEYWORD_ONLY for item in arguments):
        raise StrategyError(
            f"{owner} is a mask_mod itself; write a function of the batch that returns it: "
            f"def {factory.__name__}(batch): … return mask_mod"
        )
    for item in parameters:
        if item.kind is not item.KEYWORD_ONLY:
            raise StrategyError(
                f"{owner} takes {item.name!r} by position; write its parameters after a star: "
                f"def {factory.__name__}({batch.name}, *, {item.name}: …)"
            )
        if item.annotation is item.empty or item.default is item.empty:
            missing = "type" if item.annotation is item.empty else "default"
            raise StrategyError(f"parameter {item.name!r} of {owner} has no {missing}")
    annotations = {item.name: item.annotation for item in parameters}
    hints = get_type_hints(SimpleNamespace(__annotations__=annotations), factory.__globals__)
    return [(item.name, hints[item.name], item.default) for item in parameters]
