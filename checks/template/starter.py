"""ex99: A title

FILL: the problem, in two or three sentences, and why it matters.

Steps
1. FILL the heart of it (30 min): 99.1
2. Your own test (15 min): 99.2, 99.3

Requirements
99.1 (correctness) FILL a title of 40 characters: FILL the criterion, with its numbers.
99.2 (correctness) Write your own test: `test_solve` passes on right code, whoever wrote it, and
    fails on each of the slips listed below.
99.3 (readability) Reads well: ruff (E, F, W, B; lines up to 120; a docstring, not an empty one, for
    each public class and function) and mypy (typed definitions, not --strict) find nothing.
    It counts once at least half of the other requirements are earned.

In plain text
    FILL: the formula

Shapes
    FILL: a letter for each size; then the shape of each tensor

By hand
    FILL: a case small enough to work on paper, with its numbers

Conventions
- FILL: where people differ, what holds here
- A submission is one file on torch and the standard library.

Not defined
- FILL: what no check looks at

Your own test (99.2) runs on other code, right and wrong, in place of `solve`. It may use `solve`,
torch and helpers of the test. It sets its own seed and takes at most 1 s.
It has to fail on each of these slips:
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
