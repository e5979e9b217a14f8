"""Copies of the workspace in which its commands run for real, for tests and benches."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from harness.model.exercise import exercises
from harness.model.paths import TOP

COPIED = (
    ".github",
    ".gitignore",
    ".pre-commit-config.yaml",
    "Makefile",
    "README.md",
    "answers",
    "checks",
    "exercises",
    "pyproject.toml",
    "requirements-bench.txt",
    "requirements-demo.txt",
    "requirements-lint.txt",
    "requirements-test.txt",
    "requirements.txt",
)


class Workspace:
    """A copy of the workspace that shares the environment and mypy's cache with the original."""

    def __init__(self, top: Path) -> None:
        self.top = top
        top.mkdir()
        for name in COPIED:
            source = TOP / name
            if source.is_dir():
                shutil.copytree(source, top / name, ignore=shutil.ignore_patterns(".mypy_cache", "*.pyc.*"))
            elif source.exists():
                shutil.copy2(source, top / name)
        for exercise in exercises().values():
            shutil.copy2(exercise.starter_file, top / "exercises" / exercise.file_name)
        (top / ".venv").mkdir()
        for stamp in ("ready", "demo"):
            (top / ".venv" / stamp).touch()
        (top / "build").mkdir()
        for cache in ("mypy", "mypy-daemon"):
            if (TOP / "build" / cache).is_dir():
                (top / "build" / cache).symlink_to(TOP / "build" / cache)

    def keep(self, *ids: str) -> None:
        """Removes the files of all exercises but these."""
        for exercise in exercises().values():
            if exercise.id not in ids:
                for path in self.top.glob(f"*/{exercise.id}*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def make_command(self, *arguments: str) -> list[str]:
        """`make …` with this environment in place of the copy's own .venv."""
        return ["make", *arguments, f"VENV={Path(sys.executable).parent}"]

    def make(self, *arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs a target as people do; the result's stdout holds both streams."""
        # Not those of a make that runs this one: they would change what it prints.
        outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        environment = {name: value for name, value in os.environ.items() if name not in outer} | {"COLUMNS": "100"}
        command = self.make_command(*arguments)
        return subprocess.run(
            command,
            cwd=self.top,
            env=environment,
            timeout=seconds,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def answer(self, file_name: str) -> str:
        """The text of an answer."""
        return (self.top / "answers" / file_name).read_text(encoding="utf-8")


READY = "waiting for the next save"


def quiet(workspace: Workspace, seconds: float = 30) -> bool:
    """Waits until nothing runs in a copy any more: a folder that is removed before leaves its processes behind."""
    deadline = time.monotonic() + seconds
    while left := processes(workspace, "python"):
        if time.monotonic() > deadline:
            return not left
        time.sleep(0.1)
    return True


def processes(workspace: Workspace, what: str) -> list[int]:
    """Processes of this copy of the workspace: their working directory tells."""
    return [
        one.pid
        for one in psutil.process_iter(["cmdline", "cwd"])
        if what in " ".join(one.info["cmdline"] or ()) and one.info["cwd"] == str(workspace.top)
    ]
