"""Random mask_mods, written as source that a user could have written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, or_masks

ROWS = 3
"""Batch rows, and heads, that captured tensors serve."""
LENGTH = 192
"""Positions that captured tensors serve."""


def captured_tensors(seed: int) -> dict[str, Tensor]:
    """Tensors of many dtypes and shapes for masks to capture."""
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=g).to(dtype)

    odd_floats = torch.randn(LENGTH, generator=g)
    odd_floats[::17], odd_floats[5::31], odd_floats[7::37] = torch.nan, torch.inf, -torch.inf
    return {
        "ids": integers(0, 6, LENGTH, dtype=torch.int32).sort()[0],
        "rows": integers(0, 6, ROWS, LENGTH, dtype=torch.int64).sort()[0],
        "ends": integers(1, LENGTH, LENGTH, dtype=torch.int64).sort()[0],
        "bits": integers(0, 256, LENGTH, dtype=torch.uint8),
        "tiny": integers(-128, 128, LENGTH, dtype=torch.int8).sort()[0],
        "short": integers(-300, 300, LENGTH, dtype=torch.int16),
        "per_head": integers(0, 40, ROWS, ROWS, LENGTH, dtype=torch.int32),
        "windows": integers(1, 60, ROWS, dtype=torch.int64),
        "flags": integers(0, 2, LENGTH, dtype=torch.bool).sort()[0],
        "allow": integers(0, 2, 6, 6, dtype=torch.bool),
        "dense": integers(0, 2, LENGTH, LENGTH, dtype=torch.bool).sort()[0],
        "cube": integers(0, 5, ROWS, LENGTH, LENGTH, dtype=torch.int8).sort(1)[0],
        "weights": torch.randn(LENGTH, generator=g).sort()[0] * 50,
        "halves": torch.randn(ROWS, LENGTH, generator=g).half(),
        "odd_floats": odd_floats,
        "seven": torch.tensor(7),
        "three_hundred": torch.tensor(300, dtype=torch.int32),
        "minus_two": torch.tensor(-2, dtype=torch.int8),
        "tenth": torch.tensor(0.1, dtype=torch.float64),
        "yes": torch.tensor(True),
    }


@dataclass(frozen=True)
class RandomMask:
    """A mask_mod and its source."""

    source: str
    form: str
    seed: int

    def mask_mod(self, device: str = "cpu") -> Callable[..., Tensor]:
        """Compile the source, with fresh captured tensors."""
        captured = {name: x.to(device) for name, x in captured_tensors(self.seed).items()}
        source = f"lambda b, h, q_idx, kv_idx: {self.source}"
        return FORMS[self.form](eval(source, {"torch": torch, **captured}))


class CallableMask:
    """A mask_mod that is an object."""

    def __init__(self, mask_mod: Callable[..., Tensor]) -> None:
        self.mask_mod = mask_mod

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Tensor:
        return self.mask_mod(b, h, q_idx, kv_idx)


def _nested(mask_mod: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def outer(limit: Tensor) -> Callable[..., Tensor]:
        def inner(b: Any, h: Any, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return mask_mod(b, h, q_idx, kv_idx) & (kv_idx < limit)

        return inner

    return outer(torch.tensor(150))


def _with_window(
    b: Any, h: Any, q_idx: Tensor, kv_idx: Tensor, *, mask_mod: Callable[..., Tensor], window: int
) -> Tensor:
    return mask_mod(b, h, q_idx, kv_idx) | ((q_idx - kv_idx).abs() < window)


def _causal(b: Any, h: Any, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


FORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]] = {
    "lambda": lambda mask_mod: mask_mod,
    "object": CallableMask,
    "nested": _nested,
    "partial": lambda m: functools.partial(_with_window, mask_mod=m, window=5),
    "and_masks": lambda mask_mod: and_masks(_causal, mask_mod),
    "or_masks": lambda mask_mod: or_masks(_causal, mask_mod),
}

POSITIONS = ("q_idx", "kv_idx", "(q_idx + 3)", "(kv_idx - 5)", "(q_idx - kv_idx)")
INTEGERS = (
    "q_idx",
    "kv_idx",
    "q_idx",
    "kv_idx",
    "b",
    "h",
    "windows[h]",
    "windows[b]",
    "seven",
    "three_hundred",
    "minus_two",
)
TABLES = (
    "ids[{}]",
    "rows[b, {}]",
    "rows[b][{}]",
    "rows[:, {}][b]",
    "rows[..., {}][h]",
    "rows[1, {}]",
    "ends[{}]",
    "bits[{}]",
    "tiny[{}]",
    "short[{}]",
    "per_head[b, h, {}]",
    "per_head[h][b, {}]",
    "cube[b, {}, {}]",
    "cube[h, q_idx, kv_idx]",
    "rows[b].int()[{}]",
)
BOOLS = ("flags[{}]", "allow[ids[{}], rows[b, {}]]", "dense[{}, {}]", "dense[q_idx, kv_idx]")
KEPT_DIMENSIONS = (
    "(rows[b] + windows[h])[{}]",
    "per_head[b].amax(0)[{}]",
    "(rows[:, {}] == 3).sum()",
    "(per_head[b, :, {}] < windows).all(-1).int()",
)
"""Integers from dimensions that a table keeps, which no interval follows."""
FLOATS = ("weights[{}]", "halves[h, {}]", "odd_floats[{}]", "tenth")
COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")


class _Source:
    """Draws source of each type; ``depth`` bounds how deep expressions nest."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def pick(self, *choices: str) -> str:
        return self.draw(st.sampled_from(choices))

    def filled(self, template: str, depth: int) -> str:
        return template.format(*(self.position(depth) for _ in range(template.count("{}"))))

    def constant(self) -> str:
        return str(self.draw(st.integers(-40, 120)))

    def position(self, depth: int) -> str:
        """An index within ``[-LENGTH, LENGTH)``."""
        kind = self.draw(st.integers(0, 5)) if depth > 0 else 0
        if kind <= 2:
            return self.pick(*POSITIONS)
        if kind == 3:
            return f"({self.tensor(depth - 1)}.long() % {LENGTH})"
        if kind == 4:
            return f"{self.tensor(depth - 1)}.long().clamp({self.pick('0', '-9')}, {LENGTH - 1})"
        return f"torch.where({self.bool(depth - 1)}, q_idx, kv_idx)"

    def integer(self, depth: int) -> str:
        """An integer tensor or Python number."""
        return self.constant() if self.draw(st.integers(0, 3)) == 0 else self.tensor(depth)

    def tensor(self, depth: int) -> str:
        """An integer tensor."""
        kind = self.draw(st.integers(0, 11)) if depth > 0 else self.draw(st.integers(0, 1))
        if kind == 0:
            return self.pick(*INTEGERS)
        if kind == 1:
            return self.filled(self.pick(*TABLES), depth - 1)
        a = self.tensor(depth - 1)
        if kind <= 4:
            return f"({a} {self.pick('+', '-', '*')} {self.integer(depth - 1)})"
        if kind == 5:
            divisor = self.pick("2", "3", "7", "16", "-3", "seven", f"({a}.abs() + 1)")
            return f"({a} {self.pick('//', '%')} {divisor})"
        if kind == 6:
            return self.pick(
                f"{a}.abs()", f"(-{a})", f"(~{a})", f"({a} ** 2)", f"{a}.square()", f"{a}.sign()"
            )
        if kind == 7:
            b = self.tensor(depth - 1)
            name = self.pick("minimum", "maximum", "min", "max")
            return self.pick(
                f"torch.{name}({a}, {b})",
                f"{a}.{name}({b})",
                f"{a}.clamp(-7, 90)",
                f"torch.clamp({a}, max=50)",
                f"{a}.clip(min={b})",
                f"{a}.clamp_min(3)",
            )
        if kind == 8:
            condition = self.bool(depth - 1)
            return self.pick(
                f"torch.where({condition}, {a}, {self.integer(depth - 1)})",
                f"{a}.where({condition}, {self.tensor(depth - 1)})",
            )
        if kind == 9:
            c = self.pick(self.tensor(depth - 1), "5", "12", "1", "-16")
            return self.pick(f"({a} {self.pick('&', '|', '^')} {c})", f"({a} << 2)", f"({a} >> 3)")
        if kind == 10:
            dtype = self.pick("int8", "int16", "int32", "int64", "uint8")
            return self.pick(
                f"{a}.to(torch.{dtype})",
                f"{a}.type(torch.{dtype})",
                f"{a}.type_as({self.tensor(0)})",
                f"{a}.to(q_idx.device, dtype=torch.{dtype})",
                f"{a}.long()",
            )
        return self.pick(
            f"({self.bool(depth - 1)}).int()",
            f"torch.gcd({a}, {a} + 6)",
            self.filled(self.pick(*KEPT_DIMENSIONS), 0),
            f"torch.div({a}, 4, rounding_mode='{self.pick('trunc', 'floor')}')",
            f"torch.full_like({a}, 11)",
            f"({a} + b.new_ones(()))",
            f"torch.sub({a}, kv_idx, alpha=2)",
            f"({self.integer(0)} - {a})",
            f"torch.fmod({a}, 9)",
            f"({a}.float() / 3).{self.pick('floor', 'ceil', 'round', 'trunc')}().long()",
        )

    def float(self, depth: int) -> str:
        kind = self.draw(st.integers(0, 4)) if depth > 0 else 0
        if kind == 0:
            return self.filled(self.pick(*FLOATS), depth - 1)
        if kind == 1:
            return f"{self.tensor(depth - 1)}.{self.pick('float', 'double')}()"
        if kind == 2:
            divisor = self.pick("3", "0.7", "-2.5", self.tensor(0))
            return f"({self.tensor(depth - 1)} / {divisor})"
        a = self.float(depth - 1)
        if kind == 3:
            other = self.pick("0.5", "2", self.float(depth - 1), self.tensor(depth - 1))
            return f"({a} {self.pick('+', '-', '*')} {other})"
        return self.pick(
            f"torch.sqrt({a}.abs())", f"{a}.floor()", f"(-{a})", f"{a}.clamp(min=-3)", f"({a} % 3)"
        )

    def bool(self, depth: int) -> str:
        kind = self.draw(st.integers(0, 8)) if depth > 0 else self.draw(st.integers(0, 1))
        if kind <= 2:
            comparison = self.pick(*COMPARISONS)
            return f"({self.tensor(depth - 1)} {comparison} {self.integer(depth - 1)})"
        if kind == 3:
            return self.filled(self.pick(*BOOLS, "yes"), depth - 1)
        if kind == 4:
            other = self.pick("0", "0.5", self.float(depth - 1), self.tensor(depth - 1))
            return f"({self.float(depth - 1)} {self.pick(*COMPARISONS)} {other})"
        a = self.bool(depth - 1)
        if kind == 5:
            return self.pick(
                f"(~{a})", f"torch.logical_not({a})", f"{self.tensor(depth - 1)}.bool()"
            )
        b = self.bool(depth - 1)
        if kind == 8:
            return self.pick(
                f"torch.where({a}, {b}, {self.bool(depth - 1)})",
                f"({a} == {b})",
                f"torch.isnan({self.float(depth - 1)})",
            )
        name = self.pick("and", "or", "xor")
        return self.pick(
            f"({a} {self.pick('&', '|', '^')} {b})", f"torch.logical_{name}({a}, {b})"
        )


@st.composite
def random_masks(draw: st.DrawFn, depth: int = 4) -> RandomMask:
    """Draw a mask_mod that depends on a query and a key somewhere."""
    source = _Source(draw).bool(depth)
    return RandomMask(source, draw(st.sampled_from(sorted(FORMS))), draw(st.integers(0, 9)))
