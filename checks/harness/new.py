"""Begins an exercise: every file that one needs, from the template, with FILL where words are missing.

Usage: python -P -m harness.new EX NAME
"""

import re
import sys

from harness import template
from harness.answer import DISCUSSION
from harness.specification import TOP, UsageError, exercises

EXAMPLE = 'make new EX=12 NAME="Grouped query attention"'


def files(number: int, title: str) -> dict[str, str]:
    """The new files' texts by their paths below the project's top."""
    ex = f"ex{number:02d}"
    name = f"{ex}_{'_'.join(re.findall(r'[a-z0-9]+', title.lower()))}.py"
    texts = {
        f"checks/starters/{name}": template.STARTER,
        f"exercises/{name}": template.STARTER,
        f"answers/{name}": template.ANSWER,
        f"checks/test_{name}": template.CHECKS,
        f"checks/mistakes/{ex}.py": template.MISTAKES,
        f"checks/variants/{ex}/written_differently.py": template.VARIANT,
    }
    return {path: filled(text, number, title) for path, text in texts.items()}


def filled(text: str, number: int, title: str) -> str:
    """A text of the template for one exercise."""
    return text.replace("@ID@", f"ex{number:02d}").replace("@N@", str(number)).replace("@TITLE@", title)


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


def main(ex: str = "", name: str = "") -> int:
    """Writes the files of a new exercise; nothing at all if one of them is there."""
    title = name.strip().replace("_", " ")
    title = title[:1].upper() + title[1:]
    try:
        number = wanted(ex, title)
        texts = files(number, title)
        if there := [path for path in texts if (TOP / path).exists()]:
            raise UsageError(f"{', '.join(there)}: there already; make new overwrites nothing")
    except UsageError as error:
        print(error)
        return 2
    for path, text in texts.items():
        (TOP / path).parent.mkdir(parents=True, exist_ok=True)
        (TOP / path).write_text(text, encoding="utf-8")
        print(f"new: {path}")
    DISCUSSION.parent.mkdir(exist_ok=True)
    with DISCUSSION.open("a", encoding="utf-8") as discussion:
        discussion.write(filled(template.REPLIES, number, title))
    print(f"new: a section of {DISCUSSION.relative_to(TOP)}")
    print(f"next: make check-exercise EX={number} says what to fill")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
