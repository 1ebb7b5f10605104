import json
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_model.corpus import encode
from demo_model.evaluate import (
    ARRANGEMENTS,
    SINGLE,
    accuracy,
    arrange,
    dense_mask,
    generate_greedily,
    single_paraphrases,
)
from demo_model.train import run
from demo_model.train_config import ModelShape, TrainConfig
from demo_model.world import (
    RELATIONS,
    Noise,
    Question,
    WorldConfig,
    add_noise,
    format_questions,
    make_questions,
    make_training_pairs,
    make_world,
    read_questions,
)
from flexmask.demo import model_path, questions_path

RESTARTED, CONSECUTIVE, CONCATENATED = ARRANGEMENTS[1:]
TINY = TrainConfig(
    steps=3,
    rows_per_step=4,
    row_tokens=128,
    pairs=600,
    tokenizer_pairs=600,
    warmup_steps=2,
    world=WorldConfig(people=20, towns=20, questions=2),
    shape=ModelShape(
        vocab_size=400, hidden_size=48, intermediate_size=64, num_hidden_layers=1, head_dim=16
    ),
)


@pytest.fixture(autouse=True)
def one_thread():
    # Threads that share tensors this small mostly wait for each other: on a busy machine,
    # two are five times as slow as one.
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="module")
def world():
    return make_world(0)


@pytest.fixture(scope="module")
def questions():
    return read_questions(questions_path())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        model_path(), dtype=torch.float32, attn_implementation="sdpa"
    )


def test_the_package_finds_its_demo_without_torch():
    code = "import sys, flexmask.demo as d; d.model_path(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_questions_file_follows_from_the_seed(world):
    assert format_questions(make_questions(world)) == questions_path().read_text(encoding="utf-8")


def test_questions_survive_a_round_trip(world, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(format_questions(make_questions(world)), encoding="utf-8")
    assert read_questions(path) == make_questions(world)


def test_another_seed_is_another_world(world):
    assert make_world(1).facts != world.facts


def test_each_question_has_five_paraphrases_and_an_answer(questions):
    assert len(questions) == len({question.uuid for question in questions}) == 200
    assert len({question.prefix for question in questions}) == 1
    assert questions[0].prefix.count("\nA: ") == 3
    assert questions[0].prefix.endswith("\n\n")
    for question in questions:
        assert len(set(question.segments)) == 5
        assert all(segment.startswith("Q: ") for segment in question.segments)
        assert question.suffix == "\nA:"
        assert all(question.answers)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.name)
def test_relations_are_asked_in_many_ways_and_some_are_held_out(world, relation):
    training = set(world.training_templates[relation.name])
    held_out = set(world.held_out_templates[relation.name])
    assert len(relation.nouns) + len(relation.clauses) >= 8
    assert len(held_out) >= world.config.paraphrases
    assert training.isdisjoint(held_out)
    assert training | held_out == set(relation.templates())


def test_training_text_uses_no_held_out_template(world):
    quiet = replace(world, config=replace(world.config, training_noise=Noise()))
    entities = {fact.entity for facts in world.facts.values() for fact in facts}
    held_out = {t for templates in world.held_out_templates.values() for t in templates}
    for question, _ in make_training_pairs(quiet, 2000):
        text = question.removeprefix("Q: ").removesuffix("\nA:")
        words = text.replace("'s", "").replace(",", "").rstrip("?.").split()
        names = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
        (entity,) = entities.intersection(names)
        assert text.replace(entity, "{entity}") not in held_out


def test_no_shipped_paraphrase_is_in_the_training_text(world, questions):
    seen = {question for question, _ in make_training_pairs(world, 50_000)}
    segments = {segment + "\nA:" for question in questions for segment in question.segments}
    assert seen.isdisjoint(segments)


def test_no_noise_changes_nothing_and_full_noise_leaves_a_word():
    assert add_noise("Who founded Taskel?", Noise(), Random(0)) == "Who founded Taskel?"
    assert add_noise("Who founded Taskel?", Noise(drop=1.0), Random(0)) == "Who"


