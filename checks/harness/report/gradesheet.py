"""The verdicts on a submission as JSON for programs and as Markdown for people."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from harness.model.exercise import CRITERIA, POINTS
from harness.model.paths import write_whole
from harness.model.results import ExerciseVerdict, Outcome, RequirementVerdict, Result, State
from harness.model.source import place_of
from harness.model.submission import LoadError, read
from harness.sandbox.output import printable

# By requirement and check, where a failure is.
Places = Mapping[tuple[str, str], str]
SCHEMA = 1
NOT_COUNTED = "counts once half of the exercise's other requirements are earned"
_SHOWN_CHARACTERS = 1000


class Points(TypedDict):
    """Points out of how many."""

    score: int
    max_score: int


class CheckRow(TypedDict):
    """What one check said."""

    name: str
    outcome: Outcome
    message: str


class RequirementRow(Points):
    """A requirement and its checks."""

    id: str
    title: str
    criterion: str
    checks: list[CheckRow]


class ExerciseRow(Points):
    """An exercise and its requirements; the reason is empty where the state says all."""

    id: str
    title: str
    state: State
    reason: str
    seconds: float
    requirements: list[RequirementRow]


class Origin(TypedDict, total=False):
    """Where a submission comes from, where that is known; the date is UTC's, as ISO 8601 writes it."""

    repository: str
    commit: str
    date: str


class Sheet(Points, Origin):
    """A gradesheet, of schema 1: scores by criterion, exercise, requirement and check."""

    schema: int
    checks_version: str
    torch: str
    criteria: dict[str, Points]
    exercises: list[ExerciseRow]


def sheet(verdicts: Sequence[ExerciseVerdict], checks_version: str, torch_version: str, origin: Origin) -> Sheet:
    """The gradesheet of some exercises."""
    requirements = [one for verdict in verdicts for one in verdict.requirements]
    return {
        "schema": SCHEMA,
        "checks_version": checks_version,
        "torch": torch_version,
        **origin,
        "score": sum(verdict.score for verdict in verdicts),
        "max_score": sum(verdict.max_score for verdict in verdicts),
        "criteria": {criterion: _criterion(criterion, requirements) for criterion in CRITERIA},
        "exercises": [_exercise(verdict) for verdict in verdicts],
    }


def markdown(graded: Sheet, places: Places) -> str:
    """The same for people: the exercises, the criteria, and, folded, each exercise that was begun: for a requirement
    that failed how many of its checks pass, and of the first that does not the place and the message.
    """
    lines = [f"# Gradesheet: {graded['score']} of {graded['max_score']} points", ""]
    if "commit" in graded:
        lines += [f"{_code(graded['repository'])} at {_code(graded['commit'])}, {graded['date']}", ""]
    lines += ["| exercise | state | points |", "|---|---|---|"]
    for one in graded["exercises"]:
        reason = _code(one["reason"]).replace("|", "\\|")
        state = f"{one['state']}: {reason}" if reason else one["state"]
        lines.append(f"| {one['id']} {one['title']} | {state} | {one['score']}/{one['max_score']} |")
    lines += ["", "| criterion | points |", "|---|---|"]
    lines += [f"| {name} | {found['score']}/{found['max_score']} |" for name, found in graded["criteria"].items()]
    for one in graded["exercises"]:
        if one["state"] != "not started":
            lines += ["", *_details(one, places)]
    return "\n".join(lines) + "\n"


def _details(one: ExerciseRow, places: Places) -> list[str]:
    checks = [check for requirement in one["requirements"] for check in requirement["checks"]]
    points = f"{one['score']} of {one['max_score']} points, {_passed(checks)}"
    lines = ["<details>", f"<summary>{one['id']} {one['title']}: {points}</summary>", ""]
    for requirement in one["requirements"]:
        named, checks = f"{requirement['id']} {requirement['title']}", requirement["checks"]
        failed = next((check for check in checks if check["outcome"] != "passed"), None)
        if requirement["score"]:
            lines.append(f"- ✓ {named}")
        elif failed is None:
            lines.append(f"- ✗ {named}: {NOT_COUNTED}")
        else:
            lines.append(f"- ✗ {named}: {_passed(checks)}")
            place = places.get((requirement["id"], failed["name"]), "")
            where = f"{_code(place)}: " if place else ""
            lines.append(f"  - {where}{_code(failed['message'])} (`{failed['name']}`, {failed['outcome']})")
    return [*lines, "", "</details>"]


def _passed(checks: Sequence[CheckRow]) -> str:
    return f"{sum(check['outcome'] == 'passed' for check in checks)} of {len(checks)} checks"


def places(verdicts: Sequence[ExerciseVerdict], folder: Path) -> Places:
    """`exercises/file.py:line` of each failure, by requirement and check.

    Args:
        folder: the submission.
    """
    return {
        (failed.requirement, failed.name): f"exercises/{verdict.exercise.file_name}:{line_of(verdict, failed, folder)}"
        for verdict in verdicts
        for failed in verdict.results()
        if failed.outcome != "passed" and failed.kind not in ("no file", "unjudged")
    }


def line_of(verdict: ExerciseVerdict, result: Result, folder: Path) -> int:
    """The line to look at for a result: its own, or else that of the requirement's code."""
    if result.line or result.kind == "load":
        return result.line or 1
    exercise = verdict.exercise
    try:
        return place_of(result.requirement, result.message, read(folder / exercise.file_name), exercise.starter)
    except LoadError:
        return 1


def write(graded: Sheet, out: Path, places: Places) -> Path:
    """Writes the JSON and, beside it with the same stem, the Markdown; each as a whole. Returns the Markdown's path."""
    beside = out.with_suffix(".md")
    write_whole(out, json.dumps(graded, indent=2, ensure_ascii=False) + "\n")
    write_whole(beside, markdown(graded, places))
    return beside


def _criterion(criterion: str, requirements: Sequence[RequirementVerdict]) -> Points:
    of_it = [one for one in requirements if one.requirement.criterion == criterion]
    return {"score": sum(one.score for one in of_it), "max_score": POINTS * len(of_it)}


def _exercise(verdict: ExerciseVerdict) -> ExerciseRow:
    return {
        "id": verdict.exercise.id,
        "title": verdict.exercise.title,
        "state": verdict.state,
        "reason": verdict.reason,
        "score": verdict.score,
        "max_score": verdict.max_score,
        "seconds": round(verdict.seconds, 2),
        "requirements": [_requirement(one) for one in verdict.requirements],
    }


def _requirement(one: RequirementVerdict) -> RequirementRow:
    return {
        "id": one.requirement.id,
        "title": one.requirement.title,
        "criterion": one.requirement.criterion,
        "score": one.score,
        "max_score": POINTS,
        "checks": [{"name": r.name, "outcome": r.outcome, "message": r.message} for r in one.results],
    }


def one_line(message: str) -> str:
    """A message's lines as one, joined by semicolons, of characters that print."""
    lines = (" ".join(line.split()) for line in printable(message).splitlines())
    return "; ".join(line for line in lines if line)


def _code(message: str) -> str:
    """One line that Markdown shows as it is."""
    line = one_line(message)[:_SHOWN_CHARACTERS].replace("`", "'")
    return f"`{line}`" if line else ""
