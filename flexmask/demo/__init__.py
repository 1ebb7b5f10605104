"""Paths of the bundled demo model and of its questions.

``benchmarks/demo_model`` made them: ``world`` → ``corpus`` → ``train`` → ``evaluate``.
"""

from pathlib import Path


def model_path() -> Path:
    """Return the folder of the demo model, for ``AutoModelForCausalLM.from_pretrained``."""
    return Path(__file__).parent / "model"


def questions_path() -> Path:
    """Return the file of the demo questions, one JSON object per line."""
    return Path(__file__).parent / "questions.jsonl"
