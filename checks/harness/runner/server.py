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
from pathlib import Path
from typing import Any

import pytest

from harness.model.cache import checks_version, fingerprint
from harness.runner.supervisor import Abandoned, Judge
from harness.sandbox.hugepages import use_huge_pages
from harness.sandbox.processes import alive, lineage
from harness.testing import lint

SOCKET = Path("build") / "warm.sock"
RESTART = "restart"
Run = Callable[[list[str], Judge], int]


def serve(session: pytest.Session, owners: set[int], run: Run, idle: Callable[[], None]) -> int:
    """Serves requests until no owner lives or the checks have changed.

    Args:
        owners: processes for which it serves.
        run: what a request's arguments are handed to, in a fork.
        idle: called about every second while nobody asks.
    """
    known = fingerprint()
    # Remembered, so that no fork has to read all files again.
    checks_version()
    Judge(session.items).read_banks()
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
                        for owner in _answer(connection, session, run, listener) - owners:
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
        if not alive(owner):
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


def _answer(connection: socket.socket, session: pytest.Session, run: Run, listener: socket.socket) -> set[int]:
    """Forks a process that runs one request on the client's own terminal; returns the client's owners."""
    connection.settimeout(5)
    try:
        message, descriptors, _, _ = socket.recv_fds(connection, 65536, 3)
        request = json.loads(message)
    except (OSError, ValueError):
        return set()
    connection.settimeout(None)
    if os.fork() == 0:
        listener.close()
        _run_request(connection, session, run, request, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    return set(request["owners"])


def _run_request(
    connection: socket.socket, session: pytest.Session, run: Run, request: dict[str, Any], descriptors: list[int]
) -> None:
    """In the fork: runs the command on the client's own terminal, tells the client the exit code, and ends."""
    status = 70
    try:
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
        sys.stdout = sys.stderr = open(
            1, "w", closefd=False, encoding=request["encoding"], errors="replace", buffering=1
        )
        os.environ.update(request["environment"], EXERCISES_MYPY_DAEMON="1")
        status = run(request["arguments"], Judge(session.items, connection.fileno()))
    except (Abandoned, BrokenPipeError):
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            connection.sendall(str(status).encode())
        os._exit(status)
