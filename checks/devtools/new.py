"""Begins an exercise: every file that one needs, from checks/template, with FILL where words are missing."""

import re
from pathlib import Path

from harness.model.exercise import UsageError, exercises
from harness.model.paths import ANSWERS, CHECKS, EXERCISES, shown

EXAMPLE = 'make new EX=12 NAME="Grouped query attention"'
TEMPLATE = CHECKS / "template"


def run(ex: str, name: str) -> int:
    """Writes the files of a new exercise.

    Raises:
        UsageError: EX or NAME will not do, or one of the files is there; then nothing is written.
    """
    title = name.strip().replace("_", " ")
    title = title[:1].upper() + title[1:]
    number = wanted(ex, title)
    texts = files(number, title)
    if there := [shown(path) for path in texts if path.exists()]:
        raise UsageError(f"{', '.join(there)}: there already; make new overwrites nothing")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"new: {shown(path)}")
    print(f"next: make check-exercise EX={number} says what to fill")
    return 0


def files(number: int, title: str) -> dict[Path, str]:
    """The new files' texts by their paths. In the template "ex99" stands for the exercise, "99." begins its
    requirements, and "A title" is its title; its files `exercise.py`, `answer.py` and `answer.md` lie elsewhere.
    """
    ex = f"ex{number:02d}"
    name = f"{ex}_{'_'.join(re.findall(r'[a-z0-9]+', title.lower()))}"
    places = {"answer.py": ANSWERS / f"{name}.py", "answer.md": ANSWERS / f"{ex}.md"}
    found: dict[Path, str] = {}
    for path in sorted(path for path in TEMPLATE.rglob("*") if path.suffix in (".py", ".md")):
        relative = path.relative_to(TEMPLATE).as_posix()
        text = path.read_text(encoding="utf-8").replace("ex99", ex)
        text = re.sub(r"\b99\.", f"{number}.", text).replace("A title", title)
        found[places.get(relative, CHECKS / name / relative)] = text
        if relative == "starter.py":
            found[EXERCISES / f"{name}.py"] = text
    return found


def wanted(ex: str, title: str) -> int:
    """The number that EX gives to a new exercise.

    Raises:
        UsageError: EX or NAME is none, or the exercise is there.
    """
    digits = ex.strip().lower().removeprefix("ex")
    if not re.fullmatch(r"\d{1,2}", digits, re.ASCII) or not int(digits):
        raise UsageError(f"EX={ex.strip()}: make new wants a number from 1 to 99, as in: {EXAMPLE}")
    if not re.fullmatch(r"[A-Za-z][\w ,()-]*", title, re.ASCII):
        raise UsageError(f"NAME={title}: make new wants a title of letters and digits, as in: {EXAMPLE}")
    there = exercises().get(f"ex{int(digits):02d}")
    if there is not None:
        raise UsageError(f"EX={ex.strip()}: {there.file_name} is there; the next free number is {_free()}")
    return int(digits)


def _free() -> int:
    return next(number for number in range(1, 100) if f"ex{number:02d}" not in exercises())
