"""The files of a new exercise, as `make new` writes them: the least that an exercise needs, with FILL where words are
missing. @ID@ is "ex12", @N@ "12", @TITLE@ the exercise's title.
"""

STARTER = '''"""@ID@: @TITLE@

FILL: the problem, in two or three sentences.

Requirements
@N@.1 (correctness) FILL a title: FILL the criterion in one sentence, with its numbers.
@N@.2 (correctness) Write your own test: `test_solve` passes on right code and fails on each of the slips listed below.
@N@.3 (readability) Reads well: ruff (E, F, W, B, lines up to 120; a docstring for each class and function that you
    add) and mypy (typed definitions) find nothing. It earns once half of the other requirements do.

In plain text
    FILL: the formula

Shapes
    FILL: a letter for each size; then the shape of each tensor

Conventions
- FILL: where people differ, what holds here, with a worked number

Your own test (@N@.2) is run with other implementations put in place of `solve`. It uses contract names only, sets its
own seed, takes at most 1 s, and has to fail on each of these slips:
- zeros: FILL what this wrong code does; checks/mistakes/@ID@.py holds it under the same name

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
    # TODO(@N@.1, @N@.3): FILL what to do, in the imperative.
    raise NotImplementedError("TODO @N@.1")


def test_solve() -> None:
    """Your own test of `solve`."""
    # TODO(@N@.2): call solve and assert what it returns.
    raise NotImplementedError("TODO @N@.2")
'''

_SOLVE = """\
    # TODO(@N@.1, @N@.3): FILL what to do, in the imperative.
    raise NotImplementedError("TODO @N@.1")
"""
_TEST = """\
    # TODO(@N@.2): call solve and assert what it returns.
    raise NotImplementedError("TODO @N@.2")
"""
ANSWER = STARTER.replace(_SOLVE, "    return x  # FILL: the answer; everything outside bodies is the starter's text\n")
ANSWER = ANSWER.replace(_TEST, "    raise AssertionError  # FILL: a test that catches every slip\n")
VARIANT = ANSWER.replace("FILL: the answer; everything", "FILL: the answer, written differently; everything")

CHECKS = '''"""The specification of @ID@, @TITLE@, as checks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness.door import Close, OwnTest, Subject, Trials, Where, requirement

OWN_TEST = OwnTest(__file__, "test_solve", swaps=("solve",))


@requirement("@N@.1")
def test_solve_by_hand(subject: Subject, close: Close) -> None:
    """FILL: the claim, in one sentence."""
    expected = torch.tensor([3.0, -2.0])  # FILL: computed by hand

    close(subject.solve(torch.tensor([3.0, -2.0])), expected, "solve([3, -2])", hint="FILL: the slip to look for")


@requirement("@N@.1")
def test_agrees_with_a_reference(subject: Subject, close: Close, rng: torch.Generator, on: Where) -> None:
    """FILL: what it agrees with, on every device."""
    x = torch.randn(3, 5, generator=rng).to(on.device, on.dtype)
    expected = x  # FILL: an independent reference

    close(subject.solve(x), expected, "solve(x)")


@requirement("@N@.2")
@pytest.mark.parametrize("right", OWN_TEST.right)
def test_own_test_passes_on(submission_file: Path, trials: Trials, right: str) -> None:
    """The learner's test passes on right code."""
    OWN_TEST.passes_on(right, trials, submission_file)


@requirement("@N@.2")
@pytest.mark.parametrize("slip", OWN_TEST.slips)
def test_own_test_catches(submission_file: Path, trials: Trials, slip: str) -> None:
    """The learner's test fails on a slip."""
    OWN_TEST.catches(slip, trials, submission_file)


@requirement("@N@.3")
def test_ruff_finds_nothing(ruff: Callable[[], None]) -> None:
    """ruff finds nothing."""
    ruff()


@requirement("@N@.3")
def test_mypy_finds_nothing(mypy: Callable[[], None]) -> None:
    """mypy finds nothing."""
    mypy()
'''

MISTAKES = '''"""Wrong answers of @ID@. Identity and zeros are always among them."""

from harness.door import Mistake

MISTAKES = [
    Mistake(
        "zeros",
        "@N@.1",
        [("FILL: a text that the answer holds once", "FILL: the wrong text in its place")],
        says="FILL: what the first message names",
        only=True,
    ),
    Mistake(
        "tests_nothing",
        "@N@.2",
        [("FILL: the assert of the own test", "FILL: a call without it")],
        says="passes although the code under it is wrong",
        only=True,
    ),
]
'''

REPLIES = """
## @ID@ @TITLE@

1. FILL: the reply to the first question of the docstring
2. FILL: to the second
3. FILL: to the third
4. FILL: to the fourth
"""
