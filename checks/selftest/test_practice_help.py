"""Help when stuck, by make's real targets on the toy exercise: hints, progress, attempts."""

import importlib.util
import json
from pathlib import Path

import pytest

from devtools.workspace import Workspace
from harness.model import history
from harness.model.exercise import UsageError, exercises
from harness.model.history import Change, Track, judged
from harness.model.results import ExerciseVerdict, Outcome, Result, verdict_of
from harness.practice.help import attempts, progress
from selftest.toys import ANSWER, FILE, STARTER, plant

WRONG = ANSWER.replace("2 * x", "3 * x")


@pytest.fixture
def small(workspace: Workspace) -> Workspace:
    """A copy of the workspace with the toy exercise alone, for the sake of time."""
    workspace.keep()
    plant(workspace)
    return workspace


def test_a_hint_per_attempt_then_what_happened(small: Workspace) -> None:
    path, kept = small.top / "exercises" / FILE, small.top / "practice" / "progress.json"

    first = small.make("hint", "EX=42").stdout
    again = small.make("hint", "EX=42").stdout
    assert (
        first
        == again
        == (
            "ex42 42.1 Double (step 1 of 2, Doubling)\n"
            "  1. What is added to x to make it twice as large?\n"
            "hint 1 of 3; the next one comes after another attempt, once that is judged\n"
        )
    )

    path.write_text(WRONG)
    unjudged = small.make("hint", "EX=42")
    assert unjudged.returncode == 2 and unjudged.stdout.startswith(
        f"exercises/{FILE}: not judged as it is now; make check EX=42 first, or save it while make watch runs\n"
    ), unjudged.stdout

    assert "  1. What is added to x" not in small.make("check", "EX=42").stdout
    second = small.make("hint", "EX=42").stdout
    assert "  2. The same number again, whatever it is.\nhint 2 of 3; the next one comes" in second, second

    path.write_text(WRONG + "\n# again\n")
    small.make("check", "EX=42")
    third = small.make("hint", "EX=42").stdout
    last = "hint 3 of 3; it was the last; make answer EX=42 FORCE=1 shows the answer\n"
    assert "  3. 3 becomes 6, and 0 stays 0.\n" in third and third.endswith(last), third

    said = small.make("progress").stdout
    rows = [line.split() for line in said.splitlines()]
    assert rows[0] == [
        "exercise",
        "points",
        "steps",
        "saves",
        "minutes",
        "hints",
        "lost",
        "kept",
        "sessions",
        "last",
    ], said
    assert rows[1][:6] == ["ex42", "10/15", "1", "of", "2", "2"] and rows[1][7:11] == ["3", "0", "0", "0"], said
    assert "correctness 1 of 2, efficiency 0 of 0, robustness 0 of 0, readability 1 of 1\n" in said, said
    assert "kept in practice/progress.json, on this machine alone\n" in said
    assert said.endswith("picture: practice/progress.png\n"), said
    assert (small.top / "practice" / "progress.png").read_bytes().startswith(b"\x89PNG")
    changes = json.loads(kept.read_text())["exercises"]["ex42"]["changes"]
    assert ["42.2", True] in [[one["requirement"], one["earned"]] for one in changes], changes


def test_attempts_are_listed_and_restored(small: Workspace) -> None:
    path = small.top / "exercises" / FILE

    none = small.make("attempts", "EX=42").stdout
    assert none == "ex42: no attempts yet; make reset EX=42 keeps your file when it starts over\n", none
    path.write_text("first\n")
    small.make("reset", "EX=42")
    listed = small.make("attempts", "EX=42").stdout
    number, name = listed.splitlines()[1].split()[:2]
    assert listed.split()[:4] == ["attempt", "last", "changed", "lines"], listed
    assert f"one back: make attempts EX=42 RESTORE={number}; yours is kept first\n" in listed, listed

    back = small.make("attempts", "EX=42", f"RESTORE={number}").stdout
    assert back == f"exercises/{FILE} is attempts/{name}.py again\n" and path.read_text() == "first\n", back
    assert "already" in small.make("attempts", "EX=42", f"RESTORE={name}").stdout
    path.write_text("second\n")
    said = small.make("attempts", "EX=42", f"RESTORE={name}.py").stdout
    kept = small.top / said.strip().rpartition("; the file before is ")[2]
    assert path.read_text() == "first\n" and kept.read_text() == "second\n", said


