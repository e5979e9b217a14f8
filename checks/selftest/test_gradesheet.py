"""`make grade`: the sheet's form, its points, and what it does with what cannot be graded."""

import json
import os
import time
from typing import Any

import psutil

from devtools.workspace import Workspace
from harness.model.exercise import CRITERIA, exercises

FILE = "ex01_multi_head_attention.py"
CHILDREN = """
import subprocess
import threading
subprocess.Popen(["sleep", "98765"], start_new_session=True)
subprocess.Popen("(sleep 98765 &) ; sleep 98765", shell=True)
threading.Thread(target=threading.Event().wait).start()
"""


def graded(workspace: Workspace, *arguments: str) -> dict[str, Any]:
    done = workspace.make("grade", *arguments, seconds=300)
    assert done.returncode == 0, done.stdout
    found: dict[str, Any] = json.loads((workspace.top / "gradesheet.json").read_text())
    return found


def test_the_answers_earn_everything(workspace: Workspace) -> None:
    found = graded(workspace, "SUBMISSION=answers")

    assert found["score"] == found["max_score"] == sum(5 * len(e.requirements) for e in exercises().values())
    assert list(found) == ["schema", "checks_version", "torch", "score", "max_score", "criteria", "exercises"]
    assert found["schema"] == 1 and found["torch"] == "2.13.0"
    assert tuple(found["criteria"]) == CRITERIA
    assert sum(one["max_score"] for one in found["criteria"].values()) == found["max_score"]
    first = found["exercises"][0]
    assert (first["id"], first["state"], first["reason"]) == ("ex01", "done", "")
    check = first["requirements"][0]["checks"][0]
    assert check == {"name": "test_any_lengths[1-1]", "outcome": "passed", "message": ""}
    assert (workspace.top / "gradesheet.md").read_text().startswith("# Gradesheet: ")


def test_broken_submissions_lose_their_own_points_only(workspace: Workspace) -> None:
    """Each in bounded time, with a reason in one line, and nothing of it runs on."""
    names = [exercise.file_name for exercise in exercises().values()]
    folder = workspace.top / "student"
    folder.mkdir()
    (folder / names[0]).write_text("import threading\nthreading.Event().wait()\n")
    (folder / names[1]).symlink_to(workspace.top / "answers" / names[1])
    (folder / names[2]).mkdir()
    os.mkfifo(folder / names[3])
    (folder / names[4]).write_text(workspace.answer(names[4]) + CHILDREN)
    (folder / names[5]).write_text(workspace.answer(names[5]) + "\nwhile True:\n    print('x' * 9999)\n")

    begin = time.monotonic()
    found = graded(workspace, "SUBMISSION=student")

    assert time.monotonic() - begin < 150
    reasons = {one["id"]: (one["state"], one["score"], one["reason"]) for one in found["exercises"]}
    assert reasons["ex01"] == ("does not import", 0, "did not load within 10 s"), reasons
    assert reasons["ex06"][1] == 0, found["exercises"][-1]
    assert reasons["ex02"] == ("does not import", 0, "is a link; a regular file is wanted")
    assert reasons["ex03"] == reasons["ex04"] == ("does not import", 0, "is not a regular file")
    refused = "PermissionError: subprocess.Popen: an exercise starts no processes on import"
    assert reasons["ex05"] == ("does not import", 0, refused)
    first = found["exercises"][0]["requirements"][0]["checks"][0]
    assert first["outcome"] == "timeout" and first["message"].startswith("did not end within 10 s")
    assert not [one for one in psutil.process_iter(["cmdline"]) if "98765" in " ".join(one.info["cmdline"] or ())]


def test_a_missing_file_and_a_broken_one_earn_nothing_and_say_why(workspace: Workspace) -> None:
    workspace.keep("ex01", "ex02")
    folder = workspace.top / "student"
    folder.mkdir()
    (folder / FILE).write_text("def broken(:\n")

    found = graded(workspace, "SUBMISSION=student")

    assert found["score"] == 0 and len(found["exercises"]) == 2
    states = {one["id"]: (one["state"], one["reason"]) for one in found["exercises"]}
    assert states["ex01"] == ("does not import", "SyntaxError: invalid syntax")
    assert states["ex02"] == ("not started", "no file")
    one = graded(workspace, "EX=1")
    assert [exercise["id"] for exercise in one["exercises"]] == ["ex01"]
    assert (one["score"], one["max_score"], one["exercises"][0]["state"]) == (0, 50, "not started")


def test_a_folder_without_any_exercise_earns_nothing_and_says_why(workspace: Workspace) -> None:
    workspace.keep("ex01", "ex02")
    (workspace.top / "empty").mkdir()
    (workspace.top / "empty" / f"E{FILE[1:]}").write_text("x = 1\n")

    done = workspace.make("grade", "SUBMISSION=empty")
    found = json.loads((workspace.top / "gradesheet.json").read_text())

    assert done.returncode == 0 and f"SUBMISSION=empty: holds no exercise; files are named like {FILE}" in done.stdout
    assert (found["score"], found["max_score"]) == (0, 100)
    reasons = {one["id"]: one["reason"] for one in found["exercises"]}
    assert reasons == {"ex01": f"no file of this name; E{FILE[1:]} is there, rename it", "ex02": "no file"}


def test_what_cannot_be_graded_leaves_no_sheet(workspace: Workspace) -> None:
    for arguments, says in (
        (("SUBMISSION=nowhere",), "no such folder"),
        (("EX=99",), "no such exercise"),
        (("OUT=checks",), "a file name such as gradesheet.json is wanted"),
    ):
        done = workspace.make("grade", *arguments, seconds=300)
        assert done.returncode == 2 and says in done.stdout, done.stdout
    assert not list(workspace.top.glob("gradesheet*"))
