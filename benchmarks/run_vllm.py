"""Runs jobs with vLLM and dummy weights: ``python run_vllm.py MODEL JOBS OUTCOMES``.

MODEL is a folder with a config. ``vllm_peer.py`` starts this program in vLLM's environment, which
needs nothing of flexmask. The prefix cache is emptied before every run.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

from vllm import LLM, SamplingParams

from peer_jobs import Job, Outcome, OutcomeFile, read_jobs

MEMORY_SHARE = 0.85
CONTEXT = 20_000
"""The context if no job needs more: the same for all selections of jobs, for the sake of vLLM's
compile cache."""


def run(llm: LLM, job: Job) -> Outcome:
    """Time every run of a job."""
    sampling = SamplingParams(
        max_tokens=job.new_tokens,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=0 if job.scores_prompts else None,
    )
    seconds = []
    for prompts in job.runs:
        if not llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache: a request is still running")
        inputs = [{"prompt_token_ids": token_ids} for token_ids in prompts]
        started = time.perf_counter()
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
        for output in outputs:
            if (found := len(output.outputs[0].token_ids)) != job.new_tokens:
                raise RuntimeError(f"vLLM generated {found} tokens of {job.new_tokens}")
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    cached_tokens = sum(output.num_cached_tokens or 0 for output in outputs)
    first_s, *others = seconds
    return Outcome(
        job.number, first_s, tuple(others), prompt_tokens, prompt_tokens - cached_tokens
    )


def main(model: Path, jobs: list[Job], outcomes: OutcomeFile) -> None:
    """Start vLLM, and run the jobs one after another."""
    context = max(
        len(prompt) + job.new_tokens for job in jobs for run in job.prompts for prompt in run
    )
    config = json.loads((model / "config.json").read_text())
    context = max(context, min(CONTEXT, config["max_position_embeddings"]))
    started = time.perf_counter()
    llm = LLM(
        model=str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=context,
        gpu_memory_utilization=MEMORY_SHARE,
        enable_prefix_caching=True,
        disable_log_stats=True,
    )
    start_s = time.perf_counter() - started
    scheduler = llm.llm_engine.vllm_config.scheduler_config
    outcomes.write(
        {name: version(name) for name in ("vllm", "torch", "transformers")}
        | {"max_num_seqs": scheduler.max_num_seqs}
        | {"max_num_batched_tokens": scheduler.max_num_batched_tokens}
        | {"max_model_len": context, "memory_share": MEMORY_SHARE, "start_s": start_s}
    )
    for job in jobs:
        outcomes.write(run(llm, job))


if __name__ == "__main__":
    model, jobs, outcomes = map(Path, sys.argv[1:])
    main(model, read_jobs(jobs), OutcomeFile(outcomes))
