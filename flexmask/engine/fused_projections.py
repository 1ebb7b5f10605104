"""Fuses the projections of a traced decoder layer into few launches.

The graph that torch.compile traces holds every projection of a layer, whatever its name is in the
model's code. Projections of the same input become one `flexmask::project` if their weights are
dense, or of 8 bits with a scale for each row. It also takes in a root-mean-square norm that only
they use, the gate of a pair, and a residual sum after one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

import flexmask.kernels.projection  # noqa: F401  (registers the operator)
from flexmask.kernels.linear_weights import has_scaled_rows, is_dense
from flexmask.kernels.projection import MAX_ROWS, most_rows_with_norm
from flexmask.kernels.rounded_linear import linear_of_8_bits
from flexmask.tensor_parallel.collectives import sum_over_ranks

_MOST_WEIGHTS = 3


@dataclass(frozen=True)
class _Norm:
    """A root-mean-square norm: its input, its weight, and the ``eps`` of its mean square."""

    x: fx.Node
    weight: fx.Node
    eps: float


@dataclass(frozen=True)
class _GatedPair:
    """Two projections, the activation of the first, and the product of it with the second."""

    gate: fx.Node
    up: fx.Node
    activation: str
    product: fx.Node


def fuse_projections(graph: fx.Graph) -> int:
    """Replace the projections in a traced layer by `flexmask::project`.

    Returns:
        The number of calls of that operator in the graph.
    """
    by_input: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if _is_projection(node):
            by_input.setdefault(node.args[0], []).append(node)
    launches = 0
    for projections in by_input.values():
        norm = _norm_before(projections)
        if pair := _gated_pair(projections):
            _replace(graph, pair.product, [pair.gate, pair.up], norm, activation=pair.activation)
            projections = [p for p in projections if p not in (pair.gate, pair.up)]
            launches += 1
        by_kind: dict[object, list[fx.Node]] = {}
        for projection in projections:
            by_kind.setdefault(_kind(projection), []).append(projection)
        for alike in by_kind.values():
            for first in range(0, len(alike), _MOST_WEIGHTS):
                _replace_side_by_side(graph, alike[first : first + _MOST_WEIGHTS], norm)
                launches += 1
    graph.lint()
    return launches


def _is_projection(node: fx.Node) -> bool:
    if node.target not in (nn.functional.linear, linear_of_8_bits):
        return False
    x, weight = (_value(argument) for argument in node.args[:2])
    if node.target is nn.functional.linear:
        is_readable = is_dense(weight) or has_scaled_rows(weight)
        if x.dtype != weight.dtype or not is_readable:
            return False
    return _digits(node).is_contiguous() and _num_rows(x) <= MAX_ROWS


def _digits(projection: fx.Node) -> Tensor:
    """Return the numbers of a weight without its scale."""
    weight: Any = _value(projection.args[1])
    digits: Tensor = weight.qdata if has_scaled_rows(weight) else weight
    return digits


def _kind(projection: fx.Node) -> object:
    """Return what projections of one launch have in common."""
    return _bias(projection) is not None, _digits(projection).dtype


def _num_rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _replace_side_by_side(
    graph: fx.Graph, projections: Sequence[fx.Node], norm: _Norm | None
) -> None:
    if len(projections) == 1 and (total := _residual_sum(projections[0])):
        residual = next(term for term in total.all_input_nodes if term is not projections[0])
        _replace(graph, total, projections, norm, residual=residual)
        return
    if len(projections) == 1 and (total := _residual_after_ranks(projections[0])):
        _fold_residual(graph, projections[0], total, norm)
        return
    if len(projections) == 1:
        _replace(graph, projections[0], projections, norm)
        return
    with graph.inserting_before(projections[0]):
        joined = _project(graph, projections, norm, "", None)
        start = 0
        for projection in projections:
            stop = start + _value(projection.args[1]).shape[0]
            own = graph.call_function(torch.narrow, (joined, -1, start, stop - start))
            projection.replace_all_uses_with(own, propagate_meta=True)
            start = stop
    for projection in projections:
        _erase_unused(graph, projection)


def _fold_residual(
    graph: fx.Graph, projection: fx.Node, total: fx.Node, norm: _Norm | None
) -> None:
    """Add a residual on rank 0, before the sum over ranks, and nowhere after it."""
    residual = next(term for term in total.all_input_nodes if term is not projection)
    with graph.inserting_before(projection):
        own = residual if dist.get_rank() == 0 else None
        launch = _project(graph, [projection], norm, "", own)
    projection.replace_all_uses_with(launch, propagate_meta=True)
    total.replace_all_uses_with(launch)
    for node in (projection, total):
        _erase_unused(graph, node)


def _replace(
    graph: fx.Graph,
    node: fx.Node,
    projections: Sequence[fx.Node],
    norm: _Norm | None,
    *,
    activation: str = "",
    residual: fx.Node | None = None,
) -> None:
    """Replace ``node``, the last node of what one launch computes, by that launch."""
    with graph.inserting_before(node):
        launch = _project(graph, projections, norm, activation, residual)
    node.replace_all_uses_with(launch, propagate_meta=True)
    _erase_unused(graph, node)


def _project(
    graph: fx.Graph,
    projections: Sequence[fx.Node],
    norm: _Norm | None,
    activation: str,
    residual: fx.Node | None,
) -> fx.Node:
    biases = [bias for p in projections if (bias := _bias(p)) is not None]
    weights, scales = zip(*(_weight_and_scale(graph, p) for p in projections), strict=True)
    arguments = (
        projections[0].args[0] if norm is None else norm.x,
        list(weights),
        biases,
        [scale for scale in scales if scale is not None],
        None if norm is None else norm.weight,
        0.0 if norm is None else norm.eps,
        activation,
        residual,
    )
    return graph.call_function(torch.ops.flexmask.project.default, arguments)


def _weight_and_scale(graph: fx.Graph, projection: fx.Node) -> tuple[Any, Any]:
    """Return the nodes of a weight's numbers and of its scale, which is None for a dense one."""
    weight = projection.args[1]
    if projection.target is linear_of_8_bits:
        return weight, projection.args[2]
    if has_scaled_rows(_value(weight)):
        qdata, scale = (graph.call_function(getattr, (weight, n)) for n in ("qdata", "scale"))
        return qdata, scale
    return weight, None


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing uses, and the nodes that only it used."""
    if node.users or node.op not in ("call_function", "call_method"):
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for used in inputs:
        _erase_unused(graph, used)


def _value(node: Any) -> Tensor:
    """Return the tensor, without data, that a node stands for."""
    value: Tensor = node.meta["example_value"]
    return value


def _bias(projection: fx.Node) -> fx.Node | None:
    place = 3 if projection.target is linear_of_8_bits else 2
    bias = (
        projection.args[place] if len(projection.args) > place else projection.kwargs.get("bias")
    )
    return bias if isinstance(bias, fx.Node) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _residual_sum(projection: fx.Node) -> fx.Node | None:
    """Return the sum of a projection and a tensor of its shape, if nothing else uses it."""
    total = _only_user(projection)
    return total if total is not None and _adds_alike(total) else None


def _residual_after_ranks(projection: fx.Node) -> fx.Node | None:
    """Return the sum of a residual and a projection that is summed over ranks before."""
    users = list(projection.users)
    if len(users) != 2 or users[0].target is not sum_over_ranks or not _adds_alike(users[1]):
        return None
    residual = next(term for term in users[1].all_input_nodes if term is not projection)
    return users[1] if residual < projection else None


def _adds_alike(total: fx.Node) -> bool:
    """Return True for the sum of two tensors of one shape and dtype."""
    if total.target is not operator.add:
        return False
    kinds = {
        (_value(term).shape, _value(term).dtype) if isinstance(term, fx.Node) else None
        for term in total.args
    }
    return len(kinds) == 1 and total.args[0] is not total.args[1]


def _gated_pair(projections: Sequence[fx.Node]) -> _GatedPair | None:
    for gate in projections:
        activated = _only_user(gate)
        activation = "" if activated is None else _activation(activated)
        product = _only_user(activated) if activated is not None and activation else None
        if product is None or product.target is not operator.mul:
            continue
        for up in projections:
            is_other = up is not gate and up in product.args and _only_user(up) is product
            if is_other and _kind(up) == _kind(gate):
                return _GatedPair(gate, up, activation, product)
    return None


def _activation(node: fx.Node) -> str:
    if node.target is nn.functional.silu:
        return "silu"
    is_gelu = node.target is nn.functional.gelu
    return "gelu_tanh" if is_gelu and node.kwargs.get("approximate") == "tanh" else ""


def _norm_before(projections: Sequence[fx.Node]) -> _Norm | None:
    """Return the norm whose result only these projections use; None if there is none."""
    result = projections[0].args[0]
    assert isinstance(result, fx.Node)
    most_rows = min(most_rows_with_norm(_digits(projection).dtype) for projection in projections)
    if _num_rows(_value(result)) > most_rows or set(result.users) != set(projections):
        return None
    for weight, normalized in _factors(result):
        if _value(weight).dim() != 1:
            continue
        for wide, rsqrt in _factors(_before_cast(normalized)):
            eps = _eps_of_mean_square(rsqrt, wide)
            x = _before_cast(wide)
            if eps is not None and _value(x).dtype == _value(result).dtype:
                return _Norm(x, weight, eps)
    return None


def _factors(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Return the two factors of a product, in both orders."""
    if node.target is not operator.mul or not all(isinstance(a, fx.Node) for a in node.args):
        return []
    first, second = node.args
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    return [(first, second), (second, first)]


