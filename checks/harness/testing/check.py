"""A check as the harness knows it: what pytest collected, looked at once. And the fixtures that check files name."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from harness.model.exercise import Exercise, exercise_of
from harness.model.limits import KIND_SECONDS
from harness.model.paths import TOP
from harness.model.results import Cause, Outcome, Result
from harness.testing import lint as linters
from harness.testing.compare import CPU, Close, Where
from harness.testing.own_test import OwnTest
from harness.testing.own_test_process import Trials
from harness.testing.subject import Subject

Kind = Literal["code", "ruff", "mypy", "own test"]
# Those that people wait for come first.
KINDS: tuple[Kind, ...] = ("code", "ruff", "mypy", "own test")
_CHECK = pytest.StashKey["Check"]()
_TRIALS = pytest.StashKey[Trials]()


@dataclass(frozen=True, eq=False)
class Check:
    """One check.

    Args:
        item: what pytest runs.
        requirement: the requirement that it decides, "1.5".
        kind: which process runs it: the learner's code and the tools do not share one.
        limit: seconds that it may run before it counts as a hang.
        walk: it is a walk's; these come last, since they are for what no other check finds.
        halfway: by time, half of the exercise's checks of the code come before it.
        counts: whether it earns: what runs elsewhere than on the CPU in float64 is only shown.
        forbids: it names `forbid`, which makes it one of "from scratch".
        own_test: what its file says of the exercise's own test.
    """

    item: pytest.Item
    exercise: Exercise
    requirement: str
    kind: Kind
    limit: float
    walk: bool
    halfway: bool
    counts: bool
    forbids: bool
    own_test: OwnTest | None

    @property
    def name(self) -> str:
        """The function's name, with its parameters in brackets; one of its own within the exercise."""
        return self.item.name

    @property
    def file(self) -> Path:
        """The learner's file, in the folder that the options name."""
        return Path(TOP, self.item.config.getoption("--submission", "exercises"), self.exercise.file_name)

    def result(self, outcome: Outcome, message: str = "", line: int = 0, kind: Cause = "", printed: str = "") -> Result:
        """What it said."""
        return Result(self.requirement, self.name, outcome, message, line, kind, printed)


def check_of(item: pytest.Item) -> Check:
    """The check that a collected item is.

    Raises:
        pytest.UsageError: it decides no requirement.
    """
    if _CHECK not in item.stash:
        item.stash[_CHECK] = _looked_at(item)
    return item.stash[_CHECK]


def _looked_at(item: pytest.Item) -> Check:
    assert isinstance(item, pytest.Function)
    requirement, limit = item.get_closest_marker("requirement"), item.get_closest_marker("limit")
    if requirement is None:
        raise pytest.UsageError(f"{item.nodeid}: no @requirement")
    fixtures = item.fixturenames
    kind: Kind = "own test" if "trials" in fixtures else "code"
    kind = "ruff" if "ruff" in fixtures else "mypy" if "mypy" in fixtures else kind
    return Check(
        item,
        exercise_of(item.path),
        str(requirement.args[0]),
        kind,
        float(limit.args[0]) if limit is not None else KIND_SECONDS[kind],
        walk=item.get_closest_marker("walk") is not None,
        halfway=item.get_closest_marker("halfway") is not None,
        counts="on" not in fixtures or item.callspec.params["on"] == CPU,
        forbids="forbid" in item.function.__code__.co_names,
        own_test=getattr(item.module, "OWN_TEST", None),
    )


def start_trials(config: pytest.Config) -> None:
    """Starts the helper process of own tests where none runs; only before any tensor work in this process."""
    if _TRIALS not in config.stash:
        config.stash[_TRIALS] = Trials()


def end_trials(config: pytest.Config) -> None:
    """Ends the helper process of own tests, where one runs."""
    if (trials := config.stash.get(_TRIALS, None)) is not None:
        trials.close()
        del config.stash[_TRIALS]


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    """The learner's module, loaded at the first use of one of its names."""
    return Subject(check_of(request.node).file)


@pytest.fixture
def submission_file(request: pytest.FixtureRequest) -> Path:
    """The learner's file of the exercise that this check belongs to."""
    return check_of(request.node).file


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
def ruff(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Runs ruff on the learner's file and fails on findings."""
    check = check_of(request.node)
    return lambda: linters.ruff(check.file, check.exercise)


@pytest.fixture
def mypy(submission_file: Path) -> Callable[[], None]:
    """Runs mypy on the learner's file and fails on findings."""
    return lambda: linters.mypy(submission_file)
