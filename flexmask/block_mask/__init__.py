"""BlockMasks for any mask_mod, without S×S work. docs/block-masks.md says how."""

from flexmask.block_mask.create import DecodeRowMask, MaskReport, create_block_mask, explain_mask

__all__ = ["DecodeRowMask", "MaskReport", "create_block_mask", "explain_mask"]
