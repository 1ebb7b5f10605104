"""Shards whose decode layers are fused as on a GPU, and then run op by op on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from flexmask.engine import compiled_view, model_runner
from flexmask.engine.model_loading import load_shard
from flexmask.tensor_parallel.plan import RankOf

Patch = Callable[[Any, str, Any], None]

residuals: list[int] = []
"""Launches that add a residual, in each graph that was fused in this process."""


def fuse_decoding(patch: Patch) -> None:
    """Make engines of this process fuse what they decode, and trace all without inductor."""
    make_view = compiled_view.compiled_view

    def fused_view(
        model: Any, names: Any, *, dynamic: bool, backend: Any = "eager", **options: Any
    ) -> Any:
        if dynamic:
            return make_view(model, names, dynamic=dynamic, backend="eager", **options)
        view = make_view(model, names, dynamic=dynamic, backend=compiled_view.fused_backend)
        compiled_view.compile_beside_layers(view, names)
        return view

    patch(model_runner, "compiled_view", fused_view)
    patch(model_runner, "multiply_few_rows", lambda view: None)
    patch(compiled_view, "compile_graph", run_op_by_op)


def run_op_by_op(module: fx.GraphModule, inputs: Sequence[Tensor], options: Any) -> Any:
    project = torch.ops.flexmask.project.default
    launches = [node for node in module.graph.nodes if node.target is project]
    residuals.append(sum(node.args[-1] is not None for node in launches))
    return module.forward


def load_fused_shard(place: RankOf, device: torch.device, *, model: str) -> PreTrainedModel:
    """Load a shard; in another process than that of the tests, also patch the engine."""
    if place.rank:
        fuse_decoding(setattr)
    return load_shard(place, device, model=model, dtype="auto", trust_remote_code=False)
