"""Floors: the least time of a run on a machine of measured rates.

Prefill costs the matrix products that make keys and values of the tokens to compute, so all layers
but the last, and of that one keys and values alone. A decode step costs the products of its rows.
Each reads all weights once, and a decode step every key and value. Of reading and computing the
floor is the longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from flexmask.bench.machine import matrix_rate, read_bandwidth
from flexmask.kernels.linear_weights import DENSE, kinds_of_projections

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flexmask.engine.run_stats import RunStats


@dataclass(frozen=True)
class Rates:
    """Peak rates of a machine.

    Attributes:
        bytes_per_s: Bytes read per second.
        flops_per_s: Operations per second of a large matrix product.
    """

    bytes_per_s: float
    flops_per_s: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Self:
        """Measure them; the memory this takes is free afterwards."""
        rates = cls(read_bandwidth(device), matrix_rate(device, dtype))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return rates

    def seconds(self, num_bytes: float, flops: float) -> float:
        """Return the time to read bytes and to compute, at once."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)

    def __str__(self) -> str:
        """Return them in words."""
        return f"{self.bytes_per_s / 1e9:,.0f} GB/s, {self.flops_per_s / 1e9:,.0f} GFLOP/s"


@dataclass(frozen=True)
class ModelCost:
    """Bytes and operations of a model.

    Attributes:
        weight_bytes: Weights that every step reads.
        slot_bytes: Key and value of one token in all layers.
        token_flops: Matrix products of one token, without its logits.
        logits_flops: The product that makes the logits of one token.
        pair_flops: Attention from one token to one key in all layers.
        last_token_flops: The part of `token_flops` that follows the keys and values of the last
            layer. Only a token whose logits are needed costs it.
        last_pair_flops: That part of `pair_flops`: attention in the last layer.
    """

    weight_bytes: int
    slot_bytes: int
    token_flops: int
    logits_flops: int
    pair_flops: int
    last_token_flops: int
    last_pair_flops: int

    @classmethod
    def of(cls, model: PreTrainedModel, ranks: int = 1) -> Self:
        """Read the cost off a model, which may be on the meta device.

        Args:
            model: A language model alone, each token of which is multiplied by every weight
                (`is_known`); or the shard of a rank.
            ranks: Number of ranks, which divide the heads among them.
        """
        config, itemsize = model.config, model.dtype.itemsize
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()  # to mypy a module may be a tensor
        weights = list(model.parameters())
        if head.weight is not embedding.weight:
            weights = [weight for weight in weights if weight is not embedding.weight]
        read = sum(weight.numel() for weight in weights)
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        last_layer = sum(
            weight.numel()
            for name, weight in model.named_parameters()
            if f".{layers - 1}." in name
        )
        keys_and_values = 2 * key_heads * dim * config.hidden_size // ranks
        return cls(
            weight_bytes=sum(weight.numel() * weight.itemsize for weight in weights),
            slot_bytes=2 * layers * key_heads * dim * itemsize // ranks,
            token_flops=2 * (read - head.weight.numel()),
            logits_flops=2 * head.weight.numel(),
            pair_flops=4 * layers * heads * dim // ranks,
            last_token_flops=2 * (last_layer - keys_and_values),
            last_pair_flops=4 * heads * dim // ranks,
        )

    @staticmethod
    def is_known(model: PreTrainedModel) -> bool:
        """Return True if the cost can be read off a model.

        It cannot where a token is multiplied by some experts of many, weights are packed, or the
        model has other towers.
        """
        has_experts = any(weight.ndim > 2 for weight in model.parameters())
        is_dense = all(kind == DENSE for kind, _ in kinds_of_projections(model))
        return is_dense and not has_experts and model.config.get_text_config() is model.config

    def keys_flops(self, tokens: int, pairs: int = 0) -> int:
        """Return the operations that make keys and values of tokens in all layers.

        Args:
            tokens: The tokens.
            pairs: Keys that each token sees, summed over the tokens; 0 to leave attention out.
        """
        of_tokens = tokens * (self.token_flops - self.last_token_flops)
        return of_tokens + pairs * (self.pair_flops - self.last_pair_flops)

    def decode_step_s(self, rows: int, keys: int, pairs: int, rates: Rates) -> float:
        """Return the floor of a step.

        Args:
            rows: Prompts that get a token.
            keys: Keys to read; one that several prompts share counts once.
            pairs: Keys that each prompt sees, summed over the prompts.
            rates: Rates of the machine.
        """
        flops = rows * (self.token_flops + self.logits_flops) + pairs * self.pair_flops
        return rates.seconds(self.weight_bytes + keys * self.slot_bytes, flops)

    def shares_of(self, stats: RunStats, rates: Rates) -> Mapping[str, float]:
        """Return the floors of a run as shares of the seconds that its phases took.

        Attention's own products are left out, and what scoring needs of the last layer, so these
        are lower bounds.

        Args:
            stats: Counts and times of the run.
            rates: Rates of the machine.

        Returns:
            The share of ``prefill`` and of ``decode``; of a phase that did nothing, none.
        """
        prefill_s = rates.seconds(
            stats.prefills * self.weight_bytes, self.keys_flops(stats.computed_tokens)
        )
        num_bytes = stats.decode_steps * self.weight_bytes + stats.keys_read * self.slot_bytes
        flops = stats.used_row_steps * (self.token_flops + self.logits_flops)
        decode_s = rates.seconds(num_bytes, flops)
        phases = {"prefill": (prefill_s, stats.prefill_s), "decode": (decode_s, stats.decode_s)}
        return {name: floor_s / took_s for name, (floor_s, took_s) in phases.items() if took_s}
