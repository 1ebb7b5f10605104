"""A run over a data set as its options define it, whether it generates or scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from flexmask.checkpoint.identity import model_files
from flexmask.demo import model_path
from flexmask.plugins.registry import recorded_plugin
from flexmask.plugins.strategy_file import recorded_location, recorded_name
from flexmask.results.run_config import RunConfig
from flexmask_cli.dataset_options import DEMO
from flexmask_cli.engine_loading import load_engine, load_tokenizer
from flexmask_cli.options import (
    BatchSizeOptions,
    ChatOptions,
    EngineOptions,
    ResultOptions,
    RowOptions,
    RunModelOptions,
)

if TYPE_CHECKING:
    from flexmask.encoding.tokenization import RequestTokenizer
    from flexmask.engine import Engine
    from flexmask.fusion import Fusion
    from flexmask.results.dataset_run import DatasetJob
    from flexmask.strategy import Strategy
    from flexmask.tasks.judge import ChoiceJudge, Judge
    from flexmask.tasks.request_source import RequestSource
    from flexmask.tasks.task import Task
    from flexmask_cli.strategy_choice import ChosenStrategy


class DatasetOptions(Protocol):
    """The options that every run over a data set has."""

    @property
    def rows(self) -> RowOptions:
        """The number of rows to use, and the handling of bad rows."""

    @property
    def model(self) -> RunModelOptions:
        """The model."""

    @property
    def chat(self) -> ChatOptions:
        """Chat template and special tokens."""

    @property
    def batch(self) -> BatchSizeOptions:
        """The batch size."""

    @property
    def engine(self) -> EngineOptions:
        """Device, dtype and prefill kernel."""

    @property
    def results(self) -> ResultOptions:
        """The handling of an existing result, and of printed output."""


OptionsT = TypeVar("OptionsT", bound=DatasetOptions)
JudgeT = TypeVar("JudgeT", "Judge", "ChoiceJudge")


@dataclass(frozen=True)
class PlannedRun(ABC, Generic[OptionsT, JudgeT]):
    """The options of a run, and its task."""

    options: OptionsT
    task: Task | None

    @property
    @abstractmethod
    def judge(self) -> JudgeT:
        """Extracts answers from results and judges them."""

    @property
    @abstractmethod
    def job_type(self) -> type[DatasetJob[Any]]:
        """The class of jobs that carry the run out."""

    @abstractmethod
    def that_change_rows(self) -> dict[str, Any]:
        """Return arguments of the engine that change what is in the rows."""

    @abstractmethod
    def recorded(self) -> dict[str, Any]:
        """Return what the record of a run holds of this kind only, as JSON values."""

    @property
    def uses_chat_template(self) -> bool:
        """True if requests are put into the model's chat template."""
        return self.options.chat.uses_template(self.task)

    @property
    def model_name(self) -> str:
        """The model's name as results record it."""
        return self.options.model.model or DEMO

    def checked(self, requests: RequestSource) -> RequestSource:
        """Return requests that are checked for the judge and the chat template."""
        return replace(requests, judge=self.judge, is_chat=self.uses_chat_template)

    def check(self, *, is_elsewhere: bool = False) -> None:
        """Check what would otherwise fail after the model is loaded.

        Args:
            is_elsewhere: Whether the model runs on other machines, with devices of their own.

        Raises:
            OptionError: If a needed package, file or device is missing.
        """
        from flexmask.device import resolve_device, resolve_dtype

        self.judge.check()
        if is_elsewhere:
            return
        engine = self.options.engine
        resolve_dtype(engine.dtype, resolve_device(engine.device))

    def for_engine(self) -> dict[str, Any]:
        """Return arguments of `Engine.generate` or `Engine.score`."""
        return self.that_change_rows() | {"batch_size": self.options.batch.rows_at_once}

    def job(
        self,
        choose: Callable[[], ChosenStrategy],
        open_requests: Callable[[], RequestSource],
        fusion: Fusion,
        input: str,
    ) -> DatasetJob[Any]:
        """Return the run as any process can carry it out.

        Args:
            choose: Makes the strategy.
            open_requests: Opens the input.
            fusion: The fusion.
            input: Name of the input.
        """
        return self.job_type(
            open_requests=open_requests,
            make_strategy=partial(_strategy, choose),
            load_engine=self.load_engine,
            record=partial(self._record, choose, fusion, input),
            fusion=fusion,
            judge=self.judge,
            on_error=self.options.rows.on_bad_row,
            options=self.for_engine(),
        )

    def _record(
        self, choose: Callable[[], ChosenStrategy], fusion: Fusion, input: str
    ) -> RunConfig:
        return self.config(*choose(), fusion, input)

    def config(self, reference: str, strategy: Strategy, fusion: Fusion, input: str) -> RunConfig:
        """Return the record of a run for its result file.

        Args:
            reference: Name of the strategy, or ``path/to/file.py:name``.
            strategy: The strategy.
            fusion: The fusion.
            input: Name of the input.
        """
        model, ranks = self.options.model, self.options.engine.num_ranks
        return RunConfig(
            run={
                "strategy": recorded_name(reference),
                "parameters": strategy.parameter_values(),
                "plugin": recorded_plugin(reference),
                "model": self.model_name,
                "model_files": model_files(model.model or str(model_path()), **model.changes),
                **model.changes,
                "dtype": self.options.engine.dtype,
                "task": self.task and self.task.record(),
                "judge": self.judge.record(),
                "fusion": fusion.record(),
                "chat_template": self.uses_chat_template,
                "allow_special_tokens": self.options.chat.allow_special_tokens,
                **self.recorded(),
            },
            environment={
                **self.machine(),
                "batch_size": self.options.batch.batch_size,
                **({} if ranks == 1 else {"tensor_parallel": ranks}),
                "input": input,
                "strategy_file": recorded_location(reference),
            },
        )

    def machine(self) -> Mapping[str, str]:
        """Return versions and device."""
        from flexmask.device import resolve_device

        versions = {name: version(name) for name in ("flexmask", "torch", "transformers")}
        return {**versions, "device": str(resolve_device(self.options.engine.device))}

    def load_tokenizer(self) -> RequestTokenizer:
        """Load the model's tokenizer, without the weights."""
        return load_tokenizer(self.options.model, self.options.chat, self.task)

    def load_engine(self) -> Engine:
        """Load the model."""
        return load_engine(self.options.model, self.options.engine)


def _strategy(choose: Callable[[], ChosenStrategy]) -> Strategy:
    return choose().strategy
