"""Whether flexmask can work here: each thing it needs is tried, not assumed."""

from flexmask.doctor.check import Check, State
from flexmask.doctor.run import run_checks

__all__ = ["Check", "State", "run_checks"]
