"""An exercise comes in by files alone: a toy one is watched, checked, answered, tested like the others."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

from devtools.workspace import READY, Terminal, Workspace, processes, quiet

FILE = "ex42_doubling.py"
STARTER = '''"""ex42: Doubling

Doubles tensors.

Requirements
42.1 (correctness) Double: `double` returns twice its input, in the input's dtype.
42.2 (correctness) Write your own test: `test_double` passes on right code and fails on each of the slips listed below.
42.3 (readability) Reads well: ruff and mypy find nothing. Counts once half of the other requirements are earned.

Your own test is judged on right code and on these slips:
- adds_two: two is added instead
- squares: the square is returned

Discuss
1. What does a doubling cost?
2. When does it overflow?
3. What would you watch in production?
4. What would you make faster?
"""

from torch import Tensor


def double(x: Tensor) -> Tensor:
    """Twice `x`."""
    # TODO(42.1, 42.3): double x.
    raise NotImplementedError("TODO 42.1")


def test_double() -> None:
    """Your own test of `double`."""
    # TODO(42.2): call double and assert what it returns.
    raise NotImplementedError("TODO 42.2")
'''
ANSWER = (
    STARTER.replace("from torch import Tensor", "import torch\nfrom torch import Tensor")
    .replace('    # TODO(42.1, 42.3): double x.\n    raise NotImplementedError("TODO 42.1")\n', "    return 2 * x\n")
    .replace(
        '    # TODO(42.2): call double and assert what it returns.\n    raise NotImplementedError("TODO 42.2")\n',
        "    assert double(torch.tensor(3.0)) == 6.0\n",
    )
)
CHECKS = '''"""Checks of ex42: doubling."""

import pytest
import torch
from harness.testing import Close, OwnTest, Subject, Trials, requirement

OWN_TEST = OwnTest(__file__, "test_double", swaps=("double",))


@requirement("42.1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_doubles(subject: Subject, close: Close, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Every element is twice what it was."""
    x = torch.randn(3, 5, generator=rng, dtype=dtype)

    close(subject.double(x), 2 * x, "double(x)")


@requirement("42.2")
@pytest.mark.parametrize("right", OWN_TEST.right)
def test_own_test_passes_on(submission_file, trials: Trials, right: str) -> None:
    """The learner's test passes on right code."""
    OWN_TEST.passes_on(right, trials, submission_file)


@requirement("42.2")
@pytest.mark.parametrize("slip", OWN_TEST.slips)
def test_own_test_catches(submission_file, trials: Trials, slip: str) -> None:
    """The learner's test fails on a slip."""
    OWN_TEST.catches(slip, trials, submission_file)


@requirement("42.3")
def test_ruff_finds_nothing(ruff) -> None:
    """Ruff finds nothing."""
    ruff()


@requirement("42.3")
def test_mypy_finds_nothing(mypy) -> None:
    """Mypy finds nothing."""
    mypy()
'''
MISTAKES = '''"""Wrong answers of ex42."""

from harness.testing import Mistake

MISTAKES = [
    Mistake("adds_two", "42.1", [("return 2 * x", "return 2 + x")], says="double(x)", only=True),
    Mistake("squares", "42.1", [("return 2 * x", "return x * x")], says="double(x)"),
    Mistake("tests_nothing", "42.2", [("    assert double(torch.tensor(3.0)) == 6.0", "    double(torch.tensor(3.0))")],
        says="passes although the code under it is wrong", only=True),
]
'''
BENCH = '''"""Bench of ex42."""

import torch
from harness.testing.bench import Case

X, REFERENCE = "elements", "x + x"


def cases(modules):
    """Doubling, beside a sum."""
    for size in (8, 16):
        x = torch.ones(size)
        runs = {name: lambda m=module, x=x: {"sum": float(m.double(x).sum())} for name, module in modules.items()}
        yield Case("doubling", size, runs | {REFERENCE: lambda x=x: {"sum": float((x + x).sum())}}, memory=True)


def conclude(measured):
    """What the sums are."""
    yield str(next(one.values["answer"] for one in measured if one.metric == "sum"))
'''
REPLIES = "\n## ex42 Doubling\n\n1. One pass.\n2. At half the range.\n3. Overflow.\n4. Nothing.\n"


@pytest.fixture
def grown(workspace: Workspace) -> Iterator[Workspace]:
    """A copy of the workspace with the toy exercise; whatever runs in it is ended."""
    files = {
        f"exercises/{FILE}": STARTER,
        f"checks/starters/{FILE}": STARTER,
        f"checks/test_{FILE}": CHECKS,
        "checks/mistakes/ex42.py": MISTAKES,
        f"answers/{FILE}": ANSWER,
        "checks/benches/ex42.py": BENCH,
        "checks/variants/ex42/sums.py": ANSWER.replace("return 2 * x", "return x + x"),
    }
    for name, text in files.items():
        path = workspace.top / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    with (workspace.top / "answers" / "discussion.md").open("a") as discussion:
        discussion.write(REPLIES)
    yield workspace
    for pid in processes(workspace, "python"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_it_is_watched(grown: Workspace) -> None:
    path = grown.top / "exercises" / FILE
    watch = Terminal(grown.make_command("watch", "EX=42"), grown.top)
    assert "not started" in watch.until(READY, 120)

    path.write_text(ANSWER)
    done = watch.until(READY)
    assert "15/15" in done and "✓ 42.2 Write your own test" in done, done

    path.write_text(ANSWER.replace("2 * x", "3 * x"))
    wrong = watch.until(READY)
    assert f"\nexercises/{FILE}:25: error: 42.1 double(x): " in wrong, wrong

    watch.interrupt()
    assert watch.ended() and quiet(grown)


def test_it_is_checked_graded_and_answered(grown: Workspace) -> None:
    board = grown.make("check", "EX=42", "SUBMISSION=answers")
    assert board.returncode == 0 and "15/15" in board.stdout, board.stdout

    graded = grown.make("grade", "EX=42")
    assert graded.returncode == 0 and "ex42 0/15 not started" in graded.stdout, graded.stdout

    answer = grown.make("answer", "EX=42", "FORCE=1")
    assert "+    return 2 * x" in answer.stdout and "At half the range." in answer.stdout, answer.stdout


def test_it_is_measured(grown: Workspace) -> None:
    done = grown.make("bench", "EX=42", seconds=300)

    assert done.returncode == 0, done.stdout
    assert "yours is left out: doubling, 8: NotImplementedError: TODO 42.1" in done.stdout
    assert "doubling: peak bytes" in done.stdout and "{8: 16.0, 16: 32.0}" in done.stdout, done.stdout
    assert "picture: build/bench/ex42.png" in done.stdout
    assert (grown.top / "build" / "bench" / "ex42.png").read_bytes().startswith(b"\x89PNG")
    assert "make bench wants one exercise" in grown.make("bench").stdout


def test_it_is_tested(grown: Workspace) -> None:
    environment = {**os.environ, "PYTHONPATH": str(grown.top / "checks"), "PYTHONWARNINGS": "ignore"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        python = [sys.executable, "-P", *command]
        return subprocess.run(python, env=environment, cwd=grown.top, capture_output=True, text=True, timeout=120)

    bank = run("-m", "harness", "bank", "ex42")
    assert bank.returncode == 0 and "adds_two" in bank.stdout, bank.stdout + bank.stderr

    form = ("-c", "checks/selftest/pytest.ini", "checks/selftest/test_specification.py", "-q", "-k", "ex42 or stray")
    tested = run("-m", "pytest", *form)
    assert tested.returncode == 0, tested.stdout
