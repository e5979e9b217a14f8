"""Reviews and optimisations as people open and end them, by the real commands."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from devtools.workspace import Workspace
from harness.model import bank
from harness.model.exercise import exercises
from harness.practice import measuring, optimise, planted, review, sessions
from harness.practice.sessions import Session
from harness.report.terminal import console
from harness.testing.bench import Case, Series, measure

EX02 = exercises()["ex02"]


def test_a_review_counts_what_is_named(workspace: Workspace) -> None:
    opened = workspace.make("review", "EX=2", "FORCE=1", "SEED=3").stdout
    folder = workspace.top / "practice" / "review-ex02-3"
    form, diff = folder / "review.md", (folder / "change.diff").read_text()
    empty = workspace.make("review", "EX=2", "END=1")

    head = "review-ex02-3: a change of the answer to Rotary position embedding, some of it right, some wrong\n"
    assert opened.startswith(head) and diff in opened, opened
    assert opened.endswith("then have it judged: make review EX=2 SEED=3 END=1\n")
    assert review.FEWEST <= diff.count("\n@@ ") <= review.MOST, diff
    assert empty.returncode == 2 and "practice/review-ex02-3/review.md names no fault yet; what" in empty.stdout
    assert "see the model review all the same: make review EX=2 SEED=3 END=1 FORCE=1\n" in empty.stdout

    made = review.change(Session("review", EX02, 3, 0.0))
    assert made.right and len(made.faults) > 1
    first = made.faults[0].mistake
    assert first is not None
    table = form.read_text().partition("|  |")[0]
    form.write_text(f"{table}| x | | |\n|1|9.9||\n")
    refused = workspace.make("review", "EX=2", "END=1").stdout
    for says in ("line x: a number is wanted", "requirement 9.9: there are 2.1"):
        assert f"practice/review-ex02-3/review.md: {says}" in refused, refused
    right = planted.line_of(EX02, made.right[0].change.hunks[0], made.changes)
    row = f"| {right}-{right + 1} | {first.requirements[0]} | mine |\n"
    form.write_text(f"{table}|  | 2.1, {first.requirements[0]} | it is |\n| 1 |  | no |\n{row}")
    judged = workspace.make("review", "EX=2", "END=1").stdout

    assert f"review-ex02-3: 1 of {len(made.faults)} faults named, 2 false alarms, under a minute\n" in judged, judged
    assert judged.count(", missed: ") == len(made.faults) - 1 and judged.count(", named: ") == 1, judged
    assert f"   yours: 2.1, {first.requirements[0]}: it is\n" in judged and "- false alarm: line 1: no\n" in judged, (
        judged
    )
    assert f"   false alarm: line {right}-{right + 1}, {first.requirements[0]}: mine\n" in judged, judged
    assert judged.count(", right: ") == len(made.right), judged
    assert judged.count(" was wanted") >= len(made.faults), judged
    assert re.search(
        r"another one: make review EX=2 SEED=\d+; this one again: move practice/review-ex02-3 away", judged
    )
    listed = workspace.make("practice").stdout
    assert re.search(r"review +ex02 +3 +1 of \d faults named, 2 false alarms +0", listed), listed


def test_an_optimisation_opens_what_is_dear_alone(workspace: Workspace) -> None:
    opened = workspace.make("optimise", "EX=1", "FORCE=1", "SEED=3").stdout

    assert opened == (
        "optimise-ex01-3: Multi-head attention, right but wasteful\n"
        "  open is 1.3 Be memory efficient; the other requirements are earned, and must stay so\n"
        "  make practice/optimise-ex01-3/ex01_multi_head_attention.py cheap; make watch judges every save\n"
        "  at the end, or to give up: make optimise EX=1 SEED=3 END=1 measures before and after\n"
    ), opened


def test_what_differs_is_said() -> None:
    series = Series("forward", "peak bytes", {"before": {8: 4e6}, "after": {8: 1e6}, "answer": {8: 1e6}})
    alike = Series("forward", "seconds", {"before": {8: 1.0}, "after": {8: 0.95}})

    assert list(measuring.differences([series, alike])) == [
        "forward, peak bytes at 8: 4 MB before, 1 MB after, 1 MB the answer"
    ]


def test_an_optimisation_is_measured(
    practice: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, after and the answer beside each other, and a picture in the session's folder."""
    held = {"before": 4e6, "after": 1e6, "answer": 1e6}
    runs = {name: lambda value=value: {"peak bytes": value} for name, value in held.items()}
    bench = SimpleNamespace(X="length", REFERENCE="answer", CAPTION="small", SECONDS=1, HIGHER_IS_BETTER=())
    bench.cases = lambda modules: [Case("forward", 8, {name: runs[name] for name in modules}, timed=False)]
    monkeypatch.setattr(measuring, "bench_of", lambda exercise: bench)
    monkeypatch.setattr(measuring, "BUILD", practice / "build")
    session = sessions.new("optimise", EX02, "3")
    sessions.begin(session, bank.answer(EX02))

    lines = measuring.figures(session, optimise.first_text(session), console())

    assert lines == ["forward, peak bytes at 8: 4 MB before, 1 MB after, 1 MB the answer"]
    assert re.search(r"^8 +before +4 \(4.00\) *\n +after +1 \(1.00\)", capsys.readouterr().out, re.MULTILINE)
    assert (session.folder / "before-and-after.png").exists()


def test_what_takes_long_is_not_run_at_larger_places(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "LONGEST_SECONDS", 0.0)
    cases = [Case("forward", x, {"before": lambda: None}) for x in (2.0, 1.0)]

    measured = measure(measuring.bounded(cases), console()).series

    assert [set(one.values["before"]) for one in measured] == [{1.0}]
    assert "before is left out: forward, 2: TimeoutError: it takes 0.0 s at 1\n" in capsys.readouterr().out
