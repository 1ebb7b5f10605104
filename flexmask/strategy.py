"""Mask strategies: the base class, and the declaration and checks of its parameters."""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Self,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from flexmask import display
from flexmask.error_text import described
from flexmask.errors import StrategyError
from flexmask.layout import Layout, TokenizedRequest, shared_prefix_layout
from flexmask.limits import LARGEST_SIZE, shown_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from flexmask.layout_batch import LayoutBatch
    from flexmask.mod_types import MaskMod, RowMod, ScoreMod

ParameterValue = bool | int | float | str

LONGEST_NAME = 80
"""Characters of a strategy's name, which names files of results too."""


def parameter(default: Any, *, help: str, minimum: float | None = None) -> Any:
    """Declare a parameter of a strategy.

    Example::

        window: int = parameter(1024, help="How many tokens back a token sees.", minimum=1)

    Args:
        default: The default value.
        help: A description, for listings.
        minimum: The smallest value allowed. A class that defines ``__post_init__`` must call
            ``super().__post_init__()`` in it, which checks the minimum.
    """
    return field(default=default, metadata={"help": help, "minimum": minimum})


@dataclass(frozen=True)
class Parameter:
    """A declared parameter, for listings."""

    name: str
    type: str
    default: ParameterValue
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None


@dataclass(frozen=True)
class ScaledPart:
    """A part of the keys whose total attention weight is scaled for some queries.

    The log-sum-exp of the scores of these keys is multiplied by ``scale``. Their weights keep
    their proportions among each other, and gain or lose against all other keys.

    Attributes:
        queries: ``(b, q_idx) -> bool tensor``, in slots: True for the queries. None of them may
            be one of the keys.
        keys: ``(b, kv_idx) -> bool tensor``, in slots: True for keys of the part.
        scale: The factor; 1 changes nothing.
    """

    queries: RowMod
    keys: RowMod
    scale: float


