"""`make check DEVICE=…`: checks on another device are shown and never counted. A stand-in plays the GPU."""

import resource
from pathlib import Path

import pytest

from devtools.workspace import Workspace
from selftest import toys as toy

CHECKS = toy.CHECKS.replace('@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)\n', "").replace(
    "dtype: torch.dtype", "on: Where"
)
CHECKS = CHECKS.replace("dtype=dtype)", "dtype=on.dtype).to(on.device)").replace(
    "Subject, own_test", "Subject, Where, own_test"
)
# Right where it counts; elsewhere it is wrong, or tells which limit on memory it runs under.
WRONG_ELSEWHERE = """\
    if x.dtype == torch.bfloat16:
        return 3 * x
    if x.dtype == torch.float32:
        import resource

        raise ValueError(f"limit {resource.getrlimit(resource.RLIMIT_AS)[0]}")
    return 2 * x
"""


@pytest.fixture
def exercise(workspace: Workspace) -> Path:
    """The toy exercise in a copy of the workspace, alone; its check compares on the place that it is given."""
    workspace.keep()
    toy.plant(workspace)
    (workspace.top / toy.FOLDER / "test_solve.py").write_text(CHECKS)
    path = workspace.top / "exercises" / toy.FILE
    path.write_text(toy.ANSWER.replace("    return 2 * x\n", WRONG_ELSEWHERE))
    return path


def test_another_device_is_shown_and_not_counted(workspace: Workspace, exercise: Path) -> None:
    _raises_elsewhere(workspace, exercise)

    exercise.write_text(exercise.read_text().replace("torch.float32:", "torch.float16:"))
    shown = workspace.make("check", "DEVICE=stand-in").stdout.partition("shown but not counted:\n")[2]
    assert "1 of 2 checks pass" in shown and "error: 42.1 double(x): 15 of 15 values differ" in shown, shown
    assert "(tolerance 0.05)\n  check: test_doubles[cpu-bfloat16]" in shown, shown


def test_where_nothing_can_fork_too(workspace: Workspace, exercise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXERCISES_COLD", "1")

    _raises_elsewhere(workspace, exercise)


def _raises_elsewhere(workspace: Workspace, exercise: Path) -> None:
    done = workspace.make("check", "DEVICE=stand-in")

    assert done.returncode == 0, done.stdout
    counted, _, shown = done.stdout.partition("agreement on stand-in, shown but not counted:\n")
    assert "ex42  Doubling  done  15/15" in counted and "error" not in counted, counted
    assert "  ex42  Doubling  0 of 2 checks pass\n" in shown, shown
    # CUDA could not even start under the limit on addresses that other children have.
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    line = exercise.read_text().partition("raise ValueError")[0].count("\n") + 1
    assert f"exercises/{toy.FILE}:{line}:9: error: 42.1 your code raises ValueError: limit {limit}\n" in shown, shown
    assert "  check: test_doubles[cpu-float32]" in shown, shown


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("cuda", "finds no GPU here; make check judges on the CPU, make doctor says more"),
        ("tpu", "DEVICE=tpu: cpu or cuda is wanted"),
    ],
)
def test_a_device_that_is_not_there_is_said_in_one_line(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, device: str, says: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    done = workspace.make("check", f"DEVICE={device}")

    lines = [line for line in done.stdout.splitlines() if not line.startswith("make: ***")]
    assert done.returncode == 2 and len(lines) == 1 and says in lines[0], done.stdout
