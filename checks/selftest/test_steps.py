"""A step can be worked on by itself: what belongs to later ones may be empty without a failure in it."""

import ast
from collections.abc import Callable
from typing import Any

import pytest

from harness.model import bank
from harness.model.exercise import Exercise, exercises, within
from harness.model.source import functions, public_names, todo_numbers
from harness.practice.interview.statement import first_text

ENDS = [(one.id, step.number) for one in exercises().values() for step in one.steps[:-1]]


def up_to(exercise: Exercise, step: int) -> str:
    """The answer, but for what has TODOs of later steps alone: that is as in the starter."""
    starter, text = exercise.starter.splitlines(), bank.answer(exercise).splitlines()
    written = functions("\n".join(text))
    for name, node in reversed(functions(exercise.starter).items()):
        empty = starter[node.lineno - 1 : node.end_lineno]
        numbers = [number for line in empty for number in todo_numbers(line)]
        if numbers and all(exercise.step_of(number).number > step for number in numbers):
            text[written[name].lineno - 1 : written[name].end_lineno] = empty
    return "\n".join([*text, ""])


@pytest.mark.parametrize(("ex", "step"), ENDS)
def test_a_step_stands_without_later_ones(judged: Callable[..., dict[str, Any]], ex: str, step: int) -> None:
    exercise = exercises()[ex]
    asked = tuple(number for one in exercise.steps[:step] for number in one.requirements)

    found = judged(ex, {"so far": up_to(exercise, step)}, "code", requirements=asked)["so far"]["results"]

    failed = [f"{one['name']}: {one['message']}" for one in found if one["outcome"] != "passed"]
    assert not failed, f"{ex}, steps 1 to {step} written, the answer fails:\n" + "\n".join(failed[:5])
    assert found, f"{ex}: no check decides {asked}"


@pytest.mark.parametrize("exercise", exercises())
def test_what_an_interview_leaves_out_is_not_needed(judged: Callable[..., dict[str, Any]], exercise: str) -> None:
    """The answer without what an interview leaves out earns what counts."""
    whole = exercises()[exercise]
    scope = within(whole, 45)
    stated, lines = first_text(whole, scope, 45), bank.answer(whole).splitlines()
    gone = public_names(whole.starter) - public_names(stated)
    for node in ast.parse(bank.answer(whole)).body:
        if getattr(node, "name", "") in gone:
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or 0) - node.lineno + 1)
    asked = tuple(one.id for one in scope.requirements)

    found = judged(exercise, {"stated": "\n".join([*lines, ""])}, "code", requirements=asked)["stated"]["results"]

    failed = [f"{one['name']}: {one['message']}" for one in found if one["outcome"] != "passed"]
    assert gone and found and not failed, "\n".join(failed[:5])
