"""Holds a strategy, built in or of one's own, to what the engine needs of it."""

from flexmask.check.finding import Finding
from flexmask.check.runner import RULES, Outcome, check_strategy, run_rules

__all__ = ["RULES", "Finding", "Outcome", "check_strategy", "run_rules"]