def test_what_cannot_be_done_is_said_in_one_line(small: Workspace) -> None:
    progress = small.top / "practice" / "progress.json"

    assert small.make("progress").stdout.startswith("nothing noted yet: make watch EX=1 judges each save")
    progress.parent.mkdir(exist_ok=True)
    progress.write_text("{")
    unread = "practice/progress.json: cannot be read; move it away, and what happens is noted anew"
    for arguments, says in (
        (("hint",), "make hint wants one exercise, as in: make hint EX=1"),
        (("hint", "EX=7"), "EX=7: no such exercise; there are ex42"),
        (("hint", "EX=42"), unread),
        (("progress",), unread),
        (("attempts",), "make attempts wants one exercise, as in: make attempts EX=1"),
        (
            ("attempts", "EX=42", "RESTORE=../x"),
            "RESTORE=../x: no such attempt; make attempts EX=42 lists them",
        ),
    ):
        done = small.make(*arguments)
        lines = [line for line in done.stdout.splitlines() if not line.startswith("make: ***")]
        assert done.returncode == 2 and lines == [says], done.stdout
    assert progress.read_text() == "{"
    progress.unlink()
    (small.top / "exercises" / FILE).unlink()
    gone = small.make("hint", "EX=42").stdout
    assert gone.startswith(f"exercises/{FILE}: no file; make reset EX=42 brings the starter back"), gone
    (small.top / "exercises" / FILE).write_text(STARTER)
    (small.top / "checks" / FILE.removesuffix(".py") / "hints.md").unlink()
    assert small.make("hint", "EX=42").stdout.startswith("ex42: has no hints on 42.1\n")


def test_what_is_earned_and_lost_is_noted_with_its_time_and_pauses_do_not_count() -> None:
    exercise, track = exercises()["ex01"], Track()

    def verdict(outcome: Outcome) -> ExerciseVerdict:
        results = [Result(one.id, f"test {one.id}", outcome) for one in exercise.requirements]
        return verdict_of(exercise, results, untouched=False)

    judged(track, verdict("passed"), (1, 1), 1000.0)
    judged(track, verdict("failed"), (2, 1), 1060.0)
    judged(track, verdict("failed"), (3, 1), 9000.0)

    assert track.saves == 3 and track.seconds == 60.0 and not track.earned
    assert track.changes[0] == Change(1000.0, "1.1", True) and track.changes[-1] == Change(1060.0, "1.10", False)


def test_what_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "progress.json").write_text("[")
    verdict = verdict_of(exercises()["ex01"], [], untouched=False)
    said = history.note(verdict, (1, 1), tmp_path / "progress.json")
    assert said == f"{tmp_path}/progress.json: cannot be read; move it away, and what happens is noted anew"
    assert (tmp_path / "progress.json").read_text() == "["
    with pytest.raises(UsageError, match=r"file/progress\.json: cannot be written: .*; make doctor says more"):
        history.store({}, tmp_path / "file" / "progress.json")

    kept = tmp_path / "attempt.py"
    kept.touch()
    monkeypatch.setattr(attempts, "kept", lambda _: [kept])
    monkeypatch.setattr("shutil.copyfile", lambda *_: (tmp_path / "file" / "x").touch())
    with pytest.raises(UsageError, match=r"file/x: Not a directory; nothing was lost, make doctor says more"):
        attempts.restored(exercises()["ex01"], "attempt")


def test_without_matplotlib_there_is_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(history, "load", lambda: {"ex01": Track(saves=1, last=1.0)})
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    progress.run()

    said = capsys.readouterr().out
    assert "ex01" in said and said.endswith("no picture: matplotlib is not there yet; make .venv/bench installs it\n")
