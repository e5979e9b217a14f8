"""What a check's code leaves switched on goes off after each check of ex06."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import _pop_mode

from .reference import left_on


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    """What a check's code leaves switched on goes off after it, so that the next check starts clean."""
    yield
    left_on()
    while torch._C._len_torch_dispatch_stack():
        _pop_mode()
    if torch.autograd._profiler_enabled():
        torch.autograd._disable_profiler()
    torch.set_autocast_enabled("cpu", False)
    torch.set_autocast_dtype("cpu", torch.bfloat16)
