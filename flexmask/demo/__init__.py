"""A small model that the package carries, and the questions it was made to be asked.

How they are made: ``world`` → ``corpus`` → ``train`` → ``evaluate``.
"""

from pathlib import Path


def model_path() -> Path:
    """Folder of the demo model, for ``AutoModelForCausalLM.from_pretrained``."""
    return Path(__file__).parent / "model"


def questions_path() -> Path:
    """File of the demo questions, one JSON object per line."""
    return Path(__file__).parent / "questions.jsonl"
