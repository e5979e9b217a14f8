"""The toy exercise ex42, whose files lie in `toy/` as those of a new exercise lie in checks/template."""

from pathlib import Path

from devtools.workspace import Workspace

FILE = "ex42_doubling.py"
FOLDER = f"checks/{FILE.removesuffix('.py')}"
_TOY = Path(__file__).parent / "toy"
_ELSEWHERE = {"answer.py": f"answers/{FILE}", "answer.md": "answers/ex42.md"}


def _read(name: str) -> str:
    return (_TOY / name).read_text(encoding="utf-8")


STARTER, ANSWER, CHECKS, MISTAKES = map(_read, ("starter.py", "answer.py", "test_solve.py", "mistakes/values.py"))
# The line of the answer's first definition.
DOUBLE = ANSWER.partition("def double")[0].count("\n") + 1
ROW = "| 42 | Doubling | x | y |\n"


def files() -> dict[str, str]:
    """The texts by their paths in a workspace."""
    found = {f"exercises/{FILE}": STARTER}
    for path in sorted(path for path in _TOY.rglob("*") if path.suffix in (".py", ".md")):
        name = path.relative_to(_TOY).as_posix()
        found[_ELSEWHERE.get(name, f"{FOLDER}/{name}")] = _read(name)
    return found


def plant(workspace: Workspace) -> None:
    """Puts the toy exercise into a copy of the workspace, a row in README's table too."""
    for name, text in files().items():
        (workspace.top / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace.top / name).write_text(text, encoding="utf-8")
    readme = workspace.top / "README.md"
    rule = "|---|---|---|---|\n"
    readme.write_text(readme.read_text(encoding="utf-8").replace(rule, rule + ROW, 1), encoding="utf-8")
