"""Measures a model that several GPUs hold together, beside one GPU and transformers' own way.

Models of random weights at real shapes; each rank makes its shard on its device, so there is no
checkpoint. The floor is that of all GPUs: the time to read the weights, and the keys and values so
far, once at their bandwidth together, or to compute the products at their matrix rate together.
The peer is transformers' tensor parallelism (``tp_plan="auto"``) with its ``generate``, with a
static cache, which it compiles, and with a dynamic one.

Each way runs in processes of its own, within a time limit; results so far are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from flexmask.bench.floors import ModelCost, Rates
from flexmask.engine import Engine
from flexmask.engine.executor import BatchSize
from flexmask.engine.model_runner import bucketed_capacity
from flexmask.engine.turns import TURN
from flexmask.plugins.registry import make_strategy
from generation import REPEATS, decode_flexmask, endless, seconds
from prompt_work import PromptWork
from random_model import DTYPES, SHAPES, random_config, random_engine, random_model
from random_prompts import RandomPrompts
from stamp import environment_stamp
from start_peer import generate

STRATEGY = "causal"
CLOSING_S = 20
"""Seconds that a way has to end after its last result."""
RATES = "rates"
"""The way that measures one GPU's rates."""
BY_NCCL = "flexmask by NCCL"
"""The engine with NCCL for small sums too."""
PEERS = {"transformers static": "static", "transformers dynamic": "dynamic"}
"""Cache of each peer."""


@dataclass(frozen=True)
class Way:
    """A way to run the model.

    Attributes:
        name: ``flexmask``, `BY_NCCL`, or one of `PEERS`.
        ranks: GPUs, or processes on a CPU.
    """

    name: str
    ranks: int

    def __str__(self) -> str:
        """Return it as the table shows it."""
        return f"{self.name}, {self.ranks} rank{'s' if self.ranks > 1 else ''}"


@dataclass(frozen=True)
class Case:
    """A measurement that each way makes.

    Attributes:
        phase: ``decode``, or ``prefill``: the keys and values of all prompts; a peer's takes the
            first tokens too.
        rows: Number of prompts.
        tokens: Tokens of each.
    """

    phase: str
    rows: int
    tokens: int

    @classmethod
    def all_of(cls, decode: Sequence[str], prefill: Sequence[str]) -> list[Case]:
        """Read cases such as ``8x1024``."""
        return [
            cls(phase, *map(int, text.split("x")))
            for phase, texts in (("decode", decode), ("prefill", prefill))
            for text in texts
        ]

    def floor_s(self, cost: ModelCost, rates: Rates) -> float:
        """Return the least time of a step, or of a prefill."""
        keys = self.rows * self.tokens
        if self.phase == "decode":
            return cost.decode_step_s(self.rows, keys, keys, rates)
        pairs = self.rows * self.tokens * (self.tokens + 1) // 2
        return PromptWork(self.rows, keys, pairs, keys).prefill_s(cost, rates)


@dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        way: The way that ran.
        case: What was measured.
        first_s: Seconds of the first time, with compilation.
        ms: Median milliseconds of a decode step, or of a prefill.
        peak_gb: Peak memory of the first GPU in 10⁹ bytes; 0 on a CPU.
    """

    way: Way
    case: Case
    first_s: float
    ms: float
    peak_gb: float


def measure_flexmask(engine: Engine, way: Way, case: Case, steps: int) -> Result:
    """Measure a case with the engine."""
    if case.phase == "decode":
        found = decode_flexmask(engine, STRATEGY, case.rows, case.tokens, steps, 0.0)
        return Result(way, case, found.first_s, found.ms_per_step, found.peak_gb)
    first_s, *times = prefill_times(engine, case)
    return Result(way, case, first_s, 1e3 * statistics.median(times), peak_gb())


def prefill_times(engine: Engine, case: Case) -> list[float]:
    """Time the prefill of all prompts, without the plan that the host makes before."""
    strategy, runner = make_strategy(STRATEGY, {}), engine.runner
    drawn = RandomPrompts(engine.tokenizer)
    layouts = [
        strategy.layout(drawn.tokenizer(drawn.request(strategy, case.tokens)))
        for _ in range(case.rows)
    ]
    with TURN:
        size = BatchSize(case.rows, bucketed_capacity(case.tokens + 1), group=1)
        engine.executor.prepare(strategy, size, endless(engine, 1))
        plan = runner.plan(dict(enumerate(layouts)), 1)

        def prefill() -> None:
            runner.prefill(plan)

        # The second captures a graph, if the prompts are short.
        first_s = seconds(prefill) + seconds(prefill)
        return [first_s, *(seconds(prefill) for _ in range(REPEATS))]


def measure_peer(model: PreTrainedModel, way: Way, case: Case, steps: int) -> Result:
    """Measure a case with transformers' generate, which all ranks call alike."""
    cache = {"cache_implementation": PEERS[way.name]}
    torch.manual_seed(0)
    prompt = torch.randint(5, model.config.vocab_size, (case.rows, case.tokens))
    prompt = prompt.to(model.device)
    added = steps if case.phase == "decode" else 0

    def timed(count: int) -> float:
        return seconds(lambda: generate(model, prompt, count, **cache))

    first_s = timed(added + 2) + timed(added + 2)
    short_s = statistics.median(timed(1 if not added else 2) for _ in range(REPEATS))
    if not added:
        return Result(way, case, first_s, 1e3 * short_s, peak_gb())
    long_s = statistics.median(timed(added + 2) for _ in range(REPEATS))
    return Result(way, case, first_s, 1e3 * (long_s - short_s) / steps, peak_gb())


