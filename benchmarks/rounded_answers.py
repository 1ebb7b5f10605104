"""Measures what rounding the weights of a trained model does to its greedy answers.

Each way of ``--ways`` loads the model again: its weights as they are (``none``), or rounded as by
``--quantize``, with ``+head`` the output head too. All run the same requests, and are compared
with the first way: how many generations are the same token by token, and by how much the share of
right answers differs, with a paired bootstrap interval over the questions.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexmask import Engine, Generation, Request
from flexmask.device import DTYPES_OF_8_BITS, resolve_device, resolve_quantize
from flexmask.engine.model_loading import load_model
from flexmask.kernels.rounded_linear import RoundedLinear
from flexmask.results.evaluation import Estimate, estimate_mean
from flexmask.tasks.judge import Judge
from flexmask.tasks.request_source import read_requests
from stamp import print_record

HEAD = "+head"
WAYS = ("none", *DTYPES_OF_8_BITS, *(name + HEAD for name in DTYPES_OF_8_BITS))


@dataclass(frozen=True)
class Answers:
    """The answers of one way, compared with those of the first.

    Attributes:
        way: What weights were rounded to.
        weight_error: The length of all rounded weights' errors, as a share of their length.
        num_bytes: Bytes of all weights.
        rows: Number of requests.
        same_tokens: Requests whose generation has the tokens of the first way's.
        same_answers: Requests whose answer is that of the first way.
        right: Share of right answers.
        difference: Right answers more than the first way's, as a share of the questions.
    """

    way: str
    weight_error: float
    num_bytes: int
    rows: int
    same_tokens: int
    same_answers: int
    right: Estimate
    difference: Estimate

    def row(self) -> str:
        """Return a line of the table."""
        right, difference = (
            f"{100 * each.mean:.1f}% [{100 * each.low:.1f}, {100 * each.high:.1f}]"
            for each in (self.right, self.difference)
        )
        return (
            f"{self.way:10} {self.weight_error:8.3%} {self.num_bytes / 1e6:8,.0f} {self.rows:5} "
            f"{self.same_tokens:11} {self.same_answers:12} {right:>20} {difference:>20}"
        )


def load(model: str, device: str, dtype: str, way: str) -> tuple[Engine, float]:
    """Load a model one way; returns the error of its weights too."""
    target, quantize = resolve_device(device), way.removesuffix(HEAD)
    if way == "none":
        return Engine.from_pretrained(model, device=device, dtype=dtype), 0.0
    loaded, tokenizer = load_model(model, device=target, dtype=dtype, quantize=quantize)
    plain, _ = load_model(model, device=target, dtype=dtype)
    module: Any = loaded
    if way.endswith(HEAD):
        dtype_of_head = resolve_quantize(quantize, target)
        module.lm_head = RoundedLinear(module.lm_head, dtype_of_head, target)
    error = weight_error(loaded, plain)
    return Engine(loaded, tokenizer), error


def weight_error(rounded: nn.Module, plain: nn.Module) -> float:
    """Return the length of the errors of all rounded weights, as a share of their length."""
    squares = torch.zeros(2, dtype=torch.float64)
    for name, layer in rounded.named_modules():
        if isinstance(layer, RoundedLinear):
            before: Any = plain.get_submodule(name)
            weight = before.weight.float()
            error = layer.weight.float() * layer.scale - weight
            squares += torch.stack((error.pow(2).sum(), weight.pow(2).sum())).cpu()
    return float((squares[0] / squares[1]).sqrt())


def compared(
    way: str, engine: Engine, error: float, pairs: Sequence[tuple[Generation, Generation]]
) -> Answers:
    """Compare the generations of a way with the first way's, of the same requests."""
    judge = Judge()
    answers = [(judge.prediction(first), judge.prediction(own)) for first, own in pairs]
    scores = [
        [judge.score(answer, own.request.answers) for answer in both]
        for both, (_, own) in zip(answers, pairs, strict=True)
    ]
    return Answers(
        way=way,
        weight_error=error,
        num_bytes=sum(weight.nbytes for weight in engine.model.parameters()),
        rows=len(pairs),
        same_tokens=sum(first.token_ids == own.token_ids for first, own in pairs),
        same_answers=sum(first == own for first, own in answers),
        right=estimate_mean(own for _, own in scores),
        difference=estimate_mean(own - first for first, own in scores),
    )


def main() -> None:
    """Print a line for each way, then a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("requests", type=Path, help="from benchmarks/myriadlama.py")
    parser.add_argument("--model", required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS[:3])
    parser.add_argument("--strategy", default="ensemble_isolation")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()

    requests: list[Request] = read_requests(str(arguments.requests))[: arguments.rows]
    print(
        f"{'way':10} {'error':>8} {'MB':>8} {'rows':>5} {'same tokens':>11} {'same answers':>12} "
        f"{'right':>20} {'difference':>20}"
    )
    results, first = [], None
    for way in arguments.ways:
        engine, error = load(arguments.model, arguments.device, arguments.dtype, way)
        run = engine.generate(
            requests,
            arguments.strategy,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
            stop=["\n"],
        )
        generations = list(run)
        first = first or generations
        results.append(compared(way, engine, error, list(zip(first, generations, strict=True))))
        print(results[-1].row(), flush=True)
        del engine, run
        torch.compiler.reset()
        gc.collect()
    print_record(arguments, {"ways": [asdict(result) for result in results]})


if __name__ == "__main__":
    main()
