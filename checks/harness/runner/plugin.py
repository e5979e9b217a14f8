"""The pytest hooks that tie the harness to check files; thin."""

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.model.limits import DEVICE_SECONDS
from harness.model.paths import TOP, shown
from harness.model.results import Result
from harness.model.submission import bounded
from harness.runner.explain import NotRun, explain, shorten
from harness.testing.check import check_of, end_trials, start_trials
from harness.testing.compare import CPU, ELSEWHERE
from harness.testing.forbid import prebuilt_attention
from harness.testing.subject import neutral_state

SINK = pytest.StashKey[Callable[[Result], None]]()
FOLDER = pytest.StashKey[Path]()
_RESULT = pytest.StashKey[Result]()
_HUNG = pytest.StashKey[set[Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("exercises")
    group.addoption(
        "--submission", default="exercises", metavar="DIR", help="the folder that is judged (default: exercises)"
    )
    group.addoption(
        "--device", default="cpu", choices=["cpu", *ELSEWHERE], help="also run the agreement checks on this device"
    )
    group.addoption("--walk-steps", type=int, default=0, help="calls of a walk, in place of as many as its check says")


def pytest_configure(config: pytest.Config) -> None:
    # Forked children hang in their first computation if this process has ever computed with several threads.
    torch.set_num_threads(1)
    # Listed before any submission is loaded, which could replace what is in the list.
    prebuilt_attention()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "on" in metafunc.fixturenames:
        # A device may take long to come up; no hang is reported for that.
        device, slow = metafunc.config.getoption("--device", "cpu"), pytest.mark.limit(DEVICE_SECONDS)
        others = [pytest.param(place, marks=slow, id=str(place)) for place in ELSEWHERE.get(device, ())]
        metafunc.parametrize("on", [pytest.param(CPU, id=str(CPU)), *others])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Checks run in the order of the requirements, however they are spread over files; walks come last."""
    places: dict[pytest.Item, tuple[str, bool, int]] = {}
    for item in items:
        check = check_of(item)
        ids = [requirement.id for requirement in check.exercise.requirements]
        place = ids.index(check.requirement) if check.requirement in ids else len(ids)
        places[item] = check.exercise.id, check.walk, place
    items.sort(key=places.__getitem__)


def pytest_runtestloop(session: pytest.Session) -> None:
    """Starts the helper of own tests before the first check."""
    if any(check_of(item).kind == "own test" for item in session.items):
        load_late_modules()
        start_trials(session.config)


def load_late_modules() -> None:
    """Loads the 800 modules that torch loads at the first use of this and that, once before forks rather than in each.
    It takes more than a second.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._dynamo")


def pytest_unconfigure(config: pytest.Config) -> None:
    end_trials(config)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path.parent in item.config.stash.setdefault(_HUNG, set()):
        raise NotRun
    os.chdir(item.config.stash.get(FOLDER, TOP))
    neutral_state()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Turns what a check raised into a message for the learner: no traceback of the harness's own.

    pytest does not see the exception: the traceback that it would format, and nobody would read, takes 4 ms.
    """
    excinfo, call.excinfo = call.excinfo, None
    outcome: Any = yield
    call.excinfo = excinfo
    report: pytest.TestReport = outcome.get_result()
    check = check_of(item)
    if excinfo is not None:
        shorten(excinfo.value)
        result = explain(excinfo.value, check)
        result = replace(result, message=bounded(result.message))
        item.stash.setdefault(_RESULT, result)
        if result.outcome == "timeout":
            item.config.stash[_HUNG].add(item.path.parent)
        place = f"{shown(check.file)}:{result.line}" if result.line else shown(check.file)
        report.outcome, report.longrepr = "failed", f"{result.requirement}: {result.message}\n{place}"
        if result.kind == "unjudged":
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, result.message)
    if call.when == "teardown" and (sink := item.config.stash.get(SINK, None)) is not None:
        sink(item.stash.get(_RESULT, check.result("passed")))
