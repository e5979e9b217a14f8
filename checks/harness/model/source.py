"""What a file's text says of itself: the names that it defines, its TODOs, the line to look at."""

import ast
import re

_TODO = re.compile(r"#\s*TODO\(([\d., ]+)\)")


def public_names(text: str) -> set[str]:
    """The classes and functions that a file defines at its top level."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.parse(text).body if isinstance(node, kinds)}


def todo_lines(text: str) -> dict[str, int]:
    """The first line of `text` that carries each requirement's `# TODO(N.M)`."""
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if found := _TODO.search(line):
            for requirement in re.split(r"[,\s]+", found[1].strip()):
                lines.setdefault(requirement, number)
    return lines


def place_of(requirement: str, message: str, text: str, starter: str) -> int:
    """The line of a learner's `text` to look at: the definition that the message begins with ("forward: …"), else the
    requirement's TODO, else the definition that holds the TODO in the starter, else line 1.
    """
    try:
        definitions = _definitions(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        definitions = []
    named = re.match(r"\w*", message)
    called = named[0] if named else ""
    for path, node in definitions:
        if path.rpartition(".")[2] == called:
            return node.lineno
    if (line := todo_lines(text).get(requirement)) is not None:
        return line
    wanted = _enclosing(starter, todo_lines(starter).get(requirement, 0))
    return next((node.lineno for path, node in definitions if path == wanted), 1)


def _enclosing(text: str, line: int) -> str:
    """The dotted name of the innermost definition around a line."""
    around = [
        (path, node) for path, node in _definitions(ast.parse(text)) if node.lineno <= line <= (node.end_lineno or 0)
    ]
    return around[-1][0] if around else ""


def _definitions(
    tree: ast.AST, prefix: str = ""
) -> list[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    found: list[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append((prefix + node.name, node))
            found.extend(_definitions(node, f"{prefix}{node.name}."))
    return found
