"""Compiled views of a model: copies of its module tree that share every tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from flexmask.engine.fused_projections import fuse_projections
from flexmask.engine.fused_rotary import fuse_rotary
from flexmask.engine.shared_tensors import tensors_by_id
from flexmask.kernels.few_rows import linear_of_few_rows
from flexmask.kernels.linear_weights import is_plain_linear
from flexmask.kernels.projection import project
from flexmask.kernels.rounded_linear import RoundedLinear
from flexmask.torch_internals import compile_graph

# A decode step reads every weight once, so what counts is how fast each kernel reads, and the
# number of kernels. The first option searches tile sizes, the second joins independent kernels.
LAYER_OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True, "combo_kernels": True}

# Programmatic dependent launch: a kernel starts while the one before it ends. Not within layers:
# inductor's kernels wait only for the kernel before them, and rely on that one having waited for
# its predecessor before it lets others start. The kernels of flexmask.kernels let others start
# first.
STEP_OPTIONS: dict[str, Any] = {"triton.enable_pdl": True}


def fused_backend(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile a decode layer: fuse its projections and rotary embeddings, then use inductor.

    A backend of torch.compile.
    """
    return _compile_fused(graph_module, inputs, LAYER_OPTIONS)


def _beside_backend(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    return _compile_fused(graph_module, inputs, STEP_OPTIONS)


def _compile_fused(
    graph_module: fx.GraphModule, inputs: Sequence[Tensor], options: dict[str, Any]
) -> Callable[..., Any]:
    sums = _sums_over_ranks(graph_module.graph)
    fuse_projections(graph_module.graph)
    fuse_rotary(graph_module.graph)
    assert _sums_over_ranks(graph_module.graph) == sums, "a sum over ranks is lost by fusing"
    graph_module.recompile()
    return compile_graph(graph_module, inputs, options)


def _sums_over_ranks(graph: fx.Graph) -> int:
    return sum(str(node.target).startswith("flexmask.sum_over_ranks") for node in graph.nodes)


def compiled_view(
    model: PreTrainedModel,
    attention_names: Sequence[str],
    *,
    dynamic: bool,
    backend: Any = "inductor",
    ends_with_keys: bool = False,
) -> PreTrainedModel:
    """Copy the module tree, sharing all tensors, and compile the layers that attend.

    Args:
        model: The model.
        attention_names: Names of its attention modules in the order of a pass; a module that
            holds one is a layer.
        dynamic: Compile one graph for any length, and not one for each shape.
        backend: The backend of torch.compile.
        ends_with_keys: End a pass with `KeysWritten` as soon as the last layer has written its
            keys and values, for which it needs neither attention nor what follows. The layer is
            not compiled: tracing another graph would take longer than a run gains by it.
    """
    view = copy.deepcopy(model, tensors_by_id(model))
    layers = layer_names(attention_names)
    if ends_with_keys:
        layers.remove(name := last_layer_name(attention_names))
        last: nn.Module = view.get_submodule(name)
        last.forward = partial(last.forward, ends_pass=True)
    for name in layers:
        layer: nn.Module = view.get_submodule(name)
        layer.compile(fullgraph=True, dynamic=dynamic, backend=backend)
    return view


def compile_beside_layers(view: PreTrainedModel, attention_names: Sequence[str]) -> None:
    """Compile the modules before and after the layers: embedding, rotary angles, norm, logits.

    Op by op these take some twenty kernels a step. Graph breaks are allowed in them, because
    nothing is assumed of what a model computes there.
    """
    layers = layer_names(attention_names)
    above = set().union(*(_ancestors(name) for name in layers))
    for name, module in view.named_modules():
        if name.rpartition(".")[0] in above and name not in above | layers:
            module.forward = _compiled_call(module)


def _compiled_call(module: nn.Module) -> Callable[..., Any]:
    """Compile a module's forward, also of torch's own modules, which ``compile()`` skips."""
    forward = module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return torch.compile(call, dynamic=False, backend=_beside_backend)


def multiply_few_rows(view: PreTrainedModel) -> None:
    """Replace the forward of linear modules by a product for few rows on a CPU."""
    for module in view.modules():
        if is_plain_linear(module):
            cast(Any, module).forward = _few_rows_forward(module)
        elif type(module) is RoundedLinear:
            cast(Any, module).forward = _rounded_forward(module)


def _few_rows_forward(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return linear_of_few_rows(x, module.weight, module.bias)

    return forward


def _rounded_forward(module: RoundedLinear) -> Callable[[Tensor], Tensor]:
    """Return a product that inductor does not compile: its loop takes ten times as long."""
    biases = [] if module.bias is None else [module.bias]

    def forward(x: Tensor) -> Tensor:
        result: Tensor = project(x, [module.weight], biases, [module.scale], None, 0.0, "", None)
        return result

    return forward


def layer_names(attention_names: Sequence[str]) -> set[str]:
    """Names of the layers, which are the modules that hold an attention module."""
    return {name.rpartition(".")[0] for name in attention_names}


def last_layer_name(attention_names: Sequence[str]) -> str:
    """Name of the last layer of a pass."""
    return attention_names[-1].rpartition(".")[0]


def _ancestors(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:depth]) for depth in range(len(parts))}
