"""What an exercise asks for, read from its starter: the one home of requirements, points and slips."""

import ast
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
CHECKS = TOP / "checks"
POINTS = 5
CRITERIA = ("correctness", "efficiency", "robustness", "readability")

_REQUIREMENT = re.compile(r"^(\d+\.\d+) \((\w+)\) ([^:]+):", re.MULTILINE)
_SLIP = re.compile(r"^- (\w+): (.+)$", re.MULTILINE)
_TODO = re.compile(r"#\s*TODO\(([\d., ]+)\)")


class SpecificationError(ValueError):
    """A starter whose docstring does not follow the form."""


@dataclass(frozen=True)
class Requirement:
    """One numbered sentence of an exercise, worth POINTS."""

    id: str
    criterion: str
    title: str


@dataclass(frozen=True)
class Exercise:
    """One exercise of the workspace. `slips` maps the names of the slips that the learner's own test has to catch to
    their descriptions.
    """

    id: str
    file_name: str
    title: str
    requirements: tuple[Requirement, ...]
    slips: dict[str, str] = field(hash=False)
    starter: str = field(hash=False, repr=False)

    @property
    def check_file(self) -> Path:
        return CHECKS / f"test_{self.file_name}"

    @property
    def answer_file(self) -> Path:
        return TOP / "answers" / self.file_name


def parse(text: str, file_name: str) -> Exercise:
    """Reads an exercise from the starter's `text`.

    The docstring's first line is `exNN: Title`; a requirement is a line `3.2 (robustness) Title: criterion in
    words`; a slip is a
    line `- name: what the wrong code does` below the line that ends with `slips:`.

    Raises:
        SpecificationError: the docstring lacks its title or its requirements, or names an unknown criterion.
    """
    docstring = ast.get_docstring(ast.parse(text)) or ""
    head = re.match(r"(ex\d\d): (.+)", docstring)
    if head is None or not file_name.startswith(head[1] + "_"):
        raise SpecificationError(f"{file_name}: the docstring's first line is not `{file_name[:4]}: Title`")
    requirements = tuple(Requirement(*found) for found in _REQUIREMENT.findall(docstring))
    if not requirements:
        raise SpecificationError(f"{file_name}: the docstring holds no requirement line `N.M (criterion) Title: …`")
    for requirement in requirements:
        if requirement.criterion not in CRITERIA:
            raise SpecificationError(
                f"{file_name}: {requirement.id} names the criterion {requirement.criterion!r}, not one of {CRITERIA}"
            )
    _, _, after = docstring.partition("slips:\n")
    slips = dict(_SLIP.findall(after.split("\n\n")[0]))
    return Exercise(head[1], file_name, head[2].strip(), requirements, slips, text)


@cache
def exercises() -> dict[str, Exercise]:
    """All exercises that the workspace has, by id, in order."""
    files = sorted((CHECKS / "starters").glob("ex[0-9][0-9]_*.py"))
    parsed = (parse(file.read_text(encoding="utf-8"), file.name) for file in files)
    return {exercise.id: exercise for exercise in parsed}


class UsageError(Exception):
    """What was asked for cannot be done; the text says why and what there is."""


def selected(ex: str) -> list[Exercise]:
    """The exercises that EX names: 3, 03 or ex03; all if it is empty.

    Raises:
        UsageError: there is no such exercise.
    """
    there = exercises()
    if not ex.strip():
        return list(there.values())
    number = ex.strip().lower().removeprefix("ex")
    wanted = f"ex{int(number):02d}" if number.isascii() and number.isdigit() else ""
    if wanted not in there:
        raise UsageError(f"EX={ex.strip()}: no such exercise; there are {', '.join(there)}")
    return [there[wanted]]


def exercise_of(check_file: Path) -> Exercise:
    """The exercise that a check file `test_exNN_name.py` belongs to."""
    return exercises()[check_file.name[len("test_") : len("test_exNN")]]


def public_names(text: str) -> set[str]:
    """The classes and functions that a file defines at its top level."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.parse(text).body if isinstance(node, kinds)}


def todo_lines(text: str) -> dict[str, int]:
    """The first line of `text` that carries each requirement's `# TODO(N.M)`."""
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if found := _TODO.search(line):
            for requirement in re.split(r"[,\s]+", found[1].strip()):
                lines.setdefault(requirement, number)
    return lines


def place_of(requirement: str, message: str, text: str, starter: str) -> int:
    """The line of a learner's `text` to look at: the definition that the message begins with ("forward: …"), else the
    requirement's TODO, else the definition that holds the TODO in the starter, else line 1.
    """
    try:
        definitions = _definitions(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        definitions = []
    named = re.match(r"\w*", message)
    called = named[0] if named else ""
    for path, node in definitions:
        if path.rpartition(".")[2] == called:
            return node.lineno
    if (line := todo_lines(text).get(requirement)) is not None:
        return line
    wanted = _enclosing(starter, todo_lines(starter).get(requirement, 0))
    return next((node.lineno for path, node in definitions if path == wanted), 1)


def _enclosing(text: str, line: int) -> str:
    """The dotted name of the innermost definition around a line."""
    around = [
        (path, node) for path, node in _definitions(ast.parse(text)) if node.lineno <= line <= (node.end_lineno or 0)
    ]
    return around[-1][0] if around else ""


def _definitions(
    tree: ast.AST, prefix: str = ""
) -> list[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    found: list[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append((prefix + node.name, node))
            found.extend(_definitions(node, f"{prefix}{node.name}."))
    return found
