"""ex99: A title

FILL: the problem, in two or three sentences, and why it matters.

Steps
1. FILL the heart of it (30 min): 99.1
2. Your own test (15 min): 99.2, 99.3

Requirements
99.1 (correctness) FILL a title of 40 characters: FILL the criterion in one to three sentences, with its numbers.
99.2 (correctness) Write your own test: `test_solve` passes on right code and fails on each of the slips listed below.
99.3 (readability) Reads well: ruff (E, F, W, B, lines up to 120; a docstring for each class and function that you
    add) and mypy (typed definitions) find nothing. It earns once half of the other requirements do.

In plain text
    FILL: the formula

Shapes
    FILL: a letter for each size; then the shape of each tensor

By hand
    FILL: a case small enough to work on paper, with its numbers

Conventions
- FILL: where people differ, what holds here

Not defined
- FILL: what no check looks at

Your own test (99.2) is run with other implementations put in place of `solve`. It uses contract names only, sets its
own seed, takes at most 1 s, and has to fail on each of these slips:
- zeros: FILL what this wrong code does; the mistakes hold it under the same name

Discuss
1. FILL: how does it scale to production?
2. FILL: where are its limits?
3. FILL: what would you monitor?
4. FILL: what would you optimise next?

Sources
- FILL: the paper, and the lines compared with
"""

from torch import Tensor


def solve(x: Tensor) -> Tensor:
    """FILL: what it returns.

    Args:
        x: FILL: shape, dtype and unit.
    """
    # TODO(99.1, 99.3): FILL what to do, in the imperative.
    raise NotImplementedError("TODO 99.1")


def test_solve() -> None:
    """Your own test of `solve`."""
    # TODO(99.2): call solve and assert what it returns.
    raise NotImplementedError("TODO 99.2")
