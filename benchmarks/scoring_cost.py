r"""Measures the cost of scoring choices, in tokens and seconds, beside a pass for each choice.

Requests are those of ``myriadlama.py --choices``: of each the first paraphrase, behind a few-shot
prompt. It is ``shared`` by all questions, or each question has examples of its ``own``, drawn from
the other questions, so that nothing is shared between questions.

flexmask computes a prompt once for its choices. The peer in this process has the same weights and
computes a pass for each choice: it is the model ``hf`` of lm-evaluation-harness, whose choices of
one token share a pass, or, where the harness is not installed, a plain loop of transformers. Both
are given the same texts, each prompt as one segment, so that both have the same tokens. The sides
take turns; the first turn warms up, and medians of the others count. Tokens computed include
padding.

With ``--shape``, weights are random. Then ``--vllm-site`` lets vLLM score the same token ids
before, in a process of its own, with its prefix cache on; it computes log-probabilities of whole
prompts only.

Examples:
    python benchmarks/scoring_cost.py --requests choices.jsonl --model SmolLM2-135M.gguf \
        --questions 40
    python benchmarks/scoring_cost.py --requests choices.jsonl --shape llama-3.2-3b --device cuda
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from flexmask import Engine, Request, RequestTokenizer, read_requests
from flexmask.demo import model_path
from peer_jobs import Job
from random_model import DTYPES, SHAPES, random_engine
from scoring_peers import (
    DensePeer,
    Harness,
    PlainLoop,
    Scores,
    counted_tokens,
    dense_twin,
    passes,
)
from stamp import environment_stamp
from vllm_process import run_vllm

STRATEGY = "causal"
SHOTS = 5
CASES = ("shared", "own")
SETTINGS = ("shape", "device", "batch_size", "repeats", "cases")


@dataclass(frozen=True)
class Outcome:
    """Figures of one side.

    Attributes:
        case: ``shared`` or ``own`` examples.
        side: Its name.
        seconds: Seconds of each turn that counts, from texts to scores.
        prompt_tokens: Tokens of the prompts, each once, without choices.
        computed_tokens: Tokens computed in one turn.
        largest_difference: Largest difference of a choice's log-probability from flexmask's; None
            for flexmask, and for sides that do not report theirs.
        failure: The reason why it did not run; None if it did.
    """

    case: str
    side: str
    seconds: tuple[float, ...]
    prompt_tokens: int
    computed_tokens: int
    largest_difference: float | None
    failure: str | None = None

    @property
    def median_s(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)


def with_own_examples(requests: Sequence[Request], pool: Sequence[Request]) -> list[Request]:
    """Return requests with examples of their own, drawn from the other requests of a pool."""
    draw = random.Random(0)
    changed = []
    for request in requests:
        others = draw.sample([other for other in pool if other is not request], SHOTS)
        shots = (
            f"{other.segments[0]}{other.suffix}{other.choices[other.answer or 0]}\n\n"
            for other in others
        )
        changed.append(replace(request, prefix="".join(shots)))
    return changed


def as_one_segment(request: Request) -> Request:
    """Return a request whose prompt is tokenized as one text."""
    text = request.prefix + "".join(request.segments) + request.suffix
    return replace(request, segments=(text,), prefix="", suffix="")


def timed(score: Callable[[], Scores]) -> tuple[float, Scores]:
    """Return the seconds of a turn, and its scores."""
    started = time.perf_counter()
    scores = score()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, scores


def measure(
    case: str,
    requests: list[Request],
    engine: Engine,
    peer: DensePeer,
    arguments: argparse.Namespace,
) -> list[Outcome]:
    """Let flexmask and a peer score requests in turn."""
    computed: dict[str, int] = {}

    def by_flexmask() -> Scores:
        run = engine.score(requests, STRATEGY, batch_size=arguments.batch_size)
        scores = [[choice.logprob for choice in score.choices] for score in run]
        computed["flexmask"] = run.stats.computed_tokens
        computed["prompts"] = run.stats.prompt_tokens
        return scores

    def by_peer() -> Scores:
        with counted_tokens(peer.model) as counts:
            scores = peer.score(requests)
        computed[peer.name] = sum(counts)
        return scores

    sides = {"flexmask": by_flexmask, peer.name: by_peer}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, torch.Tensor] = {}
    for _ in range(1 + arguments.repeats):
        for name, score in sides.items():
            took, scores = timed(score)
            seconds[name].append(took)
            found[name] = torch.tensor(scores, dtype=torch.float64)
    difference = float((found["flexmask"] - found[peer.name]).abs().max())
    return [
        Outcome(
            case,
            name,
            tuple(seconds[name][1:]),
            computed["prompts"],
            computed[name],
            None if name == "flexmask" else difference,
        )
        for name in sides
    ]


def measure_vllm(
    case: str,
    requests: Sequence[Request],
    tokenize: RequestTokenizer,
    arguments: argparse.Namespace,
) -> Outcome:
    """Let vLLM compute the log-probabilities of every prompt with a choice behind it."""
    rows = [passes(tokenize, request) for request in requests]
    prompts = tuple([*prompt, *choice] for of_request in rows for prompt, choice in of_request)
    job = Job(0, STRATEGY, 1, (prompts,), 1 + arguments.repeats, scores_prompts=True)
    with tempfile.TemporaryDirectory() as folder:
        report = run_vllm(
            arguments.shape,
            [job],
            Path(folder),
            arguments.vllm_time_limit,
            arguments.vllm_python,
            arguments.vllm_site,
        )
    if (outcome := report.outcomes.get(0)) is None:
        return Outcome(case, "vLLM", (), 0, 0, None, report.failure)
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    return Outcome(case, "vLLM", outcome.seconds, prompt_tokens, outcome.computed_tokens, None)


def lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield a line for each side of a case, compared with flexmask."""
    own = next(outcome for outcome in outcomes if outcome.side == "flexmask")
    for outcome in outcomes:
        if outcome.failure:
            yield f"{outcome.case:8}{outcome.side:14}{outcome.failure}"
            continue
        shown = (
            f"{outcome.case:8}{outcome.side:14}{outcome.computed_tokens:10,}"
            f"{outcome.computed_tokens / own.computed_tokens:8.1f}{outcome.median_s:10.2f}"
            f"{outcome.median_s / own.median_s:8.1f}"
        )
        if outcome.largest_difference is not None:
            shown += f"{outcome.largest_difference:12.1e}"
        yield shown


