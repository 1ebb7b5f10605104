"""Checks of what is installed: Python, packages, compiler, GPU, caches, plugins."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from flexmask.doctor.check_result import Check, tried
from flexmask.plugins.registry import load_registry
from flexmask.version import TESTED

PYTHON = (3, 11)
PROGRAM = "#include <vector>\nint main() { return std::vector<int>(1).back(); }\n"


def check_python() -> Check:
    """Check the version of Python."""
    found = platform.python_version()
    if sys.version_info >= PYTHON:
        return Check("python", "ok", found)
    return Check("python", "broken", found, f"install Python {_dotted(PYTHON)} or newer")


def check_package(name: str) -> Check:
    """Import a package, and compare its version with those that flexmask's tests run with."""

    def imported() -> str:
        import_module(name)
        return version(name)

    tested = [_numbers(text) for text in TESTED[name]]
    advice = f"pip install '{name}>={TESTED[name][0]}'"
    check = tried(name, imported, advice)
    if check.state != "ok" or _numbers(check.detail) in tested:
        return check
    if _numbers(check.detail) < tested[0]:
        return Check(name, "broken", check.detail, advice)
    listed = ", ".join(TESTED[name])
    detail = f"{check.detail}, and flexmask is tested with {listed}"
    return Check(name, "warning", detail, "if something fails, try one of these versions")


def check_compiler() -> Check:
    """Check that the C++ compiler that torch.compile calls can compile a program."""
    command = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    advice = "install a C++ compiler (apt install g++), or name one in CXX"
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "program.cpp")
            source.write_text(PROGRAM)
            made = [command, str(source), "-o", str(Path(folder, "program"))]
            subprocess.run(made, check=True, capture_output=True, text=True)
        listed = subprocess.run([command, "--version"], capture_output=True, text=True)
    except OSError as error:
        return Check("compiler", "broken", f"{command}: {error.strerror}", advice)
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split())[:200]
        return Check("compiler", "broken", f"{command} compiles nothing: {reason}", advice)
    return Check("compiler", "ok", listed.stdout.partition("\n")[0] or command)


def check_gpu() -> Check:
    """Report the GPUs that torch sees, and their compute capability."""
    import torch

    if not torch.cuda.is_available():
        advice = "for a GPU, install its driver and a CUDA build of torch"
        return Check("gpu", "unavailable", "torch sees none; attention runs on the CPU", advice)
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    memory = properties.total_memory / 2**30
    count = torch.cuda.device_count()
    named = f"{count} × {properties.name}" if count > 1 else properties.name
    return Check("gpu", "ok", f"{named}, capability {capability}, {memory:.0f} GiB")


def check_compile_cache() -> Check:
    """Check that compiled kernels can be cached on disk, for later starts."""

    def written() -> str:
        from flexmask.torch_internals import compile_cache_folder

        return _written(compile_cache_folder())

    return tried(
        "compile cache", written, "set TORCHINDUCTOR_CACHE_DIR to a folder that you can write"
    )


def check_model_cache() -> Check:
    """Check that models from the hub can be cached on disk."""

    def written() -> str:
        from huggingface_hub.constants import HF_HUB_CACHE

        return _written(Path(HF_HUB_CACHE))

    return tried("model cache", written, "set HF_HOME to a folder that you can write")


def check_plugins() -> Iterator[Check]:
    """Report for every plugin whether it loaded."""
    registry = load_registry()
    for plugin in registry.plugins:
        name = f"plugin {plugin.entry_point}"
        error = registry.error_of(plugin)
        if error:
            advice = f"correct or uninstall {plugin.distribution}"
            yield Check(name, "broken", f"{plugin}: {error}", advice)
        else:
            yield Check(name, "ok", f"{plugin.distribution} {plugin.version}")


def _written(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as trial:
        trial.write(b"flexmask")
    return str(folder)


def _numbers(text: str) -> tuple[int, ...]:
    """Return major and minor number of a version such as ``2.13.0+cpu``."""
    return tuple(int(part) for part in text.split(".")[:2])


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
