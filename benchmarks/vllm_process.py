"""Runs jobs with vLLM, in a process of its own and perhaps in another environment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from peer_jobs import Job
from peer_process import Report, run_jobs
from random_model import random_config

VLLM_SETTINGS = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
PROGRAM = Path(__file__).with_name("run_vllm.py")


def run_vllm(
    shape: str,
    jobs: Sequence[Job],
    folder: Path,
    time_limit_s: float,
    python: str,
    site: Path | None,
) -> Report:
    """Run jobs on a model of random weights.

    Args:
        shape: Shape of the model.
        jobs: The jobs, whose prompts are token ids.
        folder: An empty folder.
        time_limit_s: Seconds after which the process is killed.
        python: The Python to run.
        site: The only folder on ``PYTHONPATH``; None to leave it as it is.
    """
    model = folder / "model"
    random_config(shape).save_pretrained(model)
    packages = {"PYTHONPATH": str(site.absolute())} if site else {}
    environment = os.environ | VLLM_SETTINGS | packages
    return run_jobs([python, str(PROGRAM), str(model)], jobs, folder, time_limit_s, environment)
