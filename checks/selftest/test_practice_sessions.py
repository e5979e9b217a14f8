"""Practice sessions as people open, leave and end them, by the real commands; the bank's side is in test_banks."""

import json
import re
import shutil

import pytest

from devtools.terminal import Terminal
from devtools.workspace import READY, Workspace, quiet
from harness.model.exercise import exercises
from harness.practice.planted import file_text

EX05 = exercises()["ex05"]
FILE = EX05.file_name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("debug",), "make debug wants one exercise, as in: make debug EX=1"),
        (("optimise",), "make optimise wants one exercise, as in: make optimise EX=1"),
        (("review", "EX=77"), "EX=77: no such exercise; there are ex01"),
        (("practice", "EX=77"), "EX=77: no such exercise; there are ex01"),
        (("debug", "EX=5", "FORCE=1", "BUGS=5"), "BUGS=5: a number from 1 to 4 is wanted"),
        (("debug", "EX=5", "FORCE=1", "SEED=x"), "SEED=x: a number from 0 to 999999 is wanted"),
        (("debug", "EX=5", "SEED=7", "END=1"), "no session to end: make debug EX=5 SEED=7 begins one"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(workspace: Workspace, arguments: tuple[str, ...], says: str) -> None:
    done = workspace.make(*arguments)

    assert done.returncode == 2
    lines = [line for line in done.stdout.splitlines() if not line.startswith("make: ***")]
    assert len(lines) == 1 and says in lines[0], done.stdout


def test_a_session_waits_until_the_exercise_is_done(workspace: Workspace) -> None:
    none = workspace.make("practice").stdout
    refused = workspace.make("debug", "EX=5")

    begins = "make debug EX=1, make optimise EX=1, make review EX=1 or make interview EX=1 begins one"
    assert none == f"no practice session yet; {begins}\n"
    assert refused.returncode == 2 and not (workspace.top / "practice").exists()
    assert "ex05 is not done yet by its last verdict; a session shows much of the answer\n" in refused.stdout
    assert "judge it now: make check EX=5; open it all the same: make debug EX=5 FORCE=1\n" in refused.stdout, (
        refused.stdout
    )


def test_a_hunt_is_the_same_for_a_seed_and_goes_on(workspace: Workspace) -> None:
    begun = workspace.make("debug", "EX=5", "FORCE=1", "SEED=7", "BUGS=2").stdout
    folder = workspace.top / "practice" / "debug-ex05-7"
    first = (folder / FILE).read_text()
    (folder / FILE).write_text(first + "# mine\n")
    (folder / "notes.md").write_text("mine")
    on = workspace.make("debug", "EX=5").stdout
    otherwise = workspace.make("debug", "EX=5", "SEED=7", "BUGS=3")

    assert begun == on, on
    assert begun == (
        "debug-ex05-7: the answer to LoRA with 2 bugs in it\n"
        "  say first what is wrong and why, in practice/debug-ex05-7/notes.md\n"
        f"  then mend practice/debug-ex05-7/{FILE}; make watch judges every save\n"
        "  give up, and see: make debug EX=5 SEED=7 END=1\n"
    ), begun
    assert (folder / FILE).read_text() == first + "# mine\n" and (folder / "notes.md").read_text() == "mine"
    assert "practice/debug-ex05-7 was begun otherwise; take another SEED, or go on: make debug EX=5 SEED=7" in (
        otherwise.stdout
    )
    assert first.startswith('"""ex05: LoRA\n') and first != file_text(EX05)
    assert set(json.loads((folder / "session.json").read_text())["options"]) == {"bugs", "text"}

    shutil.rmtree(folder)
    workspace.make("debug", "EX=5", "FORCE=1", "SEED=7", "BUGS=2")
    assert (folder / FILE).read_text() == first

    (folder / "session.json").write_text("{")
    broken = "practice/debug-ex05-7: holds no session.json that can be read; "
    assert f"{broken}move it away, or take another SEED" in workspace.make("debug", "EX=5", "SEED=7").stdout
    assert f"{broken}left out\n" in workspace.make("practice").stdout


def test_without_answers_and_banks_it_says_so(workspace: Workspace) -> None:
    shutil.rmtree(workspace.top / "answers")

    for mode in ("debug", "optimise", "review"):
        done = workspace.make(mode, "EX=5", "FORCE=1")
        assert done.returncode == 2, done.stdout
        assert f"no answers/{FILE} in this copy of the workspace\n" in done.stdout, done.stdout


def test_a_hunt_from_the_watch_to_its_report(workspace: Workspace) -> None:
    workspace.keep("ex05")
    watch = Terminal(workspace.make_command("watch"), workspace.top)
    watch.until(READY)

    # A hunt that begins is judged at once.
    workspace.make("debug", "EX=5", "FORCE=1", "SEED=7")
    begun = watch.until(READY)
    folder = workspace.top / "practice" / "debug-ex05-7"
    assert f"judging practice/debug-ex05-7/{FILE} …" in begun and "\ndebug-ex05-7 LoRA: " in begun, begun
    assert f"\npractice/debug-ex05-7/{FILE}:" in begun and "minutes to go" not in begun, begun
    assert f"next: mend practice/debug-ex05-7/{FILE} and save; give up, and see: make debug EX=5 SEED=7 END=1" in begun
    assert re.search(r"\d\d:\d\d:\d\d judged debug-ex05-7 in \d", begun), begun
    assert re.search(r"debug +ex05 +7 +not begun +0 +\d+/50", workspace.make("practice").stdout)
    standing = r"debug-ex05-7: \d+/50 points, open 5\.\d.*, under a minute; make debug EX=5 SEED=7 goes on\n"
    assert re.search(rf"^under way: {standing}", workspace.make("board").stdout, re.MULTILINE)
    assert re.search(r"^  so far: \d+/50 points, open 5", workspace.make("debug", "EX=5").stdout, re.MULTILINE)

    # A save of the exercise judges the exercise alone.
    path = workspace.top / "exercises" / FILE
    path.write_text(path.read_text() + "# mine\n")
    assert "judged ex05 in" in (saved := watch.until(READY)) and "practice/" not in saved, saved

    # Mended: the report, beside the note.
    (folder / "notes.md").write_text("- line 1: no\n")
    (folder / FILE).write_text(file_text(EX05))
    mended = watch.until(READY)
    report = (folder / "report.md").read_text()
    assert "debug-ex05-7: 1 of 1 bug found, under a minute\n" in report, report
    assert re.search(r"^1\. line \d+, found: .+ \(5\.\d\)\n   no note of yours is on it\n", report, re.MULTILINE), (
        report
    )
    assert "   the smallest mend:\n" in report and report.endswith("   on no bug: line 1: no\n"), report
    assert "debug-ex05-7: 1 of 1 bug found" in mended and "debug-ex05-7 50/50 (+" in mended, mended
    assert re.search(r"debug +ex05 +7 +done +0 +50/50", workspace.make("practice").stdout)
    assert workspace.make("debug", "EX=5", "SEED=7").stdout.startswith(f"{report}another one: make debug EX=5 SEED=")
    (folder / FILE).write_text(file_text(EX05) + "# more\n")
    watch.until("debug-ex05-7 has ended; practice/debug-ex05-7/report.md says how")
    watch.interrupt()
    assert watch.ended() and quiet(workspace)
