"""FILL: in one line, what is unusual. Only the definitions that differ stand here; the rest is the answer's."""

from torch import Tensor


def solve(x: Tensor) -> Tensor:
    """FILL: what it returns."""
    return x  # FILL: the answer, written differently
