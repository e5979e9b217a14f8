"""The real `make watch` in a pseudo-terminal, through everything that can happen to it."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from devtools.terminal import Terminal
from devtools.workspace import READY, Workspace, processes, quiet

FILE = "ex01_multi_head_attention.py"


@pytest.fixture
def watch(workspace: Workspace) -> Iterator[Terminal]:
    terminal = Terminal(workspace.make_command("watch", "EX=1"), workspace.top)
    yield terminal
    with suppress(ProcessLookupError):
        os.kill(terminal.pid, signal.SIGKILL)
    for pid in processes(workspace, "python"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_the_loop(workspace: Workspace, watch: Terminal) -> None:
    path = workspace.top / "exercises" / FILE
    starter, answer = path.read_text(), workspace.answer(FILE)

    # At start every exercise is judged that has no verdict.
    first = watch.until(READY)
    assert f"judging exercises/{FILE} …" in first and "not started" in first, first
    shown = " ".join(first.split())
    assert f"next: open exercises/{FILE}: step 1 of " in shown and "minutes); every save is judged" in shown, first

    # A save is judged, and only what was saved.
    path.write_text(answer)
    saved = watch.until(READY)
    assert "done" in saved and "50/50" in saved and "✓ 1.1  " in saved, saved
    assert saved.count("judging ") == 1

    # mypy's daemon has survived it: without it a save costs a quarter of a second more.
    assert processes(workspace, "mypy.dmypy")

    # A mistake: where, what came, what was wanted; and what the code printed.
    path.write_text(answer.replace("q.size(-1) ** -0.25", "q.size(-1) ** -0.5; print('here', q.dim())"))
    wrong = watch.until(READY)
    assert f"\nexercises/{FILE}:" in wrong and ": error: 1.1 forward: weights: " in wrong, wrong
    assert "in progress" in wrong and "| here 4" in wrong and " checks" in wrong

    # A file that does not parse, saved as vim does it: by an atomic rename.
    scratch = path.with_name("scratch~")
    scratch.write_text(answer + "\ndef broken(:\n")
    scratch.rename(path)
    broken = watch.until(READY)
    line = answer.count("\n") + 2
    assert "does not import" in broken and f"\nexercises/{FILE}:{line}:1: error: SyntaxError" in broken, broken

    # An endless loop is superseded by the next save.
    path.write_text(
        answer.replace("        scores_shape = (", "        while True:\n            pass\n        scores_shape = (")
    )
    watch.until("judging ")
    time.sleep(1)
    begin = time.monotonic()
    path.write_text(answer)
    assert "50/50" in watch.until(READY)
    assert time.monotonic() - begin < 8, "the save waited for the endless loop"

    # The warm process is killed: the next save brings a new one.
    for pid in processes(workspace, "harness serve"):
        os.kill(pid, signal.SIGKILL)
    path.write_text(answer + "# again\n")
    assert "50/50" in watch.until(READY)

    # A change under checks/ is never missed.
    check_file = workspace.top / "checks" / FILE.removesuffix(".py") / "test_scale_and_dropout.py"
    check_file.write_text(check_file.read_text().replace('hint="13 and -2,', 'hint="thirteen and -2,'))
    path.write_text(answer.replace("q.size(-1) ** -0.25", "0.5 * q.size(-1) ** -0.25"))
    changed = watch.until(READY)
    assert "loading torch and the checks …" in changed and "in progress" in changed, changed

    # A second watch beside the first: both see the save.
    second = Terminal(workspace.make_command("watch", "EX=1"), workspace.top)
    second.until(READY)
    path.write_text(answer)
    assert "50/50" in second.until(READY)
    assert "50/50" in watch.until(READY)
    second.interrupt()
    assert second.ended()

    # Deleted, and back again.
    path.unlink()
    gone = watch.until("no file")
    path.write_text(starter)
    assert "not started" in watch.until(READY) + gone

    # Ctrl-C in the middle of a run ends everything.
    path.write_text("while True:\n    pass\n")
    watch.until("judging ")
    watch.interrupt()
    assert watch.ended()
    assert quiet(workspace), "processes stay behind"
