"""Shows what lies between a learner's file and the answer, then the replies to the Discuss questions."""

import ast
import difflib
import re

from rich.console import Console

from harness.commands.request import one_exercise
from harness.model import bank
from harness.model.cache import VerdictCache, checks_version
from harness.model.exercise import Exercise
from harness.model.submission import LoadError, read
from harness.report import terminal

_HUNK, _HEAD = re.compile(r"^@@ -(\d+)(\S*) \+(\d+)(\S*) @@$"), re.compile(r"\s*(?:async def|def|class)\s")
# The lines of a hunk before its first change.
_CONTEXT = 3


def run(ex: str, force: bool) -> int:
    """Prints the diff and the replies; asks for FORCE=1 before an exercise is done."""
    exercise, out = one_exercise("answer", ex), terminal.console()
    if not force and not is_done(exercise):
        _refuse(exercise, out)
        return 1
    try:
        theirs = read(exercise.file)
    except LoadError:
        theirs = ""
    terminal.diff(out, difference(theirs, bank.answer(exercise), exercise.file_name))
    replies = exercise.replies_file.read_text(encoding="utf-8") if exercise.replies_file.exists() else ""
    out.print(f"\n{replies.strip()}", markup=False, soft_wrap=True)
    return 0


def is_done(exercise: Exercise) -> bool:
    """Whether the last verdict, if it is on the file as it is now, says done."""
    verdict = VerdictCache(checks_version()).verdict(exercise, exercise.file)
    return verdict is not None and verdict.state == "done"


def difference(theirs: str, answer: str, file_name: str) -> list[str]:
    """The unified diff that turns the learner's code into the answer's, with the files' line numbers, and the function
    that each part lies in; the text above the code, which the answer has not, is left out.
    """
    names, mine, ours = (f"exercises/{file_name}", f"answers/{file_name}"), _code(theirs), _code(answer)
    above = [len(text.splitlines()) - len(lines) for text, lines in ((theirs, mine), (answer, ours))]

    def placed(found: re.Match[str]) -> str:
        first, other = int(found[1]), int(found[3])
        head = f"@@ -{first + above[0]}{found[2]} +{other + above[1]}{found[4]} @@ {_around(mine, first)}"
        return head.rstrip()

    return [_HUNK.sub(placed, line) for line in difflib.unified_diff(mine, ours, *names, lineterm="")]


def _around(lines: list[str], number: int) -> str:
    """The head of the function or class that a line, counted from 1, lies in or begins."""
    heads = (line for line in reversed(lines[: max(number, 1) + _CONTEXT]) if _HEAD.match(line))
    return next(heads, "").strip().rstrip(":")


def _code(text: str) -> list[str]:
    """The lines below a file's docstring."""
    lines = text.splitlines()
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return lines
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return lines[first.end_lineno :]
    return lines


def _refuse(exercise: Exercise, out: Console) -> None:
    number = exercise.number
    out.print(f"{exercise.id} is not done yet by its last verdict; the answer would spoil it", soft_wrap=True)
    out.print(
        f"judge it now: make check EX={number}; see the answer all the same: make answer EX={number} FORCE=1",
        soft_wrap=True,
    )
