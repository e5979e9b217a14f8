"""Fixtures of the project's own tests: copies of the workspace, and real runs of its commands."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from devtools.workspace import Workspace
from harness.model.paths import TOP
from harness.practice import sessions

# Files whose tests wait much, or take long, are begun first: what runs beside them fills the gaps.
FIRST = ("test_banks.py", "test_watch.py", "test_same_verdict.py", "test_adding.py", "test_gradesheet.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(FIRST)))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A fresh copy of the workspace, as shipped: its exercises are the starters."""
    return Workspace(tmp_path / "a workspace")


class Driver:
    """A process that has collected the checks of one exercise and judges what it is sent."""

    def __init__(self, exercise: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", Path(__file__).parent / "driver.py", exercise],
            env={**os.environ, "PYTHONPATH": str(TOP / "checks")},
            cwd=TOP,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def judge(self, request: dict[str, Any]) -> dict[str, Any]:
        """The verdict on each of the request's texts."""
        assert self._process.stdin is not None and self._process.stdout is not None
        limit = Timer(400, self._process.kill)
        limit.start()
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        limit.cancel()
        assert line, f"the driver ended with {self._process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> int:
        """Ends the process; its exit code."""
        self._process.communicate(timeout=60)
        return self._process.returncode


@pytest.fixture(scope="session")
def judged() -> Iterator[Callable[..., dict[str, Any]]]:
    """Judges texts as submissions of an exercise, each alone, in one session, by the checks of some kinds."""
    drivers: dict[str, Driver] = {}

    def judge(
        exercise: str,
        texts: dict[str, str | bytes],
        *kinds: str,
        graded: bool = False,
        seconds: float = 0.0,
        requirements: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        encoded = {name: text.encode() if isinstance(text, str) else text for name, text in texts.items()}
        if exercise not in drivers:
            drivers[exercise] = Driver(exercise)
        return drivers[exercise].judge(
            {
                "texts": {name: text.hex() for name, text in encoded.items()},
                "kinds": kinds or ["code"],
                "graded": graded,
                "seconds": seconds,
                "requirements": requirements,
            }
        )

    yield judge
    codes = [driver.close() for driver in drivers.values()]
    assert not any(codes), codes


@pytest.fixture
def practice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which sessions lie meanwhile."""
    monkeypatch.setattr(sessions, "PRACTICE", tmp_path)
    return tmp_path
