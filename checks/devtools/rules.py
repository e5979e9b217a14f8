"""What an exercise's files must be: one sentence for each thing to do. `make check-exercise` and `make test` ask."""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.model.bank import answer
from harness.model.exercise import Exercise
from harness.model.paths import TOP, shown
from harness.model.results import READABILITY
from harness.model.source import todo_lines
from harness.practice.help.hints import WANTED, all_hints

MARK = re.compile(r"\bFILL\b")
LINES = 500
# A text: the headings in their order, and how much of it people read.
_HEADINGS = (
    *("Steps", "Requirements", "In plain text", "Shapes", "By hand", "Conventions", "Not defined"),
    *("Your own test", "Discuss", "Sources"),
)
# A hint, and what of an answer is long enough to be quoted.
_LETTERS_OF_A_HINT, _QUOTABLE = 220, 10
_LINES_OF_A_TEXT, _LINES_TO_THE_REQUIREMENTS_END, _COLUMNS, _TITLE, _FIRST_STEP_MINUTES = 160, 60, 100, 40, 40
# What gives the checks that are the same in every exercise, with the requirement that they decide.
_STOCK = ("own_test_checks", "style_checks")


def missing(exercise: Exercise) -> Iterator[str]:
    """Files that an exercise consists of and that are not there."""
    for path in (exercise.file, exercise.answer_file, exercise.replies_file, exercise.hints_file):
        if not path.exists():
            yield f"{shown(path)}: no such file"
    if not exercise.check_files:
        yield f"{shown(exercise.folder)}/: holds no test_….py, the checks"
    if not exercise.mistake_files:
        yield f"{shown(exercise.folder)}/mistakes/: holds no mistakes, the wrong answers"
    if not exercise.variant_files:
        yield f"{shown(exercise.folder)}/variants/: holds no variant, a right answer written differently"


def unfilled(exercise: Exercise) -> Iterator[str]:
    """Each line that the template has left to fill; those that a file shares with the starter once."""
    starter = set(exercise.starter.splitlines())
    if MARK.search(exercise.file.read_text(encoding="utf-8")):
        yield from not_as_shipped(exercise)
    for path in (*files(exercise), exercise.answer_file, exercise.replies_file, exercise.hints_file):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if MARK.search(line) and (path == exercise.starter_file or line not in starter):
                yield f"{shown(path)}:{number}: to fill: {line.strip()}"


def not_as_shipped(exercise: Exercise) -> Iterator[str]:
    """An exercise that is not its starter: one to be shipped is, one that a learner has begun is not."""
    if exercise.file.read_text(encoding="utf-8") != exercise.starter:
        yield f"{shown(exercise.file)}: not the starter as it is now; make reset EX={exercise.number} brings that"


def files(exercise: Exercise) -> list[Path]:
    """The Python files of an exercise's folder, the starter first."""
    found = sorted(path for path in exercise.folder.rglob("*.py"))
    return sorted(found, key=lambda path: path != exercise.starter_file)


def requirements_and_todos_agree(exercise: Exercise) -> Iterator[str]:
    """Requirements are numbered through, each has a TODO, and one is of the criterion readability."""
    ids = [requirement.id for requirement in exercise.requirements]
    if ids != [f"{exercise.number}.{i}" for i in range(1, len(ids) + 1)]:
        yield f"{exercise.id}: requirements are {ids}"
    todos = todo_lines(exercise.starter)
    yield from (f"requirement {n} has no `# TODO({n})` in the starter" for n in ids if n not in todos)
    yield from (f"`# TODO({n})` of the starter names no requirement" for n in todos if n not in ids)
    if not any(requirement.criterion == READABILITY for requirement in exercise.requirements):
        yield f"{exercise.id}: no requirement is of the criterion readability"


