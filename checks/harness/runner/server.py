"""The fork server: a process that has collected all checks and then waits. Each request is served by a fork of it.

A cold run pays for Python, torch, pytest and collection; a fork of this process has them already. The process itself
computes nothing and runs no learner's code, so that its forks are safe and alike.
"""

import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.model.cache import checks_version, fingerprint
from harness.runner.judge import Judge
from harness.runner.supervisor import Abandoned
from harness.sandbox.hugepages import use_huge_pages
from harness.sandbox.processes import lineage
from harness.testing import lint
from harness.testing.check import Check

SOCKET = Path("build") / "warm.sock"
RESTART = "restart"
Run = Callable[[list[str], Judge], int]


@dataclass(frozen=True)
class Asked:
    """What a client sends: its command line, the processes for which the server is to live, its terminal's encoding and
    the variables that its output depends on.
    """

    arguments: list[str]
    owners: list[int]
    encoding: str
    environment: dict[str, str]


def serve(checks: list[Check], owners: set[int], run: Run, idle: Callable[[], None]) -> int:
    """Serves requests until no owner lives or the checks have changed.

    Args:
        owners: processes for which it serves.
        run: what a request's arguments are handed to, in a fork.
        idle: called about every second while nobody asks.
    """
    known = fingerprint()
    # Remembered, so that no fork has to read all files again.
    checks_version()
    judge = Judge(checks)
    judge.prepare()
    judge.read_banks()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lint.start_mypy_daemon()
    use_huge_pages()
    daemon, parents = 0, {owner: lineage(owner) for owner in owners}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            SOCKET.unlink(missing_ok=True)
            listener.bind(str(SOCKET))
            listener.listen(16)
            identity = _inode(SOCKET)
            while (owners := _still_wanted(parents)) and _inode(SOCKET) == identity:
                daemon = lint.mypy_daemon() or daemon
                with suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG) != (0, 0):
                        pass
                if select.select([listener], [], [], 1.0)[0]:
                    connection, _ = listener.accept()
                    with connection:
                        if fingerprint() != known:
                            connection.sendall(RESTART.encode())
                            break
                        for owner in _answer(connection, checks, run, listener) - owners:
                            parents[owner] = lineage(owner)
                else:
                    idle()
            if _inode(SOCKET) == identity:
                SOCKET.unlink()
    finally:
        lint.stop_mypy_daemon(daemon)
    return 0


def _still_wanted(parents: dict[int, tuple[int, ...]]) -> set[int]:
    """The watches that run. One whose terminal, or whatever started it, has gone is ended: nobody sees it any more."""
    for owner, before in list(parents.items()):
        if not psutil.pid_exists(owner):
            del parents[owner]
        elif lineage(owner) != before:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(owner, signal.SIGTERM)
            del parents[owner]
    return set(parents)


def _inode(path: Path) -> int:
    """What tells this process's socket from one that another warm process has put in its place; 0 where there is
    none.
    """
    return path.stat().st_ino if path.exists() else 0


def _answer(connection: socket.socket, checks: list[Check], run: Run, listener: socket.socket) -> set[int]:
    """Forks a process that runs one request on the client's own terminal; returns the client's owners."""
    connection.settimeout(5)
    try:
        message, descriptors, _, _ = socket.recv_fds(connection, 65536, 3)
        asked = Asked(**json.loads(message))
    except (OSError, ValueError, TypeError):
        return set()
    connection.settimeout(None)
    if os.fork() == 0:
        listener.close()
        _run_request(connection, checks, run, asked, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    return set(asked.owners)


def _run_request(
    connection: socket.socket, checks: list[Check], run: Run, asked: Asked, descriptors: list[int]
) -> None:
    """In the fork: runs the command on the client's own terminal, tells the client the exit code, and ends."""
    status = 70
    try:
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
        sys.stdout = sys.stderr = open(1, "w", closefd=False, encoding=asked.encoding, errors="replace", buffering=1)
        os.environ.update(asked.environment, EXERCISES_MYPY_DAEMON="1")
        status = run(asked.arguments, Judge(checks, connection.fileno()))
    except (Abandoned, BrokenPipeError):
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            connection.sendall(str(status).encode())
        os._exit(status)
