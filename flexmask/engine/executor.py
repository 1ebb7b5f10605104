"""The executor: one model and what runs need of it, prepared for batches of one size at a time."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from flexmask.attention.flex_call import PrefillKernel
from flexmask.block_mask.cache import BlockMaskCache
from flexmask.engine.decode_loop import DecodeLoop
from flexmask.engine.logit_fusion import LogitFusion
from flexmask.engine.model_runner import ModelRunner
from flexmask.engine.ranks import Ranks, on_all_ranks
from flexmask.engine.row_processors import BatchProcessors
from flexmask.engine.run_options import RunOptions
from flexmask.engine.turns import TURN, Occupancy
from flexmask.errors import ModelError
from flexmask.strategy import Strategy

MAX_AUTO_BATCH_SIZE = 256
CPU_AUTO_BATCH_SIZE = 8


@dataclass(frozen=True)
class BatchSize:
    """The size of batches that an executor is prepared for.

    Attributes:
        rows: Batch rows, one for each prompt.
        capacity: Slots of the key-value cache per row.
        group: Most rows of one prompt group.
    """

    rows: int
    capacity: int
    group: int


class Executor:
    """Executes batches on one model; the engine makes it, and all runs share it.

    It holds the batch of one run at a time. Runs take turns with it: hold
    `flexmask.engine.turns.TURN`, then call ``occupancy.admit``.

    Attributes:
        model: The model.
        ranks: The processes that hold the model.
        mask_cache: BlockMasks of earlier batches.
        runner: Prefill and decode of the model.
        occupancy: The run that prepared the executor last.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefill_kernel: PrefillKernel | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Probe ``model`` and wrap it; nothing is compiled yet.

        Args:
            model: A model loaded with ``attn_implementation="flexmask"``, or this rank's shard.
            prefill_kernel: The kernel that computes prompts on a GPU; None to choose.
            ranks: The processes that hold the model; None for this one alone.

        Raises:
            AttentionError: If the model does not attend through flexmask, or the kernel is not
                available.
        """
        self.model = model
        self.ranks = ranks or Ranks()
        self.mask_cache = BlockMaskCache()
        self.occupancy = Occupancy()
        with TURN, self.ranks.waiting():
            self.runner = ModelRunner(model, self.mask_cache, prefill_kernel, self.ranks)
        self._loop_key: object = None
        self._loop: DecodeLoop | None = None

    @property
    def largest_batch(self) -> int:
        """Most rows that `auto_batch_size` chooses."""
        is_cpu = self.model.device.type == "cpu"
        return CPU_AUTO_BATCH_SIZE if is_cpu else MAX_AUTO_BATCH_SIZE

    def auto_batch_size(self, num_prompts: int, capacity: int, group_size: int = 1) -> int:
        """Choose a number of rows: by free memory on a GPU, 8 on a CPU, at most ``num_prompts``.

        Args:
            num_prompts: Prompts to run.
            capacity: Slots per row.
            group_size: Rows of the largest prompt group; the result is a multiple of it, unless
                it is ``num_prompts``.

        Raises:
            ModelError: If the GPU has no memory for a single row.
        """
        largest = self.largest_batch
        device = self.model.device
        if device.type == "cuda":
            cache = self.runner.cache
            # The cache of earlier batches is freed for the next ones. Were it not counted as free,
            # a second run of the same requests would choose fewer rows, and compile for them.
            free = self.ranks.least_free_bytes(device) or 0
            free += cache.num_bytes - self.runner.reserved_bytes
            largest = min(largest, free // 2 // cache.bytes_per_row(capacity))
            if largest == 0:
                raise ModelError(
                    f"not enough GPU memory for one row of {capacity} slots; shorten the prompts"
                )
        rows = max(1, min(1 << (largest.bit_length() - 1), num_prompts))
        return rows if rows == num_prompts else max(1, rows // group_size) * group_size

    def kept_capacity(self, strategy: Strategy, rows: int, capacity: int) -> int:
        """Return the capacity for a run: what an earlier one has, if that is little more.

        Runs of a few prompts each, some shorter and some longer than a power of two, would
        otherwise be prepared anew each time, without the CUDA graphs of the ones before.

        Args:
            strategy: The mask strategy.
            rows: Batch rows.
            capacity: Slots per row that the run needs.
        """
        prepared = self.runner.prepared_for
        if prepared is None or prepared[:2] != (strategy, rows):
            return capacity
        return prepared[2] if capacity <= prepared[2] <= 2 * capacity else capacity

    @property
    def loop(self) -> DecodeLoop:
        """The loop that `prepare` has made."""
        assert self._loop is not None, "prepare comes first"
        return self._loop

    def prepare(self, strategy: Strategy, size: BatchSize, options: RunOptions) -> DecodeLoop:
        """Prepare for batches of one size, keeping what an earlier call allocated for the same.

        Returns:
            The loop that decodes prompts once ``runner`` has prefilled them.

        Raises:
            AttentionError: If the model cannot run under the strategy.
        """
        self._prepare(strategy, size, options.of_steps)
        return self.loop

    @on_all_ranks("executor")
    def _prepare(self, strategy: Strategy, size: BatchSize, options: RunOptions) -> None:
        is_new = self.runner.prepare(strategy, size.rows, size.capacity)
        device = self.runner.device
        rules, max_new_tokens = options.rules, options.max_new_tokens
        chosen_by = (options.sampling, max_new_tokens, rules.eos_token_ids)
        reported = options.top_logprobs
        fused = (options.fusion, size.group) if options.fusion.is_of_logits else None
        if is_new or self._loop is None or self._loop_key != (chosen_by, fused, reported):
            self._loop_key = (chosen_by, fused, reported)
            fusion = LogitFusion(*fused, size.rows, device) if fused else None
            self._loop = DecodeLoop(self.runner, *chosen_by, fusion, reported)
        processors = BatchProcessors(rules, max_new_tokens, device) if rules.applied else None
        self._loop.processors = processors

    @on_all_ranks("executor")
    def release(self) -> None:
        """Free the key-value cache and all buffers that belong to one size of batches."""
        self._loop_key = self._loop = None
        self.runner.release()

    def end(self) -> None:
        """Free everything, CUDA graphs included, once the device has done what is queued."""
        self.release()
        with self.ranks.waiting():
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
        gc.collect()
