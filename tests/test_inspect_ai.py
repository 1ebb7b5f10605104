"""The model ``flexmask`` of Inspect, on a local task and the bundled model."""

from __future__ import annotations

import asyncio
import gc
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexmask.demo import questions_path
from flexmask.errors import OptionError, RequestError
from flexmask.request import Request
from plugin_site import load_distribution

inspect_ai: Any = pytest.importorskip("inspect_ai", reason="needs inspect-ai 0.3.285")
PLUGIN = Path(__file__).parents[1] / "plugins" / "flexmask-inspect-ai" / "flexmask_inspect_ai.py"

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("without_inductor")]

QUESTIONS = [json.loads(line) for line in questions_path().read_text().splitlines()[:6]]
ARGUMENTS = {"device": "cpu", "strategy": "ensemble_isolation", "separator": "<|>"}


@pytest.fixture(scope="module")
def plugin() -> Iterator[Any]:
    yield load_distribution(PLUGIN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inspect leaves streams open when a task fails
        gc.collect()


@pytest.fixture(scope="module")
def model(plugin: Any) -> Any:
    """The bundled model; the parts of a turn are its prefix, segments and tail."""
    return inspect_ai.model.get_model(
        "flexmask/demo", **ARGUMENTS, has_prefix=True, keep_separator=False
    )


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The bundled questions, with a mark between the parts of each, as rows of JSON."""
    path = tmp_path_factory.mktemp("task") / "questions.jsonl"
    rows = [
        {
            "input": "<|>".join([row["prefix"], *row["segments"], row["suffix"]]),
            "target": row["answers"],
        }
        for row in QUESTIONS
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return inspect_ai.Task(
        dataset=inspect_ai.dataset.json_dataset(str(path)),
        solver=inspect_ai.solver.generate(),
        scorer=inspect_ai.scorer.includes(),
        config=inspect_ai.model.GenerateConfig(max_tokens=6, stop_seqs=["\n"]),
    )


def evaluated(task: Any, model: Any, folder: Path, **options: Any) -> Any:
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(folder), display="none", **options)
    return log


def generations(model: Any, **options: Any) -> list[Any]:
    requests = [
        Request(tuple(row["segments"]), row["prefix"], row["suffix"], uuid=str(number))
        for number, row in enumerate(QUESTIONS)
    ]
    options = {"max_new_tokens": 6, "stop": ["\n"]} | options
    return list(model.api.engine.generate(requests, model.api.strategy, **options))


def test_a_local_task_has_the_answers_of_the_engine_in_one_run(
    model: Any, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, generate = [], model.api.engine.generate

    def recorded(requests: Any, *arguments: Any, **options: Any) -> Any:
        sizes.append(len(requests))
        return generate(requests, *arguments, **options)

    monkeypatch.setattr(model.api.engine, "generate", recorded)
    log = evaluated(task, model, tmp_path, logprobs=True, top_logprobs=2)
    assert (log.status, sizes) == ("success", [len(QUESTIONS)])
    assert log.results.scores[0].metrics["accuracy"].value == 1.0
    outputs = [sample.output for sample in sorted(log.samples, key=lambda sample: sample.id)]
    for output, expected in zip(outputs, generations(model, top_logprobs=2), strict=True):
        (choice,) = output.choices
        assert (output.completion, choice.stop_reason) == (expected.text, "stop")
        counts = (output.usage.input_tokens, output.usage.output_tokens)
        assert counts == (expected.prompt_tokens, len(expected.token_ids))
        assert [one.logprob for one in choice.logprobs.content] == list(expected.logprobs)
        assert "".join(one.token for one in choice.logprobs.content).startswith(expected.text)
        first = choice.logprobs.content[0].top_logprobs
        assert [top.logprob for top in first] == [top.logprob for top in expected.top_logprobs[0]]


def test_epochs_and_choices_are_sampled_and_the_same_in_another_run(
    plugin: Any, model: Any, task: Any, tmp_path: Path
) -> None:
    options = {"epochs": 3, "limit": 2, "temperature": 20.0, "seed": 1, "num_choices": 2}
    runs = []
    for number in range(2):
        model.api._asked.clear()
        log = evaluated(task, model, tmp_path / str(number), **options)
        assert log.status == "success"
        texts = [tuple(c.message.text for c in sample.output.choices) for sample in log.samples]
        runs.append(sorted(texts))
    assert runs[0] == runs[1]
    assert len({text for texts in runs[0] for text in texts}) > 4


def messages(*turns: tuple[str, str]) -> list[Any]:
    roles: dict[str, Any] = {
        "system": inspect_ai.model.ChatMessageSystem,
        "user": inspect_ai.model.ChatMessageUser,
        "assistant": inspect_ai.model.ChatMessageAssistant,
    }
    return [roles[role](content=text) for role, text in turns]


def test_a_conversation_becomes_a_request(model: Any) -> None:
    conversation = messages(
        ("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."),
        ("user", "Read:<|>One.<|>Two.<|>Which?"), ("assistant", "It is"),
    )  # fmt: skip
    request, again = (model.api._request(conversation) for _ in range(2))
    assert (request.prefix, request.segments, request.suffix) == (
        "Read:",
        ("One.", "Two."),
        "Which?",
    )
    assert (request.system, request.answer_prefix) == ("Be brief.", "It is")
    assert [(m.role, m.content) for m in request.messages] == [
        ("user", "Hello"),
        ("assistant", "Hi."),
    ]
    assert request.uuid != again.uuid
    with pytest.raises(RequestError, match="must end with a user turn"):
        model.api._request(messages(("system", "Be brief.")))


def test_what_cannot_be_done_is_one_line(
    plugin: Any, model: Any, task: Any, tmp_path: Path
) -> None:
    settings: tuple[tuple[dict[str, Any], str], ...] = (
        ({"frequency_penalty": 1.0}, "flexmask takes no frequency_penalty; leave it out"),
        ({"num_choices": 2}, "2 samples need a temperature"),
        ({"top_p": 2.0}, "top_p must be above 0 and at most 1, got 2.0"),
        ({"system_message": "Be brief."}, "need a chat template"),
    )
    for options, message in settings:
        log = evaluated(task, model, tmp_path, limit=1, **options)
        assert log.status == "error"
        assert message in log.error.message
        assert "\n" not in log.error.message
    arguments: tuple[tuple[dict[str, Any], str], ...] = (
        ({"base_url": "http://localhost"}, "runs in this process; leave out the base URL"),
        ({"has_prefix": True}, "has_prefix needs a separator that ends the prefix"),
        ({"window": 3}, "strategy 'causal' has no parameter 'window'"),
    )
    for options, message in arguments:
        with pytest.raises(plugin.PrerequisiteError) as caught:
            plugin.FlexMaskAPI("demo", **options)
        assert message in str(caught.value)
    with pytest.raises(OptionError, match="calls no tools"):
        asyncio.run(model.api.generate([], [object()], "auto", task.config))


def test_an_error_of_a_run_is_that_of_all_its_calls(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(model.api.engine, "generate", fail)

    async def ask() -> list[Any]:
        config = inspect_ai.model.GenerateConfig()
        calls = [model.api.generate(messages(("user", text)), [], "auto", config) for text in "ab"]
        return await asyncio.gather(*calls, return_exceptions=True)

    assert [str(error) for error in asyncio.run(ask())] == ["no room"] * 2


def test_the_task_of_the_recipe_divides_its_rows(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (PLUGIN.parents[2] / "docs" / "recipes.md").read_text()
    for name in ("retrieved.jsonl", "documents.py"):
        _, text = page.split(f'title="{name}"\n')
        (tmp_path / name).write_text(text.split("```")[0])
    monkeypatch.chdir(tmp_path)
    log = evaluated("documents.py", model, tmp_path, max_tokens=2)
    assert (log.status, len(log.samples)) == ("success", 3)
    question = log.samples[0].messages[0]
    request = model.api._request([question])
    row = json.loads((tmp_path / "retrieved.jsonl").read_text().splitlines()[0])
    assert list(request.segments) == row["segments"]
    assert (request.prefix, request.suffix) == (row["prefix"], row["suffix"])
