"""The table of all rules of interval arithmetic, and the rule of casts."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from flexmask.block_mask.intervals.arithmetic_rules import ARITHMETIC, WHERE
from flexmask.block_mask.intervals.interval import Ends, Interval
from flexmask.block_mask.intervals.interval_rule import COMMON, INTEGERS, Rule, fits
from flexmask.block_mask.intervals.logic_rules import LOGIC, nonzero
from flexmask.block_mask.intervals.stand_in import NoIntervalRule


def cast_ends(value: Interval, dtype: torch.dtype) -> Ends | None:
    """Return the ends of ``value.to(dtype)``.

    Raises:
        NoIntervalRule: If the dtype is not a common one: one-byte floats become NaN when they
            overflow, and unsigned integers wrap around.
    """
    if dtype not in COMMON:
        raise NoIntervalRule(f"a cast to {dtype}")
    source = value.dtype
    if dtype == torch.bool:
        return nonzero(value)
    if dtype in INTEGERS and source != torch.bool and not fits(value.bounds, dtype):
        return None
    return value.ends.to(dtype)


def _named(names: str) -> set[Callable[..., Any]]:
    """Return the functions of torch, Tensor and operator that have one of the names."""
    homes = (torch, torch.Tensor, operator)
    found = (getattr(home, name, None) for name in names.split() for home in homes)
    return {function for function in found if callable(function)}


def _rules() -> dict[Callable[..., Any], Rule]:
    rules = {
        function: rule
        for names, rule in (ARITHMETIC | LOGIC).items()
        for function in _named(names)
    }
    return rules | {torch.where: WHERE}


RULES = _rules()
"""The rules by torch function, Tensor method and Python operator."""
