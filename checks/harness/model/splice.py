"""Puts a file that holds only the definitions that differ together with the file that it differs from."""

import ast

from harness.model.source import Definition, lines_of


def spliced(base: str, changes: str) -> str:
    """The text of `base` with the definitions of `changes` in place of those of the same names.

    What `changes` defines besides comes before the next definition that it replaces, or at the end; the imports of both
    stand at the top, as far as they are used. Docstrings of files and comments between definitions are lost.
    """
    ours, theirs = ast.parse(base).body, ast.parse(changes).body
    known = {name for node in ours for name in _names(node)}
    left = [(_names(node), _source(changes, node)) for node in theirs if _names(node)]
    pieces: list[str] = []
    for node in ours:
        names = _names(node)
        place = next((place for place, (others, _) in enumerate(left) if names & others), None)
        if place is not None:
            pieces += [source for others, source in left[: place + 1] if names & others or not others & known]
            left = [one for one in left[:place] if one[0] & known] + left[place + 1 :]
        elif names:
            pieces.append(_source(base, node))
    pieces += [source for _, source in left]
    body = "\n\n\n".join(pieces)
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    return "\n".join([*_imports([*ours, *theirs], used), "\n", body, ""])


def _names(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a file defines."""
    if isinstance(node, Definition):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def _source(text: str, node: ast.stmt) -> str:
    lines = lines_of(node)
    return "\n".join(text.splitlines()[lines.start - 1 : lines.stop - 1])


def _imports(nodes: list[ast.stmt], used: set[str]) -> list[str]:
    """A line for each name that is imported and used."""
    lines = set()
    for node in nodes:
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else []:
            if (alias.asname or alias.name.split(".")[0]) in used:
                words = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                lines.add(
                    f"from {node.module} import {words}" if isinstance(node, ast.ImportFrom) else f"import {words}"
                )
    return sorted(lines, key=lambda line: (line.startswith("from"), line))
