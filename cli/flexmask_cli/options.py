"""Option groups that several commands take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, cast

import typer

from flexmask.checkpoint.model_name import check_adapter_name, check_model_name
from flexmask.device import check_device_name, check_dtype_name, check_quantize_name
from flexmask.errors import OptionError
from flexmask.fusion import Fusion
from flexmask.kv_store.options import DEFAULT_FOLDER_BYTES, KVCacheOptions
from flexmask.limits import read_size
from flexmask.sampling import Sampling
from flexmask_cli import completion
from flexmask_cli.option_kinds import Pair, byte_size, flag, is_utf8, pairs, path, size, text

if TYPE_CHECKING:
    from flexmask.attention.flex_call import PrefillKernel
    from flexmask.results.resume import OutputMode
    from flexmask.tasks.judge import Judge
    from flexmask.tasks.request_source import OnError
    from flexmask.tasks.task import Task

Parameters = Annotated[
    list[Pair],
    pairs(
        "--param",
        "-p",
        metavar="KEY=VALUE",
        help="Set a parameter of the strategy. Repeatable.",
    ),
]
JUDGE_FORM = "exact|f1|lemma|contains|regex:PATTERN|choice|number|file.py:name"
AsJson = Annotated[bool, flag("--json", help="Print JSON.")]
Quiet = Annotated[bool, flag("--quiet", "-q", help="Print errors and warnings only.")]
Verbose = Annotated[
    bool,
    flag("--verbose", "-v", help="Also print the model, its layers, kernels and floor."),
]


@dataclass(frozen=True)
class ListingOptions:
    """The form of a listing."""

    as_json: AsJson = False


@dataclass(frozen=True)
class StrategyOptions:
    """A mask strategy and its parameters."""

    heading: ClassVar[str] = "Strategy"

    strategy: Annotated[
        str,
        text(
            "--strategy",
            "-s",
            completion=completion.strategies,
            help="Name of a mask strategy ('flexmask strategies' lists them), or one in a file: "
            "path/to/file.py:name.",
        ),
    ] = "ensemble_isolation"
    param: Parameters = field(default_factory=list)

    @property
    def parameters(self) -> Mapping[str, str]:
        """The parameters by name."""
        return dict(self.param)


@dataclass(frozen=True)
class FusionOptions:
    """The fusion of a request's segments into one answer."""

    heading: ClassVar[str] = "Strategy"

    fusion: Annotated[
        str,
        text(
            "--fusion",
            completion=completion.fusions,
            help="attention puts all segments into one prompt, under the strategy's mask. Every "
            "other fusion makes each segment a prompt of its own: mean, mean_prob, max, "
            "weighted_mean and weighted_max fuse the logits of all prompts into one generation; "
            "none runs the first prompt only, each runs every prompt by itself, and vote takes "
            "the answer of most prompts. self_consistency puts all segments into one prompt and "
            "takes the answer of most of its samples.",
        ),
    ] = "attention"
    fusion_weights: Annotated[
        str | None,
        text(
            "--fusion-weights",
            metavar="column|confidence",
            help="Weights of weighted_mean and weighted_max: the input's column 'weights', or "
            "the probability of the token that each prompt finds most likely.",
        ),
    ] = None

    samples: Annotated[
        int,
        size(
            "--samples",
            help="Continue each prompt N times, which needs a --temperature. Every sample has a "
            "row; under vote and self_consistency the samples are counted instead.",
        ),
    ] = 1

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            OptionError: If a name is unknown, or weights are missing or unwanted.
        """
        _ = self.chosen

    @property
    def chosen(self) -> Fusion:
        """The fusion."""
        return Fusion(self.fusion, self.fusion_weights, self.samples)


class BadRows(StrEnum):
    """Values of ``--on-error``."""

    STOP = "stop"
    SKIP = "skip"


@dataclass(frozen=True)
class RowOptions:
    """The number of rows to use, and the handling of bad rows."""

    heading: ClassVar[str] = "Input"

    limit: Annotated[
        int | None, size("--limit", "-n", help="Use only the first N rows of the input.")
    ] = None
    on_error: Annotated[
        BadRows,
        typer.Option(
            metavar="stop|skip",
            help="When a row cannot be used, stop the run, or skip the row and keep it in the "
            "output with the reason.",
        ),
    ] = BadRows.STOP

    @property
    def on_bad_row(self) -> OnError:
        """``stop`` or ``skip``."""
        return self.on_error.value


@dataclass(frozen=True)
class ModelOptions:
    """A model, or the model whose tokenizer is used."""

    heading: ClassVar[str] = "Model"

    model: Annotated[
        str | None,
        text(
            "--model",
            metavar="MODEL",
            help="Hub id, folder or .gguf file. Default: the small model that comes with "
            "flexmask.",
        ),
    ] = None
    trust_remote_code: Annotated[
        bool, flag("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False

    def __post_init__(self) -> None:
        """Check the model's name as far as possible without importing a library.

        Raises:
            OptionError: If it is not UTF-8.
            ModelError: If there is no such folder or file, and it cannot be a hub id.
        """
        if self.model is None:
            return
        if not is_utf8(self.model):
            raise OptionError(f"--model must be UTF-8, got {self.model!r}")
        check_model_name(self.model)


@dataclass(frozen=True)
class RunModelOptions(ModelOptions):
    """A model to run, and changes of its weights at loading."""

    adapter: Annotated[
        Path | None,
        path(
            "--adapter",
            help="Folder of a LoRA adapter, merged into the model at loading; needs "
            "flexmask[adapters].",
        ),
    ] = None
    quantize: Annotated[
        str | None,
        text(
            "--quantize",
            metavar="int8|fp8",
            completion=completion.quantizations,
            help="Round the weights of linear layers to 8 bits at loading, with a scale for each "
            "row (docs/models.md).",
        ),
    ] = None

    def __post_init__(self) -> None:
        """Check the names, as far as possible without importing a library.

        Raises:
            OptionError: If the model's name is not UTF-8, or weights cannot be rounded so.
            ModelError: If there is no such model or adapter, or a package is missing.
        """
        super().__post_init__()
        if self.adapter is not None:
            check_adapter_name(str(self.adapter))
        if self.quantize is not None:
            check_quantize_name(self.quantize)

    @property
    def changes(self) -> dict[str, str]:
        """The changes that were asked for, as arguments of `Engine.from_pretrained`."""
        changes = {"adapter": self.adapter, "quantize": self.quantize}
        return {name: str(value) for name, value in changes.items() if value is not None}


@dataclass(frozen=True)
class ChatOptions:
    """Chat template and special tokens."""

    heading: ClassVar[str] = "Model"

    chat_template: Annotated[
        bool | None,
        flag(
            "--chat-template/--no-chat-template",
            help="Put requests into the model's chat template, or not. Default: as the task "
            "says; without a task, not.",
        ),
    ] = None
    allow_special_tokens: Annotated[
        bool,
        flag(
            "--allow-special-tokens",
            help="Read the text of a special token in the input, such as <eos>, as that token. "
            "Default: as plain text.",
        ),
    ] = False

    def uses_template(self, task: Task | None) -> bool:
        """Return True if requests are put into the chat template, by option or by the task."""
        if self.chat_template is None:
            return task is not None and task.chat_template
        return self.chat_template


@dataclass(frozen=True)
class JudgeOptions:
    """The judge of a run's answers."""

    heading: ClassVar[str] = "Judging"

    judge: Annotated[
        str | None,
        text(
            "--judge",
            metavar=JUDGE_FORM,
            help="How answers are scored (docs/datasets.md). Default: as the task says; without "
            "a task, exact.",
        ),
    ] = None
    cut: Annotated[
        str | None,
        text(
            "--cut",
            metavar="first line|all",
            help="The part of a generation in which the answer is. Default: as the task says; "
            "without a task, the first line that is not blank.",
        ),
    ] = None

    def __post_init__(self) -> None:
        """Check the judge; a Python file is not run.

        Raises:
            OptionError: If there is no such judge or cut.
        """
        if (self.judge, self.cut) != (None, None):
            _ = self.of(None)

    def of(self, task: Task | None) -> Judge:
        """Return the judge of a task, as changed by these options."""
        from flexmask.tasks.judge import Judge

        judge = task.judge if task else Judge()
        return replace(judge, metric=self.judge or judge.metric, cut=self.cut or judge.cut)


