"""What an interview tells at first, the problem and the signatures, and what it tells when it is asked."""

import ast
import re
import textwrap
from dataclasses import dataclass

from harness.model.exercise import Exercise, first_step
from harness.model.source import todo_numbers

_DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# So many words of a convention tell what it is about, and not yet what it says.
_WORDS_OF_A_TOPIC = 3


@dataclass(frozen=True)
class Topic:
    """What can be asked about, and what is said then."""

    name: str
    text: str


def first_text(exercise: Exercise, minutes: int) -> str:
    """The file that an interview begins with: the starter, its docstring cut to the problem and the titles of what
    counts, the docstrings in it to their first lines, and without TODOs.
    """
    problem = _docstring(exercise).split("\n\n")[1]
    counts = "\n".join(f"{one.id} ({one.criterion}) {one.title}" for one in first_step(exercise).requirements)
    said = (
        f"{exercise.id}: {exercise.title}\n\n{problem}\n\nRequirements\n{counts}\n\n"
        f"An interview of {minutes} minutes. What is not said here is yours to ask:\n"
        f"make ask EX={exercise.number} lists the topics."
    )
    lines, tree = exercise.starter.splitlines(), ast.parse(exercise.starter)
    cuts = [(_span(tree), f'"""{said}\n"""')]
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (summary := ast.get_docstring(node)):
            cuts.append((_span(node), " " * (node.col_offset + 4) + f'"""{summary.splitlines()[0]}"""'))
    for (first, last), text in sorted(cuts, reverse=True):
        lines[first - 1 : last] = text.splitlines()
    return "\n".join(line for line in lines if not todo_numbers(line)) + "\n"


def topics(exercise: Exercise) -> list[Topic]:
    """What can be asked: the requirements that count in full, shapes, the case by hand, each convention, what is not
    defined, and the learner's own test.
    """
    docstring = _docstring(exercise)
    wanted = first_step(exercise).requirements
    found = [Topic(f"{one.id} {one.title}, in full", _requirement(docstring, one.id)) for one in wanted]
    for head, name in (("Shapes", "the shapes"), ("By hand", "a case by hand")):
        found.append(Topic(name, _part(docstring, head)))
    found += [Topic(_topic(text), text) for text in _bullets(_part(docstring, "Conventions"))]
    found.append(Topic("what no check looks at", _part(docstring, "Not defined")))
    own_test = docstring.partition("\nYour own test")[2].partition("\nDiscuss\n")[0].strip()
    found.append(Topic("your own test and its slips", f"Your own test {own_test}"))
    names = [topic.name for topic in found]
    return [
        Topic(f"{one.name} ({names[: place + 1].count(one.name)})", one.text) if names.count(one.name) > 1 else one
        for place, one in enumerate(found)
    ]


def discussion(exercise: Exercise) -> list[str]:
    """The questions at the end of the docstring, each on one line."""
    text = _docstring(exercise).partition("\nDiscuss\n")[2].partition("\n\n")[0]
    return [" ".join(one.split()) for one in re.split(r"^\d\. ", text, flags=re.MULTILINE)[1:]]


def _docstring(exercise: Exercise) -> str:
    return ast.get_docstring(ast.parse(exercise.starter)) or ""


def _span(node: ast.AST) -> tuple[int, int]:
    """The lines of a documented node's docstring."""
    body: list[ast.stmt] = getattr(node, "body", [])
    return body[0].lineno, body[0].end_lineno or body[0].lineno


def _requirement(docstring: str, number: str) -> str:
    found = re.search(rf"^{re.escape(number)} \(.*?(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    return found[0].strip() if found is not None else ""


def _part(docstring: str, head: str) -> str:
    """What stands below a heading, up to the next one."""
    found = re.search(rf"^{head}\n(.*?)(?=^[A-Z][^\n]*\n|\Z)", docstring, re.MULTILINE | re.DOTALL)
    return textwrap.dedent(found[1]).strip("\n") if found is not None else ""


def _bullets(text: str) -> list[str]:
    return [" ".join(one.split()) for one in re.split(r"^- ", text, flags=re.MULTILINE)[1:]]


def _topic(text: str) -> str:
    """What a convention is about, without what it says of it."""
    words = text.replace("`", "").split()
    return " ".join(words[:_WORDS_OF_A_TOPIC]) + " …" * (len(words) > _WORDS_OF_A_TOPIC)
