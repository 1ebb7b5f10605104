"""Options that say how tokens are generated, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from flexmask.checkpoint.identity import model_files
from flexmask.demo import model_path
from flexmask.errors import OptionError
from flexmask.limits import check_size
from flexmask.plugins.registry import recorded_plugin
from flexmask.plugins.strategy_file import recorded_location, recorded_name
from flexmask.results.run_config import RunConfig
from flexmask_cli.engine_loading import load_engine
from flexmask_cli.options import parse_batch_size, parse_prefill_kernel

if TYPE_CHECKING:
    from flexmask.encoding.tokenization import RequestTokenizer
    from flexmask.engine import Engine
    from flexmask.fusion import Fusion
    from flexmask.sampling import Sampling
    from flexmask.strategy import Strategy
    from flexmask.tasks.judge import Judge
    from flexmask.tasks.task import Task

DEMO = "demo"


@dataclass(frozen=True)
class GenerationOptions:
    """What was asked for."""

    task: Task | None
    model: str | None
    device: str
    dtype: str
    prefill_kernel: str
    trust_remote_code: bool
    batch_size: str
    max_new_tokens: int
    stop: Sequence[str]
    chat_template: bool | None
    allow_special_tokens: bool
    temperature: float
    top_p: float
    top_k: int
    seed: int

    def __post_init__(self) -> None:
        """Raise now what needs no library to be found.

        Raises:
            OptionError: If an option has an impossible value.
        """
        check_size("--max-new-tokens", self.max_new_tokens, 1)
        parse_batch_size(self.batch_size)
        parse_prefill_kernel(self.prefill_kernel)
        if not all(self.stop):
            raise OptionError("--stop must not be empty; leave it out to generate to the end")
        for option, texts in (("--model", [self.model or ""]), ("--stop", self.stop)):
            for text in texts:
                if not _is_utf8(text):
                    raise OptionError(f"{option} must be UTF-8, got {text!r}")
        _ = self.sampling  # which checks itself

    @property
    def judge(self) -> Judge:
        """The task's, else that of all."""
        from flexmask.tasks.judge import Judge

        return self.task.judge if self.task else Judge()

    @property
    def uses_chat_template(self) -> bool:
        """As asked for, else as the task says."""
        if self.chat_template is None:
            return self.task is not None and self.task.chat_template
        return self.chat_template

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        from flexmask.sampling import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)

    def check(self) -> None:
        """Raise now what would be raised once the model is loaded.

        Raises:
            OptionError: If an option has an impossible value, or cannot be had here.
        """
        from flexmask.device import resolve_device, resolve_dtype

        self.judge.check()
        resolve_dtype(self.dtype, resolve_device(self.device))

    def for_engine(self) -> dict[str, Any]:
        """Those that `Engine.generate` takes."""
        return self._that_change_rows() | {"batch_size": parse_batch_size(self.batch_size)}

    def config(self, reference: str, strategy: Strategy, fusion: Fusion, input: str) -> RunConfig:
        """What a result file records of a run.

        Args:
            reference: The strategy as it was asked for.
            strategy: The same.
            fusion: What the segments of a request have to do with each other.
            input: Name of the input.
        """
        return RunConfig(
            run={
                "strategy": recorded_name(reference),
                "parameters": strategy.parameter_values(),
                "plugin": recorded_plugin(reference),
                "model": self.model or DEMO,
                "model_files": model_files(self.model or str(model_path())),
                "dtype": self.dtype,
                "task": self.task and self.task.record(),
                "judge": asdict(self.judge),
                "fusion": asdict(fusion),
                **self._that_change_rows(),
                "sampling": asdict(self.sampling),
            },
            environment={
                **self.machine(),
                "batch_size": self.batch_size,
                "input": input,
                "strategy_file": recorded_location(reference),
            },
        )

    def machine(self) -> Mapping[str, str]:
        """Versions and device."""
        from flexmask.device import resolve_device

        versions = {name: version(name) for name in ("flexmask", "torch", "transformers")}
        return {**versions, "device": str(resolve_device(self.device))}

    def load_tokenizer(self) -> RequestTokenizer:
        """Load the model's tokenizer, and not the model."""
        from flexmask.encoding.tokenization import RequestTokenizer, load_tokenizer

        path = self.model or str(model_path())
        tokenizer = load_tokenizer(path, trust_remote_code=self.trust_remote_code)
        return RequestTokenizer(
            tokenizer,
            chat_template=self.uses_chat_template,
            allow_special_tokens=self.allow_special_tokens,
        )

    def load_engine(self, *, is_verbose: bool) -> Engine:
        """Load the model."""
        return load_engine(
            self.model,
            self.device,
            self.dtype,
            self.trust_remote_code,
            is_verbose,
            parse_prefill_kernel(self.prefill_kernel),
        )

    def _that_change_rows(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "sampling": self.sampling,
            "stop": [text.replace("\\n", "\n").replace("\\t", "\t") for text in self.stop],
            "chat_template": self.uses_chat_template,
            "allow_special_tokens": self.allow_special_tokens,
        }


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not come as half characters
        return False
    return True
