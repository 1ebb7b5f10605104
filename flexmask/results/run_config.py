"""The configuration of a run, as recorded in its result file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from flexmask.record_differences import differences
from flexmask.tasks.shards import ShardRecord

IDENTITY = ("model_files", "plugin")
"""Entries that identify the model files and the plugin code; early versions recorded none."""


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run, in JSON values.

    Attributes:
        run: Settings that change the rows: strategy, parameters, model, seed and so on. A run is
            resumed only with the same settings.
        environment: Versions and device; recorded, not compared.
        earlier_environments: Environments of the runs that this one resumed, where they differ;
            of a merged file, those of its parts beyond the first.
        shard: The shard that the run is; None for a run of the whole input.
        num_rows: Rows of the result file of a shard; None for a run of the whole input.
    """

    run: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)
    earlier_environments: Sequence[Mapping[str, Any]] = ()
    shard: ShardRecord | None = None
    num_rows: int | None = None

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
        kinds: dict[str, type] = {"run": dict, "environment": dict, "earlier_environments": list}
        if isinstance(recorded, dict) and "shard" in recorded:
            kinds |= {"shard": dict, "num_rows": int}
        if not isinstance(recorded, dict) or recorded.keys() != kinds.keys():
            raise ValueError("not the configuration of a run")
        if not all(isinstance(recorded[name], kind) for name, kind in kinds.items()):
            raise ValueError("not the configuration of a run")
        if "shard" in recorded:
            recorded["shard"] = ShardRecord.from_json(recorded["shard"])
        return cls(**recorded)

    def to_json(self) -> str:
        """Return a JSON object of the attributes, without those of a shard if it is none."""
        values = dict(vars(self))
        if self.shard is None:
            del values["shard"], values["num_rows"]
        else:
            values["shard"] = self.shard.to_json()
        return json.dumps(values)

    def resuming(self, earlier: RunConfig) -> Self:
        """Return this configuration with the environments of an earlier run recorded."""
        others: list[Mapping[str, Any]] = []
        for other in (*earlier.earlier_environments, earlier.environment):
            if other != self.environment and other not in others:
                others.append(other)
        return replace(self, earlier_environments=others)

    def merging(self, other: RunConfig) -> Self:
        """Return this configuration with the environments of another shard's run recorded."""
        environments = [*self.earlier_environments, other.environment, *other.earlier_environments]
        joined = replace(self, earlier_environments=environments)
        return replace(self, earlier_environments=self.resuming(joined).earlier_environments)

    def unrecorded(self, earlier: RunConfig) -> list[str]:
        """Return entries of `IDENTITY` that an earlier run did not record, to compare with."""
        return [name for name in IDENTITY if name in self.run and name not in earlier.run]

    def differences(self, earlier: RunConfig) -> list[str]:
        """Return the settings that differ from an earlier run's, such as ``seed: 1 → 2``."""
        return differences(_compared(earlier), _compared(self))


def _compared(config: RunConfig) -> Mapping[str, Any]:
    return config.run if config.shard is None else {**config.run, "shard": config.shard.to_json()}
