"""What an exercise asks for, read from its starter: the one home of requirements, points and slips."""

import ast
import re
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from pathlib import Path

from harness.model.paths import ANSWERS, CHECKS, EXERCISES

POINTS = 5
CRITERIA = ("correctness", "efficiency", "robustness", "readability")

_REQUIREMENT = re.compile(r"^(\d+\.\d+) \((\w+)\) ([^:]+):", re.MULTILINE)
_STEP = re.compile(r"^(\d+)\. ([^(\n]+) \((\d+) min\): (.+)$", re.MULTILINE)
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
class Step:
    """What can be worked on at a stretch; later steps may be empty meanwhile. `requirements` are ids."""

    number: int
    name: str
    minutes: int
    requirements: tuple[str, ...]


@dataclass(frozen=True)
class Exercise:
    """One exercise of the workspace. `steps` are in the order to work in; `slips` maps the names of the slips that the
    learner's own test has to catch to their descriptions.
    """

    id: str
    file_name: str
    title: str
    requirements: tuple[Requirement, ...]
    steps: tuple[Step, ...]
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
    def hints_file(self) -> Path:
        """Three hints for each requirement."""
        return self.folder / "hints.md"

    @property
    def patterns_file(self) -> Path:
        """How each known mistake fails."""
        return self.folder / "patterns.json"

    @property
    def bench_file(self) -> Path:
        return self.folder / "bench.py"

    @property
    def demo_file(self) -> Path:
        return self.folder / "demo.py"

    @property
    def refactorings_file(self) -> Path:
        """Which functions of which variants are right in the answer too, each by itself."""
        return self.folder / "refactorings.txt"

    @property
    def answer_file(self) -> Path:
        return ANSWERS / self.file_name

    @property
    def replies_file(self) -> Path:
        """The replies to the Discuss questions."""
        return ANSWERS / f"{self.id}.md"

    def step_of(self, requirement: str) -> Step:
        """The step that a requirement belongs to."""
        return next(step for step in self.steps if requirement in step.requirements)

    @property
    def number(self) -> int:
        """As people type it: EX=3."""
        return int(self.id[2:])


def within(exercise: Exercise, minutes: int) -> Exercise:
    """An exercise of which the first steps count, as many as are done in so many minutes, and one at least."""
    ends = accumulate(step.minutes for step in exercise.steps)
    steps = exercise.steps[: max(1, sum(end <= minutes for end in ends))]
    wanted = {number for step in steps for number in step.requirements}
    return replace(exercise, requirements=tuple(one for one in exercise.requirements if one.id in wanted), steps=steps)


def parse(text: str, file_name: str) -> Exercise:
    """Reads an exercise from the starter's `text`.

    The docstring's first line is `exNN: Title`; a step is a line `1. Name (25 min): 3.1, 3.4`; a requirement is a line
    `3.2 (robustness) Title: criterion in words`; a slip is a line `- name: what the wrong code does` below the line
    that ends with `slips:`.

    Raises:
        SpecificationError: the docstring lacks its title, its steps or its requirements, names an unknown criterion, or
            has a requirement that is not in exactly one step.
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
    steps = _steps(docstring, file_name, [requirement.id for requirement in requirements])
    slips = dict(_SLIP.findall(_paragraph(docstring, "slips:\n")))
    return Exercise(head[1], file_name, head[2].strip(), requirements, steps, slips, text)


def _steps(docstring: str, file_name: str, ids: list[str]) -> tuple[Step, ...]:
    found = _STEP.findall(_paragraph(docstring, "\nSteps\n"))
    steps = tuple(Step(int(n), name, int(minutes), tuple(re.split(r", *", of))) for n, name, minutes, of in found)
    numbers = [number for step in steps for number in step.requirements]
    if sorted(numbers) != sorted(ids) or [step.number for step in steps] != list(range(1, len(steps) + 1)):
        wrong = sorted({*ids, *numbers} - {number for number in ids if numbers.count(number) == 1})
        raise SpecificationError(
            f"{file_name}: below `Steps`, lines `1. Name (25 min): N.M, N.M` name each requirement once, in the order "
            f"to work in; not so: {', '.join(wrong) or 'their own numbers'}"
        )
    return steps


def _paragraph(text: str, head: str) -> str:
    """What follows a heading, up to the next empty line."""
    return text.partition(head)[2].split("\n\n")[0]


@cache
def exercises() -> dict[str, Exercise]:
    """All exercises that the workspace has, by id, in order: the folders of checks/ with a starter."""
    starters = sorted(CHECKS.glob("ex[0-9][0-9]_*/starter.py"))
    parsed = (parse(file.read_text(encoding="utf-8"), f"{file.parent.name}.py") for file in starters)
    return {exercise.id: exercise for exercise in parsed}


class UsageError(Exception):
    """What was asked for cannot be done; the text says why and what there is."""


def selected(ex: str) -> list[Exercise]:
    """The exercises that EX names: 3, 03, ex03 or its file; all if it is empty.

    Raises:
        UsageError: there is no such exercise.
    """
    there = exercises()
    if not ex.strip():
        return list(there.values())
    named = Path(ex.strip()).name.lower()
    number = (named.partition("_")[0] if named.endswith(".py") else named).removeprefix("ex")
    wanted = f"ex{int(number):02d}" if number.isascii() and number.isdigit() else ""
    if wanted not in there:
        raise UsageError(f"EX={ex.strip()}: no such exercise; there are {', '.join(there)}")
    return [there[wanted]]


def exercise_of(check_file: Path) -> Exercise:
    """The exercise whose folder a check file lies in."""
    return exercises()[check_file.parent.name[: len("exNN")]]
