"""The answer to ex42, Doubling."""

import torch
from torch import Tensor


def double(x: Tensor) -> Tensor:
    """Twice `x`."""
    return 2 * x


def test_double() -> None:
    """Your own test of `double`."""
    assert double(torch.tensor(3.0)) == 6.0
