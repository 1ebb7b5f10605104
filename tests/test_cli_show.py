import io
import json
import re
import sys

import pytest

from flexmask.generation import Generation
from flexmask.layout import TokenizedRequest
from flexmask.plugins.registry import make_strategy
from flexmask.request import Request
from flexmask.results.result_writer import ResultWriter
from flexmask.results.run_config import RunConfig
from flexmask_cli.app import main
from oracles import dense_mask

LENGTHS = ["--prefix", "2", "--segments", "3,2", "--suffix", "1"]
REQUEST = TokenizedRequest((5, 5), ((5, 5, 5), (5, 5)), (5,))


@pytest.fixture
def show(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["flexmask", "show", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        if end.value.code:
            return str(end.value.code)
        return capsys.readouterr().out

    return run


@pytest.fixture(params=["feather", "parquet", "jsonl"])
def results(request, tmp_path):
    """A result file of two rows, made with ``prefix_segment``."""
    requests = [
        Request(("Q: one?", "Q: first?"), "Answer.\n", "\nA:", ("London", "Paris"), uuid="a"),
        Request(("Q: two?", "Q: second?"), "Answer.\n", "\nA:", uuid="b"),
    ]
    run = {
        "strategy": "prefix_segment",
        "parameters": {"positions": "sequential"},
        "model": "demo",
        "chat_template": False,
    }
    path = tmp_path / f"results.{request.param}"
    with ResultWriter.open(path, config=RunConfig(run=run), requests=requests) as writer:
        writer.write([Generation(requests[0], " in London", (7, 8, 2), "eos", 20)])
        writer.write([Generation(requests[1], " a cat", (7, 8), "length", 20)])
    return path


def drawn_rows(output):
    """The cells of a picture in plain characters."""
    lines = output.splitlines()
    first = next(n for n, line in enumerate(lines) if re.fullmatch("   [PTG0-9]+", line))
    return [[cell == "#" for cell in line[3:]] for line in lines[first + 1 : -1]]


@pytest.mark.parametrize("name", ["causal", "prefix_segment", "ensemble_isolation"])
def test_the_picture_is_the_dense_mask(show, name):
    strategy = make_strategy(name, {})
    drawn = drawn_rows(show("--strategy", name, *LENGTHS))
    assert drawn == dense_mask(strategy, strategy.layout(REQUEST)).tolist()


def test_a_long_layout_is_drawn_in_tiles(show, monkeypatch):
    monkeypatch.setenv("COLUMNS", "44")
    output = show("--strategy", "causal", "--segments", "3000,2000")
    assert len(drawn_rows(output)) == 40
    assert "a cell is 126 tokens" in output


def test_several_strategies_are_drawn_one_after_another(show):
    output = show("-s", "causal,prefix_segment:positions=sequential", *LENGTHS)
    assert output.index("causal\n") < output.index("prefix_segment (positions=sequential)")
    output = show("-s", "tree:parents=0,1,1,causal", *LENGTHS)
    assert output.index("tree (parents=0,1,1)\n") < output.index("causal\n")


def test_a_difference_is_drawn_against_another_strategy(show):
    output = show("-s", "causal", "--against", "prefix_segment", *LENGTHS)
    assert " 2 ==<<<=..\n" in output


def test_the_statistics_count_tiles_and_pairs(show):
    layout = make_strategy("prefix_segment", {}).layout(REQUEST)
    pairs = int(dense_mask(make_strategy("prefix_segment", {}), layout).sum())
    figures = json.loads(show("--strategy", "prefix_segment", "--json", *LENGTHS))
    assert figures["strategy"] == "prefix_segment (positions=restart)"
    assert figures["allowed_pairs"] == pairs
    assert (figures["tiles_empty"], figures["tiles_partial"], figures["tiles_full"]) == (0, 1, 0)
    assert f"allowed pairs{pairs:>24}" in show("--stats", "-s", "prefix_segment", *LENGTHS)
    listed = json.loads(show("--strategy", "causal,prefix_segment", "--json", *LENGTHS))
    assert [each["allowed_pairs"] for each in listed] == [36, pairs]


def test_a_request_of_a_file_is_shown_with_its_text(show, tmp_path):
    path = tmp_path / "requests.jsonl"
    rows = [{"segments": [f"Q: {n}?", "Q: what?"], "suffix": "\nA:", "uuid": n} for n in "xy"]
    path.write_text("\n".join(map(json.dumps, rows)))
    output = show(path, "--row", "2", "-s", "causal")
    assert "requests.jsonl, row 2: y" in output
    assert re.search(r"S2 .*\n    Q :  what \?", output)
    assert "--row must be 1 to 2, got 3" in show("--input", path, "--row", "3")


def test_a_request_of_standard_input_is_shown(show, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"segments": ["a b", "c d"]})))
    monkeypatch.setattr("flexmask_cli.render.lines.print_warnings", print)
    output = show("--input", "-")
    assert "standard input, row 1: 1" in output
    assert "['the segments share no ending" in output


