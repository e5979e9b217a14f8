"""What is read from a starter, and how an exercise is named."""

import re

import pytest

from harness.model.exercise import SpecificationError, Step, UsageError, parse, selected
from harness.model.source import place_of

STARTER = '''"""ex07: A title

Steps
1. The heart (30 min): 7.1
2. Polish (5 min): 7.2

Requirements
7.1 (correctness) Do it: rightly,
    in every case.
7.2 (readability) Reads well: it does.

It fails on each of these slips:
- one: the first
- two: the second, which goes
  on

- three: not a slip
"""


def solve() -> None:
    """Solves."""
    # TODO(7.1, 7.2): solve.
    raise NotImplementedError("TODO 7.1")
'''


def test_a_starter_is_parsed() -> None:
    exercise = parse(STARTER, "ex07_a_title.py")

    assert (exercise.id, exercise.title) == ("ex07", "A title")
    found = [(r.id, r.criterion, r.title) for r in exercise.requirements]
    assert found == [("7.1", "correctness", "Do it"), ("7.2", "readability", "Reads well")]
    assert exercise.slips == {"one": "the first", "two": "the second, which goes"}
    assert exercise.steps == (Step(1, "The heart", 30, ("7.1",)), Step(2, "Polish", 5, ("7.2",)))
    assert exercise.step_of("7.2").number == 2


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("ex07: A title", "A title", "first line"),
        ("ex07: A title", "ex08: A title", "first line"),
        ("(correctness)", "(beauty)", "'beauty'"),
        ("7.1 (correctness) Do it: rightly,", "", "7.1"),
        ("7.2 (readability) Reads well", "7.3 (readability) Reads well", "7.2, 7.3"),
        ("2. Polish (5 min): 7.2", "2. Polish (5 min): 7.1, 7.2", "7.1"),
        ("2. Polish", "3. Polish", "their own numbers"),
        ("Steps", "Plan", "7.1, 7.2"),
    ],
)
def test_a_starter_out_of_form_is_named(old: str, new: str, says: str) -> None:
    text = STARTER.replace(old, new)
    with pytest.raises(SpecificationError, match=re.escape(says)):
        parse(text, "ex07_a_title.py")


def test_a_failures_place_is_what_the_message_names_or_the_todo() -> None:
    solved = STARTER.replace("    # TODO(7.1, 7.2): solve.\n", "")
    definition = STARTER.splitlines().index("def solve() -> None:") + 1

    assert place_of("7.1", "solve(): 3 came", STARTER, STARTER) == definition
    assert place_of("7.1", "other: 3 came", STARTER, STARTER) == definition + 2
    assert place_of("7.1", "other: 3 came", solved, STARTER) == definition
    assert place_of("7.1", "", "x = 1\n", STARTER) == 1
    layers = "".join(f"class {name}:\n    def forward(self):\n        pass  # TODO(7.1)\n" for name in "AB")
    assert [place_of("7.1", f"{name}.forward(): 3 came", layers, layers) for name in "AB"] == [2, 5]
    assert place_of("7.1", "", "def broken(:\n", STARTER) == 1


@pytest.mark.parametrize("ex", ["1", "01", "ex01", " EX1 "])
def test_an_exercise_is_named_in_several_ways(ex: str) -> None:
    assert [exercise.id for exercise in selected(ex)] == ["ex01"]


@pytest.mark.parametrize("ex", ["99", "0", "-1", "one", "ex", "1.1", "²"])
def test_an_unknown_exercise_is_refused_with_those_that_there_are(ex: str) -> None:
    with pytest.raises(UsageError, match=r"no such exercise; there are ex01"):
        selected(ex)
