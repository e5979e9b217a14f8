"""Right changes of an answer: a function's body as a variant writes it. Which are right by themselves is listed."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from harness.model import bank
from harness.model.exercise import Exercise
from harness.model.source import Function, functions
from harness.practice import planted
from harness.practice.planted import Change

# A change that is much larger than any mistake tells what it is.
MOST_LINES = 16


@dataclass(frozen=True)
class Refactoring:
    """A function of the answer with the body that it has in a variant. `around` are its lines in the answer's code."""

    variant: str
    function: str
    change: Change
    around: range

    @property
    def name(self) -> str:
        """As it is listed."""
        return f"{self.variant} {self.function}"


def proposed(exercise: Exercise) -> Iterator[Refactoring]:
    """Every function that a variant writes differently, with the same name and parameters and by means of the same
    others; the answer's docstring stays.
    """
    answer, lines = bank.answer(exercise), planted.code(exercise)
    above = len(planted.parts(answer)[0])
    ours = functions(answer)
    there = {*ours, *(node.name for node in ast.parse(answer).body if isinstance(node, ast.ClassDef))}
    for variant, path in exercise.variant_files.items():
        text = path.read_text(encoding="utf-8")
        for name, theirs in functions(text).items():
            if name.startswith("test_") or name not in ours or not _replaces(theirs, ours[name], there):
                continue
            start, end = (number - above for number in _body(ours[name]))
            first, last = _body(theirs)
            changed = [*lines[:start], *text.splitlines()[first:last], *lines[end:]]
            hunks = planted.hunks(lines, changed)
            change = Change(hunks)
            if hunks and change.size <= MOST_LINES:
                yield Refactoring(variant, name, change, range(ours[name].lineno - 1 - above, end))


def listed(exercise: Exercise) -> list[str]:
    """The names of those that are right."""
    file = exercise.refactorings_file
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def right(exercise: Exercise) -> list[Refactoring]:
    """Those that are right."""
    names = listed(exercise)
    return [one for one in proposed(exercise) if one.name in names]


def _replaces(theirs: Function, ours: Function, definitions: set[str]) -> bool:
    """Whether a body can stand in another's place: its parameters are the same, and no function or class of the answer
    goes idle, nor what looks at an attribute that is set, nor a refusal that stands elsewhere: a fault in it would then
    be none.
    """
    there = {name.rpartition(".")[2] for name in definitions}
    same = _parameters(theirs) == _parameters(ours) and _refusals(theirs) <= _refusals(ours)
    return same and _names(theirs) & there >= _names(ours) & there and _stored(theirs) >= _stored(ours)


def _parameters(function: Function) -> list[str]:
    return [node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)]


def _refusals(function: Function) -> int:
    """How many errors a function raises."""
    return sum(isinstance(node, ast.Raise) for node in ast.walk(function))


def _stored(function: Function) -> set[str]:
    """The attributes that a function sets."""
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if isinstance(node.ctx, ast.Store)}


def _names(function: Function) -> set[str]:
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {node.id for node in nodes if isinstance(node, ast.Name)}


def _body(function: Function) -> tuple[int, int]:
    """The lines of a function below its docstring, or else below its head, counted from 0."""
    first, *rest = function.body
    documented = ast.get_docstring(function) is not None and rest
    return (first.end_lineno or 0) if documented else first.lineno - 1, function.end_lineno or 0
