"""What an interview tells at first, the problem and the signatures, and what it tells when it is asked."""

import ast
import re
import textwrap
from dataclasses import dataclass

from harness.model.exercise import Exercise
from harness.model.source import Definition, lines_of, todo_numbers

# A convention begins with what it is about; without one of these, so many words tell it.
_WORDS_OF_A_TOPIC, _MOST_WORDS = 3, 8
_VERB = re.compile(
    r"adds?|appears|apply|asks|averages|carry|carries|changes?|continues|copy|counts|depends|draws|fits|gets?|gives?|go|has"
    r"|have|holds?|is|are|keeps?|lies|look|makes|match|matches|may|means?|must|need|puts?|reads?|returns|says|see|stays?"
    r"|stands?|takes?|times|turns|use|works?|write"
)


@dataclass(frozen=True)
class Topic:
    """What can be asked about, and what is said then."""

    name: str
    text: str


def first_text(exercise: Exercise, scope: Exercise, minutes: int) -> str:
    """The file that an interview begins with: the starter without what does not count, its docstring cut to the problem
    and the titles of what does, the docstrings in it to their first lines and attributes, and without TODOs.

    Args:
        scope: the exercise with the steps that count.
    """
    problem = _docstring(exercise).split("\n\n")[1]
    counts = "\n".join(f"{one.id} ({one.criterion}) {one.title}" for one in scope.requirements)
    said = (
        f"{exercise.id}: {exercise.title}\n\n{problem}\n\nRequirements\n{counts}\n\n"
        f"An interview of {minutes} minutes. What is not said here is yours to ask:\n"
        f"make ask EX={exercise.number} lists the topics."
    )
    starter = without(exercise.starter, {one.id for one in scope.requirements})
    lines, tree = starter.splitlines(), ast.parse(starter)
    cuts = [(_span(tree), f'"""{said}\n"""')]
    for node in ast.walk(tree):
        if isinstance(node, Definition) and (docstring := ast.get_docstring(node)):
            cuts.append((_span(node), textwrap.indent(_in_short(docstring), " " * (node.col_offset + 4))))
    for (first, last), text in sorted(cuts, reverse=True):
        lines[first - 1 : last] = text.splitlines()
    kept: list[str] = []
    told = False  # Whether the line before is a TODO's, which comments below it go on with.
    for line in lines:
        told = bool(todo_numbers(line)) or (told and line.lstrip().startswith("#"))
        kept += [] if told else [line]
    return "\n".join(kept) + "\n"


def _in_short(docstring: str) -> str:
    """A docstring's first line and, since code elsewhere reads them, its attributes."""
    summary, attributes = docstring.splitlines()[0], re.search(r"^Attributes:\n(?:[ ]+.*(?:\n|\Z))+", docstring, re.M)
    return f'"""{summary}\n\n{attributes[0].rstrip()}\n"""' if attributes is not None else f'"""{summary}"""'


def without(starter: str, counting: set[str]) -> str:
    """A starter without the functions and classes all of whose TODOs are for requirements that do not count, and
    without the imports that they alone need. A class is whole or gone: its checks call what is to be written later.
    """
    lines, tree = starter.splitlines(), ast.parse(starter)
    gone: list[range] = []
    for node in tree.body:
        numbers = {number for place in lines_of(node) for number in todo_numbers(lines[place - 1])}
        if isinstance(node, Definition) and numbers and not numbers & counting:
            gone.append(lines_of(node))
    left = [line for number, line in enumerate(lines, start=1) if not any(number in one for one in gone)]
    text = re.sub(r"\n{4,}", "\n\n\n", "\n".join(left)).rstrip() + "\n"
    return _without_imports(text, _names(tree) - _names(ast.parse(text)))


def _names(tree: ast.Module) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _without_imports(text: str, names: set[str]) -> str:
    """A text whose imports leave these names out."""
    lines = text.splitlines()
    for node in reversed(ast.parse(text).body):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        kept = [one for one in node.names if (one.asname or one.name.partition(".")[0]) not in names]
        if len(kept) < len(node.names):
            node.names = kept
            lines[node.lineno - 1 : node.end_lineno] = [ast.unparse(node)] if kept else []
    return "\n".join([*lines, ""])


def topics(exercise: Exercise) -> list[Topic]:
    """What can be asked about an exercise, or a part of it: the requirements that count in full, shapes, the case by
    hand, each convention, what is not defined, and the learner's own test.
    """
    docstring = _docstring(exercise)
    found = [Topic(f"{one.id} {one.title}, in full", _requirement(docstring, one.id)) for one in exercise.requirements]
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
    """What a convention is about, up to its first verb, without what it says of it."""
    words = text.replace("`", "").split()
    end = next(
        (place for place, word in enumerate(words) if _VERB.fullmatch(word.strip(",:;."))), _WORDS_OF_A_TOPIC - 1
    )
    shown = words[: min(max(end + 1, 2), _MOST_WORDS)]
    return " ".join(shown).rstrip(",:;.") + " …" * (len(words) > len(shown))
