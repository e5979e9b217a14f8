"""Takes the exercises, and nothing else, out of a student's repository, and states where its other files differ from
those that grade.

Usage: python -P -m harness.overlay STUDENT SUBMISSION

STUDENT is a checkout of the student's repository, SUBMISSION the folder to make. Runs from the checkout that grades,
before anything is installed there.
"""

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.model.exercise import exercises
from harness.model.limits import FILE_BYTES
from harness.model.paths import TOP
from harness.model.submission import near
from harness.report import github

WORKFLOW = ".github/workflows/classroom.yml"
COMPARED = ("checks/**/*", WORKFLOW, "Makefile", "pyproject.toml", "requirements*.txt")
# Not part of every edition of the exercises.
BANKS = ("/mistakes/", "/variants/")
SHOWN = 20
_SETTING = re.compile(rb"^ +(TEMPLATE|TEMPLATE_COMMIT|FAIL_ON_MISSING_POINTS):.*$", re.MULTILINE)


@dataclass(frozen=True)
class Difference:
    """A file of the student's repository that is not as in the template: "changed", "added" or "missing"."""

    path: str
    how: str


def copy(student: Path, submission: Path) -> list[str]:
    """Copies the exercises that are regular files into a new folder; returns a sentence for each `exercises/*.py` that
    it left.

    Raises:
        FileExistsError: the folder is there already.
    """
    submission.mkdir(parents=True)
    folder = student / "exercises"
    if folder.is_symlink() or not folder.is_dir():
        return ["exercises: is no folder; nothing was copied"]
    left, wanted = [], {exercise.file_name for exercise in exercises().values()}
    for path in sorted(folder.glob("*.py")):
        name, status = f"exercises/{path.name}", path.lstat()
        if path.name not in wanted:
            meant = next((one for one in sorted(wanted) if near(path.name, one)), "")
            left.append(f"{name}: is no exercise{f', rename it to {meant}' if meant else ''}; not copied")
        elif stat.S_ISLNK(status.st_mode):
            left.append(f"{name}: is a link; not copied")
        elif not stat.S_ISREG(status.st_mode):
            left.append(f"{name}: is no regular file; not copied")
        elif status.st_size > FILE_BYTES:
            left.append(f"{name}: is {status.st_size:,} bytes long; at most {FILE_BYTES:,} are copied")
        else:
            shutil.copyfile(path, submission / path.name, follow_symlinks=False)
    return left


def differences(student: Path, template: Path) -> list[Difference]:
    """Where the files that grade differ in the student's repository. The teacher's settings in the workflow do not
    count; banks that the student's edition lacks altogether do not either.
    """
    theirs, ours = set(_files(student)), set(_files(template))
    for bank in BANKS:
        if not any(bank in path for path in theirs):
            ours = {path for path in ours if bank not in path}
    found = []
    for path in sorted(theirs | ours):
        if path not in ours:
            found.append(Difference(path, "added"))
        elif path not in theirs:
            found.append(Difference(path, "missing"))
        elif _content(student / path) != _content(template / path):
            found.append(Difference(path, "changed"))
    return found


def report(template: str, commit: str, left: list[str], found: list[Difference]) -> str:
    """What people read above the gradesheet.

    Args:
        template: owner and name of the trusted repository; empty if the student's own checks grade.
        commit: the commit whose checks grade.
        left: the sentences of `copy`.
        found: where the student's files differ.
    """
    if template:
        lines = [f"Graded by the checks of {_code(template)} at {_code(commit)}.", ""]
    else:
        lines = [
            f"Graded by this repository's own checks, at {_code(commit)}: **nothing protected the checks**.",
            f"Set TEMPLATE and TEMPLATE_COMMIT in {_code(WORKFLOW)} to grade by a repository that you trust.",
            "",
        ]
    lines += [f"- {_code(sentence)}" for sentence in left[:SHOWN]]
    if found:
        lines += ["", f"Not as in {_code(template)}, and not used for grading:", ""]
        lines += [f"- {_code(one.path)} {one.how}" for one in found[:SHOWN]]
        lines += [f"- and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "\n".join(lines).rstrip() + "\n\n"


def main(arguments: list[str]) -> int:
    """Makes the submission and reports on standard output and on the step's summary page."""
    student, submission = map(Path, arguments)
    template = os.environ.get("TEMPLATE", "")
    left = copy(student, submission)
    found = differences(student, TOP) if template else []
    text = report(template, _commit(TOP), left, found)
    print(text, end="")
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:
            file.write(text)
    return 0


def _files(top: Path) -> Iterator[str]:
    """The compared files of a checkout, links included; what Python leaves behind is not looked at."""
    for pattern in COMPARED:
        for path in top.glob(pattern):
            if (path.is_symlink() or not path.is_dir()) and "__pycache__" not in path.parts:
                yield path.relative_to(top).as_posix()


def _content(path: Path) -> bytes:
    """What a file holds; of a link, where it points. The workflow without the teacher's settings."""
    if path.is_symlink():
        return b"link to " + os.fsencode(os.readlink(path))
    data = path.read_bytes()
    return _SETTING.sub(b"", data) if path.as_posix().endswith(WORKFLOW) else data


def _commit(top: Path) -> str:
    command = ["git", "-c", "safe.directory=*", "-C", str(top), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "an unknown commit"


def _code(text: str) -> str:
    return f"`{github.plain(text).replace('`', chr(39))}`"
