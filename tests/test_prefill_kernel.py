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


def test_flash_computes_long_prompts_where_it_can(has_flash):
    chosen = [kernels().choose(capacity, changes_scores=False) for capacity in (4224, 8320)]
    assert chosen == ["triton", "flash" if has_flash else "triton"]


def test_scores_that_change_are_left_to_triton(has_flash):
    assert kernels().choose(8320, changes_scores=True) == "triton"


def test_what_is_asked_for_is_had_or_refused(has_flash):
    assert kernels("triton").choose(8320, changes_scores=False) == "triton"
    if not has_flash:
        with pytest.raises(AttentionError, match=r"needs flexmask\[flash\] installed"):
            kernels("flash")
        return
    assert kernels("flash").choose(640, changes_scores=False) == "flash"
    with pytest.raises(AttentionError, match="the strategy changes scores"):
        kernels("flash").choose(640, changes_scores=True)


def test_a_cpu_has_one_kernel():
    assert kernels(device=CPU).choose(8320, changes_scores=False) is None
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
