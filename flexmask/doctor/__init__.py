"""Checks of this machine: tries everything that flexmask needs or can use."""

from flexmask.doctor.all_checks import run_checks
from flexmask.doctor.check_result import Check, State

__all__ = ["Check", "State", "run_checks"]
