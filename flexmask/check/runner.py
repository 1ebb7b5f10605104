"""The list of all rules, and the runner that turns faults and exceptions into findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from flexmask.check import capture_rules, mask_rules
from flexmask.check.checked_strategy import Subject
from flexmask.check.finding import Fault, Finding
from flexmask.check.torch_settings import restore_settings
from flexmask.error_text import described, innermost_place, place_of_fault
from flexmask.errors import FlexMaskError
from flexmask.strategy import Strategy, check_strategy_class


@dataclass(frozen=True)
class Rule:
    """A rule that every strategy must follow.

    Attributes:
        name: The name in findings and listings.
        faults: Yields the violations of a strategy.
        mend: Advice on how to correct them.
        is_basic: Whether later rules are skipped if this one is broken.
    """

    name: str
    faults: Callable[[Subject], Iterator[Fault]]
    mend: str
    is_basic: bool = False

    @property
    def summary(self) -> str:
        """The rule in a sentence."""
        return (self.faults.__doc__ or "").partition("\n")[0].replace("``", "`")


RULES = (
    Rule(
        "layout",
        mask_rules.keeps_the_tokens,
        "build it with shared_prefix_layout or copied_prefix_layout of flexmask.layout",
        is_basic=True,
    ),
    Rule(
        "positions",
        mask_rules.has_positions,
        "give Layout a tuple of ints, with the tail's going up by one from any start",
        is_basic=True,
    ),
    Rule(
        "bool tensor",
        mask_rules.returns_bool,
        "return a comparison of tensors: `q_idx >= kv_idx`, and `q_idx >= 0` for True",
        is_basic=True,
    ),
    Rule(
        "pointwise",
        mask_rules.is_pointwise,
        "decide each pair from b, h, q_idx, kv_idx and tensors indexed by them, with `&`, `|`, "
        "`~` and torch.where; build tables outside the mask_mod",
        is_basic=True,
    ),
    Rule(
        "torch settings",
        capture_rules.leaves_torch_alone,
        "leave torch's global settings to the program that uses the strategy",
        is_basic=True,
    ),
    Rule(
        "deterministic",
        mask_rules.is_deterministic,
        "use no random numbers, counters or clocks in mask_mod",
        is_basic=True,
    ),
    Rule(
        "no empty row",
        mask_rules.has_no_empty_row,
        "let every token see itself: or_masks(rule, lambda b, h, q_idx, kv_idx: q_idx == kv_idx)",
    ),
    Rule(
        "causal",
        mask_rules.is_causal,
        "wrap the rule as and_masks(causal, rule); where a prompt token is meant to see later "
        "ones, set is_causal = False and keep the tail unseen",
    ),
    Rule(
        "oracle",
        mask_rules.equals_the_oracle,
        "make mask_mod and allowed() say the same; the picture is of mask_mod",
    ),
    Rule(
        "any slot",
        mask_rules.holds_in_any_slot,
        "ask for segments and positions, batch.segment_ids[b, q_idx] and "
        "batch.position_ids[b, q_idx], not for absolute slots or row 0",
    ),
    Rule(
        "next layout",
        mask_rules.follows_the_batch,
        "capture batch.segment_ids and batch.position_ids themselves and index them inside the "
        "mask_mod: their content changes from batch to batch",
    ),
    Rule(
        "decode",
        mask_rules.decodes_what_it_prefills,
        "decide a row from its own slot and earlier ones; later slots are not filled yet",
    ),
    Rule(
        "device",
        capture_rules.moves_to_another_device,
        "make tables with batch.table(values) and other tensors with device=batch.device; read "
        "the batch's values inside the mask_mod, by indexing",
    ),
    Rule(
        "numbers",
        capture_rules.captures_no_changing_number,
        "take the number from a tensor of the batch, indexed inside the mask_mod; capture only "
        "parameters",
        is_basic=True,
    ),
    Rule(
        "tables",
        capture_rules.captures_nothing_as_long_as_the_batch,
        "index batch.segment_ids or batch.position_ids instead, or use a table of fixed size",
        is_basic=True,
    ),
    Rule(
        "attention",
        capture_rules.attends_as_dense_attention_does,
        "make tables that mask_mod captures with batch.table(values), and use plain pointwise "
        "operations of torch",
    ),
    Rule(
        "compiles once",
        capture_rules.compiles_once,
        "capture only tensors of the batch, constant tables and parameters",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """The outcome of one rule; ``finding`` is None unless the rule is broken."""

    rule: Rule
    status: Literal["ok", "broken", "skipped"]
    finding: Finding | None = None


def check_strategy(strategy: Strategy) -> list[Finding]:
    """Check a strategy against every rule, on a fixed set of layouts.

    Example::

        findings = check_strategy(Sliding(window=3))
        assert not findings, findings[0]

    Returns:
        A finding for each rule that it breaks, at the smallest layout that breaks it.
    """
    return [outcome.finding for outcome in run_rules(strategy) if outcome.finding is not None]


def run_rules(strategy: Strategy) -> Iterator[Outcome]:
    """Check rule by rule, as `check_strategy` does; the last two compile and take seconds.

    Raises:
        StrategyError: If it is not a usable strategy class.
    """
    check_strategy_class(type(strategy))
    subject, is_checkable = Subject(strategy), True
    try:
        for rule in RULES:
            if not is_checkable:
                yield Outcome(rule, "skipped")
                continue
            finding = _first_finding(rule, subject)
            is_checkable = finding is None or not rule.is_basic
            yield Outcome(rule, "ok" if finding is None else "broken", finding)
    finally:
        restore_settings(subject.settings)


def _first_finding(rule: Rule, subject: Subject) -> Finding | None:
    try:
        fault = next(rule.faults(subject), None)
    except FlexMaskError as error:
        place = place_of_fault(error, subject.source_file)
        fault = Fault(f"{error}; see {place}" if place else str(error), subject.case)
    except Exception as error:
        place = place_of_fault(error, subject.source_file) or innermost_place(error)
        fault = Fault(
            f"it raises {described(error)} at {place}",
            subject.case,
            mend="make that line work for this layout",
        )
    if fault is None:
        return None
    return Finding(
        rule=rule.name,
        message=fault.message,
        mend=fault.mend or rule.mend,
        layout=str(fault.case or ""),
        q_idx=fault.q_idx,
        kv_idx=fault.kv_idx,
        picture=fault.picture,
    )
