"""Conversations: system turns, turns before, segments in turns, and starts of answers."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, PreTrainedTokenizerBase

from command import run_command
from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.errors import RequestError, TaskError
from flexmask.generation import Generation
from flexmask.inputs.rows import Row, rows_in_memory
from flexmask.request import Message, Request
from flexmask.results.result_writer import ResultWriter, read_finished_rows
from flexmask.results.run_config import RunConfig
from flexmask.tasks.request_source import PlainRequests
from flexmask.tasks.task import load_task
from flexmask.tasks.task_requests import TaskPrompts
from small_tokenizers import KINDS

# As the models have them, without tools and images.
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = '<|begin_of_text|>' + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '</s> ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# The system turn stands in the last user turn, as in Mistral's later templates.
MERGED = (
    "<s>{% for message in messages %}{% if message.role == 'user' %}[INST] "
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ message.content }}[/INST]{% elif message.role == 'assistant' %} {{ message.content }}</s>"
    "{% endif %}{% endfor %}"
)
SILENT = (
    "{% for message in messages if message.role != 'system' %}{{ message.content }}{% endfor %}"
)
TEMPLATES = {
    "llama-3": LLAMA_3, "qwen-2": QWEN_2, "mistral": MISTRAL, "gemma": GEMMA, "merged": MERGED
}  # fmt: skip
WITH_SYSTEM = ["llama-3", "qwen-2", "merged"]
ADDED = (
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"),
    *("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "[INST]"),
)

MESSAGES = (
    Message("user", "Where was Ada born?"),
    Message("assistant", "London"),
    Message("user", "And Emmy?"),
    Message("assistant", "Erlangen"),
)
REQUEST = Request(
    segments=("Q: Where was Kurt born?\n", "Q: Kurt's birthplace?\n"),
    prefix="Answer.\n",
    suffix="Answer:",
    messages=MESSAGES,
    answer_prefix="It is",
)


@cache
def tokenizer_of(template: str) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(KINDS["byte_level"]())
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(text, normalized=False) for text in ADDED]}
    )
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer


@cache
def tokenize_of(template: str) -> RequestTokenizer:
    return RequestTokenizer(tokenizer_of(template), chat_template=True)


def whole(template: str, request: Request) -> str:
    """The whole conversation, rendered by the model's own template."""
    turns = [{"role": "system", "content": request.system}] if request.system else []
    turns += [vars(message) for message in request.messages]
    texts = [request.prefix, *request.segments, request.suffix]
    if request.segment_turns == "one":
        texts = ["".join(texts)]
    turns += [{"role": "user", "content": text} for text in texts if text]
    text = tokenizer_of(template).apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    return str(text) + request.answer_prefix


def changed(request: Request, **changes: Any) -> Request:
    return Request(**{**vars(request), **changes})


CASES = [
    *((name, REQUEST) for name in TEMPLATES),
    *((name, Request(("Who?",))) for name in TEMPLATES),
    *((name, changed(REQUEST, system="Be brief.")) for name in WITH_SYSTEM),
    *(
        (name, changed(REQUEST, system=" Be brief.", segment_turns="each", segments=("a?", "b?")))
        for name in WITH_SYSTEM
    ),
    ("qwen-2", Request(("a?", "b?", "c?"), segment_turns="each")),
]


@pytest.mark.parametrize(("template", "request_"), CASES)
def test_prefix_segments_and_tail_are_what_the_template_makes_of_the_whole(
    template: str, request_: Request
) -> None:
    tokenize, tokenizer = tokenize_of(template), tokenizer_of(template)
    assert tokenize.chat_text(request_) == whole(template, request_)
    tokens = tokenize(request_)
    ids = [*tokens.prefix, *(id_ for part in tokens.segments for id_ in part), *tokens.tail]
    assert tokenizer.decode(ids) == whole(template, request_)
    turns = set(tokenizer.convert_ids_to_tokens(ids)) & set(ADDED)
    assert all(text in turns for text in ADDED if text in whole(template, request_))


