"""A model's module tree once more, sharing every tensor, with its layers compiled."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

# A decode step reads every weight once: what counts is how well each kernel reads, and how many
# there are. The first searches tile sizes, the second joins independent kernels in one launch.
# With the third a kernel starts while the one before it ends.
DECODE_OPTIONS = {
    "coordinate_descent_tuning": True,
    "combo_kernels": True,
    "triton.enable_pdl": True,
}


def compiled_view(
    model: PreTrainedModel,
    attention_names: Sequence[str],
    *,
    dynamic: bool,
    backend: Any = "inductor",
) -> PreTrainedModel:
    """Copy the module tree, sharing all tensors, and compile the layers that attend.

    Args:
        model: The model.
        attention_names: Its attention modules; what holds one is a layer.
        dynamic: Whether for any length, or for the shapes that come.
        backend: Of torch.compile.
    """
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    view = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name in attention_names:
        layer: nn.Module = view.get_submodule(name.rpartition(".")[0])
        layer.compile(fullgraph=True, dynamic=dynamic, backend=backend)
    return view
