"""What a file's text says of itself: the names that it defines, its TODOs, the line to look at."""

import ast
import re
from functools import lru_cache

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | Function
_TODO = re.compile(r"#\s*TODO\(([\d., ]+)\)")


def public_names(text: str) -> set[str]:
    """The classes and functions that a file defines at its top level."""
    return {node.name for node in ast.parse(text).body if isinstance(node, Definition)}


def todo_lines(text: str) -> dict[str, int]:
    """The first line of `text` that carries each requirement's `# TODO(N.M)`."""
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        for requirement in todo_numbers(line):
            lines.setdefault(requirement, number)
    return lines


def todo_numbers(line: str) -> list[str]:
    """The requirements that the `# TODO(N.M, …)` of a line names; none where it carries none."""
    found = _TODO.search(line)
    return re.split(r"[,\s]+", found[1].strip()) if found is not None else []


def functions(text: str) -> dict[str, Function]:
    """The functions of a file and the methods of its classes, by dotted name."""
    found: dict[str, Function] = {}
    for node in ast.parse(text).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + one.name: one for one in inner if isinstance(one, Function)}
    return found


def lines_of(node: ast.stmt) -> range:
    """The lines of a statement, its decorators too."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return range(first, (node.end_lineno or first) + 1)


def place_of(requirement: str, message: str, text: str, starter: str) -> int:
    """The line of a learner's `text` to look at: the definition that the message begins with ("forward: …" or
    "Layer.forward: …") if a TODO of the requirement stands in it in the starter; else such a TODO that is left; else
    the first definition in which one stood; else the one that the message begins with; else line 1.
    """
    try:
        definitions = {path: first for path, first, _ in reversed(_definitions(text))}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        definitions = {}
    words = re.match(r"[\w.]*", message)
    named = words[0] if words else ""
    called = [path for path in definitions if named in (path, path.rpartition(".")[2])]
    asked = [path for path in _with_todo(starter, requirement) if path in definitions]
    both = [path for path in called if path in asked]
    if not both and (line := todo_lines(text).get(requirement)) is not None:
        return line
    return next((definitions[path] for path in (*both, *asked, *called)), 1)


def _with_todo(text: str, requirement: str) -> list[str]:
    """The dotted names of the innermost definitions in which a TODO of the requirement stands."""
    found: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if requirement in todo_numbers(line):
            around = [path for path, first, last in _definitions(text) if first <= number <= last]
            found += around[-1:]
    return found


@lru_cache(maxsize=8)
def _definitions(text: str) -> list[tuple[str, int, int]]:
    """The dotted name of each class and function, its first line and its last; read once for all failures of a file."""
    return _in(ast.parse(text), "")


def _in(tree: ast.AST, prefix: str) -> list[tuple[str, int, int]]:
    found: list[tuple[str, int, int]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            found.append((prefix + node.name, node.lineno, node.end_lineno or 0))
            found.extend(_in(node, f"{prefix}{node.name}."))
    return found