def test_a_result_is_shown_as_it_was_run(show, results):
    output = show(results, "--row", "1")
    assert f"{results.name}, row 1: a" in output
    assert "generation   in [London]  (eos)" in output
    assert "prediction  in London  (wrong)" in output
    assert "prefix_segment (positions=sequential)" in output
    assert "G   3 tokens" in output
    second = show(results, "--row", "2", "-s", "causal")
    assert "(not judged)" in second
    assert "causal\n" in second


def test_a_result_that_does_not_record_its_run_is_refused(show, tmp_path):
    path = tmp_path / "bare.feather"
    request = Request(("Q: one?",), uuid="a")
    run = RunConfig(run={"strategy": "causal"})
    with ResultWriter.open(path, config=run, requests=[request]) as writer:
        writer.write([Generation(request, "x", (7,), "eos", 2)])
    assert "its run does not record parameters, model, chat_template" in show(path)


def test_a_result_of_prompts_that_ran_apart_has_no_mask_to_show(show, tmp_path):
    request = Request(("Q: one?", "Q: two?"), "", "\nA:", uuid="a")
    run = {"strategy": "causal", "parameters": {}, "model": "demo", "chat_template": False}
    for name, asked in (("vote", request), ("each", request.alone()[1])):
        path, config = tmp_path / f"{name}.feather", RunConfig(run | {"fusion": {"name": name}})
        with ResultWriter.open(path, config=config, requests=[asked]) as writer:
            writer.write([Generation(asked, " x", (7,), "stop", 20)])
    assert "its segments ran as separate prompts (fusion 'vote')" in show(
        tmp_path / "vote.feather"
    )
    alone = show(tmp_path / "each.feather")
    assert "\nS1" in alone
    assert "\nS2" not in alone


def test_a_correct_answer_is_marked_as_right(show, results, tmp_path):
    request = Request(("Q: one?",), "", "\nA:", ("London", "Paris"), uuid="a")
    config = RunConfig(
        run={"strategy": "causal", "parameters": {}, "model": "demo", "chat_template": False}
    )
    path = tmp_path / "right.feather"
    with ResultWriter.open(path, config=config, requests=[request]) as writer:
        writer.write([Generation(request, " london\n", (7, 8), "stop", 20)])
    output = show(path)
    assert "prediction  london  (right)" in output
    assert "accepted    [London], Paris" in output


@pytest.mark.parametrize("extension", ["png", "svg", "pdf", "html"])
def test_pictures_are_written_by_extension(show, tmp_path, extension):
    path = tmp_path / "new" / f"mask.{extension}"
    assert show("-s", "causal", "-o", path, *LENGTHS) == f"wrote {path}\n"
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "html": b"<!DOCTYPE html>"}
    assert path.read_bytes().startswith(start[extension])


def test_a_page_holds_both_strategies_and_their_difference(show, tmp_path):
    path = tmp_path / "mask.html"
    show("-s", "causal", "--against", "prefix_segment", "-o", path, *LENGTHS)
    data = path.read_text().partition('id="data">')[2].partition("</script>")[0]
    titles = [panel["title"] for panel in json.loads(data)["panels"]]
    assert titles[:2] == ["causal", "prefix_segment (positions=restart)"]
    assert titles[2] == "causal against prefix_segment (positions=restart)"


def test_output_is_checked_before_anything_is_read(show, tmp_path):
    missing = tmp_path / "missing.jsonl"
    assert "unknown extension '.gif'" in show(missing, "-o", tmp_path / "mask.gif")
    assert "a folder" in show(missing, "-o", make_folder(tmp_path / "folder.png"))
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "cannot be written" in show(missing, "-o", blocked / "mask.png")


def make_folder(path):
    path.mkdir()
    return path


def test_without_matplotlib_the_page_works_and_a_figure_says_what_to_install(
    show, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'flexmask[plot]'" in show("-o", tmp_path / "mask.png")
    assert "wrote" in show("-o", tmp_path / "mask.html")
    assert "positions 0 to 13" in show()


def test_contradictions_are_refused(show, results, tmp_path):
    figure = ["-o", tmp_path / "mask.png"]
    assert "a figure shows one mask, got 2" in show("-s", "causal,prefix_segment", *figure)
    assert "a figure shows one mask, got 2" in show("--against", "causal,causal", *figure)
    assert "leave out --stats, --json and --ascii" in show("--stats", *figure)
    assert "--row needs an --input or a --task" in show("--row", "2")
    assert "--column needs an --input or a --task" in show("--column", "segments=q")
    assert "--prefix is for requests; a result is" in show(results, "--prefix", "3")
    assert "--segments is for a request without an input" in show(
        "--task", "webqa", "--segments", "3"
    )
    assert "--chat-template is for requests" in show(results, "--no-chat-template")
    assert "one file at a time" in show(results, "-i", results)
    assert "--param needs --strategy" in show(results, "-p", "positions=restart")
    assert "--segments must be positive numbers" in show("--segments", "4,x")
    assert "none of the strategies takes it" in show("-s", "causal,causal", "-p", "a=1")
    assert "has no parameter 'a'; it takes: none" in show("-s", "causal", "-p", "a=1")
    assert "unknown strategy 'cause'" in show("-s", "cause")
    assert "--num-segments is for requests" in show(results, "--num-segments", "1")
    assert "model folder './nowhere' does not exist" in show(results, "--model", "./nowhere")