def checks_decide_the_requirements(exercise: Exercise) -> Iterator[str]:
    """Every check decides one requirement, says what it claims, and has a name of its own in the exercise."""
    decided: set[str] = set()
    names: set[str] = set()
    for path in exercise.check_files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in _STOCK:
                decided.add(ast.literal_eval(node.args[0]))
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            marks = [d for d in node.decorator_list if isinstance(d, ast.Call) and ast.unparse(d.func) == "requirement"]
            if len(marks) != 1:
                yield f"{shown(path)}: {node.name} decides no requirement"
            decided.update(ast.literal_eval(mark.args[0]) for mark in marks)
            if not ast.get_docstring(node):
                yield f"{shown(path)}: {node.name} has no docstring"
            if node.name in names:
                yield f"{shown(path)}: another check of the exercise is named {node.name}"
            names.add(node.name)
    ids = {requirement.id for requirement in exercise.requirements}
    yield from (f"requirement {n} has no check" for n in sorted(ids - decided))
    yield from (f"the checks decide {n}, which is no requirement" for n in sorted(decided - ids))


def asserts_carry_messages(exercise: Exercise) -> Iterator[str]:
    """Every assert of a check says what came."""
    for path in exercise.check_files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bare = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert) and node.msg is None]
        if bare:
            yield f"{shown(path)}: asserts without a message in lines {bare}"


def the_text_can_be_worked_from(exercise: Exercise) -> Iterator[str]:
    """The docstring has its parts in their order, is not longer than people read, and begins with the heart of it."""
    lines = (ast.get_docstring(ast.parse(exercise.starter)) or "").splitlines()
    places = [next((n for n, line in enumerate(lines) if line.startswith(head)), -1) for head in _HEADINGS]
    if -1 in places or places != sorted(places):
        yield f"{exercise.id}: the docstring's parts are not {', '.join(_HEADINGS)}, in this order"
        return
    for what, count, most in (
        ("the docstring", len(lines), _LINES_OF_A_TEXT),
        ("it to the end of Requirements", places[2] - 1, _LINES_TO_THE_REQUIREMENTS_END),
    ):
        if count > most:
            yield f"{exercise.id}: {what} has {count} lines; at most {most} are wanted"
    for number, line in enumerate(lines, start=1):
        if len(line) > _COLUMNS:
            yield f"{shown(exercise.starter_file)}:{number}: {len(line)} columns; at most {_COLUMNS} are wanted"
    for one in exercise.requirements:
        if len(one.title) > _TITLE:
            yield f"{exercise.id}: the title {one.title!r} has more than {_TITLE} characters"
    if exercise.steps[0].minutes > _FIRST_STEP_MINUTES:
        yield f"{exercise.id}: the first step takes more than {_FIRST_STEP_MINUTES} minutes"


def questions_are_replied_to(exercise: Exercise) -> Iterator[str]:
    """Four questions end the docstring, and each has a reply."""
    docstring = ast.get_docstring(ast.parse(exercise.starter)) or ""
    _, _, questions = docstring.partition("\nDiscuss\n")
    replies = exercise.replies_file.read_text(encoding="utf-8")
    for where, text in (("docstring, Discuss,", questions), (shown(exercise.replies_file), replies)):
        numbers = re.findall(r"^(\d)\. ", text, re.MULTILINE)
        if numbers != ["1", "2", "3", "4"]:
            yield f"{exercise.id}: the {where} numbers {numbers}, not 1 to 4"


def the_answer_keeps_the_contract(exercise: Exercise) -> Iterator[str]:
    """Same docstrings and signatures; the answer only fills bodies and adds private helpers and imports."""
    starter, theirs = _contract(exercise.starter), _contract(answer(exercise))
    for name, stated in starter.items():
        if theirs.get(name) != stated:
            yield f"{exercise.id}: {name} differs between starter and answer"
    docstring = ast.get_docstring(ast.parse(answer(exercise))) or ""
    if exercise.id not in docstring or "\n" in docstring:
        yield f"{shown(exercise.answer_file)}: its docstring is not one line that names {exercise.id}"


