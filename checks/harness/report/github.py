"""The verdicts as GitHub Actions shows and passes them on: annotations, notices, the step's summary and its result.

The files that a step writes to (GITHUB_OUTPUT and others) stand open to a learner's code too: `publish` comes after
that code has ended, replaces what it needs and empties the rest.
"""

import base64
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from harness.model.exercise import POINTS
from harness.model.results import ExerciseVerdict, RequirementVerdict, Result
from harness.report import gradesheet
from harness.report.gradesheet import Origin, Points, Sheet
from harness.sandbox.output import printable

ANNOTATIONS = 10  # GitHub shows no more of a kind per step.
MESSAGE_LINES = 12
SUMMARY_BYTES = 1 << 20
_MESSAGE_CHARACTERS = 1000
_ENTRY_CHARACTERS = 300
_LATER_STEPS = ("GITHUB_ENV", "GITHUB_PATH", "GITHUB_STATE")


def mute() -> str:
    """Has GitHub take no line for a command until `publish` says the token that this returns: a learner's code can
    write to its parents' standard output.
    """
    token = secrets.token_hex(16)
    print(command("stop-commands", token), flush=True)
    return token


def origin(environment: Mapping[str, str], now: datetime) -> Origin:
    """Where the submission comes from, as the gradesheet says it."""
    date = now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    repository, commit = environment.get("GITHUB_REPOSITORY", ""), environment.get("GITHUB_SHA", "")
    return {"repository": repository, "commit": commit, "date": date}


def publish(verdicts: Sequence[ExerciseVerdict], graded: Sheet, folder: Path, token: str) -> None:
    """Prints the annotations and notices, and writes the step's result and summary.

    Args:
        graded: the gradesheet of the verdicts.
        folder: the submission.
        token: what `mute` returned.
    """
    print(command(token), *annotations(verdicts, folder), *notices(graded), sep="\n", flush=True)
    for name in _LATER_STEPS:  # What this step's code may have left to later ones: variables, search path, state.
        _written(name, "")
    places = gradesheet.places(verdicts, folder)
    encoded = base64.b64encode(json.dumps(classroom(verdicts, folder)).encode()).decode()
    written = {"GITHUB_OUTPUT": f"result={encoded}\n", "GITHUB_STEP_SUMMARY": summary(graded, places)}
    lacking = [name for name, text in written.items() if not _written(name, text)]
    if lacking:
        print(f"github: {' and '.join(lacking)} not set, so the lines above are all; GitHub Actions sets both")


def annotations(verdicts: Sequence[ExerciseVerdict], folder: Path) -> list[str]:
    """An error per requirement that lost points of the exercises in progress, a notice where its code is not written
    yet, and an error per exercise that does not import; at most ANNOTATIONS, in turn from each exercise, unwritten
    code last.
    """
    by_exercise = [_annotations(verdict, folder) for verdict in verdicts]
    in_turn = (line for line in chain(*zip_longest(*by_exercise)) if line is not None)
    return list(islice(in_turn, ANNOTATIONS))


def notices(graded: Points) -> list[str]:
    """The two lines that classroom tools read the points from."""
    report = json.dumps({"totalPoints": graded["score"], "maxPoints": graded["max_score"]}, separators=(",", ":"))
    points = f"Points {graded['score']}/{graded['max_score']}"
    return [
        command("notice", points, title="Autograding complete"),
        command("notice", report, title="Autograding report"),
    ]


def classroom(verdicts: Sequence[ExerciseVerdict], folder: Path) -> dict[str, Any]:
    """GitHub Classroom's result: one entry per requirement, all of one weight, so that readers that count passes and
    readers that add scores show the same total.
    """
    tests = []
    for verdict in verdicts:
        for one in verdict.requirements:
            failed = _first(one.results)
            tests.append(
                {
                    "name": f"{one.requirement.id} {one.requirement.title}",
                    "status": "pass" if one.score else "fail",
                    "score": one.score,
                    "message": plain(_reason(one))[:_ENTRY_CHARACTERS],
                    "test_code": failed.name if failed is not None else "",
                    "filename": f"exercises/{verdict.exercise.file_name}",
                    "line_no": gradesheet.line_of(verdict, failed, folder) if failed is not None else 0,
                    "duration": 0,  # Time is known per exercise only; the gradesheet has it.
                }
            )
    status = "pass" if all(test["status"] == "pass" for test in tests) else "fail"
    return {"version": 1, "status": status, "max_score": POINTS * len(tests), "tests": tests}