def peak_gb() -> float:
    """Return the peak memory of this process's GPU in 10⁹ bytes."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


@dataclass(frozen=True)
class RandomWeight:
    """A weight of random numbers, of which only the parts that are read are made.

    It stands in for a slice of safetensors.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def get_shape(self) -> list[int]:
        """Return the sizes of the whole."""
        return list(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """Make a part: a random block, repeated, since random numbers take long on a CPU."""
        sizes = torch.empty(self.shape, device="meta")[index].shape
        if len(sizes) == 1:
            return torch.ones(sizes, dtype=self.dtype)
        block = torch.randn(1 << 20).mul(0.02).to(self.dtype)
        values = torch.empty(sizes, dtype=self.dtype)
        flat = values.view(-1)
        for some in flat.split(len(block)):
            some.copy_(block[: len(some)])
        return values


def parallel_transformers(shape: str, dtype: torch.dtype, ranks: int) -> PreTrainedModel:
    """Load a model of random weights as transformers loads one by its tensor parallel plan."""
    weights = random_model(shape, "meta", dtype).state_dict()
    if random_config(shape).tie_word_embeddings:
        del weights["lm_head.weight"]
    lazy = {name: RandomWeight(name, tuple(w.shape), dtype) for name, w in weights.items()}
    from_pretrained: Any = LlamaForCausalLM.from_pretrained
    model: PreTrainedModel = from_pretrained(
        None,
        config=random_config(shape),
        state_dict=lazy,
        dtype=dtype,
        attn_implementation="sdpa",
        **({"tp_plan": "auto", "tp_size": ranks} if ranks > 1 else {}),
    )
    return model


def run_way(arguments: argparse.Namespace) -> None:
    """Run the cases of one way in this process, and write each result as it is there."""
    way, dtype = Way(arguments.way, arguments.ranks[-1]), DTYPES[arguments.device]
    cases = Case.all_of(arguments.decode, arguments.prefill)
    rank = int(os.environ.get("RANK", "0"))
    measure: Any
    if way.name == RATES:
        rates = Rates.measure(torch.device(arguments.device), dtype)
        write_line(arguments.outcomes, asdict(rates))
        return
    if way.name in ("flexmask", BY_NCCL):
        subject: Any = random_engine(
            arguments.shape,
            arguments.device,
            dtype,
            ranks=way.ranks,
            by_nccl=way.name == BY_NCCL,
        )
        measure = measure_flexmask
    else:
        if arguments.device == "cuda":
            torch.cuda.set_device(rank)
        subject = parallel_transformers(arguments.shape, dtype, way.ranks)
        if way.ranks == 1:
            subject = subject.to(arguments.device)
        measure = measure_peer
    for case in cases:
        result = measure(subject, way, case, arguments.steps)
        if rank == 0:
            write_line(arguments.outcomes, asdict(result))
    if isinstance(subject, Engine):
        subject.close()
    elif dist.is_initialized():
        dist.destroy_process_group()


def write_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append a line of JSON to a file."""
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def start(way: Way, outcomes: Path, log: Path) -> list[subprocess.Popen[bytes]]:
    """Start the processes of a way: one, or for a peer one per rank."""
    count = way.ranks if way.name in PEERS else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        places = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        environment = os.environ | ({n: str(v) for n, v in places.items()} if count > 1 else {})
        command = [sys.executable, *sys.argv, "--way", way.name, "--ranks", str(way.ranks)]
        with log.open("ab") as file:
            processes.append(
                subprocess.Popen(
                    [*command, "--outcomes", str(outcomes)],
                    env=environment, stdout=file, stderr=file, start_new_session=True,
                )
            )  # fmt: skip
    return processes


def run_processes(
    way: Way, folder: Path, limit_s: float, count: int
) -> tuple[list[dict[str, Any]], str]:
    """Run a way within a time limit; return its results, and why it ended early.

    Args:
        way: The way.
        folder: An empty folder.
        limit_s: Seconds to its last result.
        count: Results that it has; after the last one, it has `CLOSING_S` seconds to end.
    """
    outcomes, log = folder / "outcomes", folder / "log"
    outcomes.touch()
    processes = start(way, outcomes, log)
    deadline, failure, is_closing = time.monotonic() + limit_s, "", False
    while None in (statuses := [process.poll() for process in processes]) or any(statuses):
        if failed := next((status for status in statuses if status), None):
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            failure = f"exit status {failed}: {lines[-1] if lines else 'no output'}"
            break
        if time.monotonic() > deadline:
            failure = f"had not ended {CLOSING_S} s after its last result"
            if not is_closing:
                failure = f"ended at its limit of {limit_s:.0f} s"
            break
        if not is_closing and len(outcomes.read_text().splitlines()) == count:
            deadline, is_closing = time.monotonic() + CLOSING_S, True
        time.sleep(0.2)
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has ended
        finally:
            process.wait()
    if failure:
        text = log.read_text(errors="replace")
        print(f"{way}: {failure}\n{text[-6000:]}", file=sys.stderr, flush=True)
    return [json.loads(line) for line in outcomes.read_text().splitlines()], failure


def table(results: Sequence[Mapping[str, Any]], shape: str, dtype: str, rates: Rates) -> list[str]:
    """Return the lines of the table: each result with its share of the floor."""
    cost = ModelCost.of(random_model(shape, "meta", DTYPES[dtype]))
    lines = [
        f"{'way':32} {'phase':8} {'prompts':>10} {'first s':>8} {'ms':>9} {'tok/s':>9} "
        f"{'floor ms':>9} {'share':>6} {'GB':>6}"
    ]
    for result in results:
        way, case = Way(**result["way"]), Case(**result["case"])
        together = Rates(rates.bytes_per_s * way.ranks, rates.flops_per_s * way.ranks)
        floor_ms = 1e3 * case.floor_s(cost, together)
        tokens = case.rows * (1 if case.phase == "decode" else case.tokens)
        lines.append(
            f"{way!s:32} {case.phase:8} {f'{case.rows}x{case.tokens}':>10} "
            f"{result['first_s']:8.1f} {result['ms']:9.3f} {1e3 * tokens / result['ms']:9,.0f} "
            f"{floor_ms:9.3f} {floor_ms / result['ms']:6.1%} {result['peak_gb']:6.1f}"
        )
    return lines


def all_ways(arguments: argparse.Namespace) -> list[Way]:
    """Return the ways to run, flexmask's first."""
    ways = [Way("flexmask", ranks) for ranks in arguments.ranks]
    several = [ranks for ranks in arguments.ranks if ranks > 1]
    return ways + [Way(peer, ranks) for ranks in several for peer in arguments.peers]


def measure_all(arguments: argparse.Namespace, folder: Path) -> None:
    """Run every way in processes of its own; print a table, then a JSON line."""
    results: list[dict[str, Any]] = []
    failures: dict[str, str] = {}

    def run(way: Way) -> list[dict[str, Any]]:
        own = folder / str(len(os.listdir(folder)))
        own.mkdir()
        count = 1 if way.name == RATES else len(arguments.decode + arguments.prefill)
        found, failure = run_processes(way, own, arguments.limit_s, count)
        if failure:
            failures[str(way)] = failure
        return found

    if arguments.rates is None:
        (measured,) = run(Way(RATES, 1))
        rates = Rates(measured["bytes_per_s"], measured["flops_per_s"])
    else:
        rates = Rates(*arguments.rates)
    print(f"{rates} each")
    record = {
        "shape": arguments.shape,
        "rates_of_one": asdict(rates),
        "results": results,
        "failures": failures,
        "environment": environment_stamp(),
    }
    for way in all_ways(arguments):
        results += run(way)
        if arguments.record is not None:
            arguments.record.write_text(json.dumps(record) + "\n")
        lines = table(results, arguments.shape, arguments.device, rates)
        print(lines[-1] if results else f"{way}: no result", flush=True)
    print("\n".join(["", *lines, *(f"{way}: {why}" for way, why in failures.items())]))
    print(json.dumps(record))


def main() -> None:
    """Measure, or be one process of a way."""
    arguments = parse()
    if arguments.way is not None:
        run_way(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure_all(arguments, Path(folder))


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="32b")
    parser.add_argument("--device", choices=tuple(DTYPES), default="cuda")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2], help="1 is one GPU")
    parser.add_argument("--decode", nargs="*", default=["1x1024", "8x1024"])
    parser.add_argument("--prefill", nargs="*", default=["8x1024"])
    parser.add_argument("--peers", nargs="*", choices=[BY_NCCL, *PEERS], default=list(PEERS))
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--limit-s", type=float, default=300, help="of each way")
    parser.add_argument("--record", type=Path, help="file that receives the results so far")
    parser.add_argument(
        "--rates", type=float, nargs=2, metavar=("BYTES/S", "FLOP/S"), help="of one GPU, if known"
    )
    parser.add_argument("--way", help="run this way in this process")
    parser.add_argument("--outcomes", type=Path, help="the file that it writes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
