"""Bad days of the watch: closed terminals, folders that go, code that prints without end, no file events, no room."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from devtools.terminal import Terminal
from devtools.workspace import READY, Workspace, processes, quiet
from harness.model.exercise import exercises
from harness.model.paths import CHECKS

EX01 = exercises()["ex01"]
FILE = EX01.file_name
FORWARD = "        scores_shape = ("


@pytest.fixture
def small(workspace: Workspace) -> Iterator[Workspace]:
    """A copy of the workspace with one exercise; whatever runs in it is ended."""
    workspace.keep("ex01")
    yield workspace
    for pid in processes(workspace, "python"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def begun(workspace: Workspace, command: list[str] | None = None) -> Terminal:
    watch = Terminal(command or workspace.make_command("watch", "EX=1"), workspace.top)
    watch.until(READY, 120)
    return watch


def test_nothing_stays_when_what_started_the_watch_has_gone(small: Workspace) -> None:
    """The shell around it is hung up, and the folder with all that the watch keeps is removed meanwhile."""
    make = " ".join(f"'{word}'" for word in small.make_command("watch", "EX=1"))
    shell = begun(small, ["sh", "-c", f"{make}; true"])
    deadline = time.monotonic() + 20
    while not processes(small, "mypy.dmypy") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes(small, "mypy.dmypy"), "mypy's daemon does not run"

    subprocess.run(["rm", "-rf", str(small.top / "build")], check=True)
    os.kill(shell.pid, signal.SIGHUP)

    assert quiet(small, 20), [(pid, open(f"/proc/{pid}/cmdline").read()) for pid in processes(small, "python")]


def test_what_is_printed_and_raised_without_end_is_cut(small: Workspace) -> None:
    watch = begun(small)
    flood = '        print("x" * 9_000_000)\n        raise ValueError("y\\n" * 1_000_000)\n'
    answer = small.answer(FILE)

    (small.top / "exercises" / FILE).write_text(answer.replace(FORWARD, flood + FORWARD))
    shown = watch.until(READY, 120)

    flat = " ".join(shown.split())
    assert "your code raises ValueError: y" in flat and "cut: 2,000,000 characters in all" in flat, shown[-3000:]
    assert shown.count("\n") < 120, shown[-3000:]
    assert (small.top / "build" / "verdicts.json").stat().st_size < 2_000_000


def test_a_class_that_is_edited_runs_no_trial_of_the_own_test(small: Workspace) -> None:
    watch, path = begun(small), small.top / "exercises" / FILE
    log = small.top.parent / "runs.txt"
    counted = f"    torch.manual_seed(0)\n    open({str(log)!r}, 'a').write('x')\n"
    answer = small.answer(FILE).replace("    torch.manual_seed(0)\n", counted, 1)

    path.write_text(answer)
    assert "50/50" in watch.until(READY)
    runs = len(log.read_text())
    path.write_text(answer.replace("mask == 0", "mask != 0"))
    wrong = watch.until(READY)
    path.write_text(answer.replace("    scale = q", "    # Scaled on both sides.\n        scale = q"))
    assert "50/50" in watch.until(READY)

    assert runs > 10 and len(log.read_text()) == runs
    assert "✓ 1.9  Write your own test" in wrong and "lost: 1.2" in wrong, wrong


def test_the_code_is_judged_first_and_the_rest_follows(small: Workspace) -> None:
    watch, path = begun(small), small.top / "exercises" / FILE
    path.write_text(small.answer(FILE))
    assert "50/50" in watch.until(READY)

    slow = small.answer(FILE).replace(
        "    torch.manual_seed(0)\n", "    import time; time.sleep(0.3)\n    torch.manual_seed(0)\n", 1
    )
    path.write_text(slow)
    first = watch.until("code judged in ")
    rest = watch.until(READY)

    assert re.search(r"✓ 1\.9  Write your own test +as of the last save", first), first
    assert "✓ 1.9  Write your own test\n" in rest and READY not in first, rest


def test_a_verdict_is_shown_although_nothing_can_be_kept(small: Workspace) -> None:
    subprocess.run(["rm", "-rf", str(small.top / "build")], check=True)
    (small.top / "build").write_text("a file where a folder should be\n")
    (small.top / "exercises" / FILE).write_text(small.answer(FILE))

    done = small.make("check", "EX=1", seconds=200)

    assert "build/ cannot be written to: nothing is kept" in done.stdout, done.stdout
    assert "build/verdicts.json cannot be written (" in done.stdout and "ex01  Multi-head attention" in done.stdout
    assert "Traceback" not in done.stdout


def test_without_file_events_the_watch_looks_by_itself() -> None:
    code = """
import resource
from harness.commands import watch
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
print(watch._events())
"""
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(CHECKS)}, capture_output=True, text=True)

    said = "no file events are to be had (Too many open files): saves are looked for instead, which takes a second"
    assert done.stdout.splitlines() == [said, "False"], done.stdout + done.stderr


def test_a_breakpoint_says_where_one_debugs(small: Workspace) -> None:
    (small.top / "exercises" / FILE).write_text(small.answer(FILE).replace(FORWARD, f"        breakpoint()\n{FORWARD}"))

    done = small.make("check", "EX=1")

    assert "breakpoint() stops nobody here; VS Code's Test Explorer debugs a check (Debug Test)" in done.stdout
    assert "in forward(query float64 [2, 1, 12], key float64 [2, 1, 12], value float64 [2, 1, 12]" in done.stdout


def test_saves_that_follow_each_other_leave_no_traceback(small: Workspace) -> None:
    watch, path, answer = begun(small), small.top / "exercises" / FILE, small.answer(FILE)

    for number in range(25):
        path.write_text(f"{answer}# {number}\n")
        time.sleep(0.02 + 0.02 * (number % 7))
    path.write_text(answer)
    shown = watch.until(READY)
    deadline = time.monotonic() + 20
    while "50/50" not in shown and time.monotonic() < deadline:
        shown += watch.until(READY)

    assert "50/50" in shown and "Traceback" not in shown and "Error" not in shown, shown


def test_the_cache_names_what_it_holds(small: Workspace) -> None:
    small.make("check", "EX=1")

    kept = json.loads((small.top / "build" / "verdicts.json").read_text())
    assert set(kept) == {"version", "exercises", "own tests"} and set(kept["exercises"]) == {"ex01"}
