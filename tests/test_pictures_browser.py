"""The page in a real Chromium: pointer, touch, keys, sizes and colour schemes.

Needs Chromium on the PATH and playwright (``flexmask[browser-tests]``); skipped elsewhere.
"""

import pytest

from flexmask.block_mask.tile_states import EMPTY, FULL, PARTIAL
from flexmask.plugins.registry import make_strategy
from flexmask.show.mask_page import save_page
from flexmask.show.mask_picture import Picture, draw_difference, draw_mask
from flexmask.show.palette import FULL_COLOUR, PARTIAL_COLOUR, part_colour, rgb
from flexmask.show.picture_source import Subject, subject_of_lengths
from flexmask.show.tokens import ShownRequest
from oracles import dense_mask, random_request

pytestmark = pytest.mark.browser

NAMES = ["causal", "prefix_segment", "ensemble_isolation"]
STRATEGIES = [make_strategy(name, {}) for name in NAMES]
TILE, NEW_TOKENS = 8, 4
REQUEST = random_request(seed=1, prefix=6, segments=(8, 5, 7), tail=3)
SUBJECT = Subject("a request", ShownRequest(REQUEST, NEW_TOKENS, "‹{}›".format, ("new",)))
PHONE = {"viewport": {"width": 400, "height": 800}, "has_touch": True, "is_mobile": True}


def oracle(number, subject=SUBJECT):
    strategy, shown = STRATEGIES[number], subject.shown
    return dense_mask(strategy, strategy.layout(shown.tokens).extended(shown.new_tokens))


@pytest.fixture(scope="session")
def page_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "mask.html"
    pictures: list[Picture] = [draw_mask(strategy, SUBJECT.shown, TILE) for strategy in STRATEGIES]
    pictures.append(draw_difference(STRATEGIES[0], STRATEGIES[1], SUBJECT.shown, TILE))
    save_page(pictures, SUBJECT, path)
    return path


@pytest.fixture
def open_page(open_file, page_file):
    def open_page(path=page_file, **options):
        page = open_file(path, **options)
        settle(page)
        return page

    return open_page


