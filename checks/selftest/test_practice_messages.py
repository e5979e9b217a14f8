"""What practice says where something is amiss, in this process."""

import re
from pathlib import Path

import pytest

from harness.commands import watch
from harness.commands.request import parse
from harness.model import bank
from harness.model.exercise import UsageError, exercises
from harness.model.results import Result, verdict_of
from harness.practice import debug, opening, optimise, planted, review, sessions
from harness.practice.planted import Change, Hunk

EX05 = exercises()["ex05"]

pytestmark = pytest.mark.usefixtures("practice")


def test_a_bank_that_holds_nothing_to_practise_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "mistakes", lambda exercise: {})

    with pytest.raises(UsageError, match="ex05 has no 2 mistakes that go together; 0 at most"):
        debug.bugs(sessions.new("debug", EX05, "1", bugs=2))
    with pytest.raises(UsageError, match="ex05 has nothing to optimise: its bank holds no code that is right but wa"):
        optimise.waste(sessions.new("optimise", EX05, "1"))
    with pytest.raises(UsageError, match="ex05 has no mistake that can be reviewed"):
        review.change(sessions.new("review", EX05, "999999"))


def test_a_bank_that_has_changed_since_a_session_began(practice: Path) -> None:
    session = sessions.new("debug", EX05, "3", bugs=1, text="another")
    sessions.begin(session, "mine")

    with pytest.raises(UsageError, match="debug-ex05-3: the bank has changed since; another one: make debug EX=5 SEED"):
        opening.opened(parse(["debug", "--ex", "5", "--seed", "3"]), debug.first_text)
    assert session.file.read_text() == "mine"


def test_what_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UsageError, match=r"file/x: cannot be written: .+; make doctor says more"):
        sessions.write(tmp_path / "file" / "x", "")
    assert not watch._is_there(tmp_path / "file" / "practice")
    assert "/practice/ cannot be made (Not a directory): practice sessions are not watched" in capsys.readouterr().out


def test_what_an_optimisation_says_of_a_save() -> None:
    session = sessions.new("optimise", EX05, "3")
    (dear,) = optimise._efficiency(session)
    results = [Result(one.id, one.id, "passed") for one in EX05.requirements]
    slow = [Result(one.id, one.id, "failed" if one == dear else "passed") for one in EX05.requirements]
    wrong = [Result(one.id, one.id, "failed" if one.id == "5.1" else "passed") for one in EX05.requirements]

    def said(results: list[Result]) -> list[str]:
        return optimise.says(session, verdict_of(EX05, results, untouched=False))

    assert said(results) == ["next: make optimise EX=5 SEED=3 END=1 measures before and after"]
    assert said(slow) == ["next: make it cheap, and save; give up, and see: make optimise EX=5 SEED=3 END=1"]
    assert said(wrong) == ["next: 5.1 must stay: only what the code costs is to change"]
    assert re.match(r"wasteful was line \d+: .+ \(5\.4\)", optimise.report(session, "done")[1])


def test_what_a_given_up_hunt_tells(practice: Path) -> None:
    """Not found where the planted lines stand; changed, not mended where they do not and the requirement fails."""
    session = sessions.new("debug", EX05, "7", bugs=2)
    first, second = debug.bugs(session)
    text = debug.first_text(session)
    sessions.begin(session, text.replace(first.hunks[0].new[0], "        pass"))
    place = planted.line_of(EX05, second.hunks[0], [first, second])
    sessions.write(session.folder / "notes.md", f"- line {place + 1}: it is this\n- line : \n")

    told = "\n".join(debug.report(session))

    assert told.startswith("debug-ex05-7: 0 of 2 bugs found, under a minute\n1. line "), told
    assert ", changed, not mended: " in told and f"2. line {place}, named, not mended: " in told, told
    assert f"   your note, line {place + 1}: it is this\n" in told and "on no bug" not in told, told


def test_notes_are_read_as_people_write_them(practice: Path) -> None:
    """On the nearest bug alone; what names no line is shown all the same."""
    session = sessions.new("debug", EX05, "7", bugs=2)
    first, second = debug.bugs(session)
    sessions.begin(session, debug.first_text(session))
    one, two = (planted.line_of(EX05, bug.hunks[0], [first, second]) for bug in (first, second))
    written = [
        f"* L{one - 1}: a",
        f"lines {one}-{one + 2} b",
        f"- Line {two}, c",
        "- 1: d",
        "- 5.3: e",
        "somewhere",
        "-",
    ]
    sessions.write(session.folder / "notes.md", debug._form(session) + "\n".join(written))

    told = "\n".join(debug.report(session))

    assert re.findall(r"your note, line (\d+: \w)\n", told) == [f"{one - 1}: a", f"{one}: b", f"{two}: c"], told
    assert told.index(": b\n") < told.index("\n2. line ") < told.index(": c\n"), told
    assert told.endswith("   on no bug: line 1: d\n   names no line: - 5.3: e\n   names no line: somewhere"), told
    assert [debug._nearest(line, [[10], [12, 20]]) for line in (8, 10, 11, 12, 23, 24)] == [0, 0, 0, 1, 1, None]


def test_a_hunt_waits_for_its_notes(practice: Path) -> None:
    session = sessions.new("debug", EX05, "7", bugs=1)
    sessions.begin(session, debug.first_text(session))
    done = verdict_of(EX05, [Result(one.id, one.id, "passed") for one in EX05.requirements], untouched=False)

    waiting = debug.says(session, done)
    sessions.write(session.folder / "notes.md", "- line 7: it is this")
    ended = debug.says(session, done)

    assert len(waiting) == 1 and waiting[0].startswith("all is mended; say what was wrong and why in "), waiting
    assert ended[0].startswith("debug-ex05-7: ") and session.how == "done"


def test_what_shows_at_a_glance_is_not_planted() -> None:
    assert planted.unremarkable("x = 1\n") and planted.unremarkable("def f():\n    return 1\n")
    for text in ("def f():\n    y = 1\n", "import os\n", "f(\n"):
        assert not planted.unremarkable(text)


def test_changes_go_together_line_by_line() -> None:
    lines = ["a", "b", "c", "d"]
    one, other = Change(planted.hunks(lines, ["a", "x", "y", "c", "d"])), Change(planted.hunks(lines, ["a", "b", "c"]))

    assert one.hunks == (Hunk(1, 2, ("x", "y")),) and other.hunks == (Hunk(3, 4, ()),)
    assert planted.apart(one, other) and not planted.apart(one, Change((Hunk(2, 3, ()),)))
    assert planted.applied(lines, [other, one]) == ["a", "x", "y", "c"]
    assert (one.size, other.size, one.lines) == (2, 1, range(1, 2))
