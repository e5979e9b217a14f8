"""A mock interview by make's real targets on the toy exercise, in a copy without answers and banks."""

import ast
import json
import re
import shutil

import pytest

from devtools.terminal import Terminal
from devtools.workspace import READY, Workspace, quiet
from harness.model.exercise import exercises, within
from harness.model.source import public_names
from harness.practice.interview.statement import discussion, first_text, topics
from selftest.toys import ANSWER, FILE, STARTER, plant

EACH = pytest.mark.parametrize("exercise", exercises())
NAME = "interview-ex42-7"


@pytest.fixture
def bare(workspace: Workspace) -> Workspace:
    """A copy with the toy exercise alone, without answers and banks."""
    workspace.keep()
    plant(workspace)
    shutil.rmtree(workspace.top / "answers")
    for name in ("mistakes", "variants"):
        shutil.rmtree(workspace.top / "checks" / FILE.removesuffix(".py") / name)
    return workspace


def test_a_whole_interview(bare: Workspace) -> None:
    folder = bare.top / "practice" / NAME
    own = bare.top / "exercises" / FILE

    began = bare.make("interview", "EX=42", "SEED=7", "MINUTES=20").stdout
    assert began == (
        f"{NAME}: Doubling, 20 minutes\n"
        f"  the problem and the signatures: practice/{NAME}/{FILE}\n"
        "  have every save judged: make watch EX=42\n"
        "  what counts: 42.1\n"
        "  ask what is not said: make ask EX=42\n"
        f"  think aloud, or note what you try: practice/{NAME}/notes.md\n"
        "  end it, and get the report: make interview EX=42 SEED=7 END=1\n"
        "clock: 0 of 20 minutes, 20 left\n"
    )
    stated = (folder / FILE).read_text()
    assert "def double" in stated and "test_double" not in stated, "what does not count is not there"
    off = bare.make("hint", "EX=42")
    assert (
        off.returncode == 2 and "an interview on ex42 is on: no hints; make interview EX=42 END=1 ends it" in off.stdout
    )
    listed = bare.make("ask").stdout
    assert f"{NAME}: what you may ask\n  1. 42.1 Double, in full\n" in listed and "  4. a new tensor …\n" in listed
    assert listed.endswith("ask: make ask EX=42 N=1; clock: 0 of 20 minutes, 20 left\n")
    told = bare.make("ask", "N=4").stdout
    assert told.startswith(f"4. a new tensor …\na new tensor comes out\n{NAME}: clock: 0 of 20"), told
    assert "  4. a new tensor … (asked)\n" in bare.make("ask", "EX=42").stdout

    kept = json.loads((folder / "session.json").read_text())
    kept["created"] -= 8 * 60
    (folder / "session.json").write_text(json.dumps(kept))
    (folder / FILE).write_text(ANSWER)
    with (folder / "notes.md").open("a") as notes:
        notes.write("- twice is a sum\n")
    saved = bare.make("board", "EX=42").stdout
    assert f"{NAME} Doubling: 5 of 5 points, done\n" in saved and "42.2 Write" not in saved.partition("judging exer")[0]
    assert re.search(r"^clock: \d+ of 20 minutes, 1\d left$", saved, re.MULTILINE), saved
    assert f"say aloud what you are about to try, and why, or note it in practice/{NAME}/notes.md\n" in saved, saved
    assert "all that counts is earned; test more, or end it: make interview EX=42 SEED=7 END=1\n" in saved, saved

    ended = bare.make("interview", "EX=42", "END=1").stdout
    assert re.search(rf"^{NAME}: 5 of 5 points in \d+ of 20 minutes$", ended, re.MULTILINE), ended
    assert "\n  correct: 1 of 1 requirement\n  efficient: nothing of it counts in this time\n" in ended, ended
    assert f"\nreport: practice/{NAME}/report.md; its questions are yours to answer\n" in ended, ended
    assert f"\npicture: practice/{NAME}/report.png\n" in ended, ended
    report = (folder / "report.md").read_text()
    assert re.search(r"^- minute \d+: 42\.1 Double earned$", report, re.MULTILINE), report
    for part in (
        "- readable: 1 of 1 requirement\n",
        "None is asked for in this time.\n",
        ": a new tensor …\n",
        "- **what no check looks at**\n  ```\n  - strings\n  ```\n",
        "## Your notes\n\n- twice is a sum\n",
        "2. When does it overflow?\n\n   _your answer:_\n",
    ):
        assert part in report, f"{part}\n{report}"
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    (folder / "report.md").write_text(report + "my answer")
    again = bare.make("interview", "EX=42", "SEED=7").stdout
    assert again == f"{NAME} has ended: practice/{NAME}/report.md\n" and own.read_text() == STARTER
    assert (folder / "report.md").read_text().endswith("my answer")


