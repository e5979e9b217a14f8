"""Points and states, by table."""

import pytest

from harness.model.exercise import Exercise, Requirement, Step
from harness.model.results import Cause, Outcome, Result, verdict_of

EXERCISE = Exercise(
    "ex07",
    "ex07_a_title.py",
    "A title",
    (
        Requirement("7.1", "correctness", "One"),
        Requirement("7.2", "efficiency", "Two"),
        Requirement("7.3", "correctness", "Own test"),
        Requirement("7.4", "readability", "Reads well"),
    ),
    (Step(1, "All of it", 30, ("7.1", "7.2", "7.3", "7.4")),),
    {},
    "",
)
PASSED, FAILED, TODO = ("passed", ""), ("failed", ""), ("failed", "not implemented")
UNJUDGED, BROKEN, GONE = ("missing", "unjudged"), ("error", "load"), ("error", "no file")


def results(**outcomes: list[tuple[Outcome, Cause]]) -> list[Result]:
    return [
        Result(f"7.{number[1:]}", f"test_{i}", outcome, "why", kind=kind)
        for number, of_one in outcomes.items()
        for i, (outcome, kind) in enumerate(of_one)
    ]


@pytest.mark.parametrize(
    ("outcomes", "untouched", "state", "scores"),
    [
        ({"r1": [PASSED], "r2": [PASSED], "r3": [PASSED], "r4": [PASSED]}, False, "done", [5, 5, 5, 5]),
        ({"r1": [PASSED, FAILED], "r2": [PASSED], "r3": [PASSED], "r4": [PASSED]}, False, "in progress", [0, 5, 5, 5]),
        ({"r1": [PASSED], "r2": [FAILED], "r3": [FAILED], "r4": [PASSED]}, False, "in progress", [5, 0, 0, 0]),
        ({"r1": [PASSED], "r2": [FAILED], "r3": [UNJUDGED], "r4": [PASSED]}, False, "in progress", [5, 0, 0, 5]),
        ({"r1": [PASSED], "r2": [PASSED], "r3": [UNJUDGED], "r4": [PASSED]}, False, "done", [5, 5, 0, 5]),
        ({"r1": [TODO], "r2": [TODO], "r3": [TODO], "r4": [PASSED]}, False, "not started", [0, 0, 0, 0]),
        ({"r1": [TODO, PASSED], "r2": [TODO], "r3": [TODO], "r4": [PASSED]}, False, "in progress", [0, 0, 0, 0]),
        ({"r1": [PASSED], "r2": [TODO], "r3": [TODO], "r4": [PASSED]}, True, "not started", [0, 0, 0, 0]),
        ({"r1": [BROKEN], "r2": [BROKEN], "r3": [BROKEN], "r4": [PASSED]}, False, "does not import", [0, 0, 0, 0]),
        ({"r1": [GONE], "r2": [GONE], "r3": [GONE], "r4": [GONE]}, False, "not started", [0, 0, 0, 0]),
        ({"r1": [PASSED], "r2": [PASSED], "r3": [PASSED]}, False, "in progress", [5, 5, 5, 0]),
        ({}, False, "in progress", [0, 0, 0, 0]),
    ],
)
def test_points_and_state(
    outcomes: dict[str, list[tuple[Outcome, Cause]]], untouched: bool, state: str, scores: list[int]
) -> None:
    verdict = verdict_of(EXERCISE, results(**outcomes), untouched=untouched)

    assert (verdict.state, [one.score for one in verdict.requirements]) == (state, scores)
    assert (verdict.score, verdict.max_score) == (sum(scores), 20)


def test_the_first_failure_goes_by_requirement_not_by_time() -> None:
    found = [Result("7.2", "b", "failed", "later"), Result("7.1", "a", "failed", "first"), Result("7.3", "c", "passed")]

    failure = verdict_of(EXERCISE, found, untouched=False).first_failure()

    assert failure is not None and failure.message == "first"
