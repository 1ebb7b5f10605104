"""Structured attention for decoder-only language models.

Names load when first used, so that importing the package stays cheap and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flexmask.version import __version__

if TYPE_CHECKING:
    from flexmask.attention.backend import register_attention
    from flexmask.attention.strategy_context import use_strategy
    from flexmask.block_mask import create_block_mask, explain_mask
    from flexmask.choice_scores import ChoiceScore, Score
    from flexmask.encoding.tokenization import RequestTokenizer
    from flexmask.engine import Engine
    from flexmask.errors import FlexMaskError
    from flexmask.fusion import Fusion
    from flexmask.generation import Generation
    from flexmask.kv_store.options import KVCacheOptions
    from flexmask.layout import Layout, TokenizedRequest
    from flexmask.plugins.hookspecs import hookimpl
    from flexmask.plugins.registry import load_registry, make_strategy
    from flexmask.request import Message, Request
    from flexmask.sampling import Sampling
    from flexmask.separator import Separator
    from flexmask.strategy import Strategy, parameter
    from flexmask.strategy_function import mask_strategy
    from flexmask.tasks.request_source import read_requests

_MODULE_OF = {
    "ChoiceScore": "choice_scores",
    "Engine": "engine",
    "FlexMaskError": "errors",
    "Fusion": "fusion",
    "Generation": "generation",
    "KVCacheOptions": "kv_store.options",
    "Layout": "layout",
    "Message": "request",
    "Request": "request",
    "Score": "choice_scores",
    "Separator": "separator",
    "Strategy": "strategy",
    "TokenizedRequest": "layout",
    "create_block_mask": "block_mask",
    "explain_mask": "block_mask",
    "hookimpl": "plugins.hookspecs",
    "RequestTokenizer": "encoding.tokenization",
    "Sampling": "sampling",
    "load_registry": "plugins.registry",
    "make_strategy": "plugins.registry",
    "mask_strategy": "strategy_function",
    "parameter": "strategy",
    "read_requests": "tasks.request_source",
    "register_attention": "attention.backend",
    "use_strategy": "attention.strategy_context",
}

__all__ = [
    "ChoiceScore",
    "Engine",
    "FlexMaskError",
    "Fusion",
    "Generation",
    "KVCacheOptions",
    "Layout",
    "Message",
    "Request",
    "RequestTokenizer",
    "Sampling",
    "Score",
    "Separator",
    "Strategy",
    "TokenizedRequest",
    "__version__",
    "create_block_mask",
    "explain_mask",
    "hookimpl",
    "load_registry",
    "make_strategy",
    "mask_strategy",
    "parameter",
    "read_requests",
    "register_attention",
    "use_strategy",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'flexmask' has no attribute {name!r}")
    return getattr(import_module(f"flexmask.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
