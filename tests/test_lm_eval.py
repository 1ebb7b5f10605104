"""The model ``flexmask`` of lm-evaluation-harness beside its ``hf``, on the bundled model."""

import json
from pathlib import Path

import pytest

from flexmask import Separator
from flexmask.demo import model_path, questions_path
from flexmask.errors import FlexMaskError
from plugin_site import load_distribution

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval 0.4.13")
pytest.importorskip("accelerate", reason="the harness's model hf needs it")
PLUGIN = Path(__file__).parents[1] / "plugins" / "flexmask-lm-eval" / "flexmask_lm_eval.py"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def plugin():
    return load_distribution(PLUGIN)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A question of multiple choice, an open one, and a text to score, over local rows."""
    rows = [json.loads(line) for line in questions_path().read_text().splitlines()[:4]]
    answers = [row["answers"][0] for row in rows]
    data = tmp_path_factory.mktemp("data") / "questions.json"
    data.write_text(
        "\n".join(
            json.dumps(
                {
                    "question": row["segments"][0],
                    "choices": [answers[(number + n) % 4] for n in range(4)],
                    "answer": 0,
                }
            )
            for number, row in enumerate(rows)
        )
    )
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    return [
        {
            **shared,
            "task": "which",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}\nA:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        {
            **shared,
            "task": "open",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}\nA:",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match"}],
        },
        {
            **shared,
            "task": "perplexity",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}} {{choices|join(' ')}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    ]


@pytest.fixture(scope="module")
def model(plugin):
    from lm_eval.api.registry import get_model

    cls = get_model("flexmask")
    assert cls is plugin.FlexMaskLM
    arguments = f"pretrained={model_path()},strategy=causal,dtype=float32,max_length=40"
    return cls.create_from_arg_string(arguments, {"batch_size": "auto", "device": "cpu"})


def evaluated(model, tasks):
    """All results of an evaluation, and the responses to each request of each task."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)  # reading its own tasks takes minutes
    found = lm_eval.simple_evaluate(
        model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    responses = {
        name: [sample["resps"] for sample in sorted(samples, key=lambda one: one["doc_id"])]
        for name, samples in found["samples"].items()
    }
    return found["results"], responses


def test_a_local_task_scores_as_under_hf(model, tasks):
    from lm_eval.models.huggingface import HFLM

    hf = HFLM(str(model_path()), device="cpu", dtype="float32", batch_size=4, max_length=40)
    check_equal(model, hf, tasks)


@pytest.mark.real
@pytest.mark.long
def test_a_local_task_scores_as_under_hf_on_a_real_model(plugin, smollm2, tasks):
    from lm_eval.models.huggingface import HFLM

    name = smollm2.name
    hf = HFLM(str(smollm2.parent), gguf_file=name, device="cpu", dtype="float32", batch_size=4)
    model = plugin.FlexMaskLM(str(smollm2), device="cpu", dtype="float32", batch_size=4)
    check_equal(model, hf, tasks[:2])


def check_equal(model, hf, tasks):
    """Metrics, log-likelihoods and generations are the same."""
    ours, our_responses = evaluated(model, tasks)
    theirs, their_responses = evaluated(hf, tasks)
    for task in theirs:
        metrics = {n: v for n, v in theirs[task].items() if isinstance(v, float)}
        assert metrics
        assert {name: ours[task][name] for name in metrics} == pytest.approx(metrics, rel=1e-4)
    for mine, other in zip(our_responses["which"], their_responses["which"], strict=True):
        for ((logprob, is_greedy),), ((expected, greedy),) in zip(mine, other, strict=True):
            assert float(logprob) == pytest.approx(float(expected), abs=1e-4)
            assert str(is_greedy) == str(greedy)
    strip = [[text.strip() for text in texts] for ((*texts,),) in our_responses["open"]]
    assert strip == [[text.strip() for text in texts] for ((*texts,),) in their_responses["open"]]


def test_requests_of_one_context_are_one_pass(model, monkeypatch):
    asked = []
    score = model.engine.score_tokens

    def recorded(prompts, *arguments, **options):
        asked.extend(prompts)
        return score(prompts, *arguments, **options)

    monkeypatch.setattr(model.engine, "score_tokens", recorded)
    pairs = [
        ("Q: Who?\nA:", " Ada"),
        ("Q: Who?\nA: ", "Bob Ross"),
        ("", "Ada"),
        ("Q: Who?\nA:", " C"),
    ]
    scores = model.loglikelihood([instance(*pair) for pair in pairs], disable_tqdm=True)
    assert [len(choices) for _, choices in asked] == [3, 1]
    assert all(logprob < 0 for logprob, _ in scores)
    alone = model.loglikelihood([instance(*pairs[3])], disable_tqdm=True)
    assert alone[0][0] == pytest.approx(scores[3][0], abs=1e-4)


def instance(*arguments):
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, arguments, 0)


def test_parts_of_a_context_become_its_segments(model, plugin, monkeypatch):
    monkeypatch.setattr(model, "separator", Separator("\n\n"))
    context = "Answer.\n\nQ: one\n\nQ: two\n\nQ: three\nA:"
    request = model._request(context)
    assert request.segments == ("Answer.\n\n", "Q: one\n\n", "Q: two\n\n")
    assert (request.prefix, request.suffix) == ("", "Q: three\nA:")
    monkeypatch.setattr(model, "separator", Separator("\n\n", keep=False, has_prefix=True))
    request = model._request(context)
    assert (request.prefix, request.segments) == ("Answer.", ("Q: one", "Q: two"))
    tokenized, choice = model._in_parts(context + " ", "Ada")
    assert tokenized.segments == model._tokenize(request).segments
    assert model.tokenizer.decode(choice) == " Ada"
    with pytest.raises(FlexMaskError, match="strategy 'causal' has no parameter 'window'"):
        plugin.FlexMaskLM(str(model_path()), window=3)
    with pytest.raises(FlexMaskError, match="batch_size must be a positive number or auto"):
        plugin.FlexMaskLM(str(model_path()), batch_size="many")
