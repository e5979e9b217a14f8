"""From outcomes to states and points. Pure functions."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from harness.model.exercise import POINTS, Exercise, Requirement

Outcome = Literal["passed", "failed", "error", "timeout", "missing"]
# Why a check did not pass, where that decides more than the check.
Cause = Literal["", "not implemented", "load", "no file", "unjudged"]
State = Literal["not started", "does not import", "in progress", "done"]
READABILITY = "readability"
NOT_RUN = "not run after the hang"


class Hang(AssertionError):
    """Raised by a check that waited in vain: the exercise's later checks are not run, each might wait again."""


@dataclass(frozen=True)
class Result:
    """What one check said.

    Args:
        requirement: the requirement it decides, "1.5".
        name: the check's function name with its parameters in brackets.
        message: why, in words; empty if it passed.
        line: the line of the learner's file to look at, 0 if none.
        kind: why, where that decides more than the check.
        printed: what the learner's code printed during the check, last lines.
    """

    requirement: str
    name: str
    outcome: Outcome
    message: str = ""
    line: int = 0
    kind: Cause = ""
    printed: str = ""


@dataclass(frozen=True)
class RequirementVerdict:
    """A requirement with the results of its checks and the points that it earned."""

    requirement: Requirement
    results: tuple[Result, ...]
    score: int

    @property
    def passed(self) -> int:
        return sum(result.outcome == "passed" for result in self.results)

    @property
    def fulfilled(self) -> bool:
        """Whether it has checks, and all of them passed."""
        return 0 < self.passed == len(self.results)

    @property
    def unwritten(self) -> bool:
        """Whether nothing but code that is not written yet stands against it."""
        return all(result.kind == "not implemented" for result in self.results if result.outcome != "passed")

    def failures(self) -> Iterator[Result]:
        """The results that stand against it."""
        return (result for result in self.results if result.outcome != "passed" and result.kind != "unjudged")

    def first_failure(self) -> Result | None:
        return next(self.failures(), None)

    @property
    def judged(self) -> bool:
        return not any(result.kind == "unjudged" for result in self.results)


@dataclass(frozen=True)
class ExerciseVerdict:
    """All that is known of one exercise of a submission."""

    exercise: Exercise = field(repr=False)
    state: State
    reason: str
    requirements: tuple[RequirementVerdict, ...]
    seconds: float = 0.0

    @property
    def score(self) -> int:
        return sum(verdict.score for verdict in self.requirements)

    @property
    def max_score(self) -> int:
        return POINTS * len(self.requirements)

    def first_failure(self) -> Result | None:
        """The first result, in the order of requirements, that is not "passed" and was judged."""
        return next((result for one in self.requirements for result in one.failures()), None)

    def results(self) -> Iterator[Result]:
        """All results, in the order of requirements."""
        return (result for verdict in self.requirements for result in verdict.results)


def verdict_of(
    exercise: Exercise, results: Iterable[Result], *, untouched: bool, seconds: float = 0.0
) -> ExerciseVerdict:
    """The verdict on one exercise.

    Args:
        results: one per expected check, in any order.
        untouched: the learner's text equals the starter.
        seconds: how long judging took.
    """
    by_requirement: dict[str, list[Result]] = {requirement.id: [] for requirement in exercise.requirements}
    for result in results:
        by_requirement[result.requirement].append(result)
    verdicts = [RequirementVerdict(one, tuple(by_requirement[one.id]), 0) for one in exercise.requirements]
    others = [one for one in verdicts if one.requirement.criterion != READABILITY and one.judged]
    # Readability earns only if at least half of the other requirements that were judged are earned.
    readable = 2 * sum(one.fulfilled for one in others) >= len(others) > 0
    for place, one in enumerate(verdicts):
        if one.fulfilled and not untouched and (readable or one.requirement.criterion != READABILITY):
            verdicts[place] = replace(one, score=POINTS)
    state, reason = _state(verdicts, untouched)
    return ExerciseVerdict(exercise, state, reason, tuple(verdicts), seconds)


def _state(verdicts: list[RequirementVerdict], untouched: bool) -> tuple[State, str]:
    results = [result for verdict in verdicts for result in verdict.results]
    if (gone := next((r for r in results if r.kind == "no file"), None)) is not None:
        return "not started", gone.message
    if untouched:
        return "not started", ""
    if (broken := next((r for r in results if r.kind == "load"), None)) is not None:
        return "does not import", broken.message
    code = [r for v in verdicts if v.requirement.criterion != READABILITY for r in v.results if r.kind != "unjudged"]
    if code and all(result.kind == "not implemented" for result in code):
        return "not started", ""
    if all(verdict.score for verdict in verdicts if verdict.judged) and any(verdict.score for verdict in verdicts):
        return "done", ""
    return "in progress", ""
