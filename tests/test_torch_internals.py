"""What is private to torch: as torch itself does it, and not imported where nothing compiles."""

import subprocess
import sys

import pytest
import torch

from flexmask.errors import CompilerError
from flexmask.torch_internals import compile_settings

LOADED = "print(sorted(m for m in sys.modules if m in ('torch._dynamo', 'torch._inductor')))"


def printed(code):
    """What a process of its own prints, in which nothing of torch is imported yet."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_mask_that_is_built_on_a_cpu_imports_no_compiler():
    code = (
        "import sys, torch\n"
        "from flexmask.block_mask import explain_mask\n"
        "from flexmask.layout import TokenizedRequest\n"
        "from flexmask.layout_batch import LayoutBatch\n"
        "from flexmask.mask_mods import strategy_mask\n"
        "from flexmask.plugins.registry import make_strategy\n"
        "from flexmask.torch_internals import compiled_graphs\n"
        "strategy = make_strategy('prefix_segment', {})\n"
        "layout = strategy.layout(TokenizedRequest((1, 2), ((3,) * 200, (4,) * 100), (5,)))\n"
        "batch = LayoutBatch(1, 512, torch.device('cpu'))\n"
        "batch.load([layout], [len(layout)], [0])\n"
        "mask_mod = strategy_mask(strategy, batch)\n"
        "print(explain_mask(mask_mod, 1, None, 512, 512, 'cpu').tiles_partial > 0)\n"
        "print(compiled_graphs())\n" + LOADED
    )
    assert printed(code) == ["True", "0", "[]"]


def test_tensors_marked_static_without_dynamo_carry_the_marks_of_dynamo():
    code = (
        "import sys, torch\n"
        "from flexmask.torch_internals import mark_static\n"
        "early, late = torch.zeros(3, 4), torch.zeros(3, 4)\n"
        "mark_static(early)\n"
        f"{LOADED}\n"
        "import torch._dynamo\n"
        "mark_static(late)\n"
        "print(vars(early).items() >= vars(late).items() > set())\n"
    )
    assert printed(code) == ["[]", "True"]


def test_a_layer_that_cannot_be_traced_is_one_line() -> None:
    def layer(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    message = "^torch.compile cannot trace a layer of the model: .*; load another checkpoint, or"
    with (
        pytest.raises(CompilerError, match=message) as caught,
        compile_settings(torch.device("cpu")),
    ):
        compiled(torch.ones(1))
    assert "\n" not in str(caught.value)
