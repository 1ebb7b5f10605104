"""All checks of `flexmask doctor`, in order."""

from __future__ import annotations

from collections.abc import Iterator

from flexmask.doctor.check_result import Check
from flexmask.doctor.environment_checks import (
    check_compile_cache,
    check_compiler,
    check_gpu,
    check_model_cache,
    check_package,
    check_plugins,
    check_python,
)


def run_checks() -> Iterator[Check]:
    """Check everything that flexmask needs, and yield each outcome; compiling takes a while."""
    yield check_python()
    packages = [check_package("torch"), check_package("transformers")]
    yield from packages
    yield check_compiler()
    yield check_model_cache()
    yield from check_plugins()
    if any(package.state == "broken" for package in packages):
        yield Check("attention", "broken", "not tried without torch and transformers")
        return
    yield check_gpu()
    cache = check_compile_cache()
    yield cache
    if cache.state == "broken":  # torch.compile cannot be imported
        yield Check("attention", "broken", "not tried without a compile cache")
        return
    yield from _check_attention()


def _check_attention() -> Iterator[Check]:
    from flexmask.device import resolve_device
    from flexmask.doctor.attention_checks import (
        check_cuda_graph,
        check_decode,
        check_flash,
        check_prefill,
    )
    from flexmask.doctor.kernel_checks import check_decode_kernels

    device = resolve_device("auto")
    yield check_prefill(device)
    yield check_decode(device)
    yield check_decode_kernels(device)
    yield check_flash(device)
    yield check_cuda_graph(device)
