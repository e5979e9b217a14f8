"""Child processes: how long one has really run, and its end with all that it started."""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

# On macOS forks of a process that has loaded system frameworks may crash; EXERCISES_COLD=1 asks for the same elsewhere.
CAN_FORK = hasattr(os, "fork") and sys.platform != "darwin" and not os.environ.get("EXERCISES_COLD")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def waited(pid: int) -> float:
    """Seconds that a process has waited for a processor, where the system tells: a busy machine is nobody's hang."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def cpu_seconds(pid: int) -> float | None:
    """Seconds that a process has computed; None if it is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return times.user + times.system


class Stopwatch:
    """Measures a process's own time since `restart`: wall time without its waits for a processor."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.restart()

    def restart(self) -> None:
        self._start = time.monotonic() - waited(self.pid)

    def seconds(self) -> float:
        return time.monotonic() - waited(self.pid) - self._start


class Lines:
    """Reads a descriptor line by line, without ever blocking for longer than it is told."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.ended = False
        self._buffer = b""

    def take(self) -> list[str]:
        """The complete lines that can be had now; call it when the descriptor is readable. Sets `ended` at the end."""
        chunk = os.read(self.descriptor, 65536)
        self.ended = not chunk
        *complete, self._buffer = (self._buffer + chunk).split(b"\n")
        return [line.decode("utf-8", "replace") for line in complete]


def end(pid: int) -> int:
    """Kills a child that leads its own session, with its process group, and returns its exit status as os.waitpid
    gives it.
    """
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent ends (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_children() -> None:
    """Kills what is left of this process's children, and, where it adopts orphans, of theirs."""
    deadline = time.monotonic() + 5
    while (left := _children()) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def lineage(pid: int) -> tuple[int, ...]:
    """A process's parent and that one's parent; less where they are gone."""
    found: list[int] = []
    with suppress(psutil.Error):
        for _ in range(2):
            pid = psutil.Process(pid).ppid()
            found.append(pid)
    return tuple(found)


def die_with_parent() -> None:
    """Asks the system to kill this process when its parent ends (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