def settle(page):
    """Wait until what was asked for is drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 30)))")


def token(page, panel, number):
    return page.locator(f"#tokens-{panel}-token-{number}")


def marked(page, panel, name):
    """Numbers of the tokens of a panel that carry a class."""
    spans = page.locator(f"#tokens-{panel} .token.{name}:not([hidden])")
    return spans.evaluate_all("(spans) => spans.map((span) => Number(span.dataset.token))")


def only(page, panel):
    """Show one strategy alone."""
    page.keyboard.press(str(panel + 1))
    settle(page)


def seen_by(allowed, query, visible=None):
    return allowed[query, :visible].nonzero().flatten().tolist()


def seers_of(allowed, key, visible=None):
    return allowed[:visible, key].nonzero().flatten().tolist()


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_hovering_a_token_marks_exactly_what_it_sees_and_what_sees_it(open_page, number):
    page = open_page()
    only(page, number)
    allowed = oracle(number)
    for query in (0, 7, 13, 20, len(allowed) - 6, len(allowed) - 1):
        token(page, number, query).hover()
        assert marked(page, number, "seen") == seen_by(allowed, query)
        assert marked(page, number, "sees-it") == seers_of(allowed, query)
        assert marked(page, number, "selected") == [query]
    page.mouse.move(2, 2)
    assert marked(page, number, "seen") == []


def test_a_tap_selects_a_token_until_another_tap(open_page):
    page = open_page(**PHONE)
    allowed = oracle(0)
    token(page, 0, 9).tap()
    assert marked(page, 0, "seen") == seen_by(allowed, 9)
    token(page, 0, 12).tap()
    assert marked(page, 0, "seen") == seen_by(allowed, 12)
    token(page, 0, 12).tap()
    assert marked(page, 0, "selected") == []


def test_generation_is_stepped_through_row_by_row(open_page):
    page = open_page()
    only(page, 1)
    allowed = oracle(1)
    prompt = len(allowed) - NEW_TOKENS
    visible = page.locator("#tokens-1 .token:not([hidden])")
    assert visible.count() == len(allowed)
    for _ in range(NEW_TOKENS):
        page.get_by_role("button", name="Previous step").click()
    assert visible.count() == prompt
    assert page.locator("#step-text").inner_text() == "prompt"
    assert page.get_by_role("button", name="Previous step").is_disabled()
    ways = [
        lambda: page.get_by_role("button", name="Next step").click(),
        lambda: page.keyboard.press("]"),
        lambda: page.get_by_role("slider", name="Generated tokens").press("ArrowRight"),
    ]
    for step, advance in enumerate(ways, start=1):
        advance()
        assert visible.count() == prompt + step
        newest = prompt + step - 1
        assert marked(page, 1, "selected") == [newest]
        assert marked(page, 1, "seen") == seen_by(allowed, newest, prompt + step)
    page.keyboard.press("[")
    assert visible.count() == prompt + 2


def test_strategies_switch_and_stand_side_by_side(open_page):
    page = open_page()
    shown = page.locator(".panel:visible h2")
    assert shown.all_inner_texts()[:2] == ["causal", "prefix_segment (positions=restart)"]
    assert shown.count() == 4
    page.get_by_role("button", name="ensemble_isolation (positions=restart)").first.click()
    assert shown.all_inner_texts() == ["ensemble_isolation (positions=restart)"]
    pressed = page.locator("#switches button[aria-pressed=true]")
    assert pressed.all_inner_texts() == ["ensemble_isolation (positions=restart)"]
    page.keyboard.press("1")
    assert shown.all_inner_texts() == ["causal"]
    page.get_by_role("button", name="Side by side").click()
    assert shown.count() == 4


def test_a_token_is_selected_in_every_strategy_at_once(open_page):
    page = open_page()
    token(page, 0, 6 + 8 + 2).click()  # the third token of the second segment
    assert marked(page, 1, "selected") == [6 + 8 + 2]
    assert marked(page, 2, "selected") == [(6 + 8) + 6 + 2]
    token(page, 2, (6 + 8) + 1).click()  # a copied prefix token
    assert marked(page, 0, "selected") == [1]
    only(page, 2)
    token(page, 2, (6 + 8) + 6).click()
    assert marked(page, 2, "seen") == seen_by(oracle(2), 14 + 6)


def test_keys_move_the_selection_in_a_focused_list_and_matrix(open_page):
    page = open_page()
    only(page, 0)
    for box in (page.get_by_role("listbox"), page.get_by_role("application")):
        box.focus()
        moves = {"Home": 0, "ArrowRight": 1, "ArrowDown": 6, "ArrowLeft": 5, "ArrowUp": 0}
        for key, target in moves.items():
            page.keyboard.press(key)
            assert marked(page, 0, "selected") == [target], key
        page.keyboard.press("End")
        assert marked(page, 0, "selected") == [len(oracle(0)) - 1]
        page.keyboard.press("Escape")
        assert marked(page, 0, "selected") == []


def test_every_control_is_reached_by_tab_and_shows_its_focus(open_page):
    page = open_page()
    only(page, 0)
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        name = "document.activeElement.id || document.activeElement.className"
        tag = "document.activeElement.tagName"
        if page.evaluate(tag) == "BODY":
            break
        assert page.evaluate(outline) == "solid", page.evaluate(name)
        reached.append(page.evaluate(f"{name} || {tag}"))
    wanted = {"side-by-side", "tiles", "previous", "step", "CANVAS", "zoom-in", "fit", "tokens-0"}
    assert wanted <= {name or "CANVAS" for name in reached}


def test_screen_readers_hear_names_and_what_is_selected(open_page):
    page = open_page()
    only(page, 0)
    option = page.get_by_role("option", name=", S1, slot 6, position 6")
    option.click()
    assert option.get_attribute("aria-selected") == "true"
    status = page.get_by_role("status").inner_text()
    text = f"‹{REQUEST.segments[0][0]}›"
    size = len(oracle(0))
    assert status == (
        f'causal: S1 token "{text}", slot 6, position 6, sees 7 tokens (P, S1); {size - 6} see it.'
    )
    listbox = page.get_by_role("listbox", name="Tokens under causal")
    assert listbox.get_attribute("aria-activedescendant") == "tokens-0-token-6"
    assert page.get_by_role("application", name="Mask matrix of causal").is_visible()
    assert page.get_by_role("group", name="fusion tail").is_visible()


PIXELS = """(canvas, size) => {
  const margin = Math.round((20 * canvas.width) / canvas.clientWidth);
  const scale = (canvas.width - margin) / size;
  const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.width).data;
  const at = (cell) => Math.floor(margin + (cell + 0.5) * scale);
  const cells = [...Array(size).keys()];
  return cells.map((q) => cells.map((k) => {
    const dot = 4 * (at(q) * canvas.width + at(k));
    return [...image.slice(dot, dot + 3)];
  }));
}"""
"""Colours in the middle of each of ``size`` × ``size`` cells."""


def pixels(page, panel, size):
    """The colour in the middle of each cell of a panel's matrix."""
    page.mouse.move(2, 2)
    settle(page)
    return page.locator("canvas").nth(panel).evaluate(PIXELS, size)


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_the_matrix_shows_the_oracle_pixel_by_pixel(open_page, number):
    page = open_page()
    only(page, number)
    allowed = oracle(number)
    picture = draw_mask(STRATEGIES[number], SUBJECT.shown, TILE)
    colours = {
        slot: rgb(part_colour(band.segment_id, band.is_generated))
        for band in picture.tokens.bands
        for slot in range(band.start, band.stop)
    }
    skipped = picture.mask.is_skipped
    found = pixels(page, number, len(allowed))
    for q, row in enumerate(found):
        for k, pixel in enumerate(row):
            hidden = (0xE9, 0xE9, 0xE6) if skipped[q, k] else (255, 255, 255)
            assert tuple(pixel) == (colours[k] if allowed[q, k] else hidden), (q, k)


