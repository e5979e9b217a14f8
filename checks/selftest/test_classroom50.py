"""The adapter for Classroom 50: its `result.json`, and what it says where something is missing."""

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from harness.model.paths import TOP
from harness.report.classroom50 import NEEDED, result

GRADED = {
    "score": 5,
    "max_score": 10,
    "exercises": [
        {"requirements": [{"id": "1.1", "title": "One", "score": 5, "max_score": 5}]},
        {"requirements": [{"id": "2.1", "title": "Two", "score": 0, "max_score": 5}]},
    ],
}
ENVIRONMENT = {name: f"the {name}" for name in (*NEEDED, "REVIEW_URL")}


def run(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "harness.classroom50", *arguments]
    kept = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    every = {**kept, "PYTHONPATH": str(TOP / "checks"), **environment}
    return subprocess.run(command, cwd=folder, env=every, capture_output=True, text=True)


def test_the_result_is_as_classroom_50_reads_it() -> None:
    found = result(GRADED, ENVIRONMENT, datetime.fromisoformat("2026-09-01T12:30:00+02:00"))

    assert found == {
        "schema": "classroom50/result/v1",
        "classroom": "the CLASSROOM",
        "assignment": "the ASSIGNMENT",
        "submission": "the SUBMISSION_TAG",
        "commit": "the COMMIT_URL",
        "release": "the RELEASE_URL",
        "review": "the REVIEW_URL",
        "datetime": "2026-09-01T10:30:00Z",
        "score": 5,
        "max-score": 10,
        "tests": [
            {"test-name": "1.1 One", "passed": True, "score": 5, "max-score": 5},
            {"test-name": "2.1 Two", "passed": False, "score": 0, "max-score": 5},
        ],
    }


def test_it_writes_into_the_working_directory_with_the_commits_time(tmp_path: Path) -> None:
    (tmp_path / "sheet.json").write_text(json.dumps(GRADED))
    identity = {"GIT_COMMITTER_DATE": "2026-09-01T12:30:00+02:00", "GIT_CONFIG_GLOBAL": os.devnull}
    named = ("-c", "user.name=A", "-c", "user.email=a@example.com")
    for arguments in (("init", "--quiet"), (*named, "commit", "--quiet", "--allow-empty", "--message=x")):
        subprocess.run(["git", *arguments], cwd=tmp_path, env={**os.environ, **identity}, check=True)
    done = run(tmp_path, {**ENVIRONMENT, "REVIEW_URL": ""}, "sheet.json")

    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["datetime"] == "2026-09-01T10:30:00Z" and written["review"] == "the COMMIT_URL"


def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "sheet.json").write_text(json.dumps(GRADED))
    without = {name: value for name, value in ENVIRONMENT.items() if name not in ("CLASSROOM", "COMMIT_URL")}

    for done, says in (
        (run(tmp_path, without, "sheet.json"), "classroom50: CLASSROOM, COMMIT_URL not set; Classroom 50's runner"),
        (run(tmp_path, ENVIRONMENT, "nowhere.json"), "classroom50: the path of a gradesheet is wanted, as in:"),
    ):
        assert done.returncode == 2 and done.stdout.startswith(says), done.stdout + done.stderr
        assert len(done.stdout.splitlines()) == 1 and not (tmp_path / "result.json").exists()