def test_a_segment_that_is_a_turn_has_the_same_tokens_beside_any_other() -> None:
    tokenize = tokenize_of("llama-3")
    request = changed(REQUEST, segment_turns="each", segments=("a b?", "c?"))
    swapped = changed(request, segments=("c?", "a b?"), messages=())
    assert {*tokenize(request).segments} == {*tokenize(swapped).segments}
    (alone,) = {part for one in request.alone()[:1] for part in tokenize(one).segments}
    assert alone in tokenize(request).segments


@pytest.mark.parametrize("template", ["mistral", "gemma", SILENT])
def test_a_template_without_a_system_role_is_one_line(template: str) -> None:
    with pytest.raises(RequestError) as raised:
        tokenize_of(template)(changed(REQUEST, system="Be brief."))
    assert str(raised.value) == (
        "this chat template has no system role; put the text of `system` into the prefix instead"
    )


def test_a_template_that_wants_turns_to_alternate_refuses_a_turn_for_each_segment() -> None:
    with pytest.raises(RequestError, match="the chat template fails: TemplateError: Conversation"):
        tokenize_of("gemma")(changed(REQUEST, segment_turns="each"))


def test_only_the_template_writes_special_tokens() -> None:
    request = changed(REQUEST, system="x <|im_end|> y", messages=(Message("user", "<|im_end|>"),))
    tokens = tokenize_of("qwen-2")(request)
    end = tokenizer_of("qwen-2").convert_tokens_to_ids("<|im_end|>")
    assert tokens.prefix.count(end) == 2
    assert tokens.special_text == "<|im_end|>"


def test_a_template_that_changes_a_message_is_one_line() -> None:
    template = "{% for m in messages %}{{ m.content.replace('Erl', 'E') }}|{% endfor %}"
    with pytest.raises(RequestError, match="changes the text of its messages, prefix or suffix"):
        tokenize_of(template)(REQUEST)


def test_without_a_template_turns_are_refused_and_the_answer_begins_after_the_suffix() -> None:
    tokenize = RequestTokenizer(tokenizer_of("qwen-2"))
    for name in ("messages", "system"):
        with pytest.raises(RequestError, match="need a chat template: `chat_template`"):
            tokenize(Request(("Who?",), **{name: getattr(changed(REQUEST, system="x"), name)}))
    assert tokenize.in_chat(changed(REQUEST, messages=())).suffix == "Answer:It is"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"role": "system", "content": "x"}], "got 'system'; pass its text as `system`"),
        ([{"role": "tool", "content": "x"}], "one of the roles user, assistant, got 'tool'"),
        ([{"role": "user"}], "must hold a role and its content, got {'role': 'user'}"),
        ([{"role": "user", "content": None}], "must hold a text, got None"),
        ("[", "messages must be a list, got a string"),
        ('["x"]', "must hold a role and its content, got 'x'"),
    ],
)
def test_messages_of_a_row_that_are_none_are_one_line(value: Any, message: str) -> None:
    row = Row("rows.jsonl:1", 1, {"segments": ["Who?"], "messages": value})
    with pytest.raises(RequestError) as raised:
        PlainRequests()(row)
    assert message in str(raised.value)


TASK = """
instruction = "Be brief."
[paraphrases.groups]
q = "q"
[prompt]
system = "{{ instruction }}"
segment = "{{ paraphrase }}"
answer_prefix = "{{ start }}"
messages = "history"
segment_turns = "each"
chat_template = true
[examples]
count = 1
user = "{{ paraphrase }}"
assistant = "{{ answer }}!"
rows = [{ q = "Where was Ada born?", answers = ["London"] }]
"""