def summary(graded: Sheet, places: gradesheet.Places) -> str:
    """The gradesheet as Markdown, within what GitHub takes."""
    text = gradesheet.markdown(graded, places)
    if len(text.encode()) <= SUMMARY_BYTES:
        return text
    head = text.encode()[: SUMMARY_BYTES - 200].decode("utf-8", "ignore").rpartition("\n")[0]
    return f"{head}\n\nCut here: GitHub takes 1 MiB; the gradesheet has the rest.\n"


def command(name: str, data: str = "", **properties: str | int) -> str:
    """A workflow command, escaped as GitHub's toolkit does."""
    listed = ",".join(f"{key}={_property(str(value))}" for key, value in properties.items())
    return f"::{name} {listed}::{_data(data)}" if listed else f"::{name}::{_data(data)}"


def plain(text: str) -> str:
    """A learner's text within a line of ours: one line, nothing that a terminal or GitHub would take for a command.
    GitHub obeys `##[name]` anywhere in a line.
    """
    return gradesheet.one_line(text).replace("##[", "## [")


def _first(results: Sequence[Result]) -> Result | None:
    return next((result for result in results if result.outcome != "passed"), None)


def _reason(one: RequirementVerdict) -> str:
    failed = _first(one.results)
    if failed is not None:
        return failed.message or failed.outcome
    return "" if one.score else gradesheet.NOT_COUNTED


def _annotations(verdict: ExerciseVerdict, folder: Path) -> list[str]:
    exercise = verdict.exercise
    results = [result for one in verdict.requirements for result in one.results]
    if verdict.state == "does not import":
        broken = next(result for result in results if result.kind == "load")
        return [_annotation(verdict, f"{exercise.id} does not import", broken, folder)]
    if verdict.state != "in progress":
        return []
    found = [(one, _first(one.results)) for one in verdict.requirements if one.judged]
    failures = [(one, failed) for one, failed in found if failed is not None]
    failures.sort(key=lambda failure: failure[1].kind == "not implemented")
    return [
        _annotation(verdict, f"{one.requirement.id} {one.requirement.title}", failed, folder)
        for one, failed in failures
    ]


def _annotation(verdict: ExerciseVerdict, title: str, result: Result, folder: Path) -> str:
    """An error; of what is not written yet, a notice."""
    lines = (result.message or result.outcome).splitlines()[:MESSAGE_LINES]
    message = "\n".join(lines)[:_MESSAGE_CHARACTERS]
    if result.kind != "load":
        message += f"\ncheck: {result.name}"
    kind = "notice" if result.kind == "not implemented" else "error"
    file, place = f"exercises/{verdict.exercise.file_name}", gradesheet.line_of(verdict, result, folder)
    return command(kind, message, file=file, line=place, title=title)


def _data(text: str) -> str:
    return printable(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _written(name: str, text: str) -> bool:
    """Whether there is a file that a variable names; it then holds the text."""
    if path := os.environ.get(name):
        Path(path).write_text(text, encoding="utf-8")
    return bool(path)


def main(arguments: list[str]) -> int:
    """`python -m harness.github gradesheet.json`: fails, in one line, if points are missing."""
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        print("github: the path of a gradesheet is wanted, as in: python -P -m harness.github gradesheet.json")
        return 2
    graded = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    missing = graded["max_score"] - graded["score"]
    if missing:
        print(f"{missing} of {graded['max_score']} points are missing; FAIL_ON_MISSING_POINTS makes this a failure")
    return 1 if missing else 0
