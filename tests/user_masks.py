"""Masks that people publish elsewhere, as somebody would write them with flexmask's API."""

from flexmask import mask_strategy, parameter
from flexmask.mask_mods import (
    and_masks,
    causal,
    is_fusion_tail,
    is_prefix,
    or_masks,
    same_segment,
    within_window,
)


@mask_strategy
def dilated_window(
    batch,
    *,
    window: int = parameter(64, help="How many positions back a token sees.", minimum=1),
    dilation: int = parameter(4, help="Of those, every how many.", minimum=1),
):
    """Each token sees every few of the tokens before it, up to a distance (Longformer)."""
    position_ids = batch.position_ids

    def is_on_grid(b, h, q_idx, kv_idx):
        return (position_ids[b, q_idx] - position_ids[b, kv_idx]) % dilation == 0

    return and_masks(causal, within_window(batch, window), is_on_grid)


@mask_strategy
def neighbourhood_2d(
    batch,
    *,
    width: int = parameter(8, help="Tokens in a row of the image.", minimum=1),
    radius: int = parameter(2, help="Rows and columns on each side that a token sees."),
):
    """Tokens are the pixels of an image; each sees the earlier ones near it (NATTEN)."""
    position_ids = batch.position_ids

    def is_near(b, h, q_idx, kv_idx):
        q, kv = position_ids[b, q_idx], position_ids[b, kv_idx]
        rows = (q // width - kv // width).abs()
        columns = (q % width - kv % width).abs()
        return (rows <= radius) & (columns <= radius)

    return and_masks(causal, is_near)


@mask_strategy
def document_packing(batch):
    """Segments are documents packed into one row; none sees another (attention-gym)."""
    return and_masks(causal, same_segment(batch))


@mask_strategy(is_causal=False)
def shared_prefix(batch):
    """All see the prefix, which is bidirectional as in a prefix LM; segments see themselves."""
    within_prefix = and_masks(is_prefix(batch), same_segment(batch))
    own = and_masks(causal, or_masks(same_segment(batch), is_prefix(batch), is_fusion_tail(batch)))
    return or_masks(within_prefix, own)


PARENT = (0, 0, 1, 1, 2, 2, 3, 3)
"""Parent of each segment in a tree of drafts; 0 is the prefix, its root."""


def ancestors(parent):
    """``table[q][kv]``: whether segment ``kv`` is segment ``q`` or above it."""
    table = [[q == kv for kv in range(len(parent))] for q in range(len(parent))]
    for child in range(1, len(parent)):
        for kv in range(len(parent)):
            table[child][kv] |= table[parent[child]][kv]
    return table


@mask_strategy
def draft_tree(batch):
    """Segments are the nodes of a tree; each sees those above it (Medusa, SpecInfer)."""
    is_ancestor = batch.table(ancestors(PARENT))
    segment_ids = batch.segment_ids

    def is_above(b, h, q_idx, kv_idx):
        q, kv = segment_ids[b, q_idx].clamp(min=0), segment_ids[b, kv_idx].clamp(min=0)
        return is_ancestor[q, kv]

    return and_masks(causal, or_masks(is_above, is_fusion_tail(batch)))
