"""Fixtures of the project's own tests: copies of the workspace, and real runs of its commands."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.copies import Workspace
from harness.specification import TOP

# Files whose tests wait much, or take long, are begun first: what runs beside them fills the gaps.
FIRST = ("test_banks.py", "test_watch.py", "test_same_verdict.py", "test_adding.py", "test_gradesheet.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(FIRST)))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A fresh copy of the workspace, as shipped: its exercises are the starters."""
    return Workspace(tmp_path / "a workspace")


@pytest.fixture(scope="session")
def judged() -> Callable[..., dict[str, Any]]:
    """Judges texts as submissions of an exercise, each alone, in one session, by the checks of some lanes."""

    def judge(
        exercise: str,
        texts: dict[str, str | bytes],
        *lanes: str,
        graded: bool = False,
        lane_seconds: float = 0.0,
        requirements: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        encoded = {name: text.encode() if isinstance(text, str) else text for name, text in texts.items()}
        hexes = {name: text.hex() for name, text in encoded.items()}
        request = json.dumps(
            {
                "exercise": exercise,
                "texts": hexes,
                "lanes": lanes or ["code"],
                "graded": graded,
                "lane_seconds": lane_seconds,
                "requirements": requirements,
            }
        )
        driver = Path(__file__).parent / "driver.py"
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", driver],
            input=request,
            env={**os.environ, "PYTHONPATH": str(TOP / "checks")},
            cwd=TOP,
            text=True,
            capture_output=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    return judge
