"""The page, read back; tests/test_pictures_browser.py uses it."""

import re
from dataclasses import replace

import pytest

from flexmask.layout import TokenizedRequest
from flexmask.plugins.registry import make_strategy
from flexmask.show import mask_page as page_module
from flexmask.show.answer_text import answer_text
from flexmask.show.mask_page import page_html
from flexmask.show.mask_picture import draw_difference, draw_mask
from flexmask.show.picture_source import Answer, Subject, subject_of_lengths
from flexmask.show.tokens import ShownRequest
from oracles import dense_mask
from page_data import data_of, dense_layer, panels_of

NAMES = ["causal", "prefix_segment", "ensemble_isolation"]
SUBJECT = subject_of_lengths(20, [30, 25, 41], 6).with_new_tokens(5)


@pytest.mark.parametrize("tile", [7, 16, 128])
@pytest.mark.parametrize("name", NAMES)
def test_the_pairs_that_a_page_holds_are_the_oracle(name, tile):
    strategy = make_strategy(name, {})
    picture = draw_mask(strategy, SUBJECT.shown, tile)
    (panel,) = panels_of(page_html([picture], SUBJECT))
    layout = strategy.layout(SUBJECT.shown.tokens).extended(5)
    (layer,) = panel["layers"]
    assert dense_layer(panel, layer).tolist() == dense_mask(strategy, layout).tolist()
    assert [tuple(band) for band in panel["bands"]][-1][0] == "G"
    assert unrolled(panel["positions"], len(layout)) == list(layout.position_ids)


def unrolled(runs, size):
    stops = [start for start, _ in runs[1:]] + [size]
    return [
        first + i for (start, first), stop in zip(runs, stops, strict=True)
        for i in range(stop - start)
    ]  # fmt: skip


def test_a_difference_has_three_layers_that_share_no_pair():
    first, second = (make_strategy(name, {}) for name in ("causal", "prefix_segment"))
    picture = draw_difference(first, second, SUBJECT.shown, 16)
    (panel,) = panels_of(page_html([picture], SUBJECT))
    both, one, other = (dense_layer(panel, layer) for layer in panel["layers"])
    layout = first.layout(SUBJECT.shown.tokens).extended(5)
    in_first = dense_mask(first, layout).numpy()
    in_second = dense_mask(second, layout).numpy()
    assert (both == (in_first & in_second)).all()
    assert (one == (in_first & ~in_second)).all()
    assert (other == (in_second & ~in_first)).all()


def test_equal_tiles_are_kept_once():
    picture = draw_mask(make_strategy("causal", {}), subject_of_lengths(0, [4000], 96).shown)
    (panel,) = panels_of(page_html([picture], SUBJECT))
    assert len(panel["layers"][0]["bitmaps"]) == 1


def test_beyond_a_limit_pairs_are_left_out(monkeypatch):
    monkeypatch.setattr(page_module, "MAX_PAIRS", 2 * 6 * 6)
    picture = draw_mask(make_strategy("causal", {}), subject_of_lengths(0, [20], 4).shown, 6)
    (panel,) = panels_of(page_html([picture], SUBJECT))
    (layer,) = panel["layers"]
    assert layer["bitmapOfTile"] == "AAAAAAAAAAD//////////w=="  # 0, 0, -1, -1


def test_texts_cannot_leave_their_place_in_the_page():
    attack = "</script><script>alert(1)</script>"
    request = TokenizedRequest((), ((1, 2), (1, 3)), (4,))
    shown = ShownRequest(request, 0, lambda token: attack)
    strategy = make_strategy("causal", {})
    generation = attack + " {{DATA}}"
    answer = Answer(attack, generation, ("alert",), True, "eos", attack, lambda: strategy)
    page = page_html([draw_mask(strategy, shown)], Subject(attack, shown, answer))
    assert page.count("<script") == 2
    assert "&lt;script&gt;<mark>alert</mark>(1)" in page
    (panel,) = panels_of(page)
    assert panel["texts"] == [attack] * 5


def test_shares_of_attention_stand_beside_the_answer():
    (strategy, shown) = make_strategy("causal", {}), SUBJECT.shown
    answer = Answer("a", "a", (), None, "eos", "m", lambda: strategy)
    picture = draw_mask(strategy, shown)
    assert "<dt>Attention" not in page_html([picture], Subject("", shown, answer))
    assert 'id="looked"' not in page_html([picture], Subject("", shown, answer))
    measured = replace(answer, attention=((0.5, 0.25, 0.25), (0.0, 0.75, 0.25)))
    page = page_html([picture], Subject("", shown, measured))
    assert '<p id="looked"' in page
    of_tokens = ["P 50.0%  S1 25.0%  T 25.0%", "P 0.0%  S1 75.0%  T 25.0%"]
    assert data_of(page)["attention"] == of_tokens
    assert "<dt>Attention</dt><dd>P 25.0%  S1 50.0%  T 25.0%</dd>" in page
    assert answer_text(measured).plain.endswith("attention   P 25.0%  S1 50.0%  T 25.0%\n")


def test_a_page_names_nothing_on_the_network():
    page = page_html([draw_mask(make_strategy("causal", {}), SUBJECT.shown)], SUBJECT)
    assert not re.search(r"https?://|//cdn|@import|url\(", page)
    assert "default-src 'none'" in page