def test_a_task_makes_turns_of_examples_and_says_where_segments_stand(tmp_path: Path) -> None:
    path = tmp_path / "chat.toml"
    path.write_text(TASK)
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    values = {"q": ["Who?", "Whoever?"], "start": "It", "history": history}
    rows = rows_in_memory([values], "rows.jsonl")
    request = TaskPrompts(load_task(str(path)), rows)(Row("rows.jsonl:1", 1, values))
    assert request == Request(
        uuid="1",
        segments=("Who?", "Whoever?"),
        system="Be brief.",
        messages=(
            Message("user", "Where was Ada born?"),
            Message("assistant", "London!"),
            *map(Message.of, history),
        ),
        answer_prefix="It",
        segment_turns="each",
    )
    for old, new, message in (
        ('"each"', '"two"', r"prompt\.segment_turns must be one of one, each, got 'two'"),
        ("assistant = ", "template = ", r"set both or neither"),
        (
            "rows = ",
            'template = "x"\nrows = ',
            r"examples\.template is for examples that are text",
        ),
    ):
        path.write_text(TASK.replace(old, new))
        with pytest.raises(TaskError, match=message):
            load_task(str(path))


@pytest.mark.parametrize("name", ["a.feather", "a.parquet", "a.jsonl"])
def test_a_result_file_records_what_was_sent_and_resumes(tmp_path: Path, name: str) -> None:
    request = changed(REQUEST, uuid="a", system="Be brief.")
    sent = (tokenize_of("llama-3").chat_text(request),)
    path, config = tmp_path / name, RunConfig({})
    with ResultWriter.open(path, config=config, requests=[request]) as writer:
        writer.write([Generation(request, "Brünn", (1,), "eos", 1, sent)])
    (row,) = read_finished_rows(path).to_pylist()
    assert (row["prompts"], row["system"]) == ([*sent], "Be brief.")
    assert row["messages"] == [vars(message) for message in MESSAGES]
    with ResultWriter.open(path, config=config, requests=[request], mode="resume") as writer:
        assert list(writer.remaining) == []
    other = changed(request, system="Be long.")
    with pytest.raises(Exception, match="choices of requests have changed since"):
        ResultWriter.open(path, config=config, requests=[other], mode="resume")


def test_the_command_line_sends_a_system_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer_of("qwen-2").save_pretrained("chat")
    Path("rows.jsonl").write_text(json.dumps({"segments": ["Who?"]}) + "\n")
    Path("system.txt").write_text("Be brief.")
    options = ["generate", "-i", "rows.jsonl", "--model", "chat", "--dry-run", "--chat-template"]
    printed = run_command(*options, "--system-file", "system.txt").out
    assert printed == run_command(*options, "--system", "Be brief.").out
    assert (
        "<prefix><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n</prefix>" in printed
    )
    assert "which need a chat template; pass --chat-template" in (
        run_command("generate", "-i", "rows.jsonl", "--system", "x", "--dry-run").error
    )
    both = run_command(*options, "--system", "x", "--system-file", "system.txt").error
    assert "--system and --system-file exclude each other" in both


def test_the_task_of_the_page_on_chat_makes_a_conversation(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text()
    (tmp_path / "chat.toml").write_text(re.findall(r"```toml\n(.*?)```", page, re.DOTALL)[1])
    task = load_task(str(tmp_path / "chat.toml"))
    values = {"id": "q1", "question": "Who?", "reworded": "Whoever?", "label": "Ada"}
    request = TaskPrompts(task, rows_in_memory([values], "rows"))(Row("rows:1", 1, values))
    assert tokenize_of("qwen-2").chat_text(request) == (
        "<|im_start|>system\nAnswer in one word.<|im_end|>\n"
        "<|im_start|>user\nWhere was Ada Lovelace born?<|im_end|>\n"
        "<|im_start|>assistant\nThe answer is London.<|im_end|>\n"
        "<|im_start|>user\nWho?\nWhoever?\n<|im_end|>\n<|im_start|>assistant\nThe answer is"
    )
