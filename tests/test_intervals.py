"""Interval answers must hold for every pair of their cell."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from flexmask.block_mask.intervals.evaluator import MaskEvaluator
from flexmask.block_mask.intervals.interval import Interval, Span, exact_index
from flexmask.block_mask.intervals.stand_in import NoIntervalRule
from flexmask.errors import MaskError
from mask_grammar import RandomMask, random_masks

CPU = torch.device("cpu")
Q_LEN, KV_LEN = 50, 41


def cells(length: int, width: int, evaluator: MaskEvaluator, dim: int, start: int = 0) -> Interval:
    """Cells of an index, along dimension 0 or 1."""
    cell = torch.arange(-(-length // width))
    cell = cell[:, None] if dim == 0 else cell[None]
    lo = start + cell * width
    ends = torch.stack((lo, (lo + width - 1).clamp(max=start + length - 1)))
    bounds = (start, start + length - 1)
    span = Span(cell, start, width, length)
    return Interval(ends, evaluator, bounds=bounds, span=span)


def bounded(
    mask_mod: Callable[..., Any], q_width: int, kv_width: int, b: int = 0, h: int = 0
) -> tuple[Tensor, Tensor, MaskEvaluator]:
    """Where a mask is surely and possibly true, cell by cell: ``(rows, columns)`` each."""
    evaluator = MaskEvaluator(mask_mod, CPU)
    lo, hi = evaluator.interval_ends(
        exact_index(torch.tensor([[b]]), 3, evaluator),
        exact_index(torch.tensor([[h]]), 3, evaluator),
        cells(Q_LEN, q_width, evaluator, 0),
        cells(KV_LEN, kv_width, evaluator, 1),
    )
    shape = (-(-Q_LEN // q_width), -(-KV_LEN // kv_width))
    return lo.expand(shape), hi.expand(shape), evaluator


def tiles(dense: Tensor, q_width: int, kv_width: int, fill: bool) -> Tensor:
    """Cut a dense mask into cells: ``(rows, columns, q_width, kv_width)``."""
    padding = (0, -KV_LEN % kv_width, 0, -Q_LEN % q_width)
    padded = torch.nn.functional.pad(dense, padding, value=fill)
    return padded.unfold(0, q_width, q_width).unfold(1, kv_width, kv_width)


def check_sound(mask_mod: Callable[..., Any], q_width: int, kv_width: int) -> None:
    dense = create_mask(mask_mod, 3, 3, Q_LEN, KV_LEN, device="cpu")
    for b, h in ((0, 0), (2, 1)):
        surely, possibly, _ = bounded(mask_mod, q_width, kv_width, b, h)
        is_full = tiles(dense[b, h], q_width, kv_width, True).flatten(2).all(-1)
        is_empty = ~tiles(dense[b, h], q_width, kv_width, False).flatten(2).any(-1)
        assert not (surely & ~is_full).any()
        assert not (~possibly & ~is_empty).any()


@settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(random_masks(), st.sampled_from([1, 3, 8, 16, 64]), st.sampled_from([1, 4, 8, 50]))
def test_no_cell_called_surely_empty_or_full_is_otherwise(
    random_mask: RandomMask, q_width: int, kv_width: int
) -> None:
    mask_mod = random_mask.mask_mod()
    try:
        check_sound(mask_mod, q_width, kv_width)
    except NoIntervalRule:
        return
    except RuntimeError as error:
        if "ZeroDivision" not in str(error):
            raise


ids = torch.arange(60) // 7
unsorted = (torch.arange(60) * 37) % 60
small = (torch.arange(60) - 30).to(torch.int8)
flags = torch.arange(60) % 29 < 20
perm = torch.eye(9, dtype=torch.bool) | (torch.arange(9) == 0)
starts = torch.arange(60) // 10 * 10
window = torch.tensor(9)

DECIDED_BY_INTERVALS = {
    "causal": lambda b, h, q, k: q >= k,
    "window": lambda b, h, q, k: (q >= k) & (q - k < 9),
    "window of a tensor": lambda b, h, q, k: (q - k).abs() < window,
    "documents": lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k),
    "document starts": lambda b, h, q, k: (k >= starts[q]) & (q >= k),
    "where": lambda b, h, q, k: torch.where(q < 20, k < 10, k >= q - 5),
    "clamped": lambda b, h, q, k: k <= (q + 10).clamp(max=30),
    "table of segments": lambda b, h, q, k: perm[ids[q], ids[k]],
    "flags": lambda b, h, q, k: flags[k] & (q >= k),
    "shifted": lambda b, h, q, k: ids[q] == ids[(k + 3).clamp(max=59)],
    "floats": lambda b, h, q, k: k.float() <= q / 2,
    "rows of an image": lambda b, h, q, k: (q // 8 - k // 8).abs() <= 1,
    "shifts": lambda b, h, q, k: (q >> 3) == (k >> 3),
    "bits": lambda b, h, q, k: (q & ~7) == (k & ~7),
    "clipped casts": lambda b, h, q, k: (q - k).to(torch.int32).long() >= 0,
    "minimum": lambda b, h, q, k: torch.minimum(q, k) < 8,
}


@pytest.mark.parametrize("name", DECIDED_BY_INTERVALS)
def test_cells_away_from_an_edge_are_decided(name: str) -> None:
    mask_mod = DECIDED_BY_INTERVALS[name]
    check_sound(mask_mod, 8, 8)
    surely, possibly, evaluator = bounded(mask_mod, 8, 8)
    dense = create_mask(mask_mod, 1, 1, Q_LEN, KV_LEN, device="cpu")[0, 0]
    is_full = tiles(dense, 8, 8, True).flatten(2).all(-1)
    is_empty = ~tiles(dense, 8, 8, False).flatten(2).any(-1)
    decided = int((surely | ~possibly).sum())
    assert decided >= 0.7 * int((is_full | is_empty).sum()) > 0
    assert not evaluator.needs_vmap


def test_an_operation_without_rule_hides_no_other_condition() -> None:
    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (torch.gcd(q, k) < 4)

    surely, possibly, evaluator = bounded(mask_mod, 8, 8)
    assert evaluator.needs_vmap
    assert not possibly[0, 1:].any()
    assert not surely.any()


DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_that_wrap_around_are_not_decided_wrongly(dtype: torch.dtype) -> None:
    table = torch.linspace(-140, 270, 60).to(torch.int64).to(dtype)
    largest = torch.tensor(torch.iinfo(dtype).max, dtype=dtype)
    for mask_mod in (
        lambda b, h, q, k: table[q] - table[k] > 0,
        lambda b, h, q, k: table[q] + table[k] > 5,
        lambda b, h, q, k: table[q] * table[k] > 50,
        lambda b, h, q, k: -table[q] < table[k],
        lambda b, h, q, k: table[q].abs() > table[k],
        lambda b, h, q, k: largest + table[q] > 3,
        lambda b, h, q, k: (table[q] << 3) > table[k],
        lambda b, h, q, k: table[q] ** 3 > table[k],
        lambda b, h, q, k: (q * 300 - 100 * k).to(dtype) > 7,
        lambda b, h, q, k: ~table[q] < table[k],
    ):
        check_sound(mask_mod, 8, 4)


def test_casts_to_rare_dtypes_are_not_decided_wrongly() -> None:
    for mask_mod in (
        lambda b, h, q, k: (q - k).to(torch.uint16) == 3,
        lambda b, h, q, k: (q - k).to(torch.uint32).long() < 5,
        lambda b, h, q, k: (q * 20).to(torch.float8_e4m3fn).float() >= k,
        lambda b, h, q, k: ~((q * 20).to(torch.float8_e4m3fn).float() < k),
        lambda b, h, q, k: (q - k).to(torch.complex64) == 0,
    ):
        evaluator = MaskEvaluator(mask_mod, CPU)
        zero = exact_index(torch.zeros(1, 1, 1, dtype=torch.int64), 1, evaluator)
        queries = exact_index(torch.arange(Q_LEN)[None, :, None], Q_LEN, evaluator)
        keys = exact_index(torch.arange(KV_LEN)[None, None], KV_LEN, evaluator)
        dense = create_mask(mask_mod, 1, 1, Q_LEN, KV_LEN, device="cpu")[0, 0]
        assert torch.equal(evaluator.pairs(zero, zero, queries, keys)[0], dense)
        with contextlib.suppress(NoIntervalRule):
            check_sound(mask_mod, 8, 4)


def test_nan_and_infinity_are_not_decided_wrongly() -> None:
    table = torch.linspace(-3, 3, 60)
    table[::13], table[5::20], table[7::20] = torch.nan, torch.inf, -torch.inf
    for mask_mod in (
        lambda b, h, q, k: table[q] <= table[k],
        lambda b, h, q, k: table[q] != table[k],
        lambda b, h, q, k: ~(table[q] > 0),
        lambda b, h, q, k: table[q] - table[k] <= 100,
        lambda b, h, q, k: table[q] * 0 == 0,
        lambda b, h, q, k: table[q].clamp(min=-1) >= -1,
        lambda b, h, q, k: table[k].bool(),
        lambda b, h, q, k: torch.where(q > k, table[q], table[k]) > -1,
        lambda b, h, q, k: table[q] < float("nan"),
    ):
        check_sound(mask_mod, 4, 4)


TABLE_DTYPES = (torch.uint8, torch.int8, torch.int32, torch.float32, torch.bool)
SCALARS = [torch.tensor(3, dtype=dtype) for dtype in (torch.int8, torch.int32)]
SCALARS += [torch.tensor(100, dtype=torch.uint8), torch.tensor(300), torch.tensor(True)]
SCALARS += [torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)]
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "floor_divide": lambda x, y: x // y,
    "remainder": lambda x, y: x % y,
    "divide": lambda x, y: x / y,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
    "shift": lambda x, y: x >> (y % 5),
    "shift function": lambda x, y: torch.bitwise_left_shift(x, y % 5),
    "less": lambda x, y: x < y,
    "equal": lambda x, y: x == y,
    "where": lambda x, y: torch.where(x > 0, x, y),
    "clamp": lambda x, y: x.clamp(min=y),
    "power": lambda x, y: x ** (y % 4),
    "fmod": torch.fmod,
}


@pytest.mark.parametrize("name", BINARY)
def test_scalar_tensors_promote_as_in_torch(name: str) -> None:
    """torch.vmap promotes a 0-d tensor differently from operation to operation."""
    for dtype, scalar in itertools.product(TABLE_DTYPES, SCALARS):
        values = torch.arange(-30, 30).to(dtype)
        check_promotion(functools.partial(_with_scalar, BINARY[name], values, scalar))
        check_promotion(functools.partial(_with_scalar_first, BINARY[name], values, scalar))


def _with_scalar(op: Any, values: Tensor, scalar: Tensor, index: Any) -> Any:
    return op(values[index], scalar)


def _with_scalar_first(op: Any, values: Tensor, scalar: Tensor, index: Any) -> Any:
    return op(scalar, values[index])


def check_promotion(value_at: Callable[[Any], Any]) -> None:
    """Check dtype and value of an expression of ``q_idx`` against torch's builder."""
    dtypes: list[torch.dtype] = []

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        value = value_at(q)
        dtypes.append(value.dtype)
        return value.double() > k

    try:
        dense = create_mask(mask_mod, 1, 1, Q_LEN, KV_LEN, device="cpu")[0, 0]
    except (RuntimeError, TypeError):
        return
    evaluator = MaskEvaluator(mask_mod, CPU)
    zero = exact_index(torch.zeros(1, 1, 1, dtype=torch.int64), 1, evaluator)
    queries = exact_index(torch.arange(Q_LEN)[None, :, None], Q_LEN, evaluator)
    keys = exact_index(torch.arange(KV_LEN)[None, None], KV_LEN, evaluator)
    assert torch.equal(evaluator.pairs(zero, zero, queries, keys)[0], dense)
    surely, possibly, _ = bounded(mask_mod, 8, 8)
    assert not (surely & ~tiles(dense, 8, 8, True).flatten(2).all(-1)).any()
    assert not (~possibly & tiles(dense, 8, 8, False).flatten(2).any(-1)).any()
    assert len(set(dtypes)) == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_extrema_of_free_ranges_are_exact(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(9,), (64,), (5, 12), (3, 7, 4)]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    table = torch.randint(-50, 50, shape, generator=g)
    evaluator = MaskEvaluator(lambda b, h, q, k: q >= k, CPU)
    ranges, indices = [], []
    for length in shape:
        lo = data.draw(st.integers(-length, length - 1))
        hi = data.draw(st.integers(lo, length - 1))
        ranges.append([i % length for i in range(lo, hi + 1)])
        indices.append(Interval(torch.tensor([[lo], [hi]]), evaluator, bounds=(lo, hi)))
    lo, hi, again = evaluator.tables.extrema(table, indices)
    entries = table[torch.meshgrid(*map(torch.tensor, ranges), indexing="ij")]
    assert (lo.item(), hi.item()) == (entries.min(), entries.max())
    assert again.item() == lo.item()


def test_in_place_operators_change_all_names_of_a_value() -> None:
    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        allowed = q >= k
        alias = allowed
        allowed &= k < 8
        allowed |= q < 3
        return alias

    surely, possibly, _ = bounded(mask_mod, 8, 8)
    assert not possibly[1:, 1:].any()
    assert surely[1:, 0].all()


def test_messages_name_the_captured_tensor() -> None:
    short_table = torch.zeros(45, dtype=torch.int32)

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return short_table[q] == k

    with pytest.raises(MaskError, match=r"tensor 'short_table' of shape \(45,\) with 0 to 49"):
        bounded(mask_mod, 8, 8)