@dataclass(frozen=True)
class DeviceOptions:
    """Device and dtype of a model."""

    heading: ClassVar[str] = "Device"

    device: Annotated[
        str,
        text(
            "--device",
            metavar="DEVICE",
            completion=completion.devices,
            help="auto, cpu, cuda or cuda:N.",
        ),
    ] = "auto"
    dtype: Annotated[
        str,
        text(
            "--dtype",
            metavar="DTYPE",
            completion=completion.dtypes,
            help="auto, float32, bfloat16 or float16. auto is the dtype that the model was saved "
            "in; on a CPU float32, unless the model is quantised.",
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        """Check the names, without torch, and so not whether the device is present.

        Raises:
            OptionError: If a name is unknown.
        """
        check_device_name(self.device)
        check_dtype_name(self.dtype)


@dataclass(frozen=True)
class BatchSizeOptions:
    """The batch size."""

    heading: ClassVar[str] = "Model"

    batch_size: Annotated[
        str,
        text(
            "--batch-size",
            metavar="N|auto",
            help="Prompts that run together; auto chooses by memory.",
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        """Check the batch size.

        Raises:
            OptionError: If it is neither a number nor auto.
        """
        _ = self.rows_at_once

    @property
    def rows_at_once(self) -> int | None:
        """The batch size; None for ``auto``."""
        if self.batch_size == "auto":
            return None
        return read_size("--batch-size", self.batch_size, "a positive number or auto")


@dataclass(frozen=True)
class BatchOptions(BatchSizeOptions):
    """Batch size and length of generations."""

    heading: ClassVar[str] = "Generation"

    max_new_tokens: Annotated[
        int, size("--max-new-tokens", help="Most tokens to generate for a request.")
    ] = 20


@dataclass(frozen=True)
class EngineOptions(DeviceOptions):
    """Device, dtype and prefill kernel of an engine."""

    prefill_kernel: Annotated[
        str,
        text(
            "--prefill-kernel",
            completion=completion.prefill_kernels,
            help="Attention kernel that computes prompts on a GPU: auto, triton or flash. flash "
            "needs flexmask[flash]; auto uses it for long prompts where it is installed.",
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            OptionError: If a name is unknown.
        """
        super().__post_init__()
        if self.prefill_kernel not in ("auto", "triton", "flash"):
            raise OptionError(
                f"--prefill-kernel must be auto, triton or flash, got {self.prefill_kernel!r}"
            )

    @property
    def chosen_kernel(self) -> PrefillKernel | None:
        """The prefill kernel; None for ``auto``."""
        return (
            None if self.prefill_kernel == "auto" else cast("PrefillKernel", self.prefill_kernel)
        )

    @property
    def chosen_cache(self) -> KVCacheOptions | None:
        """The cache of keys and values; None for none."""
        return None

    @property
    def num_ranks(self) -> int:
        """GPUs that hold the model together."""
        return 1


@dataclass(frozen=True)
class CachedEngineOptions(EngineOptions):
    """Device, dtype and prefill kernel of an engine, and where it keeps keys and values."""

    kv_cache: Annotated[
        Path | None,
        path(
            "--kv-cache",
            help="A folder that keeps keys and values of prefixes and documents for later runs; "
            "many may share it (docs/kv-cache.md).",
        ),
    ] = None
    kv_cache_folder_size: Annotated[
        int,
        byte_size("--kv-cache-folder-size", help="Most bytes in that folder.", least=1),
    ] = DEFAULT_FOLDER_BYTES
    kv_cache_gpu: Annotated[
        int,
        byte_size("--kv-cache-gpu", help="Bytes of GPU memory that keep them; needs a GPU."),
    ] = 0
    kv_cache_host: Annotated[
        int,
        byte_size("--kv-cache-host", help="Bytes of host memory that keep them."),
    ] = 0

    @property
    def chosen_cache(self) -> KVCacheOptions | None:
        """The cache of keys and values; None for none."""
        if not (self.kv_cache or self.kv_cache_gpu or self.kv_cache_host):
            return None
        return KVCacheOptions(
            self.kv_cache_gpu, self.kv_cache_host, self.kv_cache, self.kv_cache_folder_size
        )


@dataclass(frozen=True)
class RunEngineOptions(CachedEngineOptions):
    """Device, dtype and caches of an engine, and the GPUs that hold its model together."""

    tensor_parallel: Annotated[
        int,
        size(
            "--tensor-parallel",
            help="GPUs of this machine that hold the model together, each a part of every layer "
            "(docs/scaling.md); on a CPU, processes.",
        ),
    ] = 1

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionError: If an option has a value that it cannot have, or excludes another.
        """
        super().__post_init__()
        if self.tensor_parallel > 1 and self.chosen_cache is not None:
            raise OptionError("--kv-cache keeps whole heads, and --tensor-parallel divides them")

    @property
    def num_ranks(self) -> int:
        """GPUs that hold the model together."""
        return self.tensor_parallel


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling, and texts that end a generation."""

    heading: ClassVar[str] = "Generation"

    stop: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT", help="Text that ends a generation; \\n is a newline. Repeatable."
        ),
    ] = field(default_factory=list)
    temperature: Annotated[
        float,
        typer.Option(metavar="X", help="0 takes the most likely token; more is more random."),
    ] = 0.0
    top_p: Annotated[
        float,
        typer.Option(
            metavar="P",
            help="Sample among the most likely tokens that together have this probability.",
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        size("--top-k", least=0, help="Sample among this many most likely tokens; 0 for all."),
    ] = 0
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of sampling.")] = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionError: If an option has a value that it cannot have.
        """
        _ = self.sampling
        if not all(self.stop):
            raise OptionError("--stop must not be empty; leave it out to generate to the end")
        for stop in self.stop:
            if not is_utf8(stop):
                raise OptionError(f"--stop must be UTF-8, got {stop!r}")

    @property
    def sampling(self) -> Sampling:
        """The sampling settings."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)

    @property
    def stop_strings(self) -> list[str]:
        r"""The stop strings with a newline for each ``\n`` and a tab for each ``\t``."""
        return [text.replace("\\n", "\n").replace("\\t", "\t") for text in self.stop]


@dataclass(frozen=True)
class ResultOptions:
    """The handling of an existing result, and of printed output."""

    heading: ClassVar[str] = "Output"

    resume: Annotated[
        bool,
        flag("--resume", help="Keep the rows that the output holds and generate the others."),
    ] = False
    overwrite: Annotated[bool, flag("--overwrite", help="Replace the output.")] = False
    quiet: Quiet = False

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise OptionError("--resume and --overwrite exclude each other")

    @property
    def mode(self) -> OutputMode:
        """The treatment of a result that is there already."""
        return "resume" if self.resume else "overwrite" if self.overwrite else "new"
