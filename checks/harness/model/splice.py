"""Puts a file that holds only the definitions that differ together with the file that it differs from."""

import ast

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def spliced(base: str, changes: str) -> str:
    """The text of `base` with the definitions of `changes` in place of those of the same names.

    What `changes` defines besides comes before the next definition that it replaces, or at the end; the imports of both
    stand at the top, as far as they are used. Comments between definitions are lost.
    """
    ours, theirs = ast.parse(base), ast.parse(changes)
    new = [node for node in theirs.body if not isinstance(node, ast.Import | ast.ImportFrom) and not _is_text(node)]
    by_name = {name: node for node in new for name in _names(node)}
    kept = [node for node in ours.body if not isinstance(node, ast.Import | ast.ImportFrom) and not _is_text(node)]
    replaced = {name for node in kept for name in _names(node)} & by_name.keys()
    pieces: list[str] = []
    for node in kept:
        names = [name for name in _names(node) if name in replaced]
        if not names:
            pieces.append(_source(base, node))
            continue
        place = next((new.index(by_name[name]) for name in names if by_name[name] in new), None)
        if place is not None:
            before = [one for one in new[:place] if not replaced.intersection(_names(one))]
            pieces += [_source(changes, one) for one in (*before, new[place])]
            new = [one for one in new if one not in before and one is not by_name[names[0]]]
    pieces += [_source(changes, one) for one in new if not replaced.intersection(_names(one))]
    body = "\n\n\n".join(pieces)
    head = [_source(base, node) for node in ours.body[:1] if _is_text(node)]
    imports = _imports((ours, theirs), _used(ast.parse(body)))
    return "\n\n".join([*head, imports, f"\n{body}\n"]) if imports else "\n\n".join([*head, f"{body}\n"])


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _names(node: ast.stmt) -> list[str]:
    """The names that a statement at the top of a file defines."""
    if isinstance(node, _Definition):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _source(text: str, node: ast.stmt) -> str:
    decorators = node.decorator_list if isinstance(node, _Definition) else []
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])


def _used(tree: ast.Module) -> set[str]:
    """The names that are read anywhere, in annotations that are strings too."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return found


def _imports(trees: tuple[ast.Module, ...], used: set[str]) -> str:
    lines: dict[str, None] = {}
    for tree in trees:
        for node in tree.body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for alias in node.names:
                if (alias.asname or alias.name.split(".")[0]) not in used:
                    continue
                words = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                lines[
                    f"from {node.module} import {words}" if isinstance(node, ast.ImportFrom) else f"import {words}"
                ] = None
    return "\n".join(sorted(lines, key=lambda line: (line.startswith("from"), line)))