def test_the_tile_view_shows_what_the_kernel_computes(open_page):
    page = open_page()
    only(page, 1)
    page.keyboard.press("t")
    states = draw_mask(STRATEGIES[1], SUBJECT.shown, TILE).mask.states
    colours = {EMPTY: (0xE9, 0xE9, 0xE6), PARTIAL: rgb(PARTIAL_COLOUR), FULL: rgb(FULL_COLOUR)}
    found = pixels(page, 1, len(oracle(1)))
    for q, row in enumerate(found):
        for k, pixel in enumerate(row):
            assert tuple(pixel) == colours[int(states[q // TILE, k // TILE])], (q, k)
    assert page.get_by_role("button", name="Tiles").get_attribute("aria-pressed") == "true"
    assert "partial tile" in page.locator(".panel:visible .legend").inner_text()


def test_pointing_at_the_matrix_selects_the_row_and_zoom_keeps_it_in_view(open_page):
    page = open_page()
    only(page, 0)
    canvas = page.locator("canvas").first
    box = canvas.bounding_box()
    size = len(oracle(0))

    def point(q, k):
        scale = (box["width"] - 20) / size
        return {"x": 20 + (k + 0.5) * scale, "y": 20 + (q + 0.5) * scale}

    canvas.hover(position=point(15, 3))
    assert marked(page, 0, "selected") == [15]
    canvas.click(position=point(15, 3))
    page.locator(".zoom-in").first.click()
    page.locator(".zoom-in").first.click()
    settle(page)
    span = page.evaluate("window.flexmask.views[0].matrix.view.span")
    assert span == pytest.approx(max(8, size / 4))
    page.get_by_role("application").press("End")
    view = page.evaluate("window.flexmask.views[0].matrix.view")
    assert view["q"] + view["span"] == pytest.approx(size)
    page.locator(".fit").first.click()
    assert page.evaluate("window.flexmask.views[0].matrix.view.span") == size


def test_a_difference_marks_what_only_one_strategy_sees(open_page):
    page = open_page()
    only(page, 3)
    query = 6 + 8 + 2  # of the second segment
    token(page, 3, query).click()
    assert marked(page, 3, "layer-1") == list(range(6, 14))  # the first segment
    assert marked(page, 3, "layer-0") == [*range(6), *range(14, query + 1)]
    assert "only causal: 8" in page.get_by_role("status").inner_text()


def test_pairs_that_the_page_does_not_hold_are_marked_as_unknown(open_page, tmp_path, monkeypatch):
    monkeypatch.setattr("flexmask.show.mask_page.MAX_PAIRS", TILE**2)
    path = tmp_path / "bounded.html"
    save_page([draw_mask(STRATEGIES[0], SUBJECT.shown, TILE)], SUBJECT, path)
    page = open_page(path)
    token(page, 0, 3).click()  # in the one partial tile that is held
    assert marked(page, 0, "seen") == [0, 1, 2, 3]
    last = len(oracle(0)) - 1  # in tiles that stick out, which are partial
    assert marked(page, 0, "unknown") == [last]
    token(page, 0, 10).click()
    assert marked(page, 0, "seen") == list(range(8))
    assert marked(page, 0, "unknown") == [*range(8, 16), last]
    assert "sees 8 to 16 tokens" in page.get_by_role("status").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_are_followed_at_once(open_page, scheme):
    other = {"light": "dark", "dark": "light"}[scheme]
    page = open_page(color_scheme=other)
    only(page, 0)
    page.emulate_media(color_scheme=scheme)
    settle(page)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 22, 21)"}[scheme]
    masked = pixels(page, 0, len(oracle(0)))[0][1]
    assert masked == {"light": [255, 255, 255], "dark": [22, 22, 21]}[scheme]


def test_at_phone_width_nothing_is_cut_off(open_page):
    page = open_page(**PHONE)
    for panel in (0, 2):
        only(page, panel)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        sizes = page.locator("button:visible").evaluate_all(
            "(buttons) => buttons.map((b) => b.getBoundingClientRect().height)"
        )
        assert min(sizes) >= 32
    page.get_by_role("button", name="Side by side").tap()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_four_thousand_tokens_are_pointed_at_one_after_the_other(open_page, tmp_path):
    subject = subject_of_lengths(400, [900, 800, 1000, 850], 100).with_new_tokens(46)
    path = tmp_path / "long.html"
    pictures = [draw_mask(strategy, subject.shown) for strategy in STRATEGIES[:2]]
    save_page(pictures, subject, path)
    page = open_page(path)
    only(page, 1)
    for chunk in page.locator("#tokens-1 .chunk").all():
        chunk.scroll_into_view_if_needed()  # so that every token is in the page
    page.evaluate(
        """() => {
          const { panels, views } = window.flexmask;
          for (let token = 0; token < 4000; token += 100) {
            window.flexmask.point(panels[1], token);
            views[1].matrix.redraw();
            views[1].tokens.element.offsetHeight;
          }
        }"""
    )
    assert page.locator("#tokens-1 .token").count() == 4096


def test_sixty_four_thousand_tokens_open_and_are_drilled_into(open_page, tmp_path):
    subject = subject_of_lengths(1000, [11_000] * 5, 36).with_new_tokens(4500)
    path = tmp_path / "huge.html"
    save_page([draw_mask(STRATEGIES[2], subject.shown)], subject, path)
    page = open_page(path)
    assert page.locator(".token").count() < 5000
    page.get_by_role("listbox").press("End")
    assert token(page, 0, 64_535).is_visible()
    assert "sees 64536 tokens" in page.get_by_role("status").inner_text()
    for _ in range(12):
        page.locator(".zoom-in").click()
    page.get_by_role("application").press("Home")
    settle(page)
    found = page.locator("canvas").evaluate(PIXELS, 16)[1:]
    first_segment = list(rgb(part_colour(1)))
    drawn = [[cell == first_segment for cell in row] for row in found]
    assert drawn[6:8] == [[True] * 8 + [False] * 8, [True] * 9 + [False] * 7]
