"""The kill matrix of every exercise: right answers pass, each mistake fails where and as it should."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness.model.bank import BankError, Mistake
from harness.model.exercise import exercises
from harness.model.paths import TOP


@pytest.fixture(scope="module")
def matrices() -> dict[str, subprocess.CompletedProcess[str]]:
    """The output of `devtools bank-quick` for each exercise, two at a time."""

    def run(exercise: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-W", "ignore", "-m", "devtools", "bank-quick", "--ex", exercise]
        environment = {**os.environ, "PYTHONPATH": str(TOP / "checks")}
        return subprocess.run(command, env=environment, cwd=TOP, capture_output=True, text=True, timeout=600)

    # ex04 waits rather than computes: it is begun first.
    order = sorted(exercises(), key=lambda exercise: exercise != "ex04")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(order, pool.map(run, order), strict=True))


@pytest.mark.parametrize("exercise", exercises())
def test_the_bank_holds(
    matrices: dict[str, subprocess.CompletedProcess[str]], exercise: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = matrices[exercise]

    with capsys.disabled():
        print("\n" + done.stdout)
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert done.returncode == 0, "\n".join([*problems, done.stderr[-2000:]])


def test_an_edit_that_does_not_fit_is_named() -> None:
    with pytest.raises(BankError, match="mistake m: 'b' occurs 2 times in the answer, not once"):
        Mistake("m", "1.1", "", ("b", "c")).applied_to("abba")
