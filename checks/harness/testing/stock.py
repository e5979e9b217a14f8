"""The checks that are the same in every exercise: the own test passes and catches, ruff and mypy find nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.testing.own_test import OwnTest
from harness.testing.own_test_process import Trials
from harness.testing.subject import Subject
from harness.testing.walk import Walk

CheckFunction = Callable[..., None]
_WALKED = pytest.StashKey[dict[Walk, dict[str, Exception]]]()


def walk_check(walk: Walk, steps: int) -> CheckFunction:
    """The check of a walk, once for each requirement that it can cost: the same calls, what was found for this one.

    Args:
        steps: how many calls; as many as a tenth of a second allows.
    """
    numbers = [pytest.param(number, marks=pytest.mark.requirement(number)) for number in walk.requirements]

    @pytest.mark.walk
    @pytest.mark.parametrize("number", numbers)
    def test_calls_in_any_order(request: pytest.FixtureRequest, subject: Subject, number: str) -> None:
        """Any sequence of calls gives what the same calls give one by one."""
        walked = request.config.stash.setdefault(_WALKED, {})
        if walk not in walked:
            walked[walk] = walk.faults(subject, walk.draw(request.config.getoption("--walk-steps") or steps))
        if number in walked[walk]:
            raise walked[walk][number]

    return test_calls_in_any_order


def own_test_checks(number: str, own: OwnTest) -> tuple[CheckFunction, CheckFunction]:
    """The checks of the requirement `number`, the learner's own test: on right code, and on each slip."""

    @pytest.mark.requirement(number)
    @pytest.mark.parametrize("code", own.right)
    def test_own_test_passes_on_right_code(trials: Trials, submission_file: Path, code: str) -> None:
        """The learner's test passes on right code, whoever wrote it."""
        own.passes_on(code, trials, submission_file)

    @pytest.mark.requirement(number)
    @pytest.mark.parametrize("slip", own.slips)
    def test_own_test_catches(trials: Trials, submission_file: Path, slip: str) -> None:
        """The learner's test fails on a slip."""
        own.catches(slip, trials, submission_file)

    return test_own_test_passes_on_right_code, test_own_test_catches


def style_checks(number: str) -> tuple[CheckFunction, CheckFunction]:
    """The checks of the requirement `number`, "reads well": ruff and mypy."""

    @pytest.mark.requirement(number)
    def test_ruff_finds_nothing(ruff: Callable[[], None]) -> None:
        """ruff finds nothing."""
        ruff()

    @pytest.mark.requirement(number)
    def test_mypy_finds_nothing(mypy: Callable[[], None]) -> None:
        """mypy finds nothing."""
        mypy()

    return test_ruff_finds_nothing, test_mypy_finds_nothing
