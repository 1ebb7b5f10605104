"""Compares compiled attention under a strategy's mask with dense attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexmask.attention.backend import dense_attention, flexmask_attention
from flexmask.attention.placement import RowPlacement
from flexmask.attention.scaled_part import place_part
from flexmask.block_mask import create_block_mask
from flexmask.check.cases import Case
from flexmask.check.checked_strategy import Subject, capacity_for, evaluate
from flexmask.errors import FlexMaskError
from flexmask.layout import PADDING
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import strategy_mask
from flexmask.torch_internals import compiled_graphs

BLOCK_SIZE = 128

ROWS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 16

CASES = (
    Case(prefix=20, segments=(250, 170, 100), tail=10),
    Case(prefix=90, segments=(100, 300, 180), tail=20),
    Case(prefix=0, segments=(330, 310, 100), tail=30),
)
"""Layouts of five tiles and more, so that no sizes of the first graph are equal by chance."""


@dataclass
class CompiledRun:
    """The results of attention over `CASES`.

    Attributes:
        cases: The cases.
        tolerance: Largest difference that counts as equal.
        graphs: For each case, the number of graphs that were compiled.
        errors: For each case, the largest difference from dense attention.
        error: The error of the compiler; empty if attention compiled.
    """

    cases: tuple[Case, ...] = CASES
    tolerance: float = 1e-4
    graphs: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    error: str = ""


def run_compiled(subject: Subject) -> CompiledRun:
    """Attend over each case as the engine does, with a new mask_mod for each."""
    run = CompiledRun()
    slots = max(len(subject.layout(case)) for case in CASES)
    batch = LayoutBatch(ROWS, 2 * capacity_for(slots), torch.device("cpu"))
    for case in CASES:
        graphs = compiled_graphs()
        try:
            run.errors.append(_difference(subject, batch, case))
        except FlexMaskError:
            raise
        except Exception as error:  # anything that the compiler may raise for the author's mask
            lines = str(error).strip().splitlines() or [type(error).__name__]
            run.error = next((line.strip() for line in lines if "rror" in line), lines[0])
            return run
        run.graphs.append(compiled_graphs() - graphs)
    return run


@torch.no_grad()
def _difference(subject: Subject, batch: LayoutBatch, case: Case) -> float:
    layout, other = subject.layout(case), subject.layout(case.rearranged())
    layouts = [layout, other, layout]
    size = len(layout)
    batch.load(layouts, [size, len(other), size - 1], [0, 0, 0])
    mask_mod = strategy_mask(subject.strategy, batch)
    length = -(-max(size, len(other)) // BLOCK_SIZE) * BLOCK_SIZE
    block_mask = create_block_mask(mask_mod, ROWS, None, length, length, "cpu", BLOCK_SIZE)
    query, key, value = _random_inputs(length)
    strategy, module = subject.strategy, torch.nn.Module()
    slots = torch.arange(batch.segment_ids.shape[1]).repeat(ROWS, 1)
    changes: dict[str, Any] = {
        "score_mod": strategy.applied_score_mod(batch),
        "scaled_part": place_part(strategy.scaled_part(batch), RowPlacement(slots)),
    }
    output, _ = flexmask_attention(module, query, key, value, block_mask, **changes)
    dense = _dense_mask(subject, batch, length)
    if not any(changes.values()):
        wanted = scaled_dot_product_attention(query, key, value, dense, enable_gqa=True)
        wanted = wanted.transpose(1, 2)
    else:
        wanted, _ = dense_attention(module, query, key, value, dense, **changes)
    is_token = batch.segment_ids[:, :length, None, None] != PADDING
    difference = (output - wanted.nan_to_num()).where(is_token, 0.0)
    return float(difference.abs().max())


def _random_inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        return torch.randn(ROWS, heads, length, HEAD_DIM, generator=generator)

    return random(HEADS), random(KV_HEADS), random(KV_HEADS)


def _dense_mask(subject: Subject, batch: LayoutBatch, length: int) -> Tensor:
    """Return the dense mask of a batch, ``(B, 1, S, S)`` bool."""
    mask_mod = strategy_mask(subject.strategy, batch)
    slots = torch.arange(length)
    rows = [evaluate(mask_mod, row, slots, slots) for row in range(ROWS)]
    return torch.stack(rows)[:, None]
