"""What `make test` asks of one exercise: its files filled, their form, its bank. One line for each thing to do.

Usage: python -P -m harness.check_exercise EX
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from harness import banks, board, kill_matrix, warm
from harness.answer import DISCUSSION, replies
from harness.specification import CHECKS, TOP, Exercise, SpecificationError, UsageError, selected
from harness.supervise import Judge

SELFTEST = CHECKS / "selftest"
MARK = "FILL"
# The rules for the form of an exercise, and for its row in the README.
RULES = (("test_specification.py", "{} or stray"), ("test_readme.py", "table"))


def check(exercise: Exercise) -> int:
    """Prints what is to be done; 1 if there is anything."""
    out = board.console()

    def say(problem: str) -> None:
        out.print(problem, style="red", markup=False, soft_wrap=True)

    problems = list(_missing(exercise)) or list(_unfilled(exercise))
    form = [] if problems else list(_form(exercise))
    for problem in [*problems, *form]:
        say(problem)
    if problems:
        say(f"{exercise.id}: the form and the bank are judged once this is done")
        return 1

    def bank(session: pytest.Session) -> int:
        matrix = kill_matrix.build(Judge(session, halves=False), exercise)
        kill_matrix.show(matrix, out)
        return len(matrix.problems)

    problems = form + [""] * warm.collected(bank, exercise.id)
    if not problems:
        out.print(f"{exercise.id}: holds; make lint judges its style")
    return 1 if problems else 0


def _missing(exercise: Exercise) -> Iterator[str]:
    for path in _files(exercise):
        if not path.exists():
            yield f"{board.shown(path)}: no such file"
    if not banks.variants(exercise):
        yield f"checks/variants/{exercise.id}/: holds no variant, a right answer written differently"
    if not replies(exercise):
        yield f"{board.shown(DISCUSSION)}: no section `## {exercise.id} {exercise.title}`"


def _files(exercise: Exercise) -> list[Path]:
    return [
        CHECKS / "starters" / exercise.file_name,
        TOP / "exercises" / exercise.file_name,
        exercise.answer_file,
        exercise.check_file,
        CHECKS / "mistakes" / f"{exercise.id}.py",
    ]


def _unfilled(exercise: Exercise) -> Iterator[str]:
    """Each line that the template has left to fill; those that a file shares with the starter once."""
    starter = set(exercise.starter.splitlines())
    copied = (TOP / "exercises" / exercise.file_name).read_text(encoding="utf-8")
    if MARK in copied and copied != exercise.starter:
        number = int(exercise.id[2:])
        yield f"exercises/{exercise.file_name}: not the starter as it is now; make reset EX={number} brings that"
    for path in [*_files(exercise), *banks.variants(exercise).values()]:
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            if MARK in line and (path.parent.name == "starters" or line not in starter):
                yield f"{board.shown(path)}:{number}: to fill: {line.strip()}"
    for line in replies(exercise).splitlines():
        if MARK in line:
            yield f"{board.shown(DISCUSSION)}: to fill: {line.strip()}"


def _form(exercise: Exercise) -> Iterator[str]:
    """What the rules of the self-tests say of this exercise, as they say it."""
    for file_name, which in RULES:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            command = [sys.executable, "-P", "-m", "pytest", "-c", str(SELFTEST / "pytest.ini"), "--tb=line"]
            chosen = [str(SELFTEST / file_name), "-k", which.format(exercise.id), f"--junitxml={report}"]
            done = subprocess.run([*command, *chosen], cwd=TOP, capture_output=True, text=True)
            if not report.exists():
                yield f"{file_name} itself fails: {(done.stdout + done.stderr).strip()[-500:]}"
                continue
            for failure in ElementTree.parse(report).iter():
                if failure.tag in ("failure", "error"):
                    yield from failure.get("message", "").removeprefix("AssertionError: ").splitlines()


def main(ex: str = "") -> int:
    """Judges the one exercise that EX names."""
    try:
        if not ex.strip():
            raise UsageError("make check-exercise wants one exercise, as in: make check-exercise EX=1")
        return check(selected(ex)[0])
    except (UsageError, SpecificationError, warm.CollectionFailed) as error:
        print(error)
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
