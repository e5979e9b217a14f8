"""One program judges: the same submission gets the same outcomes in `make check`, in the watch and in `make grade`."""

import json
from typing import Any

from devtools.terminal import Terminal
from devtools.workspace import READY, Workspace, quiet
from harness.model import bank
from harness.model.exercise import Exercise, exercises

KINDS = ("answer", "variant", "mistake", "starter")


def text(exercise: Exercise, kind: str) -> str:
    if kind == "variant":
        return bank.right_code(exercise, list(exercise.variant_files)[-1])
    if kind == "mistake":
        return list(bank.mistakes(exercise).values())[-1].applied_to(bank.answer(exercise))
    return exercise.starter if kind == "starter" else bank.answer(exercise)


def outcomes(workspace: Workspace) -> dict[str, Any]:
    """What the last verdicts on exercises/ say, by exercise and check."""
    cached = json.loads((workspace.top / "build" / "verdicts.json").read_text())
    return {
        name: {result["name"]: (result["outcome"], result["message"]) for result in entry["results"]}
        for name, entry in cached["exercises"].items()
    }


def test_check_watch_and_grade_agree(workspace: Workspace) -> None:
    for number, exercise in enumerate(exercises().values()):
        path = workspace.top / "exercises" / exercise.file_name
        path.write_text(text(exercise, KINDS[number % len(KINDS)]))

    workspace.make("check", seconds=300)
    checked = outcomes(workspace)
    (workspace.top / "build" / "verdicts.json").unlink()
    watch = Terminal(workspace.make_command("watch"), workspace.top)
    watch.until(READY, 300)
    watch.interrupt()
    assert watch.ended() and quiet(workspace)
    watched = outcomes(workspace)
    assert workspace.make("grade", seconds=300).returncode == 0
    sheet = json.loads((workspace.top / "gradesheet.json").read_text())
    graded = {
        exercise["id"]: {
            check["name"]: (check["outcome"], check["message"])
            for requirement in exercise["requirements"]
            for check in requirement["checks"]
        }
        for exercise in sheet["exercises"]
    }

    for name in exercises():
        assert checked[name].keys() == watched[name].keys() == graded[name].keys()
        for check, (outcome, message) in checked[name].items():
            assert watched[name][check] == (outcome, message), (name, check)
            # Only grading looks for what is replaced, and says so.
            assert graded[name][check][0] == outcome, (name, check, message, graded[name][check][1])
