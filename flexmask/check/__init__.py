"""Checks that a strategy, built in or not, follows the rules that the engine relies on."""

from flexmask.check.finding import Finding
from flexmask.check.runner import RULES, Outcome, check_strategy, run_rules

__all__ = ["RULES", "Finding", "Outcome", "check_strategy", "run_rules"]
