"""The pytest hooks and fixtures that tie the harness to check files; thin."""

import importlib
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.model.exercise import exercise_of
from harness.model.limits import DEVICE_SECONDS
from harness.model.paths import TOP
from harness.model.results import Result
from harness.model.submission import bounded
from harness.runner.explain import NotRun, explain, shorten
from harness.testing import lint as linters
from harness.testing.compare import CPU, ELSEWHERE, Close, Where
from harness.testing.forbid import prebuilt_attention
from harness.testing.own_test_process import Trials
from harness.testing.subject import Subject, neutral_state

SINK = pytest.StashKey[Callable[[Result], None]]()
FOLDER = pytest.StashKey[Path]()
_TRIALS = pytest.StashKey[Trials]()
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
    """Checks run in the order of the requirements, however they are spread over files."""
    places = {item: _place(item) for item in items}
    items.sort(key=places.__getitem__)


def _place(item: pytest.Item) -> tuple[str, bool, int]:
    """Walks come last: they are for what no other check finds."""
    exercise, number = exercise_of(item.path), requirement_of(item)
    ids = [requirement.id for requirement in exercise.requirements]
    walk = item.get_closest_marker("walk") is not None
    return exercise.id, walk, ids.index(number) if number in ids else len(ids)


def pytest_runtestloop(session: pytest.Session) -> None:
    """Starts the helper of own tests before the first check."""
    if any("trials" in _fixtures(item) for item in session.items):
        load_late_modules()
        start_trials(session.config)


def load_late_modules() -> None:
    """Loads the 800 modules that torch loads at the first use of this and that, once before forks rather than in each.
    It takes more than a second.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._dynamo")


def start_trials(config: pytest.Config) -> None:
    """Starts the helper process of own tests where none runs; only before any tensor work in this process."""
    if _TRIALS not in config.stash:
        config.stash[_TRIALS] = Trials()


def pytest_unconfigure(config: pytest.Config) -> None:
    end_trials(config)


def end_trials(config: pytest.Config) -> None:
    """Ends the helper process of own tests, where one runs."""
    if (trials := config.stash.get(_TRIALS, None)) is not None:
        trials.close()
        del config.stash[_TRIALS]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path.parent in item.config.stash.setdefault(_HUNG, set()):
        raise NotRun
    os.chdir(item.config.stash.get(FOLDER, TOP))
    neutral_state()


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    """The learner's module, loaded at the first use of one of its names."""
    return Subject(submission_path(request.node))


@pytest.fixture
def submission_file(request: pytest.FixtureRequest) -> Path:
    """The learner's file of the exercise that this check belongs to."""
    return submission_path(request.node)


@pytest.fixture
def close(request: pytest.FixtureRequest) -> Close:
    """The one comparison; its tolerance is that of `on`, where the check asks for `on`."""
    place: Where = request.getfixturevalue("on") if "on" in request.fixturenames else CPU
    return Close(place.tolerance)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A CPU generator of this check's own, seeded by its name."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Trials:
    """The helper process that runs own tests."""
    return request.config.stash[_TRIALS]


@pytest.fixture
def ruff(request: pytest.FixtureRequest, submission_file: Path) -> Callable[[], None]:
    """Runs ruff on the learner's file and fails on findings."""
    return lambda: linters.ruff(submission_file, exercise_of(request.node.path))


@pytest.fixture
def mypy(submission_file: Path) -> Callable[[], None]:
    """Runs mypy on the learner's file and fails on findings."""
    return lambda: linters.mypy(submission_file)


def submission_path(item: pytest.Item, folder: Path | None = None) -> Path:
    """The learner's file of an item's exercise: in a folder, or in the one that the options name."""
    folder = folder or item.config.getoption("--submission", "exercises")
    return Path(TOP, folder, exercise_of(item.path).file_name)


def requirement_of(item: pytest.Item) -> str:
    """The requirement that an item decides."""
    mark = item.get_closest_marker("requirement")
    if mark is None:
        raise pytest.UsageError(f"{item.nodeid}: no @requirement")
    return str(mark.args[0])


def earns(item: pytest.Item) -> bool:
    """Whether an item counts: what runs elsewhere than on the CPU in float64 is shown only."""
    return "on" not in _fixtures(item) or _parameter(item, "on") == CPU


def _parameter(item: pytest.Item, name: str) -> object:
    assert isinstance(item, pytest.Function)
    return item.callspec.params[name]


def kind_of(item: pytest.Item) -> str:
    """Which process runs an item: "code" (the learner's), "own test", "ruff" and "mypy" do not share one."""
    fixtures = _fixtures(item)
    return "own test" if "trials" in fixtures else next((tool for tool in ("ruff", "mypy") if tool in fixtures), "code")


def _fixtures(item: pytest.Item) -> list[str]:
    return getattr(item, "fixturenames", [])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Turns what a check raised into a message for the learner: no traceback of the harness's own.

    pytest does not see the exception: the traceback that it would format, and nobody would read, takes 4 ms.
    """
    excinfo, call.excinfo = call.excinfo, None
    outcome: Any = yield
    call.excinfo = excinfo
    report: pytest.TestReport = outcome.get_result()
    if excinfo is not None:
        shorten(excinfo.value)
        path = submission_path(item)
        result = explain(excinfo.value, requirement_of(item), item.name, path, exercise_of(item.path))
        result = replace(result, message=bounded(result.message))
        item.stash.setdefault(_RESULT, result)
        if result.outcome == "timeout":
            item.config.stash[_HUNG].add(item.path.parent)
        report.outcome, report.longrepr = "failed", f"{result.requirement}: {result.message}\n{_location(path, result)}"
        if result.kind == "unjudged":
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, result.message)
    if call.when == "teardown" and (sink := item.config.stash.get(SINK, None)) is not None:
        sink(item.stash.get(_RESULT, Result(requirement_of(item), item.name, "passed")))


def _location(path: Path, result: Result) -> str:
    shown = path.relative_to(TOP) if path.is_relative_to(TOP) else path
    return f"{shown}:{result.line}" if result.line else str(shown)
