"""Starts pytest-watch on exercises/ and practice/ with the thin client as its runner."""

import ctypes
import os
import sys
from pathlib import Path

from harness.model.exercise import UsageError
from harness.model.paths import EXERCISES, PRACTICE, TOP, shown
from harness.sandbox.processes import CAN_FORK


def _events() -> bool:
    """Whether the system has a file watch left for us (Linux; elsewhere yes)."""
    if sys.platform != "linux":
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init()
    watched = descriptor >= 0 and libc.inotify_add_watch(descriptor, os.fsencode(EXERCISES), 0x2) >= 0
    if descriptor >= 0:
        os.close(descriptor)
    if not watched:
        why = os.strerror(ctypes.get_errno())
        print(f"no file events are to be had ({why}): saves are looked for instead, which takes a second", flush=True)
    return bool(watched)


def _is_there(folder: Path) -> bool:
    """Whether a folder is there, made where it is missing; what cannot be is said."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        print(f"{shown(folder)}/ cannot be made ({error.strerror}): practice sessions are not watched", flush=True)
        return False
    return True


def run(ex: str) -> int:
    """Becomes pytest-watch; returns only if it cannot start.

    Raises:
        UsageError: there is no folder to watch.
    """
    os.chdir(TOP)
    if not EXERCISES.is_dir():
        raise UsageError(f"{EXERCISES.name}/: no such folder; make reset EX=1 brings a starter back")
    folders = [EXERCISES.name, *([PRACTICE.name] if _is_there(PRACTICE) else [])]
    if not CAN_FORK:
        print("this system cannot fork safely: each save is judged cold, which takes some seconds", flush=True)
    # pytest-watch splits the runner at single spaces, so no path in it may hold any: relative ones do not.
    # The client needs no package: without `site` it starts earlier.
    python = [os.path.relpath(sys.executable), "-P", "-S"]
    runner = [*python, "checks/harness/runner/client.py", "save", *(["--ex", ex] if ex else [])]
    options = [
        "--nobeep",
        "--quiet",
        "--spool",
        "20",
        "--runner",
        " ".join(runner),
        *(["--poll"] if os.environ.get("POLL") or not _events() else []),
    ]
    environment = {**os.environ, "EXERCISES_WATCH": str(os.getpid()), "PYTHONWARNINGS": "ignore"}
    os.execve(sys.executable, [sys.executable, "-P", "-m", "pytest_watch", *options, *folders], environment)
