"""The text of a generation, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from command import run_command
from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine import Engine
from flexmask.engine.text_stream import TextStream
from flexmask.errors import OptionError, RequestError
from flexmask.fusion import Fusion
from flexmask.generation import Generation
from flexmask.request import Request
from flexmask.sampling import Sampling
from oracles import as_on_gpu
from oracles import random_text_request as request
from small_tokenizers import KINDS

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"sampling": Sampling(2.0, seed=1)},
    "mean": {"fusion": "mean"},
    "none": {"fusion": Fusion("none")},
    "stopped": {"sampling": Sampling(2.0, seed=1), "stop": ["9 t"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_stream_gives_the_text_that_generate_gives(engine: Engine, name: str) -> None:
    options = {"max_new_tokens": 8, **OPTIONS[name]}
    asked = request(3, 2, 7)
    (whole,) = engine.generate([asked], "ensemble_isolation", **options)
    stream = engine.stream(asked, "ensemble_isolation", **options)
    with pytest.raises(ValueError, match="the stream has not ended"):
        _ = stream.generation
    pieces = list(stream)
    assert "".join(pieces) == whole.text
    assert stream.generation == whole
    assert all(pieces)
    assert len(pieces) >= len(whole.token_ids) - 3
    assert stream.run.stats.first_token_s > 0


def test_a_piece_comes_as_soon_as_its_token_is_read_on_a_gpu_too(engine: Engine) -> None:
    stream = engine.stream(request(3, 2, 7), "causal", max_new_tokens=8)
    as_on_gpu(stream.run)
    read = [stream.run.stats.decode_steps for _ in stream]
    assert read == list(range(1, 9))


def test_a_stream_that_is_left_does_not_disturb_the_next(engine: Engine) -> None:
    first, second = request(3, 2, 7), request(4, 2, 9)
    (whole,) = engine.generate([second], "causal", max_new_tokens=6)
    left = engine.stream(first, "causal", max_new_tokens=6)
    next(left)
    assert "".join(engine.stream(second, "causal", max_new_tokens=6)) == whole.text
    (again,) = engine.generate([first], "causal", max_new_tokens=6)
    assert "".join(left)
    assert left.generation == again


def test_several_generations_cannot_be_streamed(engine: Engine) -> None:
    for fusion in ("vote", Fusion("each")):
        with pytest.raises(OptionError, match="makes several generations; stream another fusion"):
            engine.stream(request(3, 2, 7), "causal", fusion=fusion)
    with pytest.raises(TypeError, match="request must be a Request"):
        engine.stream(cast(Request, [request(3, 2, 7)]), "causal")
    with pytest.raises(RequestError, match="needs positions up to"):
        engine.stream(request(3, 2, 7), "causal", max_new_tokens=10**6)


class ReadyRun:
    """A run whose tokens are known, one a step."""

    def __init__(self, token_ids: Sequence[int], text: str) -> None:
        self.tokens_in_flight: Sequence[int] = ()
        self._token_ids = token_ids
        self._text = text

    def steps(self) -> Any:
        for count in range(len(self._token_ids)):
            self.tokens_in_flight = self._token_ids[:count]
            yield []
        yield [Generation(Request(("q",)), self._text, tuple(self._token_ids), "length", 1)]


TEXT = "Où? 東京 🗼 é n't end.\n\nQ: 👩‍👩‍👧 \N{REPLACEMENT CHARACTER}!"


def pieces_of(kind: str, text: str, stop: Sequence[str] = ()) -> list[str]:
    tokenizer = RequestTokenizer(KINDS[kind]())
    token_ids = tokenizer._encoder.encode_text(text).token_ids
    decoded = tokenizer.decode(token_ids)
    ends = [index for one in stop if (index := decoded.find(one)) >= 0]
    last = 1
    while last < len(token_ids) and not any(s in tokenizer.decode(token_ids[:last]) for s in stop):
        last += 1
    run = cast(Any, ReadyRun(token_ids[:last], decoded[: min(ends, default=None)]))
    pieces = list(TextStream(run, tokenizer, stop))
    assert "".join(pieces) == decoded[: min(ends, default=None)]
    return pieces


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_whole_characters_and_never_taken_back(kind: str) -> None:
    pieces = pieces_of(kind, TEXT)
    for piece in pieces[:-1]:
        assert not piece.endswith("\N{REPLACEMENT CHARACTER}")
    if kind == "byte_level":
        assert {"東", "京", "🗼"} <= set("".join(pieces))
        assert len(pieces) > 10


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    pieces = pieces_of("byte_level", "One.\n\nQ: two", ["\n\nQ"])
    assert "".join(pieces) == "One."
    assert not any("\n" in piece for piece in pieces)
    assert "\n" in "".join(pieces_of("byte_level", "One.\n\nA: two", ["\n\nQ"]))


def test_a_tokenizer_that_edits_text_across_tokens_gives_it_whole() -> None:
    from tokenizers import decoders

    tokenizer = KINDS["byte_level"]()
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece(cleanup=True)
    assert not RequestTokenizer(tokenizer).decodes_in_order


def test_generate_prints_the_one_answer_on_a_terminal_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexmask_cli.commands import generate
    from flexmask_cli.planned_run import PlannedRun

    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"segments": ["Q: one?"], "suffix": "A:", "answers": ["42"]}\n')
    asked: list[str] = []
    stats = SimpleNamespace(first_token_s=0.25, prefills=1)
    made = Generation(Request(("Q: one?",), uuid="1", answers=("42",)), " 4\x1b2", (1,), "eos", 1)

    class Stream(list[str]):
        run = SimpleNamespace(stats=stats)
        generation = made

    def stream(request: Request, strategy: Any, **options: Any) -> Stream:
        asked.append(request.uuid)
        return Stream([" 4", "\x1b", "2"])

    monkeypatch.setattr(PlannedRun, "load_engine", lambda _: SimpleNamespace(stream=stream))
    monkeypatch.setattr(generate, "_is_terminal", lambda: True)
    monkeypatch.setattr(generate, "print_stats", lambda stats, fusion: None)
    printed = run_command("generate", "-i", "rows.jsonl", "-o", "out.jsonl", "-s", "causal")
    assert printed.status == 0, printed.err
    assert printed.out.startswith(" 4\\x1b2\naccuracy: 0.0%")
    assert asked == ["1"]
