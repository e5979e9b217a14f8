"""VS Code's Test Explorer: the command lines of its Python extension, with a plugin of our own in place of its.

Discovery is `PY -m pytest -p PLUGIN --collect-only ARGS --rootdir=WORKSPACE`; a run is
`pytest.main(["-p", PLUGIN, *OPTIONS, *IDS])` with the workspace first on sys.path, absolute ids, and ARGS without its
positional words.
"""

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from devtools.workspace import Workspace
from harness.model.exercise import exercises
from harness.model.paths import TOP
from harness.runner import shards
from selftest import toys as toy
from selftest.written import node_id, written

EX01 = exercises()["ex01"]
FILE = EX01.file_name
TOY = f"{toy.FOLDER.removeprefix('checks/')}/test_solve.py"
CONTAINER = TOP / ".devcontainer" / "devcontainer.json"
PLUGIN = "explorer_recorder"
RUN = "import sys; sys.path.insert(0, sys.argv[1]); import pytest; sys.exit(pytest.main(sys.argv[2:]))"
TAKES_A_WORD = ("-c", "-k", "-m", "-n", "-o", "-p", "-r", "-W", "--rootdir", "--confcutdir", "--tb", "--capture")


def pytest_args() -> list[str]:
    """python.testing.pytestArgs, as the workspace sets it for its container; a folder's settings are the same."""
    found = re.search(r'"python\.testing\.pytestArgs":\s*(\[[^\]]*\])', CONTAINER.read_text(encoding="utf-8"))
    assert found is not None, f"{CONTAINER.name} sets no python.testing.pytestArgs"
    return [str(word) for word in json.loads(found[1])]


def options(arguments: list[str]) -> list[str]:
    """The arguments without positional words, as the extension drops them for a run."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return [word for before, word in pairs if word.startswith("-") or before in TAKES_A_WORD]


@dataclass
class Told:
    """How one command line ended, and what the plugin told."""

    code: int
    output: str
    pid: int
    lines: list[dict[str, Any]]

    def outcomes(self) -> dict[str, str]:
        """The last part of each reported id, with its outcome; every check is reported once."""
        reports = [(line["id"].partition("::")[2], line["outcome"]) for line in self.lines if "id" in line]
        assert len(dict(reports)) == len(reports), f"reported twice: {reports}"
        assert {line["pid"] for line in self.lines if "id" in line} <= {self.pid}, "reported by another process"
        return dict(reports)


class Explorer:
    """The Test Explorer of a copy of the workspace."""

    def __init__(self, workspace: Workspace, scratch: Path) -> None:
        self.workspace = workspace
        self.top = workspace.top
        self._scratch = scratch

    def discover(self) -> Told:
        """Lists the checks."""
        return self._call("-m", "pytest", "-p", PLUGIN, "--collect-only", *pytest_args(), f"--rootdir={self.top}")

    def run(self, *ids: str) -> Told:
        """Runs checks by their absolute ids."""
        arguments = [*options(pytest_args()), f"--rootdir={self.top}"]
        return self._call("-c", RUN, str(self.top), "-p", PLUGIN, *arguments, *ids)

    def id(self, node: str) -> str:
        """The absolute id of a check, or of a check file."""
        return f"{self.top}/checks/{node}"

    def _call(self, *command: str) -> Told:
        pipe = self._scratch / "pipe"
        pipe.write_text("")
        outer = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        variables = {**outer, "PYTHONPATH": str(Path(__file__).parent), "TEST_RUN_PIPE": str(pipe)}
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *command],
            cwd=self.top,
            env=variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = process.communicate(timeout=120)
        lines = [json.loads(line) for line in pipe.read_text(encoding="utf-8").splitlines()]
        return Told(process.returncode, output, process.pid, lines)


@pytest.fixture
def explorer(workspace: Workspace, tmp_path: Path) -> Explorer:
    return Explorer(workspace, tmp_path)


def test_every_check_is_listed_although_every_exercise_is_broken(explorer: Explorer) -> None:
    for path in (explorer.top / "exercises").glob("*.py"):
        path.write_text("def broken(:\n")

    found = explorer.discover()

    assert found.code == 0, found.output
    assert not [line for line in found.lines if "broken" in line], found.output
    listed = {line["listed"].partition("[")[0] for line in found.lines}
    assert listed == {
        explorer.id(node_id(exercise, name)) for exercise in exercises().values() for name in written(exercise)
    }
    assert "selftest" not in found.output


def test_a_run_reports_each_check_from_its_own_process(explorer: Explorer) -> None:
    path = explorer.top / "exercises" / FILE
    path.write_text(path.read_text().replace("from torch import", "from torch import nosuch,"))
    names = ("test_scores_by_hand", "test_agrees_with_pytorch[cpu-float64-cross-train]", "test_ruff_finds_nothing")

    told = explorer.run(*(explorer.id(node_id(EX01, name)) for name in names))

    assert told.code == 1 and told.outcomes() == dict.fromkeys(names, "failed"), told.output
    assert all("nosuch" in line["says"] for line in told.lines if "id" in line), told.lines


def test_a_single_id_runs_alone(explorer: Explorer) -> None:
    """Of its exercise nothing else is asked for, and nothing complains about that."""
    path = explorer.top / "exercises" / FILE
    path.write_text((explorer.top / "answers" / FILE).read_text())

    alone = explorer.run(explorer.id(node_id(EX01, "test_scores_by_hand")))

    assert alone.code == 0 and "warning" not in alone.output.lower(), alone.output
    assert alone.outcomes() == {"test_scores_by_hand": "passed"}


LOOP = "    while True:\n        pass\n"
CATCHING = """
    try:
        while True:
            pass
    except Exception:
        while True:
            pass
