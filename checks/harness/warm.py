"""A pytest session that has collected all checks and then waits: each request is served by a fork of it.

A cold run pays for Python, torch, pytest and collection; a fork of this process has them already. The process itself
computes
nothing and runs no learner's code, so that its forks are safe and alike.
"""

import argparse
import gc
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

from harness import commands, lint, plugin, supervise
from harness.hugepages import use_huge_pages
from harness.ledger import checks_version, fingerprint
from harness.processes import CAN_FORK, alive
from harness.specification import CHECKS, TOP, selected

SOCKET = Path("build") / "warm.sock"
RESTART, READY = "restart", "ready"


class CollectionFailed(Exception):
    """The check files cannot be collected."""


class _Waiting:
    """A pytest plugin whose run loop hands the collected session over instead of running it."""

    def __init__(self, use: Callable[[pytest.Session], int]) -> None:
        self._use = use
        self.code = 0
        self.broken: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if not self.broken:
            if CAN_FORK:
                _prepare(session)
            try:
                self.code = self._use(session)
            except SystemExit:  # rich's, when whoever read the output has gone: `make check | head`.
                self.code = 1
        return True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken.append(str(report.longrepr))


def _prepare(session: pytest.Session) -> None:
    """Does once what every fork would do: loads modules, and looks up what reports say of each check."""
    plugin.load_late_modules()
    for item in session.items:
        _ = item.location
    # What is there now is there to stay: forks neither walk nor copy it when they collect garbage.
    gc.freeze()


def collected(use: Callable[[pytest.Session], int], ex: str = "", device: str = "cpu") -> int:
    """Collects all checks (or those of the exercise `ex`), some of them for `device` too, then returns what `use`
    returns on the session.

    Raises:
        CollectionFailed: a check file has an error of its own.
    """
    waiting = _Waiting(use)
    options = ["-c", str(CHECKS / "pytest.ini"), "--rootdir", str(TOP), "--capture=no", f"--device={device}"]
    options += [f"-pno:{plugin}" for plugin in ("terminal", "faulthandler", "logging")]
    files = [str(exercise.check_file) for exercise in selected(ex) if exercise.check_file.exists()]
    code = pytest.main([*options, *files], plugins=[waiting])
    if waiting.broken or code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise CollectionFailed("\n".join(waiting.broken) or f"pytest ended with {code} before any check ran")
    return waiting.code


def serve(session: pytest.Session, owners: set[int]) -> int:
    """Serves requests until no owner lives or the checks have changed."""
    known = fingerprint()
    # Remembered, so that no fork has to read all files again.
    checks_version()
    supervise.Judge(session).read_banks()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lint.start_mypy_daemon()
    use_huge_pages()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        SOCKET.unlink(missing_ok=True)
        listener.bind(str(SOCKET))
        listener.listen(16)
        identity = _inode(SOCKET)
        try:
            while (owners := {owner for owner in owners if alive(owner)}) and _inode(SOCKET) == identity:
                with suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG) != (0, 0):
                        pass
                if select.select([listener], [], [], 1.0)[0]:
                    connection, _ = listener.accept()
                    with connection:
                        if fingerprint() != known:
                            connection.sendall(RESTART.encode())
                            break
                        owners |= _answer(connection, session, listener)
        finally:
            if _inode(SOCKET) == identity:
                SOCKET.unlink()
    lint.stop_mypy_daemon()
    return 0


def _inode(path: Path) -> int:
    """What tells this process's socket from one that another warm process has put in its place; 0 where there is
    none.
    """
    return path.stat().st_ino if path.exists() else 0


def _answer(connection: socket.socket, session: pytest.Session, listener: socket.socket) -> set[int]:
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
        _run_request(connection, session, request, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    return set(request["owners"])


def _run_request(
    connection: socket.socket, session: pytest.Session, request: dict[str, Any], descriptors: list[int]
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
        status = commands.run(request["arguments"], supervise.Judge(session, connection.fileno()))
    except (supervise.Abandoned, BrokenPipeError):
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            connection.sendall(str(status).encode())
        os._exit(status)


def main() -> int:
    """Entry point of the warm process: `python -m harness.warm --owner PID`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--owner", type=int, action="append", required=True)
    options = parser.parse_args()
    os.chdir(TOP)
    try:
        return collected(lambda session: serve(session, set(options.owner)))
    except CollectionFailed as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
