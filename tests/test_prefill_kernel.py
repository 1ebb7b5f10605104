"""Which kernel computes prompts."""

import pytest
import torch

from flexmask.attention.backend import AttentionShape
from flexmask.engine import prefill_kernel
from flexmask.engine.prefill_kernel import PrefillKernels, prefill_tile
from flexmask.errors import AttentionError

SHAPE = AttentionShape(8, 128, 128, has_softcap=False)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def kernels(asked=None, device=GPU):
    return PrefillKernels(asked, [SHAPE], torch.bfloat16, device)


@pytest.fixture(params=[True, False], ids=["flash", "no-flash"])
def has_flash(request, monkeypatch):
    monkeypatch.setattr(prefill_kernel, "flash_can_attend", lambda *_: request.param)
    return request.param


def test_what_is_asked_for_is_had_or_refused(has_flash):
    assert kernels().choose(changes_scores=True) == "triton"
    assert kernels("triton").choose(changes_scores=False) == "triton"
    if not has_flash:
        with pytest.raises(AttentionError, match=r"needs flexmask\[flash\] installed"):
            kernels("flash")
        return
    assert kernels("flash").choose(changes_scores=False) == "flash"
    with pytest.raises(AttentionError, match="the strategy changes scores"):
        kernels("flash").choose(changes_scores=True)


def test_a_cpu_has_one_kernel():
    assert kernels(device=CPU).choose(changes_scores=False) is None
    with pytest.raises(AttentionError, match="'triton' runs on a GPU only"):
        kernels("triton", CPU)


def test_short_prompts_have_small_tiles_with_tritons_kernel():
    tiles = [
        prefill_tile("triton", 640),
        prefill_tile("triton", 65664),
        prefill_tile("flash", 640),
    ]
    assert tiles == [64, 128, 128]
    assert prefill_tile(None, 640) == 128
