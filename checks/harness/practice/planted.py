"""What is planted in an answer: changes of its lines, taken from the bank, that do not touch each other."""

import ast
import difflib
import random
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from typing import TypeVar

from ruff import find_ruff_bin

from harness.model import bank
from harness.model.bank import Mistake
from harness.model.exercise import Exercise
from harness.model.source import Function, functions

Item = TypeVar("Item")
COLUMNS = 120


@dataclass(frozen=True)
class Hunk:
    """The lines `first` up to but not `last` of a text, counted from 0, become `new`."""

    first: int
    last: int
    new: tuple[str, ...]

    @property
    def size(self) -> int:
        return max(self.last - self.first, len(self.new))


@dataclass(frozen=True)
class Change:
    """A change of an answer's code."""

    hunks: tuple[Hunk, ...]

    @property
    def lines(self) -> range:
        """The lines from its first to its last, also those between its hunks."""
        return range(self.hunks[0].first, max(self.hunks[-1].last, self.hunks[0].first + 1))

    @property
    def size(self) -> int:
        return sum(hunk.size for hunk in self.hunks)


@dataclass(frozen=True)
class Fault(Change):
    """A change that is a mistake of the bank."""

    mistake: Mistake

    @property
    def named(self) -> str:
        """The mistake's name as people read it."""
        return self.mistake.name.replace("_", " ")


def parts(text: str) -> tuple[list[str], list[str]]:
    """The lines of a file up to the end of its docstring, and those below."""
    lines = text.splitlines()
    end = ast.parse(text).body[0].end_lineno or 0
    return lines[:end], lines[end:]


def code(exercise: Exercise) -> list[str]:
    """The lines of the answer below its docstring."""
    return parts(bank.answer(exercise))[1]


def hunks(before: Sequence[str], after: Sequence[str]) -> tuple[Hunk, ...]:
    """What turns one text into another, line by line."""
    # Compared is what lies between the first line that differs and the last: a whole file would take 50 ms.
    head = sum(takewhile(bool, map(eq, before, after)))
    tail = sum(takewhile(bool, map(eq, before[head:][::-1], after[head:][::-1])))
    ours, theirs = before[head : len(before) - tail], after[head : len(after) - tail]
    found = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes()
    return tuple(Hunk(head + i, head + j, tuple(theirs[k:m])) for tag, i, j, k, m in found if tag != "equal")


def mistaken(exercise: Exercise, seed: str, *, wasteful: bool = False) -> Iterator[Fault]:
    """The mistakes of the bank as changes, in the order that a seed gives; those in the learner's own test or in what
    only readability catches are left out, and those that write no code of their own: a function left out, or a stub.
    `wasteful`: those alone that are right but wasteful.
    """
    answer = bank.answer(exercise)
    criteria = {requirement.id: requirement.criterion for requirement in exercise.requirements}
    own, whole = _own_tests(answer), functions(answer)
    for mistake in shuffled(bank.mistakes(exercise).values(), seed):
        if wasteful and not mistake.wasteful:
            continue
        text = mistake.applied_to(answer)
        fault = Fault(hunks(code(exercise), parts(text)[1]), mistake)
        readable = all(criteria.get(number) == "readability" for number in mistake.requirements)
        if not readable and not _touches(fault, own) and not _stubbed(whole, text):
            yield fault


def shuffled(all: Iterable[Item], seed: str) -> list[Item]:
    """The items in the order that a seed gives."""
    items = list(all)
    random.Random(seed).shuffle(items)
    return items


def apart(one: Change, other: Change) -> bool:
    """Whether two changes leave at least a line between them."""
    return all(a.last < b.first or b.last < a.first for a in one.hunks for b in other.hunks)


def too_long(change: Change) -> bool:
    """Whether a change has a line that ruff points to by its length."""
    return any(len(line) > COLUMNS for hunk in change.hunks for line in hunk.new)


def applied(lines: Sequence[str], changes: Iterable[Change]) -> list[str]:
    """The lines with changes that do not touch each other."""
    changed = list(lines)
    for hunk in sorted(_all(changes), key=lambda hunk: hunk.first, reverse=True):
        changed[hunk.first : hunk.last] = hunk.new
    return changed


def file_text(exercise: Exercise, changes: Iterable[Change] = ()) -> str:
    """A session's file: the starter's docstring, then the answer's code with the changes."""
    return "\n".join([*parts(exercise.starter)[0], *applied(code(exercise), changes), ""])


def line_of(exercise: Exercise, hunk: Hunk, changes: Iterable[Change]) -> int:
    """The line at which a hunk of one of the changes begins in the session's file."""
    moved = sum(len(one.new) - (one.last - one.first) for one in _all(changes) if one.first < hunk.first)
    return len(parts(exercise.starter)[0]) + hunk.first + moved + 1


def mend(exercise: Exercise, change: Change) -> list[str]:
    """The lines that take a change back, as in a diff, set in."""
    lines, shown = code(exercise), []
    for hunk in change.hunks:
        shown += [f"   -{line}" for line in hunk.new] + [f"   +{line}" for line in lines[hunk.first : hunk.last]]
    return shown


def unremarkable(text: str) -> bool:
    """Whether nothing in a text shows at a glance: ruff can parse it, and finds no name or import that is not used."""
    command = [find_ruff_bin(), "check", "--isolated", "--no-cache", "--quiet", "--select", "F", "-"]
    return subprocess.run(command, input=text, text=True, capture_output=True).returncode == 0


def _all(changes: Iterable[Change]) -> list[Hunk]:
    return [hunk for change in changes for hunk in change.hunks]


def _own_tests(answer: str) -> list[range]:
    """The lines of the tests in the answer's code, counted as its hunks are."""
    above = len(parts(answer)[0])
    tests = [node for name, node in functions(answer).items() if name.startswith("test_")]
    return [range(node.lineno - 1 - above, (node.end_lineno or 0) - above) for node in tests]


def _touches(change: Change, places: list[range]) -> bool:
    return any(hunk.first < place.stop and place.start < hunk.last + 1 for hunk in change.hunks for place in places)


def _stubbed(whole: dict[str, Function], text: str) -> bool:
    """Whether a function is gone, or one of several statements has one only."""
    left = functions(text)
    return any(
        name not in left or (_statements(left[name]) < 2 and _statements(node) > 2) for name, node in whole.items()
    )


def _statements(function: Function) -> int:
    """How many statements a function's body has, its docstring not counted."""
    return len(function.body) - (ast.get_docstring(function) is not None)
