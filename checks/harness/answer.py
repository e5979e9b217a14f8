"""Shows what lies between a learner's file and the answer, then the replies to the Discuss questions.

Usage: python -P -m harness.answer EX [FORCE]
"""

import difflib
import re
import sys

from rich.console import Console

from harness import banks, board
from harness.ledger import Ledger, checks_version
from harness.specification import TOP, Exercise, UsageError, selected
from harness.submission import LoadError, read

DISCUSSION = TOP / "answers" / "discussion.md"
_STYLES = {"+": "green", "-": "red", "@": "cyan"}


def is_done(exercise: Exercise) -> bool:
    """Whether the last verdict, if it is on the file as it is now, says done."""
    ledger = Ledger(checks_version())
    if ledger.stale(exercise, TOP / "exercises" / exercise.file_name):
        return False
    return ledger.entries[exercise.id].verdict(exercise).state == "done"


def difference(theirs: str, answer: str, file_name: str) -> list[str]:
    """The unified diff that turns the learner's text into the answer's."""
    names = (f"exercises/{file_name}", f"answers/{file_name}")
    return list(difflib.unified_diff(theirs.splitlines(), answer.splitlines(), *names, lineterm=""))


def replies(exercise: Exercise) -> str:
    """The section of answers/discussion.md on an exercise; empty if there is none."""
    text = DISCUSSION.read_text(encoding="utf-8") if DISCUSSION.exists() else ""
    found = re.search(rf"^## {exercise.id} .*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[0].strip() if found else ""


def show(exercise: Exercise, out: Console, force: bool) -> int:
    """Prints the diff and the replies; asks for FORCE=1 before an exercise is done."""
    number = int(exercise.id[2:])
    if not force and not is_done(exercise):
        out.print(f"{exercise.id} is not done yet by its last verdict; the answer would spoil it", soft_wrap=True)
        out.print(
            f"judge it now: make check EX={number}; see the answer all the same: make answer EX={number} FORCE=1",
            soft_wrap=True,
        )
        return 1
    try:
        theirs = read(TOP / "exercises" / exercise.file_name)
    except LoadError:
        theirs = ""
    for line in difference(theirs, banks.answer(exercise), exercise.file_name):
        out.print(line, style=_STYLES.get(line[0], ""), markup=False, soft_wrap=True)
    out.print(f"\n{replies(exercise)}", markup=False, soft_wrap=True)
    return 0


def main(ex: str = "", force: str = "") -> int:
    """Shows the answer of the one exercise that EX names."""
    out = board.console()
    try:
        if not ex.strip():
            raise UsageError("make answer wants one exercise, as in: make answer EX=1")
        return show(selected(ex)[0], out, bool(force))
    except (UsageError, banks.BanksAbsent) as error:
        out.print(str(error), markup=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
