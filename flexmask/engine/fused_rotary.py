"""Fuses the rotary embeddings of a traced decode layer into its attention.

Only `flexmask::decode_attention` uses the rotated query and key. It can rotate them as it reads
them, which saves a launch between the projections and attention.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import flexmask.kernels.decode_attention  # noqa: F401  (registers the operator)

_FIRST_TOKEN = (slice(None), slice(None), 0)


@dataclass(frozen=True)
class _Rotation:
    """Heads before rotation, and the cosines and sines that they are rotated by."""

    heads: fx.Node
    cos: fx.Node
    sin: fx.Node


def fuse_rotary(graph: fx.Graph) -> int:
    """Let decode attention rotate query and key itself, where nothing else is done to them.

    Returns:
        The number of calls of decode attention that were changed.
    """
    fused = 0
    for node in list(graph.nodes):
        if node.target is not torch.ops.flexmask.decode_attention:
            continue
        query, key = (_rotation(heads) for heads in node.args[:2])
        if query is None or key is None or (query.cos, query.sin) != (key.cos, key.sin):
            continue
        with graph.inserting_before(node):
            heads = [_taken(graph, rotation.heads, _FIRST_TOKEN) for rotation in (query, key)]
            angles = [_taken(graph, a, (slice(None), 0, 0)) for a in (query.cos, query.sin)]
        node.args = (*heads, node.args[2], *angles, *node.args[5:])
        fused += 1
    graph.eliminate_dead_code()
    graph.lint()
    return fused


def _taken(graph: fx.Graph, tensor: fx.Node, index: tuple[Any, ...]) -> fx.Node:
    return graph.call_function(operator.getitem, (tensor, index))


def _rotation(heads: Any) -> _Rotation | None:
    """Recognise ``(x * cos + rotate_half(x) * sin)[:, :, 0]``; None for anything else."""
    if not isinstance(heads, fx.Node) or heads.target is not operator.getitem:
        return None
    total, index = heads.args
    if index != _FIRST_TOKEN or not isinstance(total, fx.Node) or total.target != operator.add:
        return None
    for plain, rotated in (total.args, total.args[::-1]):
        for x, cos in _factors(plain):
            for half, sin in _factors(rotated):
                if _is_rotate_half(half, x) and _are_angles(cos, sin, x):
                    return _Rotation(x, cos, sin)
    return None


def _factors(product: Any) -> list[tuple[fx.Node, fx.Node]]:
    if not isinstance(product, fx.Node) or product.target != operator.mul:
        return []
    first, second = product.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return []
    return [(first, second), (second, first)]


def _is_rotate_half(node: fx.Node, x: fx.Node) -> bool:
    """Return whether a node is ``cat((-x[..., half:], x[..., :half]), dim=-1)``."""
    if node.target is not torch.cat or node.kwargs.get("dim", node.args[-1]) != -1:
        return False
    parts = node.args[0]
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return False
    negated, first = parts
    if not isinstance(negated, fx.Node) or negated.target not in (operator.neg, torch.neg):
        return False
    half, rest = divmod(_shape(x)[-1], 2)
    return (
        rest == 0
        and _is_part(negated.args[0], x, slice(half, None, None))
        and _is_part(first, x, slice(None, half, None))
    )


def _is_part(node: Any, x: fx.Node, part: slice) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.target is operator.getitem
        and node.args == (x, (Ellipsis, part))
    )


def _are_angles(cos: fx.Node, sin: fx.Node, x: fx.Node) -> bool:
    """Return whether both are ``(B, 1, 1, D)`` of the heads' dtype: one token per row."""
    rows, _, _, dim = _shape(x)
    is_alike = _value(cos).dtype == _value(sin).dtype == _value(x).dtype
    return is_alike and _shape(cos) == _shape(sin) == (rows, 1, 1, dim)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(_value(node).shape)


def _value(node: fx.Node) -> Tensor:
    """Return the tensor, without data, that a node stands for."""
    value: Tensor = node.meta["example_value"]
    return value
