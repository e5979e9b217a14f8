"""A step can be worked on by itself: what belongs to later ones may be empty without a failure in it."""

import ast
import re
from collections.abc import Callable
from typing import Any

import pytest

from harness.model import bank
from harness.model.exercise import Exercise, exercises

_TODO = re.compile(r"#\s*TODO\(([\d., ]+)\)")
_Function = ast.FunctionDef | ast.AsyncFunctionDef
ENDS = [(one.id, step.number) for one in exercises().values() for step in one.steps[:-1]]


def _functions(text: str) -> dict[str, _Function]:
    """Functions and methods by dotted name."""
    found: dict[str, _Function] = {}
    for node in ast.parse(text).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + one.name: one for one in inner if isinstance(one, _Function)}
    return found


def up_to(exercise: Exercise, step: int) -> str:
    """The answer, but for what has TODOs of later steps alone: that is as in the starter."""
    starter, text = exercise.starter.splitlines(), bank.answer(exercise).splitlines()
    written = _functions("\n".join(text))
    for name, node in reversed(_functions(exercise.starter).items()):
        empty = starter[node.lineno - 1 : node.end_lineno]
        numbers = [number for line in empty if (todo := _TODO.search(line)) for number in re.split(r"[,\s]+", todo[1])]
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
