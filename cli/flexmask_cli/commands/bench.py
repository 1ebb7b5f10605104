"""``flexmask bench``: attention over one prompt, timed beside other implementations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar

from flexmask.bench.heads import Heads
from flexmask.limits import read_size
from flexmask_cli.option_groups import takes_options
from flexmask_cli.option_kinds import size, text
from flexmask_cli.options import AsJson, DeviceOptions, StrategyOptions
from flexmask_cli.render.attention import print_attention_case, print_attention_timings
from flexmask_cli.render.lines import print_json, print_passing, warnings_as_lines
from flexmask_cli.request_choice import Lengths, OneRequestOptions
from flexmask_cli.strategy_choice import choose_strategy

DEFAULT_LENGTHS = Lengths(60, (40, 35, 38), 4)


@dataclass(frozen=True)
class AttentionOptions:
    """The shape of attention."""

    heading: ClassVar[str] = "Attention"

    heads: Annotated[
        str, text("--heads", metavar="Q:K", help="Numbers of query heads and key heads.")
    ] = "24:8"
    head_dim: Annotated[int, size("--head-dim", help="Size of a head.")] = 128
    as_json: AsJson = False

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            OptionError: If they are none, or query heads are not a multiple of key heads.
        """
        _ = self.shape

    @property
    def shape(self) -> Heads:
        """The numbers of heads and their size."""
        query, separator, key = self.heads.partition(":")
        form = "two numbers as in 24:8, or one"
        count = read_size("--heads", query, form, given=self.heads)
        key_count = read_size("--heads", key, form, given=self.heads) if separator else count
        return Heads(count, key_count, self.head_dim)


@takes_options
def bench(
    *,
    strategy: StrategyOptions,
    request: OneRequestOptions,
    attention: AttentionOptions,
    device: DeviceOptions,
) -> None:
    """Time one call of attention over a prompt, compared with other implementations.

    The prompt is a row of an input, or has a prefix of 60 tokens, segments of 40, 35 and 38 and a
    suffix of 4 unless options say otherwise. The table ends with a lower bound, computed from the
    rates of matrix products and of memory reads that are measured in the same run.
    """
    chosen = choose_strategy(strategy.strategy, strategy.parameters).strategy
    with warnings_as_lines():
        subject = request.subject(DEFAULT_LENGTHS)

    import torch

    from flexmask.bench.attention_timing import AttentionBench
    from flexmask.bench.machine import machine_stamp
    from flexmask.device import resolve_device, resolve_dtype

    target = resolve_device(device.device)
    number_type = resolve_dtype(device.dtype, target)
    if not isinstance(number_type, torch.dtype):
        number_type = torch.bfloat16
    with warnings_as_lines():
        layout = chosen.layout(subject.shown.tokens)
        case = AttentionBench(chosen, layout, attention.shape, target, number_type)
        if not attention.as_json:
            print_attention_case(subject, chosen, case)
        timings = []
        for timing in case.timings():
            timings.append(timing)
            print_passing(timing.way)
        floor = case.floor()
        print_passing("")
    if attention.as_json:
        print_json(
            {
                "strategy": chosen.name,
                "parameters": chosen.parameter_values(),
                **case.figures(),
                "floor": asdict(floor),
                "ways": [asdict(timing) for timing in timings],
                "machine": machine_stamp(),
            }
        )
    else:
        print_attention_timings(timings, floor)
