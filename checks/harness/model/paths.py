"""Where the workspace's things lie, and how its files are loaded and written."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

TOP = Path(__file__).resolve().parents[3]
CHECKS = TOP / "checks"
EXERCISES = TOP / "exercises"
ANSWERS = TOP / "answers"
BUILD = TOP / "build"
PRACTICE = TOP / "practice"
ATTEMPTS = TOP / "attempts"


def shown(path: Path) -> str:
    """A path as people see it: relative to the workspace where it lies inside."""
    return str(path.relative_to(TOP)) if path.is_relative_to(TOP) else str(path)


def module_from(path: Path, name: str) -> ModuleType:
    """Runs a file of the project's as a module that nothing else imports."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_whole(path: Path, text: str) -> None:
    """Writes a file at once, so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
    scratch.replace(path)
