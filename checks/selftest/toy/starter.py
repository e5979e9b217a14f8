"""ex42: Doubling

Doubles tensors.

Steps
1. Doubling (5 min): 42.1
2. Your own test (30 min): 42.2, 42.3

Requirements
42.1 (correctness) Double: `double` returns twice its input, in the input's dtype.
42.2 (correctness) Write your own test: `test_double` passes on right code, and fails on each slip.
42.3 (readability) Reads well: ruff and mypy find nothing.

In plain text
    double(x) = x + x

Shapes
    x of any shape

By hand
    double(3) = 6

Conventions
- a new tensor comes out

Not defined
- strings

Your own test (42.2) is judged on right code and on these slips:
- adds_two: two is added instead
- squares: the square is returned

Discuss
1. What does a doubling cost?
2. When does it overflow?
3. What would you watch in production?
4. What would you make faster?

Sources
- arithmetic
"""

from torch import Tensor


def double(x: Tensor) -> Tensor:
    """Twice `x`."""
    # TODO(42.1, 42.3): double x.
    raise NotImplementedError("TODO 42.1")


def test_double() -> None:
    """Your own test of `double`."""
    # TODO(42.2): call double and assert what it returns.
    raise NotImplementedError("TODO 42.2")
