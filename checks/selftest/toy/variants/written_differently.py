"""A sum in place of a product."""

from torch import Tensor


def double(x: Tensor) -> Tensor:
    """Twice `x`."""
    return x + x