class Strategy(ABC):
    """Decides which tokens each token sees, and the position of each token.

    A strategy is a frozen dataclass whose fields are its parameters, so that two strategies
    with equal parameters are equal and a BlockMask can be cached by them. Listings show the first
    line of its docstring. Only `name` and `mask_mod` are required; `flexmask.mask_strategy` makes
    such a class from a function.
    """

    name: ClassVar[str]
    """The name by which users select it: lower-case letters, digits and underscores."""

    is_causal: ClassVar[bool] = True
    """True if no token sees a later one; if False, tokens before the tail still do not see it."""

    if TYPE_CHECKING:

        def __init__(self, **parameters: ParameterValue) -> None:
            """Accept parameters by name, for type checkers that know only `type[Strategy]`."""

    def __post_init__(self) -> None:
        """Check that parameters are at least their minimum, and that masks can compute with them.

        Raises:
            StrategyError: If one is too small, not finite, or an integer of more than 32 bits.
        """
        for item in _fields(type(self)):
            minimum, value = item.metadata.get("minimum"), getattr(self, item.name)
            if isinstance(value, int) and abs(value) > LARGEST_SIZE:
                raise StrategyError(
                    f"{item.name} must be at most {LARGEST_SIZE:,}, got {shown_number(value)}"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise StrategyError(f"{item.name} must be finite, got {value}")
            if minimum is not None and value < minimum:
                bounds = {0: "not be negative", 1: "be positive"}
                bound = bounds.get(minimum, f"be at least {minimum}")
                raise StrategyError(f"{item.name} must {bound}, got {value}")

    @abstractmethod
    def mask_mod(self, batch: LayoutBatch) -> MaskMod:
        """Build the mask of a batch.

        Args:
            batch: Segment ids and positions of each row, ``(B, capacity)`` each, in buffers
                whose content changes from batch to batch.

        Returns:
            A pointwise function of ``(b, h, q_idx, kv_idx)``, which are slots of the row, that
            captures only tensors of ``batch`` and constants. It may ignore slots without a
            token, which the core masks.
        """

    def score_mod(self, batch: LayoutBatch) -> ScoreMod | None:
        """Build a change of attention scores: a temperature, a scale, a bias. Default: none.

        Under `flexmask.Engine` it applies after the model's own scaling and capping. Attention
        then always runs in FlexAttention. Tokens whose scores it may change share no keys and
        values with other prompts; `scored_queries` says which these are.

        Args:
            batch: As for `mask_mod`.

        Returns:
            A pointwise function of ``(score, b, h, q_idx, kv_idx)``, indices in slots, that
            captures what a mask_mod may capture.
        """
        return None

    def scored_queries(self, batch: LayoutBatch) -> RowMod | None:
        """Name the queries whose scores `score_mod` may change. Default: None, for all queries.

        `score_mod` is applied to these queries only, whatever it computes for others.

        Args:
            batch: As for `mask_mod`.

        Returns:
            ``(b, q_idx) -> bool tensor``, in slots.
        """
        return None

    def scaled_part(self, batch: LayoutBatch) -> ScaledPart | None:
        """Build a scaling of the total weight of a part of the keys. Default: none.

        Under `flexmask.Engine` it applies after `score_mod`; attention then runs three times.

        Args:
            batch: As for `mask_mod`; the functions may capture what a mask_mod may.
        """
        return None

    def changes_scores(self, batch: LayoutBatch) -> bool:
        """Return True if the strategy has a `score_mod` or a `scaled_part`."""
        return bool(self.changed_queries(batch))

    def applied_score_mod(self, batch: LayoutBatch) -> ScoreMod | None:
        """Return `score_mod` as it is applied: to `scored_queries` only."""
        score_mod, queries = self.score_mod(batch), self.scored_queries(batch)
        if score_mod is None or queries is None:
            return score_mod

        def of_scored_queries(
            score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
        ) -> Tensor:
            changed = score_mod(score, b, h, q_idx, kv_idx)
            return changed.where(queries(b, q_idx), score)

        return of_scored_queries

    def changed_queries(self, batch: LayoutBatch) -> tuple[RowMod, ...]:
        """Return functions of ``(b, q_idx)``; if none is true, scores of a query do not change."""
        changed: list[RowMod] = []
        if self.score_mod(batch) is not None:
            changed.append(self.scored_queries(batch) or _every_query)
        if (part := self.scaled_part(batch)) is not None:
            changed.append(part.queries)
        return tuple(changed)

    def layout(self, request: TokenizedRequest) -> Layout:
        """Plan a request: storage order and positions. Default: that of `causal`."""
        return shared_prefix_layout(request, "sequential")

    def allowed(self, layout: Layout, q_idx: int, kv_idx: int) -> bool:
        """Return in plain Python whether slot ``q_idx`` sees slot ``kv_idx``: the oracle.

        `flexmask check` compares `mask_mod` with it; nothing else calls it.
        """
        raise NotImplementedError(f"strategy {self.name!r} has no plain-Python oracle")

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]

    @classmethod
    def source(cls) -> str:
        """Return where its mask_mod is defined, as ``path:line``."""
        code = getattr(inspect.unwrap(cls.mask_mod), "__code__", None)
        if code is None:  # a callable object, not a function
            return f"{inspect.getsourcefile(cls)}:1"
        return f"{code.co_filename}:{code.co_firstlineno}"

    @classmethod
    def parameters(cls) -> tuple[Parameter, ...]:
        """Return the declared parameters, in order."""
        hints = get_type_hints(cls)
        return tuple(
            Parameter(
                name=item.name,
                type=_type_name(hints[item.name]),
                default=cast(ParameterValue, item.default),
                help=item.metadata.get("help", ""),
                choices=get_args(hints[item.name]) if _is_choice(hints[item.name]) else (),
                minimum=item.metadata.get("minimum"),
            )
            for item in _fields(cls)
        )

    @classmethod
    def from_parameters(cls, values: Mapping[str, ParameterValue]) -> Self:
        """Create the strategy from parameter values; strings are parsed to the declared type.

        Raises:
            StrategyError: If a name is unknown or a value is not of the declared type.
        """
        hints = get_type_hints(cls)
        known = [item.name for item in _fields(cls)]
        for name in values:
            if name not in known:
                takes = ", ".join(known) or "none"
                raise StrategyError(
                    f"strategy {cls.name!r} has no parameter {name!r}; it takes: {takes}"
                )
        parsed = {name: _parse(name, value, hints[name]) for name, value in values.items()}
        return cls(**parsed)

    def parameter_values(self) -> dict[str, ParameterValue]:
        """Return name and value of each parameter."""
        return {item.name: getattr(self, item.name) for item in _fields(type(self))}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the mask on a small request, with matplotlib (``flexmask[plot]``)."""
        return display.plot(self, ax)

    def _repr_html_(self) -> str:
        return display.html(self)


def _every_query(b: Tensor, q_idx: Tensor) -> Tensor:
    return q_idx >= 0


def check_strategy_class(cls: object) -> type[Strategy]:
    """Check an object that `register_strategies` returned.

    Raises:
        StrategyError: If it is not a usable strategy class; the message says how to correct it.
    """
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        raise StrategyError(f"expected a subclass of flexmask.Strategy, got {cls!r}")
    name = getattr(cls, "name", None)
    is_name = isinstance(name, str) and name.isidentifier() and name == name.lower()
    if not is_name or len(str(name)) > LONGEST_NAME:
        raise StrategyError(
            f"{cls.__qualname__}.name must be lower-case letters, digits and underscores, at most "
            f"{LONGEST_NAME}, got {name!r}"
        )
    if cls.__abstractmethods__:
        raise StrategyError(f"strategy {name!r} does not define mask_mod(self, batch)")
    parameters: Any = cls.__dict__.get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise StrategyError(f"strategy {name!r} must be decorated with @dataclass(frozen=True)")
    for item in _fields(cls):
        if item.default is MISSING:
            raise StrategyError(f"parameter {item.name!r} of strategy {name!r} has no default")
        hint = get_type_hints(cls)[item.name]
        if isinstance(item.default, str) and hint in (bool, int, float):
            raise _wrong_type(item.name, item.default, hint)
        _parse(item.name, item.default, hint)
    if not callable(cls.mask_mod):
        raise StrategyError(f"strategy {name!r} has no method mask_mod, got {cls.mask_mod!r}")
    _check_defaults(cls)
    return cls


def _check_defaults(cls: type[Strategy]) -> None:
    """Make a strategy with its defaults, and what listings show of it.

    Raises:
        StrategyError: If its own code fails in that, which would fail whatever lists strategies.
    """
    try:
        cls.parameters()
        summary = cls.summary()
        cls()
    except StrategyError:
        raise
    except Exception as error:
        raise StrategyError(
            f"strategy {cls.name!r} cannot be made with its defaults, or listed: "
            f"{described(error)}"
        ) from error
    if not isinstance(summary, str):
        raise StrategyError(f"strategy {cls.name!r}: its summary must be a text, got {summary!r}")


def _fields(cls: type[Strategy]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def _is_choice(hint: Any) -> bool:
    return get_origin(hint) is Literal


def _type_name(hint: Any) -> str:
    if _is_choice(hint):
        return "|".join(get_args(hint))
    if hint in (bool, int, float, str):
        return str(hint.__name__)
    raise StrategyError(f"a parameter's type must be bool, int, float, str or Literal, got {hint}")


def _wrong_type(name: str, value: ParameterValue, hint: Any) -> StrategyError:
    return StrategyError(f"{name} must be {_type_name(hint)}, got {value!r}")


def _parse(name: str, value: ParameterValue, hint: Any) -> ParameterValue:
    expected = _wrong_type(name, value, hint)
    if _is_choice(hint):
        if value not in get_args(hint):
            raise expected
        return value
    if isinstance(value, bool) and hint is not bool:
        raise expected
    if hint is bool and isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise expected
        return value.lower() == "true"
    if isinstance(value, str) or (hint is float and isinstance(value, int)):
        try:
            parsed: ParameterValue = hint(value)
        except (ValueError, OverflowError):
            raise expected from None
        return parsed
    if not isinstance(value, hint):
        raise expected
    return cast(ParameterValue, value)
