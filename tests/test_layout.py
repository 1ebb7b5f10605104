import warnings

import pytest
import torch

from flexmask.errors import FlexMaskWarning, LayoutError, RequestError
from flexmask.layout import (
    TAIL,
    Layout,
    TokenizedRequest,
    copied_prefix_layout,
    shared_prefix_layout,
)
from flexmask.layout_batch import LayoutBatch


def settle(segments, suffix=(), prefix=(1, 2)):
    return TokenizedRequest.from_token_ids(prefix, segments, suffix)


def test_a_suffix_is_the_tail():
    request = settle([[3, 9], [4, 9]], suffix=[7, 8])
    assert request.segments == ((3, 9), (4, 9))
    assert request.tail == (7, 8)


def test_without_suffix_the_common_ending_becomes_the_tail_and_leaves_the_segments():
    request = settle([[3, 4, 8, 9], [5, 8, 9]])
    assert request.segments == ((3, 4), (5,))
    assert request.tail == (8, 9)


def test_the_common_ending_leaves_every_segment_a_token():
    request = settle([[3, 8, 9], [8, 9], [4, 8, 9]])
    assert request.segments == ((3, 8), (8,), (4, 8))
    assert request.tail == (9,)


def test_equal_segments_keep_their_first_token():
    request = settle([[3, 8, 9], [3, 8, 9]])
    assert request.segments == ((3,), (3,))
    assert request.tail == (8, 9)


def test_without_a_common_ending_the_last_token_fuses_with_a_warning():
    with pytest.warns(FlexMaskWarning, match="give the request a suffix"):
        request = settle([[3, 4], [5, 6]])
    assert request.segments == ((3, 4), (5,))
    assert request.tail == (6,)


def test_one_segment_gives_its_last_token_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        request = settle([[3, 4, 5]])
    assert request.segments == ((3, 4),)
    assert request.tail == (5,)


@pytest.mark.parametrize(
    ("segments", "message"),
    [([[3], []], "segment 2 has no tokens"), ([[3, 4], [5]], "segment 2 is a single token")],
)
def test_a_segment_that_cannot_be_used_is_an_error(segments, message):
    with pytest.raises(RequestError, match=message):
        settle(segments)


REQUEST = TokenizedRequest(prefix=(1, 2), segments=((3, 4, 5), (6, 7)), tail=(8,))


def test_shared_prefix_with_restarted_positions():
    layout = shared_prefix_layout(REQUEST, "restart")
    assert layout.token_ids == (1, 2, 3, 4, 5, 6, 7, 8)
    assert layout.segment_ids == (0, 0, 1, 1, 1, 2, 2, TAIL)
    assert layout.position_ids == (0, 1, 2, 3, 4, 2, 3, 5)


def test_copied_prefix_with_restarted_positions():
    layout = copied_prefix_layout(REQUEST, "restart")
    assert layout.token_ids == (1, 2, 3, 4, 5, 1, 2, 6, 7, 8)
    assert layout.segment_ids == (1, 1, 1, 1, 1, 2, 2, 2, 2, TAIL)
    assert layout.position_ids == (0, 1, 2, 3, 4, 0, 1, 2, 3, 5)


@pytest.mark.parametrize("arrange", [shared_prefix_layout, copied_prefix_layout])
def test_sequential_positions_are_slot_numbers(arrange):
    layout = arrange(REQUEST, "sequential")
    assert layout.position_ids == tuple(range(len(layout)))


@pytest.mark.parametrize("arrange", [shared_prefix_layout, copied_prefix_layout])
def test_every_token_belongs_to_a_part_and_the_tail_comes_last(arrange):
    layout = arrange(REQUEST, "restart")
    assert layout.num_segments == 2
    assert layout.segment_ids[layout.tail_start :] == (TAIL,)
    assert layout.next_position == 6


def test_generated_tokens_extend_the_tail():
    grown = shared_prefix_layout(REQUEST, "restart").extended(2)
    assert grown.segment_ids[-3:] == (TAIL, TAIL, TAIL)
    assert grown.position_ids[-3:] == (5, 6, 7)


def test_tokens_are_counted_within_their_segment_wherever_it_stands():
    layout = Layout(tuple(range(7)), (2, 0, 2, 1, 2, 1, -1), tuple(range(7)))
    assert layout.indices_in_segments == (0, 0, 1, 0, 2, 1, 0)
    batch = LayoutBatch(2, 12, torch.device("cpu"))
    batch.load([layout], [6], [1])
    assert batch.indices_in_segments.tolist() == [[0, 0, 0, 1, 0, 2, 1, 0, 1, 2, 3, 4], [0] * 12]


def test_layouts_of_one_shape_and_other_boundaries_have_other_digests():
    other = TokenizedRequest(prefix=(1, 2), segments=((3, 4), (5, 6, 7)), tail=(8,))
    one, two = shared_prefix_layout(REQUEST, "restart"), shared_prefix_layout(other, "restart")
    assert len(one) == len(two)
    assert one.digest != two.digest


@pytest.mark.parametrize(
    ("segment_ids", "position_ids", "message"),
    [
        ((0, 1), (0, 1), "at least one fusion-tail token"),
        ((TAIL, 1, TAIL), (0, 1, 2), "together at the end"),
        ((-7, TAIL), (0, 1), "segment ids must be at least"),
        ((0, TAIL), (-1, 0), "positions must not be negative"),
        ((0, 0, TAIL), (0, 1), "one of each per token"),
    ],
)
def test_a_layout_that_contradicts_itself_is_an_error(segment_ids, position_ids, message):
    with pytest.raises(LayoutError, match=message):
        Layout(tuple(range(len(segment_ids))), segment_ids, position_ids)
