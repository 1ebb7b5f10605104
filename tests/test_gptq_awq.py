"""Checkpoints of GPTQ and AWQ, written by hand: the engine computes what gptqmodel does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flexmask.doctor.model_checks import check_model
from flexmask.engine.model_loading import load_model
from flexmask.kernels.linear_weights import kinds_of_projections
from quantised_models import NUM_PROJECTIONS, TOKENS, save_plain, with_parts

WANTED = "needs gptqmodel 7.7 and optimum 2.3"
pytest.importorskip("gptqmodel", reason=WANTED, exc_type=ImportError)
pytest.importorskip("optimum", reason=WANTED)

GROUP = 32
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Places of eight numbers of a row in one of 32 bits, in AWQ."""


def digits_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers from 0 to 15, ``(K, N)``, around 8, and scales ``(K / GROUP, N)``."""
    groups = weight.view(len(weight), -1, GROUP)
    scale = (groups.abs().amax(-1) / 7).half()
    digits = ((groups / scale[..., None].float()).round() + 8).clamp(0, 15)
    return digits.long().view(weight.shape).t(), scale.t().contiguous()


def packed(digits: Tensor, dim: int, order: Sequence[int] = range(8)) -> Tensor:
    """Pack eight numbers that follow each other along a dimension into one of 32 bits."""
    eights = digits.unfold(dim, 8, 8)
    shifted = torch.stack([eights[..., place] << 4 * bits for bits, place in enumerate(order)])
    words = shifted.sum(0)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def gptq(weight: Tensor) -> dict[str, Tensor]:
    digits, scales = digits_of(weight)
    zeros = torch.full(scales.shape, 8 - 1)  # the first version of the format stores one less
    groups = torch.arange(len(digits), dtype=torch.int32) // GROUP
    return {
        "qweight": packed(digits, 0), "qzeros": packed(zeros, 1), "scales": scales, "g_idx": groups
    }  # fmt: skip


def awq(weight: Tensor) -> dict[str, Tensor]:
    digits, scales = digits_of(weight)
    zeros = torch.full(scales.shape, 8)
    return {
        "qweight": packed(digits, 1, ORDER), "qzeros": packed(zeros, 1, ORDER), "scales": scales
    }  # fmt: skip


def unpacked(weight: Tensor) -> Tensor:
    digits, scales = digits_of(weight)
    return ((digits - 8) * scales.float().repeat_interleave(GROUP, 0)).t()


METHODS: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "gptq": (gptq, {"sym": True, "desc_act": False, "checkpoint_format": "gptq"}),
    "awq": (awq, {"zero_point": True, "version": "gemm"}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_four_bits_computes_what_its_unpacked_weights_compute(
    tmp_path: Path, without_inductor: None, method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = save_plain(tmp_path / "plain")
    split, options = METHODS[method]
    config = {"quant_method": method, "bits": 4, "group_size": GROUP} | options
    folder = with_parts(plain, tmp_path / "model", config, split)
    reference: Any = AutoModelForCausalLM.from_pretrained(plain)
    for name, module in reference.named_modules():
        if name.endswith("proj"):
            module.weight.data = unpacked(module.weight.data)
    capfd.readouterr()
    model, tokenizer = load_model(str(folder), device=torch.device("cpu"), dtype="float32")
    assert capfd.readouterr() == ("", "")
    checks = check_model(model, tokenizer)
    assert [check.state for check in checks] == ["ok", "ok"], checks
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        found, expected = model(TOKENS).logits, reference(TOKENS).logits
    # gptqmodel computes on a CPU with fewer bits than float32.
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.0)
    (kind,) = [kind for kind in kinds_of_projections(model) if "gptqmodel" in kind[0]]
    assert kinds_of_projections(model)[kind] == NUM_PROJECTIONS
