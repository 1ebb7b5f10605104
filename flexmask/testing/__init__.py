"""Holds a strategy, built in or of one's own, to what the engine needs of it."""

from flexmask.testing.check import RULES, Outcome, check_strategy, run_rules
from flexmask.testing.finding import Finding

__all__ = ["RULES", "Finding", "Outcome", "check_strategy", "run_rules"]
