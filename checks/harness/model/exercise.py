"""What an exercise asks for, read from its starter: the one home of requirements, points and slips."""

import ast
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from harness.model.paths import ANSWERS, CHECKS, EXERCISES

POINTS = 5
CRITERIA = ("correctness", "efficiency", "robustness", "readability")

_REQUIREMENT = re.compile(r"^(\d+\.\d+) \((\w+)\) ([^:]+):", re.MULTILINE)
_SLIP = re.compile(r"^- (\w+): (.+)$", re.MULTILINE)


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
    def folder(self) -> Path:
        """Everything that judges it."""
        return CHECKS / self.file_name.removesuffix(".py")

    @property
    def file(self) -> Path:
        """What the learner edits."""
        return EXERCISES / self.file_name

    @property
    def starter_file(self) -> Path:
        return self.folder / "starter.py"

    @property
    def check_files(self) -> list[Path]:
        return sorted(self.folder.glob("test_*.py"))

    @property
    def mistake_files(self) -> list[Path]:
        return sorted(self.folder.glob("mistakes/*.py"))

    @property
    def variant_files(self) -> dict[str, Path]:
        """The variants' files by slug."""
        return {path.stem: path for path in sorted(self.folder.glob("variants/*.py"))}

    @property
    def bench_file(self) -> Path:
        return self.folder / "bench.py"

    @property
    def answer_file(self) -> Path:
        return ANSWERS / self.file_name

    @property
    def replies_file(self) -> Path:
        """The replies to the Discuss questions."""
        return ANSWERS / f"{self.id}.md"

    @property
    def number(self) -> int:
        """As people type it: EX=3."""
        return int(self.id[2:])


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
    """All exercises that the workspace has, by id, in order: the folders of checks/ with a starter."""
    starters = sorted(CHECKS.glob("ex[0-9][0-9]_*/starter.py"))
    parsed = (parse(file.read_text(encoding="utf-8"), f"{file.parent.name}.py") for file in starters)
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
    """The exercise whose folder a check file lies in."""
    return exercises()[check_file.parent.name[: len("exNN")]]
