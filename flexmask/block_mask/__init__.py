"""BlockMasks for any mask_mod, without work of the size S×S; see docs/block-masks.md."""

from flexmask.block_mask.create import DecodeRowMask, MaskReport, create_block_mask, explain_mask

__all__ = ["DecodeRowMask", "MaskReport", "create_block_mask", "explain_mask"]
