"""Starters, checks, banks and answers say the same, exercise by exercise."""

import ast
import re
import sys

import pytest

from harness.commands.answer import replies
from harness.model.exercise import (
    Exercise,
    SpecificationError,
    UsageError,
    exercises,
    parse,
    place_of,
    selected,
    todo_lines,
)
from harness.model.paths import TOP

EACH = pytest.mark.parametrize("exercise", exercises().values(), ids=lambda exercise: exercise.id)
STARTER = '''"""ex07: A title

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


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("ex07: A title", "A title", "first line"),
        ("ex07: A title", "ex08: A title", "first line"),
        ("(correctness)", "(beauty)", "'beauty'"),
        ("7.1 (correctness) Do it: rightly,", "", "7.2"),
    ],
)
def test_a_starter_out_of_form_is_named(old: str, new: str, says: str) -> None:
    text = STARTER.replace(old, new)
    if says == "7.2":
        assert [r.id for r in parse(text, "ex07_a_title.py").requirements] == ["7.2"]
        return
    with pytest.raises(SpecificationError, match=re.escape(says)):
        parse(text, "ex07_a_title.py")


def test_a_failures_place_is_what_the_message_names_or_the_todo() -> None:
    solved = STARTER.replace("    # TODO(7.1, 7.2): solve.\n", "")
    definition = STARTER.splitlines().index("def solve() -> None:") + 1

    assert place_of("7.1", "solve(): 3 came", STARTER, STARTER) == definition
    assert place_of("7.1", "other: 3 came", STARTER, STARTER) == definition + 2
    assert place_of("7.1", "other: 3 came", solved, STARTER) == definition
    assert place_of("7.1", "", "x = 1\n", STARTER) == 1
    assert place_of("7.1", "", "def broken(:\n", STARTER) == 1


@pytest.mark.parametrize("ex", ["1", "01", "ex01", " EX1 "])
def test_an_exercise_is_named_in_several_ways(ex: str) -> None:
    assert [exercise.id for exercise in selected(ex)] == ["ex01"]


@pytest.mark.parametrize("ex", ["99", "0", "-1", "one", "ex", "1.1", "²"])
def test_an_unknown_exercise_is_refused_with_those_that_there_are(ex: str) -> None:
    with pytest.raises(UsageError, match=r"no such exercise; there are ex01"):
        selected(ex)


@EACH
def test_requirements_todos_and_points_agree(exercise: Exercise) -> None:
    ids = [requirement.id for requirement in exercise.requirements]
    number = int(exercise.id[2:])

    todos = todo_lines(exercise.starter)
    found = [f"requirement {n} has no `# TODO({n})` in the starter" for n in ids if n not in todos]
    found += [f"`# TODO({n})` of the starter names no requirement" for n in todos if n not in ids]

    assert ids == [f"{number}.{i}" for i in range(1, len(ids) + 1)], f"{exercise.id}: requirements are {ids}"
    assert not found, "\n".join(found)
    readable = any(requirement.criterion == "readability" for requirement in exercise.requirements)
    assert readable, f"{exercise.id}: no requirement is of the criterion readability"


@EACH
def test_checks_decide_the_requirements(exercise: Exercise) -> None:
    tree = ast.parse(exercise.check_file.read_text())
    decided = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = [d for d in node.decorator_list if isinstance(d, ast.Call) and ast.unparse(d.func) == "requirement"]
            assert len(marks) == 1, f"{exercise.check_file.name}: {node.name} decides no requirement"
            assert ast.get_docstring(node), f"{exercise.check_file.name}: {node.name} has no docstring"
            decided.add(ast.literal_eval(marks[0].args[0]))
    ids = {requirement.id for requirement in exercise.requirements}
    found = [f"requirement {n} has no check" for n in sorted(ids - decided)]
    found += [f"{exercise.check_file.name} decides {n}, which is no requirement" for n in sorted(decided - ids)]
    assert not found, "\n".join(found)


@EACH
def test_every_assert_of_a_check_carries_a_message(exercise: Exercise) -> None:
    tree = ast.parse(exercise.check_file.read_text())
    bare = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert) and node.msg is None]

    assert not bare, f"{exercise.check_file.name}: asserts without a message in lines {bare}"


@EACH
def test_four_questions_end_the_docstring_and_are_replied_to(exercise: Exercise) -> None:
    docstring = ast.get_docstring(ast.parse(exercise.starter)) or ""
    _, _, questions = docstring.partition("\nDiscuss\n")

    for where, text in (("docstring, Discuss", questions), ("section of answers/discussion.md", replies(exercise))):
        numbers = re.findall(r"^(\d)\. ", text, re.MULTILINE)
        assert numbers == ["1", "2", "3", "4"], f"{exercise.id}: the {where} numbers {numbers}, not 1 to 4"


@EACH
def test_the_exercise_as_shipped_says_what_the_answer_says(exercise: Exercise) -> None:
    """Same docstrings and signatures; the answer only fills bodies and adds private helpers and imports."""
    starter, answer = _contract(exercise.starter), _contract(banks.answer(exercise))

    for name, stated in starter.items():
        assert answer.get(name) == stated, f"{exercise.id}: {name} differs between starter and answer"


@EACH
def test_exercises_stand_on_torch_and_the_standard_library(exercise: Exercise) -> None:
    for text in (exercise.starter, banks.answer(exercise)):
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top == "torch" or top in sys.stdlib_module_names, f"{exercise.id} imports {name}"


def test_no_stray_files() -> None:
    """Every file of the mirrored trees belongs to an exercise."""
    names = {exercise.file_name for exercise in exercises().values()}

    trees = {
        "answers": {path.name for path in (TOP / "answers").glob("*.py")},
        "checks": {path.name[5:] for path in (TOP / "checks").glob("test_*.py")},
    }
    for folder, there in trees.items():
        assert there == names, f"{folder}/: {sorted(there ^ names)} is not in both it and the starters"
    banks_there = {path.stem for path in (TOP / "checks" / "mistakes").glob("*.py")}
    assert banks_there == set(exercises()), f"checks/mistakes/: {sorted(banks_there ^ set(exercises()))}"


def _contract(text: str) -> dict[str, str]:
    """Docstring and signature of everything public in a file, by dotted name."""
    tree = ast.parse(text)
    found = {"the module": ast.get_docstring(tree) or ""}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[prefix + node.name] = f"{ast.get_docstring(node)}"
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                returns = ast.unparse(node.returns) if node.returns else ""
                found[prefix + node.name] = f"{ast.unparse(node.args)} {returns} {ast.get_docstring(node)}"

    visit(tree.body, "")
    return found