def it_stands_on_torch(exercise: Exercise) -> Iterator[str]:
    """Starter and answer import torch and the standard library alone."""
    for text in (exercise.starter, answer(exercise)):
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.split(".")[0] not in {"torch", *sys.stdlib_module_names}:
                    yield f"{exercise.id} imports {name}"


def imports_keep_to_the_rooms(exercise: Exercise) -> Iterator[str]:
    """Of the harness, checks and bench import harness.testing, a demo harness.language, mistakes harness.model.bank,
    variants nothing.
    """
    for path in files(exercise):
        room = {"mistakes": "harness.model.bank", "variants": ""}.get(path.parent.name, "harness.testing")
        room = "harness.language" if path == exercise.demo_file else room
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                if name.split(".")[0] in ("answers", "checks", "exercises", "harness") and name != room:
                    yield f"{shown(path)}: imports {name}; only {room or 'nothing of the harness'} is for it"


def files_are_short(exercise: Exercise) -> Iterator[str]:
    """No file is longer than people read."""
    for path in files(exercise):
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > LINES:
            yield f"{shown(path)}: has {count} lines; at most {LINES} are wanted"


def variants_say_what_is_unusual(exercise: Exercise) -> Iterator[str]:
    """A variant's docstring is one line."""
    for path in exercise.variant_files.values():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if not docstring or "\n" in docstring:
            yield f"{shown(path)}: its docstring is not one line on what is unusual about it"


def hints_are_three_and_no_code(exercise: Exercise) -> Iterator[str]:
    """Every requirement has three hints, each short and without a line of the answer."""
    where, hints = shown(exercise.hints_file), all_hints(exercise)
    ids = [requirement.id for requirement in exercise.requirements]
    yield from (f"{where}: no requirement {number}" for number in hints if number not in ids)
    starter = set(exercise.starter.splitlines())
    lines = {line.strip() for line in answer(exercise).splitlines() if line not in starter}
    quotable = [line for line in lines if len(line) >= _QUOTABLE]
    for number in ids:
        found = hints.get(number, ())
        if len(found) != WANTED:
            yield f"{where}: {number} has {len(found)} hints; {WANTED} are wanted: a question, the idea, numbers"
        for place, hint in enumerate(found, start=1):
            if len(hint) > _LETTERS_OF_A_HINT:
                yield f"{where}: hint {place} of {number} has {len(hint)} letters; at most {_LETTERS_OF_A_HINT}"
            if "`" in hint or any(line in hint for line in quotable):
                yield f"{where}: hint {place} of {number} holds code or a line of the answer"


def the_readme_lists_it(exercise: Exercise) -> Iterator[str]:
    """README's table has a row of it."""
    row = f"| {exercise.number} | {exercise.title} |"
    if row not in (TOP / "README.md").read_text(encoding="utf-8"):
        yield f"README.md: the table has no row `{row} …`"


FORM: tuple[Callable[[Exercise], Iterator[str]], ...] = (
    requirements_and_todos_agree,
    checks_decide_the_requirements,
    asserts_carry_messages,
    the_text_can_be_worked_from,
    questions_are_replied_to,
    the_answer_keeps_the_contract,
    it_stands_on_torch,
    imports_keep_to_the_rooms,
    files_are_short,
    variants_say_what_is_unusual,
    hints_are_three_and_no_code,
    the_readme_lists_it,
)


def _contract(text: str) -> dict[str, str]:
    """Docstring and signature of everything public in a file, by dotted name."""
    found: dict[str, str] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[prefix + node.name] = f"{ast.get_docstring(node)}"
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                returns = ast.unparse(node.returns) if node.returns else ""
                found[prefix + node.name] = f"{ast.unparse(node.args)} {returns} {ast.get_docstring(node)}"

    visit(ast.parse(text).body, "")
    return found