def open_engine(arguments: argparse.Namespace) -> Engine:
    """Load the model, or make one of random weights."""
    dtype = DTYPES[arguments.device]
    if arguments.model is None:
        return random_engine(arguments.shape, arguments.device, dtype)
    name = str(dtype).removeprefix("torch.")
    return Engine.from_pretrained(str(arguments.model), device=arguments.device, dtype=name)


def main() -> None:
    """Measure, print a table and a line of JSON."""
    arguments = parse()
    pool = read_requests(str(arguments.requests), num_segments=1, with_choices=True)
    requests = pool[: arguments.questions]
    has_vllm = arguments.vllm_site is not None or arguments.vllm_python != sys.executable
    requests_of = {
        case: list(map(as_one_segment, of_case))
        for case, of_case in (("shared", requests), ("own", with_own_examples(requests, pool)))
    }
    by_vllm = {}
    if has_vllm:
        tokenize = RequestTokenizer.from_pretrained(str(model_path()))
        by_vllm = {
            case: measure_vllm(case, requests_of[case], tokenize, arguments)
            for case in arguments.cases
        }
    engine = open_engine(arguments)
    tokenize = RequestTokenizer(engine.tokenizer)
    twin = dense_twin(engine.model)
    peer: DensePeer = (
        Harness(twin, engine.tokenizer, arguments.batch_size)
        if find_spec("lm_eval")
        else PlainLoop(twin, tokenize, arguments.batch_size)
    )
    print(
        f"{'case':8}{'side':14}{'computed':>10}{'times':>8}{'seconds':>10}{'times':>8}{'differs':>12}"
    )
    outcomes = []
    for case in arguments.cases:
        of_case = measure(case, requests_of[case], engine, peer, arguments)
        of_case += [by_vllm[case]] if has_vllm else []
        print("\n".join(lines(of_case)), flush=True)
        outcomes += of_case
    record = {
        "requests": len(requests),
        "choices": sum(len(request.choices) for request in requests),
        "model": arguments.model and Path(arguments.model).name,
        "arguments": {name: getattr(arguments, name) for name in SETTINGS},
        "outcomes": [
            asdict(outcome) | {"median_s": outcome.seconds and outcome.median_s}
            for outcome in outcomes
        ],
        "environment": environment_stamp(),
    }
    if arguments.record:
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=Path, required=True)
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--model", help="hub id, folder or GGUF file")
    weights.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    parser.add_argument("--device", choices=tuple(DTYPES), default="cpu")
    parser.add_argument("--questions", type=int, help="default: all")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts, or passes, at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--vllm-site", type=Path, help="folder with vLLM's packages")
    parser.add_argument("--vllm-python", default=sys.executable, help="a Python that has vLLM")
    parser.add_argument("--vllm-time-limit", type=float, default=280, help="seconds of a case")
    parser.add_argument("--record", type=Path, help="file that receives the results")
    arguments = parser.parse_args()
    if arguments.model and (arguments.vllm_site or arguments.vllm_python != sys.executable):
        parser.error("vLLM runs random weights: name a --shape")
    return arguments


if __name__ == "__main__":
    main()
