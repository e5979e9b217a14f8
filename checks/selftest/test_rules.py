"""Starters, checks, banks and answers say the same, exercise by exercise."""

from collections.abc import Callable, Iterator

import pytest

from devtools import rules
from harness.model.exercise import Exercise, exercises
from harness.model.paths import ANSWERS, CHECKS, TOP

EACH = pytest.mark.parametrize("exercise", exercises().values(), ids=lambda exercise: exercise.id)
Rule = Callable[[Exercise], Iterator[str]]


@EACH
@pytest.mark.parametrize("rule", [rules.missing, rules.unfilled, *rules.FORM], ids=lambda rule: rule.__name__)
def test_every_exercise_keeps_the_rules(exercise: Exercise, rule: Rule) -> None:
    assert not (problems := list(rule(exercise))), "\n".join(problems)


def test_no_stray_files() -> None:
    """Every file of answers/, and every folder of checks/, belongs to an exercise or is known."""
    there = exercises().values()
    answers = {path.name for exercise in there for path in (exercise.answer_file, exercise.replies_file)}
    folders = {exercise.folder.name for exercise in there} | {"devtools", "harness", "selftest", "template"}
    files = {"__init__.py", "conftest.py", "pytest.ini"}

    assert {path.name for path in ANSWERS.iterdir() if path.is_file()} == answers
    assert {path.name for path in CHECKS.iterdir() if not path.name.startswith(("__pycache__", "."))} == folders | files


def test_the_readme_lists_nothing_else() -> None:
    rows = [line for line in (TOP / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    listed = [row.split(" | ")[1] for row in rows if row[2:3].isdigit()]

    assert listed == [exercise.title for exercise in exercises().values()]
