"""torch's global settings: what changed is named and put back."""

import pytest
import torch

from flexmask.check.torch_settings import read_settings, restore_settings

CHANGES = {
    "default dtype to torch.float64": lambda: torch.set_default_dtype(torch.float64),
    "default device to meta": lambda: torch.set_default_device("meta"),
    "float32 matmul precision to medium": lambda: torch.set_float32_matmul_precision("medium"),
    "deterministic debug mode to 2": lambda: torch.use_deterministic_algorithms(True),
    "grad mode to False": lambda: torch.set_grad_enabled(False),
    "cudnn benchmark to True": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "cudnn deterministic to True": lambda: setattr(torch.backends.cudnn, "deterministic", True),
    "number of threads to 3": lambda: torch.set_num_threads(3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_is_named_and_put_back(change):
    before = read_settings()
    CHANGES[change]()
    assert restore_settings(before) == (f"torch's {change}",)
    assert read_settings() == before
    assert restore_settings(before) == ()
