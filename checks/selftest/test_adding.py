"""An exercise comes in by files alone: a toy one is watched, checked, answered, tested like the others."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

from devtools.terminal import Terminal
from devtools.workspace import READY, Workspace, processes, quiet
from selftest.toys import ANSWER, DOUBLE, FILE, plant


@pytest.fixture
def grown(workspace: Workspace) -> Iterator[Workspace]:
    """A copy of the workspace with the toy exercise; whatever runs in it is ended."""
    plant(workspace)
    yield workspace
    for pid in processes(workspace, "python"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_it_is_watched(grown: Workspace) -> None:
    path = grown.top / "exercises" / FILE
    watch = Terminal(grown.make_command("watch", "EX=42"), grown.top)
    assert "not started" in watch.until(READY, 120)

    path.write_text(ANSWER)
    done = watch.until(READY)
    assert "15/15" in done and "✓ 42.2 Write your own test" in done, done

    path.write_text(ANSWER.replace("2 * x", "3 * x"))
    wrong = watch.until(READY)
    assert f"\nexercises/{FILE}:{DOUBLE}:1: error: 42.1 double(x): " in wrong, wrong

    watch.interrupt()
    assert watch.ended() and quiet(grown)


def test_it_is_checked_graded_and_answered(grown: Workspace) -> None:
    board = grown.make("check", "EX=42", "SUBMISSION=answers")
    assert board.returncode == 0 and "15/15" in board.stdout, board.stdout

    graded = grown.make("grade", "EX=42")
    assert graded.returncode == 0 and "ex42 0/15 not started" in graded.stdout, graded.stdout

    answer = grown.make("answer", "EX=42", "FORCE=1")
    assert "+    return 2 * x" in answer.stdout and "At half the range." in answer.stdout, answer.stdout


def test_it_is_measured(grown: Workspace) -> None:
    done = grown.make("bench", "EX=42", seconds=300)

    assert done.returncode == 0, done.stdout
    assert "yours is left out: doubling, 8: NotImplementedError: TODO 42.1" in done.stdout
    assert "peak memory, MB" in done.stdout and "{8: 16.0, 16: 32.0}" in done.stdout, done.stdout
    assert "picture: build/bench/ex42.png" in done.stdout
    assert (grown.top / "build" / "bench" / "ex42.png").read_bytes().startswith(b"\x89PNG")
    assert "make bench wants one exercise, as in: make bench EX=1\n" in grown.make("bench").stdout


def test_it_is_tested(grown: Workspace) -> None:
    environment = {**os.environ, "PYTHONPATH": str(grown.top / "checks"), "PYTHONWARNINGS": "ignore"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        python = [sys.executable, "-P", *command]
        return subprocess.run(python, env=environment, cwd=grown.top, capture_output=True, text=True, timeout=120)

    bank = run("-m", "devtools", "bank", "--ex", "ex42")
    assert bank.returncode == 0 and "adds_two" in bank.stdout, bank.stdout + bank.stderr

    form = ("-c", "checks/selftest/pytest.ini", "checks/selftest/test_rules.py", "-q", "-k", "ex42 or stray")
    tested = run("-m", "pytest", *form)
    assert tested.returncode == 0, tested.stdout
