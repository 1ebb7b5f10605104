"""What is drawn is the engine's mask, pair by pair."""

import subprocess
import sys

import pytest
import torch

from flexmask.attention.model_probe import WHOLE_MODEL
from flexmask.block_mask import DecodeRowMask, create_block_mask
from flexmask.block_mask.cache import BlockMaskCache
from flexmask.block_mask.tile_states import EMPTY, FULL, PARTIAL
from flexmask.engine.model_runner import ModelRunner
from flexmask.engine.prefill_kernel import BLOCK_SIZE
from flexmask.errors import OptionError
from flexmask.layout import Layout, TokenizedRequest
from flexmask.mask_mods import causal
from flexmask.plugins.registry import make_strategy
from flexmask.show.cells import CellState, cell_grid
from flexmask.show.mask_picture import cell_side, draw_difference, draw_mask
from flexmask.show.tile_mask import TILE, TileMask
from flexmask.show.tokens import DrawnTokens, ShownRequest
from flexmask.strategy import Strategy
from oracles import dense_mask

NAMES = ["causal", "prefix_segment", "ensemble_isolation"]
SHOWN = ShownRequest.of_lengths(prefix=5, segments=(7, 4, 6), suffix=3, new_tokens=4)


def grown_layout(strategy, shown):
    return strategy.layout(shown.tokens).extended(shown.new_tokens)


@pytest.mark.parametrize("tile", [1, 4, 8, 128])
@pytest.mark.parametrize("name", NAMES)
def test_every_pair_is_that_of_the_oracle_generated_tokens_included(name, tile):
    strategy = make_strategy(name, {})
    picture = draw_mask(strategy, SHOWN, tile)
    assert picture.mask.dense.equal(dense_mask(strategy, grown_layout(strategy, SHOWN)))


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_shows_the_masks_that_the_engine_runs_with(name, models):
    strategy = make_strategy(name, {})
    shown = ShownRequest.of_lengths(prefix=60, segments=(90, 75, 110), suffix=5, new_tokens=3)
    layout = strategy.layout(shown.tokens)
    picture = draw_mask(strategy, shown)

    runner = ModelRunner(models("llama", "flexmask"), BlockMaskCache())
    runner.prepare(strategy, batch_size=1, capacity=1024)
    runner.bound.batch.load([layout], [len(layout) - 1], [0])
    mask_mod = runner.bound._mask_mods[WHOLE_MODEL]
    prefill = create_block_mask(mask_mod, 1, None, 640, 640, "cpu", BLOCK_SIZE)
    runner.bound.batch.open_tail([len(layout) - 1])
    assert picture.mask.tile == BLOCK_SIZE == TILE
    whole_tiles = (len(layout) - 1) // TILE  # those that hold prompt tokens only
    engines = states_of(prefill)[:whole_tiles, :whole_tiles]
    assert engines.equal(picture.mask.states[:whole_tiles, :whole_tiles])

    decode = DecodeRowMask(mask_mod, 1, 1024, "cpu")
    for slot in range(len(layout) - 1, len(layout) + shown.new_tokens):
        decode.update(torch.tensor([slot]))
        keys = torch.arange(1024)
        zero = torch.zeros((), dtype=torch.int64)
        row = decode.block_mask.mask_mod(zero, zero, zero, keys)
        assert row[: picture.size].equal(picture.mask.dense[slot])


def states_of(block_mask):
    """Tile states from the index tensors that kernels read."""
    rows = block_mask.kv_indices.shape[-2]
    states = torch.full((rows, rows), EMPTY, dtype=torch.uint8)
    for row in range(rows):
        partial = int(block_mask.kv_num_blocks[0, 0, row])
        full = int(block_mask.full_kv_num_blocks[0, 0, row])
        states[row, block_mask.kv_indices[0, 0, row, :partial].long()] = PARTIAL
        states[row, block_mask.full_kv_indices[0, 0, row, :full].long()] = FULL
    return states


def test_tile_states_are_those_of_the_block_mask():
    mask = TileMask.build(causal, 1000, 128)
    block_mask = create_block_mask(causal, 1, None, 1000, 1000, "cpu", 128)
    assert mask.states.equal(states_of(block_mask))


def test_tiles_that_would_be_a_square_of_tokens_are_refused():
    with pytest.raises(OptionError, match=r"take larger tiles \(`tile=2`\)"):
        TileMask.build(causal, 10_000, 1)


