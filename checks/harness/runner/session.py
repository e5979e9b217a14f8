"""Collects the checks, without running any: a pytest session whose run loop hands it over instead."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.model.exercise import UsageError, selected
from harness.model.paths import CHECKS, TOP
from harness.runner import worker
from harness.testing.check import Check, check_of


class CollectionFailed(UsageError):
    """The check files cannot be collected."""


class _HandedOver:
    """A pytest plugin whose run loop hands the collected session over instead of running it."""

    def __init__(self, use: Callable[[list[Check]], int]) -> None:
        self._use = use
        self.code = 0
        self.broken: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if not self.broken:
            try:
                self.code = self._use([check_of(item) for item in session.items])
            except SystemExit:  # rich's, when whoever read the output has gone: `make check | head`.
                self.code = 1
        return True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken.append(str(report.longrepr))


def collected(use: Callable[[list[Check]], int], ex: str = "", device: str = "cpu") -> int:
    """Collects all checks (or those of the exercise `ex`), some of them for `device` too, then returns what `use`
    returns on them.

    Raises:
        CollectionFailed: a check file has an error of its own.
        KeyboardInterrupt: Ctrl-C.
    """
    handed_over = _HandedOver(use)
    options = ["-c", str(CHECKS / "pytest.ini"), "--rootdir", str(TOP), "--capture=no", f"--device={device}"]
    options += [f"-pno:{plugin}" for plugin in ("terminal", "faulthandler", "logging")]
    files = [str(file) for exercise in selected(ex) for file in exercise.check_files]
    code = pytest.main([*options, *files], plugins=[handed_over])
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    # What fails in this process is a verdict, and no failure of the session.
    fine = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED, pytest.ExitCode.TESTS_FAILED)
    if handed_over.broken or code not in fine:
        raise CollectionFailed("\n".join(handed_over.broken) or f"pytest ended with {code} before any check ran")
    return handed_over.code


def main(exercise: str, kind: str, folder: str, writing: str, room: str, device: str) -> int:
    """A worker where forking is not safe: a fresh interpreter that collects one exercise and runs its checks of one
    kind. The token comes on standard input.
    """
    token = sys.stdin.readline().strip()

    def use(checks: list[Check]) -> int:
        wanted = [check for check in checks if check.kind == kind and check.counts == (device == "cpu")]
        work = worker.Work(wanted, Path(folder), Path(room) if room else None)
        worker.run(work, int(writing), token)
        return 0

    return collected(use, exercise, device)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
