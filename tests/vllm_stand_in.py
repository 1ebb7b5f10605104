"""A package ``vllm`` that stands in for vLLM, where a test is of the process around it."""

from __future__ import annotations

from pathlib import Path

VLLM = """
import os, sys, time
from types import SimpleNamespace as Some

FAULT = {fault!r}
SamplingParams = Some


class LLM:
    def __init__(self, **options):
        assert FAULT != "start", "no memory left"
        if FAULT == "hang":
            time.sleep(600)
        self.seen = []
        scheduler = Some(max_num_seqs=7, max_num_batched_tokens=options["max_model_len"])
        self.llm_engine = Some(vllm_config=Some(scheduler_config=scheduler))

    def reset_prefix_cache(self):
        self.seen.clear()
        return True

    def generate(self, prompts, sampling, use_tqdm):
        assert sampling.ignore_eos and "flexmask" not in sys.modules
        assert os.environ["PYTHONPATH"] == os.path.dirname(os.path.dirname(__file__))
        assert not (FAULT == "later" and sampling.max_tokens > 1), "cannot decode"
        new = [0] * sampling.max_tokens
        return [self.output(prompt["prompt_token_ids"], new) for prompt in prompts]

    def output(self, token_ids, new):
        before = max((common(token_ids, one) for one in self.seen), default=0)
        self.seen.append(token_ids)
        return Some(
            prompt_token_ids=token_ids, num_cached_tokens=before, outputs=[Some(token_ids=new)]
        )


def common(one, other):
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), len(one))
"""


def make_site(site: Path, fault: str | None = None) -> Path:
    """Make a folder with the package, which has a fault, or none."""
    (site / "vllm").mkdir(parents=True)
    (site / "vllm" / "__init__.py").write_text(VLLM.format(fault=fault))
    metadata = site / "vllm-0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.1\n")
    return site
