"""Shell completion of values: names of strategies, tasks, fusions, devices, dtypes."""

from __future__ import annotations

from flexmask.choice_scores import NORMALIZATIONS
from flexmask.device import DTYPES, DTYPES_OF_8_BITS
from flexmask.fusion import FUSIONS, SCORE_FUSIONS


def strategies(incomplete: str) -> list[str]:
    """Return names of strategies, including those of plugins."""
    from flexmask.plugins.registry import load_registry

    return _beginning(incomplete, [item.cls.name for item in load_registry().strategies()])


def tasks(incomplete: str) -> list[str]:
    """Return names of the tasks that come with flexmask."""
    from flexmask.tasks.task import shipped_names

    return _beginning(incomplete, shipped_names())


def fusions(incomplete: str) -> list[str]:
    """Return names of fusions."""
    return _beginning(incomplete, list(FUSIONS))


def score_fusions(incomplete: str) -> list[str]:
    """Return names of fusions under which choices are scored."""
    return _beginning(incomplete, list(SCORE_FUSIONS))


def normalizations(incomplete: str) -> list[str]:
    """Return names of normalizations of scores."""
    return _beginning(incomplete, list(NORMALIZATIONS))


def devices(incomplete: str) -> list[str]:
    """Return names of devices, whether present or not."""
    return _beginning(incomplete, ["auto", "cpu", "cuda"])


def dtypes(incomplete: str) -> list[str]:
    """Return names of dtypes."""
    return _beginning(incomplete, ["auto", *DTYPES])


def quantizations(incomplete: str) -> list[str]:
    """Return names of what weights can be rounded to."""
    return _beginning(incomplete, list(DTYPES_OF_8_BITS))


def prefill_kernels(incomplete: str) -> list[str]:
    """Return names of prefill kernels."""
    return _beginning(incomplete, ["auto", "triton", "flash"])


def _beginning(incomplete: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
