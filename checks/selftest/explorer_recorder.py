"""Stands in for the pytest plugin of VS Code's Python extension: tells what the Test Explorer would show.

The variable that names where to tell is the extension's own, TEST_RUN_PIPE: it has to reach pytest's process.
"""

import json
import os
from pathlib import Path

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        _tell(listed=_absolute(item))


def pytest_exception_interact(node: pytest.Item | pytest.Collector, report: pytest.CollectReport) -> None:
    """What fails outside a check's own call: a file that cannot be collected, a check that is not run."""
    if isinstance(report, pytest.CollectReport):
        _tell(broken=report.longreprtext)
    elif report.when != "call" and isinstance(node, pytest.Item):
        _tell(id=_absolute(node), outcome="error", says=report.longreprtext, pid=os.getpid())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        name = f"{Path(report.fspath).resolve()}::{report.nodeid.partition('::')[2]}"
        _tell(id=name, outcome=report.outcome, says=report.longreprtext, pid=os.getpid())


def _absolute(item: pytest.Item) -> str:
    return f"{item.path}::{item.nodeid.partition('::')[2]}"


def _tell(**what: object) -> None:
    with Path(os.environ["TEST_RUN_PIPE"]).open("a", encoding="utf-8") as pipe:
        print(json.dumps(what), file=pipe)
