"""Pages whose every text is an attack, in a real Chromium: nothing runs, nothing is asked for.

Needs Chromium on the PATH and playwright (``flexmask[browser-tests]``); skipped elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command import run_command
from comparison_folder import made_up_cell, write_comparison
from flexmask.demo import model_path
from flexmask.generation import Generation
from flexmask.request import Request
from flexmask.results.result_writer import ResultWriter
from flexmask.results.run_config import RunConfig
from sampling_of_cases import sampled

pytestmark = pytest.mark.browser

RUN = "window.PWNED = 1"
ATTACKS = {
    "a script": f"<script>{RUN}</script>",
    "the end of a script": f"</script><script>{RUN}</script><!--<script>",
    "an image": f"<img src=http://127.0.0.1:9/x onerror='{RUN}'>",
    "the end of an attribute": f"\"' onmouseover='{RUN}' autofocus onfocus='{RUN}' x=\"><svg "
    f"onload='{RUN}'>",
    "a frame": f'<iframe src="javascript:parent.{RUN}"></iframe><object data=http://127.0.0.1:9/>',
    "a style": "</style><style>@import url(http://127.0.0.1:9/x.css);body{display:none}</style>",
    "a template": f"{{{{ 7 * 7 }}}}{{% raw %}}${{{RUN}}}`<%= {RUN} %>",
    "a comment and a base": "<!--</title></textarea><base href=http://127.0.0.1:9/><meta "
    "http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
    "text that turns around": f"\u202e<b>\u2028\x00\x1b[2J\ufeff</b>\r\n&lt;script&gt;{RUN}",
}
"""By what is tried."""

LEFT = """() => ({
  ran: window.PWNED ?? null,
  elements: document.querySelectorAll("img, iframe, object, base, meta[http-equiv=refresh], b, "
    + "[onerror], [onload], [onfocus], [onmouseover]").length,
  scripts: [...document.scripts].filter((script) => script.text.includes("window.PWNED") &&
    script.type !== "application/json").length,
  shown: getComputedStyle(document.body).display,
})"""
"""What an attack would have left in a page."""
NOTHING = {"ran": None, "elements": 0, "scripts": 0, "shown": "block"}


def request_of(attack: str, number: int = 1) -> Request:
    return Request(
        segments=(f"{number} {attack}", f"{attack} {number}"),
        prefix=attack,
        suffix=f"{attack}\nA:",
        answers=(attack, "also"),
        uuid=f"{attack} {number}",
    )


def check_page(page: Any, attack: str) -> None:
    """Point at everything there is, and look at what has become of it."""
    for button in page.locator("button:visible").all()[:20]:
        if button.is_enabled():
            button.click()
    page.mouse.move(300, 300)
    page.keyboard.press("Tab")
    found = page.evaluate(LEFT)
    assert found == NOTHING
    visible = "".join(attack.split("\x00")[0].split())[:12]
    assert visible in "".join(page.locator("body").inner_text().split())


CASES = {name: (attack,) for name, attack in ATTACKS.items()}


@pytest.mark.parametrize("attack", sampled(CASES))
def test_nothing_runs_on_the_page_of_a_result(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    open_file: Callable[..., Any],
    attack: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = {"strategy": "causal", "parameters": {}, "model": attack, "chat_template": False}
    request = request_of(attack)
    with ResultWriter.open("out.feather", config=RunConfig(run=run), requests=[request]) as writer:
        writer.write([Generation(request, f" {attack}", (7, 8, 9), "eos", 9)])
    made = run_command("show", "out.feather", "--model", model_path(), "-o", "page.html")
    assert made.status == 0, made.err
    check_page(open_file(tmp_path / "page.html"), attack)


@pytest.mark.parametrize("attack", sampled(CASES))
def test_nothing_runs_on_the_page_of_a_comparison(
    tmp_path: Path, open_file: Callable[..., Any], attack: str
) -> None:
    requests = [request_of(attack, number) for number in range(4)]
    cells = {
        made_up_cell(f"causal {attack}", 1, [attack]): [attack] * 4,
        made_up_cell(f"mean {attack}", 2): ["wrong"] * 2 + [f"{attack}!"] * 2,
    }
    write_comparison(tmp_path / "report", cells, requests, failed=made_up_cell(f"max {attack}", 1))
    page = open_file(tmp_path / "report" / "report.html")
    page.wait_for_selector("#plot svg")
    check_page(page, attack)


@pytest.mark.parametrize("attack", [*ATTACKS.values()][:6], ids=[*ATTACKS][:6])
def test_an_attack_that_is_not_escaped_is_noticed(chromium: Any, attack: str) -> None:
    page = chromium.new_page()
    page.set_content(f'<title>{attack}</title><p title="{attack}">{attack}</p>{attack}')
    found = page.evaluate(LEFT)
    page.close()
    assert found != NOTHING