def test_pieces_encode_as_the_whole_does(tokenizer, questions):
    for question in questions[:50]:
        for segment in question.segments:
            pieces = (question.prefix, segment, question.suffix, " answer\n\n")
            joined = [token for piece in pieces for token in encode(tokenizer, piece)]
            assert [tokenizer.bos_token_id, *joined] == tokenizer("".join(pieces))["input_ids"]


@pytest.mark.parametrize(
    "text", ["", "a  b\t\n\n c\r\n", "naïve 東京 🙂 1234", "\x00<|x|>", "it's"]
)
def test_any_text_is_encoded_and_comes_back(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text
    assert tokenizer.unk_token is None


def test_model_is_small_and_has_three_query_heads_to_each_key_head(model):
    config = model.config
    assert model.num_parameters() <= 8e6
    assert (model_path() / "model.safetensors").stat().st_size <= 12e6
    assert config.num_attention_heads == 3 * config.num_key_value_heads
    assert config.head_dim == 64
    assert config.max_position_embeddings >= 4096
    assert config.tie_word_embeddings


def test_training_record_describes_the_shipped_model(model):
    record = json.loads((model_path() / "training.json").read_text(encoding="utf-8"))
    assert record["parameters"] == model.num_parameters()
    assert record["config"] == json.loads(json.dumps(asdict(TrainConfig())))
    assert 0.6 <= record["accuracy"]["1 paraphrase"] <= 0.8
    assert record["accuracy"][RESTARTED.name] >= 0.9


def test_generation_ends_at_the_newline(model, tokenizer, questions):
    prompt = questions[0].prefix + "Q: Who?" + questions[0].suffix
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0].tolist()
    assert tokens[-1:] == encode(tokenizer, "\n")


def test_five_isolated_paraphrases_beat_one_and_beat_concatenation(model, tokenizer, questions):
    few = questions[38:42]  # Concatenation misses half of these.
    assert 0.45 <= accuracy(model, tokenizer, single_paraphrases(few), SINGLE) <= 0.95
    assert accuracy(model, tokenizer, few, RESTARTED) == 1
    assert accuracy(model, tokenizer, few, CONCATENATED) <= 0.75


def test_arrangements_place_segments_and_positions(tokenizer):
    question = Question("u", "", ("Q: a", "Q: b a"), "\n", ("c",))
    restarted = arrange(question, RESTARTED, tokenizer)
    assert restarted.segment_ids == (0,) * 4 + (1,) * 5 + (-1,)
    assert restarted.position_ids == (*range(4), *range(5), 5)
    consecutive = arrange(question, CONSECUTIVE, tokenizer)
    assert consecutive.segment_ids == restarted.segment_ids
    assert consecutive.position_ids == tuple(range(10))
    concatenated = arrange(question, CONCATENATED, tokenizer)
    assert concatenated.segment_ids == (0,) * 9 + (-1,)
    assert concatenated.position_ids == tuple(range(10))


def test_dense_mask_isolates_segments_and_lets_the_tail_see_all():
    mask = dense_mask(torch.tensor([[0, 0, 1, -1, -2]]))[0, 0] == 0
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_training_is_deterministic_and_its_decoding_is_generate(tmp_path):
    tables = [run(TINY, tmp_path / name, torch.device("cpu")) for name in ("a", "b")]
    assert tables[0] == tables[1]
    for name in ("questions.jsonl", "model/model.safetensors", "model/tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    _check_decoding(tmp_path / "a")


def _check_decoding(folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    questions = single_paraphrases(read_questions(folder / "questions.jsonl"))[:3]
    prompts = [arrange(question, SINGLE, tokenizer) for question in questions]
    for prompt, tokens in zip(prompts, generate_greedily(model, prompts, -1, 6), strict=True):
        inputs = torch.tensor([prompt.token_ids])
        expected = model.generate(inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert tokens == expected[0, inputs.shape[1] :].tolist()
