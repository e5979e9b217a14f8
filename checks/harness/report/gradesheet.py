"""The verdicts on a submission as JSON for programs and as Markdown for people."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.model.exercise import CRITERIA, POINTS
from harness.model.paths import write_whole
from harness.model.results import ExerciseVerdict, RequirementVerdict
from harness.sandbox.output import printable

SCHEMA = 1
NOT_COUNTED = "counts once half of the exercise's other requirements are earned"
_SHOWN_CHARACTERS = 1000


def sheet(verdicts: Sequence[ExerciseVerdict], checks_version: str, torch_version: str) -> dict[str, Any]:
    """The gradesheet of some exercises, as DESIGN's schema 1: scores by criterion, exercise, requirement and check."""
    requirements = [one for verdict in verdicts for one in verdict.requirements]
    return {
        "schema": SCHEMA,
        "checks_version": checks_version,
        "torch": torch_version,
        "score": sum(verdict.score for verdict in verdicts),
        "max_score": sum(verdict.max_score for verdict in verdicts),
        "criteria": {criterion: _criterion(criterion, requirements) for criterion in CRITERIA},
        "exercises": [_exercise(verdict) for verdict in verdicts],
    }


def markdown(graded: dict[str, Any]) -> str:
    """The same for people: the exercises, the criteria, and for each requirement its first failing check."""
    lines = [f"# Gradesheet: {graded['score']} of {graded['max_score']} points", ""]
    lines += ["| exercise | state | points |", "|---|---|---|"]
    for one in graded["exercises"]:
        reason = _code(one["reason"]).replace("|", "\\|")
        state = f"{one['state']}: {reason}" if reason else one["state"]
        lines.append(f"| {one['id']} {one['title']} | {state} | {one['score']}/{one['max_score']} |")
    lines += ["", "| criterion | points |", "|---|---|"]
    lines += [f"| {name} | {found['score']}/{found['max_score']} |" for name, found in graded["criteria"].items()]
    for one in graded["exercises"]:
        lines += ["", f"## {one['id']} {one['title']}", ""]
        for requirement in one["requirements"]:
            points = f"{requirement['score']}/{requirement['max_score']}"
            lines.append(f"- {requirement['id']} {requirement['title']}: {points}")
            failed = next((check for check in requirement["checks"] if check["outcome"] != "passed"), None)
            if failed is not None:
                lines.append(f"  - `{failed['name']}` {failed['outcome']}: {_code(failed['message'])}")
            elif not requirement["score"]:
                lines.append(f"  - {NOT_COUNTED}")
    return "\n".join(lines) + "\n"


def write(graded: dict[str, Any], out: Path) -> Path:
    """Writes the JSON and, beside it with the same stem, the Markdown; each as a whole. Returns the Markdown's path."""
    beside = out.with_suffix(".md")
    write_whole(out, json.dumps(graded, indent=2, ensure_ascii=False) + "\n")
    write_whole(beside, markdown(graded))
    return beside


def _criterion(criterion: str, requirements: Sequence[RequirementVerdict]) -> dict[str, int]:
    of_it = [one for one in requirements if one.requirement.criterion == criterion]
    return {"score": sum(one.score for one in of_it), "max_score": POINTS * len(of_it)}


def _exercise(verdict: ExerciseVerdict) -> dict[str, Any]:
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


def _requirement(one: RequirementVerdict) -> dict[str, Any]:
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
