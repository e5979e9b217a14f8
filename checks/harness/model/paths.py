"""Where the workspace's things lie."""

from pathlib import Path

TOP = Path(__file__).resolve().parents[3]
CHECKS = TOP / "checks"
EXERCISES = TOP / "exercises"
ANSWERS = TOP / "answers"
BUILD = TOP / "build"


def shown(path: Path) -> str:
    """A path as people see it: relative to the workspace where it lies inside."""
    return str(path.relative_to(TOP)) if path.is_relative_to(TOP) else str(path)