def _before_cast(node: fx.Node) -> fx.Node:
    is_cast = node.op == "call_method" and node.target in ("to", "float", "type_as")
    source = node.args[0] if is_cast else node
    assert isinstance(source, fx.Node)
    return source


def _eps_of_mean_square(rsqrt: fx.Node, wide: fx.Node) -> float | None:
    """Return ``eps`` if a node is ``rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)``."""
    total = _argument(rsqrt, torch.rsqrt, "rsqrt")
    mean = None if total is None else _argument(total, operator.add)
    square = None if mean is None else _argument(mean, torch.mean, "mean")
    source = None if square is None else _argument(square, torch.pow, "pow")
    if source is not wide or total is None or mean is None or square is None:
        return None
    is_mean_square = (
        mean.args[1:] == (-1,) and mean.kwargs.get("keepdim") is True and square.args[1:] == (2,)
    )
    eps = total.args[1]
    return eps if is_mean_square and isinstance(eps, float) else None


def _argument(node: fx.Node, function: Callable[..., Any], method: str = "") -> fx.Node | None:
    """Return the first argument of a call of ``function``, or of the method of that name."""
    is_call = node.target is function or (node.op == "call_method" and node.target == method)
    first = node.args[0] if is_call and node.args else None
    return first if isinstance(first, fx.Node) else None