def test_the_watch_says_the_time_though_nothing_is_saved(bare: Workspace) -> None:
    watch = Terminal(bare.make_command("watch", "EX=42"), bare.top)
    watch.until(READY, 120)
    bare.make("interview", "EX=42", "SEED=7", "MINUTES=1")
    watch.until(READY)

    said = watch.until(READY)

    assert f"under way: {NAME}: 0/5 points, clock: 0 of 1 minutes, " in said, said
    flat = " ".join(said.split())
    assert f"say aloud what you are about to try, and why, or note it in practice/{NAME}/notes.md" in flat, said
    assert "judging" not in said and "judged nothing new" in said, said
    watch.interrupt()
    assert watch.ended() and quiet(bare)


def test_time_is_over_and_what_cannot_be_done(bare: Workspace) -> None:
    bare.make("interview", "EX=42", "SEED=7")
    path = bare.top / "practice" / NAME / "session.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "created": 0}))

    over = bare.make("interview", "EX=42").stdout
    ends = "make interview EX=42 SEED=7 END=1 writes the report\n"
    assert over.endswith(f"clock: time is over (45 minutes); {ends}"), over
    assert bare.make("hint", "EX=42").stdout.startswith("ex42 42.1 Double"), "hints come back"
    for arguments, says in (
        (("interview",), "make interview wants one exercise, as in: make interview EX=1"),
        (("interview", "EX=9"), "EX=9: no such exercise; there are ex42"),
        (("interview", "EX=42", "MINUTES=0"), "MINUTES=0: a number from 1 to 240 is wanted"),
        (
            ("interview", "EX=42", "MINUTES=30"),
            f"practice/{NAME} was begun with 45 minutes; go on: make interview EX=42 SEED=7, end it: "
            "make interview EX=42 SEED=7 END=1, or take another SEED",
        ),
        (("interview", "EX=42", "SEED=8", "END=1"), "no session to end: make interview EX=42 begins one"),
        (("ask", "N=x"), "N=x: a number from 1 to 8 is wanted; make ask lists the topics"),
    ):
        done = bare.make(*arguments)
        lines = [line for line in done.stdout.splitlines() if not line.startswith("make: ***")]
        assert done.returncode == 2 and lines == [says], done.stdout
    second = bare.make("interview", "EX=42", "SEED=8").stdout
    assert second.endswith(f"under way too: {NAME}; make interview EX=42 SEED=7 END=1 ends it\n"), second
    several = bare.make("interview", "EX=42", "END=1").stdout
    assert several.startswith("2 are under way; END=1 wants SEED, one of 7, 8\n"), several
    shutil.rmtree(path.parent.parent)
    assert bare.make("ask").stdout.startswith("no interview is under way; make interview EX=42 begins one\n")


@EACH
def test_every_exercise_can_be_asked_about(exercise: str) -> None:
    one = exercises()[exercise]
    scope = within(one, 45)
    text, there = first_text(one, scope, 45), topics(scope)

    compile(text, one.file_name, "exec")
    assert documented(text) == [name for name in documented(one.starter) if name in public_names(text)]
    assert "Conventions" not in text and "TODO(" not in text and f"make ask EX={one.number} lists the topics." in text
    assert len(there) > 6 and all(topic.name and topic.text for topic in there), there
    assert len({topic.name for topic in there}) == len(there) and len(discussion(one)) == 4


def documented(starter: str) -> list[str]:
    """The classes of a starter whose docstrings name attributes."""
    classes = [node for node in ast.parse(starter).body if isinstance(node, ast.ClassDef)]
    return [node.name for node in classes if "Attributes:\n" in (ast.get_docstring(node) or "")]
