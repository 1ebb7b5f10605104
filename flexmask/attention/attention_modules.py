"""The modules of a model that attend through the backend, found by running one token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexmask.errors import AttentionError


@dataclass(frozen=True)
class AttentionShape:
    """What one attention module of a model needs of a cache."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    has_softcap: bool


class AttentionProbe:
    """Passed through a model's forward, notes which modules attend and in which shapes."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.shapes: dict[nn.Module, AttentionShape] = {}

    def record(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        softcap: float | None,
    ) -> Tensor:
        """Note ``module``'s shapes; return zeros in place of attention's result."""
        has_softcap = softcap is not None
        shape = AttentionShape(key.shape[1], key.shape[3], value.shape[3], has_softcap)
        self.shapes[module] = shape
        batch_size, heads, length, _ = query.shape
        return value.new_zeros(batch_size, length, heads, value.shape[3])


def find_attention_modules(model: nn.Module) -> dict[nn.Module, AttentionShape]:
    """Find the modules that attend through this backend, by running one token.

    No name or attribute of a model is relied on.

    Raises:
        AttentionError: If none does.
    """
    device = next(model.parameters()).device
    probe = AttentionProbe()
    input_ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=False, attention_probe=probe)
    if not probe.shapes:
        raise AttentionError(
            f"{type(model).__name__} does not attend through flexmask; "
            "load it with attn_implementation='flexmask'"
        )
    return probe.shapes