def test_masks_that_need_vmap_are_drawn_too():
    def coprime(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (torch.gcd(q_idx, kv_idx) == 1)

    index = torch.arange(40)
    expected = (index[:, None] >= index) & (torch.gcd(index[:, None], index) == 1)
    assert TileMask.build(coprime, 40, 16).dense.equal(expected)


def test_bands_name_the_parts_in_order():
    strategy = make_strategy("ensemble_isolation", {})
    tokens = draw_mask(strategy, SHOWN).tokens
    assert [(band.label, len(band)) for band in tokens.bands] == [
        ("S1", 12), ("S2", 9), ("S3", 11), ("T", 3), ("G", 4),
    ]  # fmt: skip
    assert tokens.tail_start == 32
    assert tokens.prompt_tokens == 35


def test_copies_of_a_token_share_its_origin():
    strategy = make_strategy("ensemble_isolation", {})
    tokens = draw_mask(strategy, SHOWN).tokens
    assert tokens.origins[:12] == (*range(5), *range(5, 12))
    assert tokens.origins[12:21] == (*range(5), *range(12, 16))
    assert tokens.origins[-4:] == (25, 26, 27, 28)


def test_texts_follow_their_tokens():
    request = TokenizedRequest((1,), ((2, 3), (4,)), (5,))
    shown = ShownRequest(request, 2, "<{}>".format, ("new",))
    strategy = make_strategy("ensemble_isolation", {})
    tokens = DrawnTokens.of_request(strategy, strategy.layout(request), shown)
    assert tokens.texts == ("<1>", "<2>", "<3>", "<1>", "<4>", "<5>", "new", "")


def test_small_masks_are_drawn_token_by_token_and_large_ones_in_tiles():
    assert cell_side(64, 128, max_tokens=64, max_cells=10) == 1
    assert cell_side(1000, 128, max_tokens=64, max_cells=10) == 128
    assert cell_side(10_000, 128, max_tokens=64, max_cells=10) == 8 * 128


def test_cells_say_which_tiles_are_skipped():
    picture = draw_mask(make_strategy("causal", {}), ShownRequest.of_lengths(0, (10,), 2), 4)
    tokens = cell_grid(picture, 1).cells
    assert tokens[0, 3] == CellState.MASKED
    assert tokens[0, 4] == CellState.SKIPPED
    assert tokens[4, 3] == CellState.SEEN
    tiles = cell_grid(picture, 4).cells
    assert tiles.tolist() == [
        [CellState.PARTIAL, CellState.SKIPPED, CellState.SKIPPED],
        [CellState.FULL, CellState.PARTIAL, CellState.SKIPPED],
        [CellState.FULL, CellState.FULL, CellState.PARTIAL],
    ]


def sees_in_request(strategy, shown):
    """The oracle over the request's tokens: some copy sees some copy."""
    layout = grown_layout(strategy, shown)
    origins = draw_mask(strategy, shown).tokens.origins
    size = max(origins) + 1
    sees = torch.zeros(size, size, dtype=torch.bool)
    for q in range(len(layout)):
        for kv in range(len(layout)):
            sees[origins[q], origins[kv]] |= strategy.allowed(layout, q, kv)
    return sees


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_a_difference_is_that_of_the_oracles(first, second):
    one, other = make_strategy(first, {}), make_strategy(second, {})
    difference = draw_difference(one, other, SHOWN, tile=8)
    in_first, in_second = sees_in_request(one, SHOWN), sees_in_request(other, SHOWN)
    assert difference.both.dense.equal(in_first & in_second)
    assert difference.only_first.dense.equal(in_first & ~in_second)
    assert difference.only_second.dense.equal(in_second & ~in_first)
    assert difference.pairs_that_differ == int((in_first ^ in_second).sum())
    assert [band.label for band in difference.tokens.bands] == ["P", "S1", "S2", "S3", "T", "G"]


def test_a_shared_and_a_copied_prefix_let_the_same_tokens_see_each_other():
    one, other = (make_strategy(name, {}) for name in ("prefix_segment", "ensemble_isolation"))
    difference = draw_difference(one, other, SHOWN)
    assert difference.pairs_that_differ == difference.moved_tokens == 0


def test_positions_that_differ_are_counted_where_no_pair_does():
    restart = make_strategy("prefix_segment", {})
    sequential = make_strategy("prefix_segment", {"positions": "sequential"})
    difference = draw_difference(restart, sequential, SHOWN)
    assert difference.pairs_that_differ == 0
    assert difference.moved_tokens == 4 + 6 + 3 + 4  # all after the first segment
    assert difference.summary == "0 of 841 pairs differ; 17 of 29 tokens at other positions"


class SortsByToken(Strategy):
    """Lays the segments out by their first token."""

    name = "sorts_by_token"

    def layout(self, request):
        segments = tuple(sorted(request.segments, key=lambda segment: (-len(segment), segment)))
        tail = request.tail if request.segments[0][0] > 50 else request.tail[:1]
        return super().layout(TokenizedRequest(request.prefix, segments, tail))

    def mask_mod(self, batch):
        return causal


def test_layouts_that_depend_on_token_ids_are_drawn_but_not_compared():
    shown = ShownRequest(TokenizedRequest((), ((90, 91), (80, 81)), (1, 2)))
    assert draw_mask(SortsByToken(), shown).tokens.origins == ()
    with pytest.raises(OptionError, match="arranges tokens by their ids"):
        draw_difference(SortsByToken(), make_strategy("causal", {}), shown)


def test_a_layout_alone_has_bands():
    layout = Layout((1, 2, 3), (0, 1, -1), (0, 1, 2))
    assert [band.label for band in DrawnTokens.of_layout(layout).bands] == ["P", "S1", "T"]


LONG = """
import re, sys
from pathlib import Path
from flexmask.show.figure import save_figure
from flexmask.show.mask_picture import draw_mask
from flexmask.show.mask_page import save_page
from flexmask.show.picture_source import subject_of_lengths
from flexmask.plugins.registry import make_strategy

subject = subject_of_lengths(1000, [11000] * 5, 36).with_new_tokens(4500)
picture = draw_mask(make_strategy("ensemble_isolation", {}), subject.shown)
assert picture.size == 64536
save_figure(picture, Path(sys.argv[1], "mask.png"))
save_page([picture], subject, Path(sys.argv[1], "mask.html"))
# Not getrusage: what it counts includes the process that started this one.
(kibibytes,) = re.findall(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(int(kibibytes) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_64k_tokens_take_less_than_a_gibibyte(tmp_path):
    output = subprocess.run(
        [sys.executable, "-c", LONG, tmp_path], capture_output=True, text=True, check=True
    ).stdout
    assert float(output) < 1
    assert (tmp_path / "mask.html").stat().st_size < 2 * 2**20
