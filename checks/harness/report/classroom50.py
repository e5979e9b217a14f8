"""The gradesheet as Classroom 50 collects it: `result.json` in the working directory.

Usage: python -P -m harness.classroom50 gradesheet.json

Run by the teacher's autograder.py, in the student's checkout. Who the student is, Classroom 50 adds by itself.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = "classroom50/result/v1"
NEEDED = ("CLASSROOM", "ASSIGNMENT", "SUBMISSION_TAG", "COMMIT_URL", "RELEASE_URL")


def result(graded: Mapping[str, Any], environment: Mapping[str, str], when: datetime) -> dict[str, Any]:
    """The result of a gradesheet: one test per requirement.

    Args:
        environment: holds NEEDED, and REVIEW_URL where there is one.
        when: the graded commit's time; Classroom 50 tells late work by it.
    """
    requirements = [one for exercise in graded["exercises"] for one in exercise["requirements"]]
    return {
        "schema": SCHEMA,
        "classroom": environment["CLASSROOM"],
        "assignment": environment["ASSIGNMENT"],
        "submission": environment["SUBMISSION_TAG"],
        "commit": environment["COMMIT_URL"],
        "release": environment["RELEASE_URL"],
        "review": environment.get("REVIEW_URL") or environment["COMMIT_URL"],
        "datetime": when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "score": graded["score"],
        "max-score": graded["max_score"],
        "tests": [
            {
                "test-name": f"{one['id']} {one['title']}",
                "passed": one["score"] == one["max_score"],
                "score": one["score"],
                "max-score": one["max_score"],
            }
            for one in requirements
        ],
    }


def commit_time() -> datetime:
    """When the commit of the working directory was made; now, where git does not tell."""
    command = ["git", "-c", "safe.directory=*", "show", "-s", "--format=%cI", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return datetime.fromisoformat(done.stdout.strip()) if done.returncode == 0 else datetime.now(UTC)


def main(arguments: list[str]) -> int:
    """Writes `result.json`; fails, in one line, if something that it needs is missing."""
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        print(
            "classroom50: the path of a gradesheet is wanted, as in: python -P -m harness.classroom50 gradesheet.json"
        )
        return 2
    if lacking := [name for name in NEEDED if not os.environ.get(name)]:
        print(f"classroom50: {', '.join(lacking)} not set; Classroom 50's runner sets {', '.join(NEEDED)}")
        return 2
    graded = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    written = json.dumps(result(graded, os.environ, commit_time()), indent=2)
    Path("result.json").write_text(written + "\n", encoding="utf-8")
    return 0
