"""The page of a comparison in a real Chromium: sorting, the plot, the questions of two cells.

Needs Chromium on the PATH and playwright (``flexmask[browser-tests]``); skipped elsewhere.
"""

import pytest

from comparison_folder import made_up_cell, write_comparison
from flexmask.request import Request

pytestmark = pytest.mark.browser

QUESTIONS = 50
LONG = "ensemble_isolation:positions=sequential"
EVIL = "</script><img src=x onerror=alert(1)>"
REQUESTS = [
    Request(
        segments=(f"Q: who is {number}?", f"Q: {number} {EVIL}", "Q: and who?"),
        prefix="Say <b>who</b>.\n",
        suffix="\nA:",
        answers=(f"name {number}", "also"),
        uuid=f"q{number}",
    )
    for number in range(QUESTIONS)
]
RIGHT = [f"name {number}" for number in range(QUESTIONS)]
CELLS = {
    made_up_cell("causal", 1, ["none (1)"]): ["wrong"] * 30 + RIGHT[30:],
    made_up_cell("causal", 3): [EVIL] * 5 + RIGHT[5:45] + ["wrong"] * 5,
    made_up_cell(LONG, 3): RIGHT,
}
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 400, "height": 800}, "has_touch": True, "is_mobile": True}
DARK = {**DESKTOP, "color_scheme": "dark"}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_comparison(folder, CELLS, REQUESTS, failed=made_up_cell("max", 3))
    return folder / "report.html"


@pytest.fixture
def open_page(open_file, page_file):
    def open_page(**options):
        page = open_file(page_file, **options)
        page.wait_for_selector("#plot svg")
        return page

    return open_page


def names(page):
    return page.locator("tbody th.name > span:first-child").all_text_contents()


def test_a_click_or_a_key_on_a_heading_sorts_the_table(open_page):
    page = open_page()
    assert names(page) == ["causal", "causal", LONG, "max"]
    heading = page.get_by_role("columnheader", name="accuracy")
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert names(page) == [LONG, "causal", "causal", "max"]
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert names(page) == ["causal", "causal", LONG, "max"]
    name = page.get_by_role("button", name="strategy or fusion")
    name.click()
    name.click()
    assert names(page) == ["max", LONG, "causal", "causal"]
    assert heading.get_attribute("aria-sort") is None
    assert page.locator("#status").text_content() == "Sorted by strategy or fusion, descending"


def test_the_table_shows_intervals_what_is_the_same_and_what_failed(open_page):
    page = open_page()
    first, second, third, failed = page.locator("tbody tr").all()
    assert "also none (1)" in first.text_content()
    assert "40.0%" in first.text_content()
    assert "+40.0%" in second.text_content()
    assert "100.0 to 100.0" in third.text_content()
    assert failed.text_content() == "maxfailed: it <b>broke</b>3"


def test_the_plot_has_a_point_with_error_bars_for_each_cell_and_changes_its_cost(open_page):
    page = open_page()
    assert page.locator("#plot .point").count() == 3
    titles = page.locator("#plot .point title").all_text_contents()
    assert titles[0].startswith("causal (1): 40.0% (")
    assert titles[0].endswith(", 20 milliseconds per question")
    page.locator("#cost").select_option("prompt tokens computed per question")
    titles = page.locator("#plot .point title").all_text_contents()
    assert titles[2].endswith(", 15 prompt tokens computed per question")
    low, high = (float(page.locator("#plot .bar").first.get_attribute(y)) for y in ("y1", "y2"))
    mark = page.locator("#plot .point path").first.get_attribute("transform")
    assert high < float(mark.rstrip(")").split()[1]) < low
    assert page.locator("#legend li").all_text_contents() == ["causal", LONG]


def shown(page):
    return page.locator("#questions .uuid").all_text_contents()


def test_questions_are_listed_on_which_two_chosen_cells_differ(open_page):
    page = open_page()
    counts = page.locator("#counts")
    assert page.locator("#second").input_value() == "2"  # the best
    assert counts.text_content() == (
        "30 of 50 questions shown; A better in 0, B better in 30, both wrong in 0"
    )
    assert shown(page) == [f"q{number}" for number in range(20)]
    page.get_by_role("button", name="Show 10 of 10 more").click()
    assert len(shown(page)) == 30
    assert page.locator("#more").is_hidden()
    page.locator("#second").select_option("causal (3)")
    assert shown(page) == [f"q{number}" for number in range(5, 25)]
    page.locator("#kind").select_option("A is right, B is not")
    assert shown(page) == [f"q{number}" for number in range(45, 50)]
    page.get_by_role("button", name="Swap").click()
    assert page.locator("#first option:checked").text_content() == "causal (3)"
    assert len(shown(page)) == 20
    page.locator("#kind").select_option("both are wrong")
    assert shown(page) == [f"q{number}" for number in range(5)]


def test_a_question_shows_prompts_both_answers_and_what_is_accepted_as_plain_text(open_page):
    page = open_page()
    page.locator("#second").select_option("causal (3)")
    page.locator("#kind").select_option("answers differ")
    question = page.locator(".question").first
    assert question.locator(".segments li").all_text_contents() == [
        "Q: who is 0?",
        f"Q: 0 {EVIL}B only",
        "Q: and who?B only",
    ]
    assert question.locator(".answers dd").all_text_contents() == [
        "wrong ✗ wrong",
        f"{EVIL} ✗ wrong",
        "name 0 | also",
    ]
    question.get_by_text("prefix and suffix").click()
    assert question.locator("pre").text_content() == "Say <b>who</b>.\n…\nA:"
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("options", [DESKTOP, PHONE, DARK], ids=["desktop", "phone", "dark"])
def test_the_page_fits_the_window_and_its_text_stands_out(open_page, options):
    page = open_page(**options)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    colours = page.evaluate(
        "['color', 'backgroundColor'].map((name) => getComputedStyle(document.body)[name])"
    )
    text, ground = (sum(map(int, colour[4:-1].split(","))) for colour in colours)
    assert (text > ground) == ("color_scheme" in options)
    assert abs(text - ground) > 500


def test_everything_is_reached_and_named_by_keyboard(open_page):
    page = open_page()
    reached = []
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.role"))
    wanted = ["region", "cost", "first", "swap", "second", "kind"]
    assert [name for name in reached if name in wanted] == wanted
    unnamed = page.locator("select, button").evaluate_all(
        "(all) => all.filter((each) => !each.labels?.length && !each.textContent.trim())"
    )
    assert unnamed == []
