"""Whether flexmask can work here: each thing it needs is tried, not assumed."""

from flexmask.doctor.all_checks import run_checks
from flexmask.doctor.check_result import Check, State

__all__ = ["Check", "State", "run_checks"]
