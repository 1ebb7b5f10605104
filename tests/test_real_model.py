"""A real model from its GGUF file: the tokens of transformers, and an answer that is right."""

import json
import sys

import pytest
import torch

from flexmask.encoding.tokenization import RequestTokenizer, load_tokenizer
from flexmask.engine import Engine
from flexmask.errors import ModelError
from flexmask.request import Request
from flexmask_cli.app import main
from flexmask_strategies.causal import Causal
from real_model import with_attention

pytestmark = pytest.mark.real

QUESTIONS = [
    "What is the capital of France?",
    "How many days does a week have?",
    "Who wrote Romeo and Juliet?",
    "Which planet is closest to the sun, and how long does it take to go around it once?",
    "Name three animals that live in the sea.",
    "What do bees make?",
    "Is 17 a prime number? Explain in one sentence.",
    "What colour do you get when you mix blue and yellow?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue? Answer as you would to a child who has just learnt to read.",
]
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def reference(real_engine):
    return with_attention(real_engine.model, "sdpa")


@pytest.mark.parametrize("chat_template", [False, True], ids=["plain", "chat"])
def test_causal_equals_generate_of_transformers_in_float32(real_engine, reference, chat_template):
    requests = [
        Request((question,), suffix="" if chat_template else "\nA:", uuid=question)
        for question in QUESTIONS
    ]
    run = real_engine.generate(
        requests, Causal(), max_new_tokens=NEW_TOKENS, batch_size=5, chat_template=chat_template
    )
    tokenize = RequestTokenizer(real_engine.tokenizer, chat_template=chat_template)
    for generation in run:
        layout = Causal().layout(tokenize(generation.request))
        prompt = torch.tensor([layout.token_ids])
        output = reference.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS, do_sample=False,
        )  # fmt: skip
        assert generation.token_ids == tuple(output[0, prompt.shape[1] :].tolist())


def test_choices_score_as_by_logits_of_transformers_in_float32(real_engine, reference):
    choices = (" Paris", " seven of them, as everyone knows", " 12")
    requests = [Request((question,), suffix="\nA:", choices=choices) for question in QUESTIONS[:4]]
    tokenize = RequestTokenizer(real_engine.tokenizer)
    for score in real_engine.score(requests, Causal(), batch_size=4):
        prompt = Causal().layout(tokenize(score.request)).token_ids
        for choice in score.choices:
            tokens = torch.tensor([*prompt, *choice.token_ids])
            logits = reference(tokens[None]).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(logits)), choice.token_ids]
            found = torch.tensor(choice.token_logprobs)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert [choice.is_greedy for choice in score.choices].count(True) <= 1


def test_a_chat_prompt_is_that_of_the_chat_template_of_the_file(real_engine):
    tokenizer = real_engine.tokenizer
    request = Request(("What do bees make?",))
    tokenized = RequestTokenizer(tokenizer, chat_template=True)(request)
    turn = [{"role": "user", "content": "What do bees make?"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(Causal().layout(tokenized).token_ids) == text


def test_a_question_that_the_model_knows_is_answered(real_engine):
    requests = [Request(("What is the capital of France?",))]
    (answer,) = real_engine.generate(
        requests, Causal(), max_new_tokens=NEW_TOKENS, batch_size=5, chat_template=True
    )
    assert "Paris" in answer.text


def test_weights_are_unpacked_to_float32_and_whole(real_engine):
    model = real_engine.model
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    heads = (model.config.num_attention_heads, model.config.num_key_value_heads)
    assert (heads, model.config._attn_implementation) == ((9, 3), "flexmask")


def test_a_truncated_file_is_refused(smollm2, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(smollm2.read_bytes()[:50_000_000])
    with pytest.raises(ModelError, match="it ends early, at 50,000,000 bytes; download it again"):
        Engine.from_pretrained(str(path), device="cpu")
    with pytest.raises(ModelError, match="it ends early"):
        load_tokenizer(str(path))


def test_prompts_of_a_gguf_file_show_without_its_weights(smollm2, tmp_path, monkeypatch, capfd):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"segments": ["What do bees make?"]}) + "\n")
    options = ["generate", "-i", path, "--model", smollm2, "--chat-template", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["flexmask", *map(str, options)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code in (0, None)
    out, err = capfd.readouterr()
    assert "<|im_start|>user\n</prefix>\n<segment 1>What do bees make?</segment 1>" in out
    assert err == ""


def test_a_mask_is_shown_with_the_tokens_of_a_gguf_file(smollm2, tmp_path, monkeypatch, capfd):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"segments": ["What do bees make?"], "suffix": " A:"}) + "\n")
    options = ["show", path, "-s", "causal", "--model", smollm2]
    monkeypatch.setattr(sys, "argv", ["flexmask", *map(str, options)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code in (0, None)
    out, _ = capfd.readouterr()
    assert "bees" in out