"""


@pytest.mark.parametrize("hang", [LOOP, CATCHING], ids=["loop", "loop-that-catches"])
def test_a_hang_ends_as_it_does_on_the_board(explorer: Explorer, hang: str) -> None:
    """The check that hangs fails with the board's own message, the rest of its exercise is not run."""
    _plant(explorer, toy.ANSWER.replace("    return 2 * x\n", hang))

    told = explorer.run(explorer.id(TOY))

    outcomes = told.outcomes()
    assert told.code == 1 and outcomes.pop("test_doubles[torch.float32]") == "failed", told.output
    assert len(outcomes) == 6 and set(outcomes.values()) == {"error"}, outcomes
    first, *others = [line["says"] for line in told.lines if "id" in line]
    board = "an endless loop, or a wait that nothing ends"
    assert first.startswith(f"42.1: did not end within 1 s: {board}\nexercises/{toy.FILE}:"), first
    assert board in inspect.getsource(shards)
    assert all("not run after the hang" in says for says in others), others


def test_what_no_signal_interrupts_ends_the_run(explorer: Explorer) -> None:
    _plant(explorer, toy.ANSWER.replace("return 2 * x", "return x * sum(range(10**15))"))
    limits = explorer.top / "checks" / "harness" / "model" / "limits.py"
    limits.write_text(limits.read_text().replace("GRACE_SECONDS = 20.0", "GRACE_SECONDS = 1.0"))

    told = explorer.run(explorer.id(TOY))

    assert told.code == 1 and f'exercises/{toy.FILE}", line {toy.DOUBLE + 2} in double' in told.output, told.output


def _plant(explorer: Explorer, exercise: str) -> None:
    """Puts the toy exercise into a copy of the workspace, its first check with a time limit."""
    toy.plant(explorer.workspace)
    (explorer.top / "exercises" / toy.FILE).write_text(exercise)
    checks = explorer.top / toy.FOLDER / "test_solve.py"
    checks.write_text(toy.CHECKS.replace("@requirement(", "@pytest.mark.limit(1)\n@requirement(", 1))
