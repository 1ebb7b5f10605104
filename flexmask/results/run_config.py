"""The configuration of a run, as recorded in its result file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from flexmask.record_differences import differences

IDENTITY = ("model_files", "plugin")
"""Entries that identify the model files and the plugin code; early versions recorded none."""


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run, in JSON values.

    Attributes:
        run: Settings that change the rows: strategy, parameters, model, seed and so on. A run is
            resumed only with the same settings.
        environment: Versions and device; recorded, not compared.
        earlier_environments: Environments of the runs that this one resumed, where they differ.
    """

    run: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    earlier_environments: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse the output of `to_json`.

        Raises:
            ValueError: If ``text`` is something else.
        """
        try:
            recorded = json.loads(text)
        except RecursionError:
            raise ValueError("nested too deep") from None
        kinds = {"run": dict, "environment": dict, "earlier_environments": list}
        if not isinstance(recorded, dict) or recorded.keys() != kinds.keys():
            raise ValueError("not the configuration of a run")
        if not all(isinstance(recorded[name], kind) for name, kind in kinds.items()):
            raise ValueError("not the configuration of a run")
        return cls(**recorded)

    def to_json(self) -> str:
        """Return a JSON object of the three attributes."""
        return json.dumps(vars(self))

    def resuming(self, earlier: RunConfig) -> Self:
        """Return this configuration with the environments of an earlier run recorded."""
        environments = [*earlier.earlier_environments, earlier.environment]
        others = [other for other in environments if other != self.environment]
        return replace(self, earlier_environments=others)

    def unrecorded(self, earlier: RunConfig) -> list[str]:
        """Return entries of `IDENTITY` that an earlier run did not record, to compare with."""
        return [name for name in IDENTITY if name in self.run and name not in earlier.run]

    def differences(self, earlier: RunConfig) -> list[str]:
        """Return the settings that differ from an earlier run's, such as ``seed: 1 → 2``."""
        return differences(earlier.run, self.run)
