"""What GitHub Actions and classroom tools get: escaped commands, one total for every reader, nothing of a learner's."""

import base64
import json
import os
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from harness.model.exercise import Exercise, Requirement, Step
from harness.model.results import Cause, ExerciseVerdict, Result, verdict_of
from harness.report import github, gradesheet

STARTER = "def one():\n    # TODO(7.1): …\n    ...\n\n\ndef two():\n    # TODO(7.2): …\n    ...\n"


def exercise(number: int, requirements: int = 3) -> Exercise:
    asked = tuple(Requirement(f"{number}.{i}", "correctness", f"Title {i}: a, b") for i in range(1, requirements + 1))
    steps = (Step(1, "All of it", 30, tuple(requirement.id for requirement in asked)),)
    return Exercise(f"ex{number:02d}", f"ex{number:02d}_a_title.py", "A title", asked, steps, {}, STARTER)


def verdict(of: Exercise, *results: Result) -> ExerciseVerdict:
    """The rest of the requirements is earned."""
    decided = {result.requirement for result in results}
    earned = [Result(one.id, "test_fine", "passed") for one in of.requirements if one.id not in decided]
    return verdict_of(of, [*results, *earned], untouched=False)


def failed(requirement: str, message: str = "why", line: int = 3, kind: Cause = "") -> Result:
    return Result(requirement, f"test_{requirement}", "failed", message, line, kind)


def test_commands_are_escaped_as_the_toolkit_does() -> None:
    line = github.command("error", "50%\r\n::x::\x1b[1m", file="a,b:c%\n.py", line=3)

    assert line == "::error file=a%2Cb%3Ac%25%0A.py,line=3::50%25?%0A::x::?[1m"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\n::notice::two", "one; ::notice::two"),
        ("\n  ::error::x\r\n\n", "::error::x?"),
        ("a ##[notice]b", "a ## [notice]b"),
        ("\u2028::x \ud800 \x85", "?::x ? ?"),
    ],
)
def test_a_learners_text_is_one_line_and_no_command_within_it(text: str, shown: str) -> None:
    assert github.plain(text) == shown


def test_annotations_name_place_requirement_and_check(tmp_path: Path) -> None:
    (tmp_path / "ex07_a_title.py").write_text(STARTER)
    lines = github.annotations(
        [verdict(exercise(7), failed("7.2", "two: 1 came\n2 was wanted", 0), failed("7.1", "100%", 9))], tmp_path
    )

    assert lines == [
        "::error file=exercises/ex07_a_title.py,line=9,title=7.1 Title 1%3A a%2C b::100%25%0Acheck: test_7.1",
        "::error file=exercises/ex07_a_title.py,line=6,title=7.2 Title 2%3A a%2C b"
        "::two: 1 came%0A2 was wanted%0Acheck: test_7.2",
    ]


def test_annotations_are_one_per_requirement_and_leave_out_what_cannot_be_judged(tmp_path: Path) -> None:
    unjudged = Result("7.3", "test_own", "missing", "judged later", kind="unjudged")
    lines = github.annotations(
        [verdict(exercise(7), failed("7.1", "first"), failed("7.1", "second"), unjudged)], tmp_path
    )

    assert len(lines) == 1 and "first" in lines[0]


def test_what_does_not_import_is_one_annotation_and_what_is_not_started_or_done_none(tmp_path: Path) -> None:
    broken = [Result(f"8.{i}", "test", "error", "SyntaxError: invalid syntax", 4, "load") for i in (1, 2, 3)]
    todo = [failed(f"9.{i}", "TODO", kind="not implemented") for i in (1, 2, 3)]
    lines = github.annotations(
        [verdict(exercise(7)), verdict(exercise(8), *broken), verdict(exercise(9), *todo)], tmp_path
    )

    assert lines == [
        "::error file=exercises/ex08_a_title.py,line=4,title=ex08 does not import::SyntaxError: invalid syntax"
    ]


def test_ten_annotations_at_most_in_turn_and_unwritten_code_last(tmp_path: Path) -> None:
    seventh = verdict(
        exercise(7, 20),
        *(failed(f"7.{i}", "TODO", kind="not implemented") for i in range(1, 10)),
        *(failed(f"7.{i}") for i in range(10, 20)),
    )
    eighth = verdict(exercise(8), failed("8.1"), failed("8.2"))
    lines = github.annotations([seventh, eighth], tmp_path)

    titles = [line.partition("title=")[2].partition(" ")[0] for line in lines]
    assert titles == ["7.10", "8.1", "7.11", "8.2", *(f"7.{i}" for i in range(12, 18))]


def test_the_result_has_one_weight_and_one_total() -> None:
    verdicts = [verdict(exercise(7), failed("7.2", "a\nb" + "x" * 500)), verdict(exercise(8))]
    result = github.classroom(verdicts, Path())

    assert (result["version"], result["status"], result["max_score"]) == (1, "fail", 30)
    assert [test["score"] for test in result["tests"]] == [5, 0, 5, 5, 5, 5]
    assert result["tests"][1] == {
        "name": "7.2 Title 2: a, b",
        "status": "fail",
        "score": 0,
        "message": ("a; b" + "x" * 500)[:300],
        "test_code": "test_7.2",
        "filename": "exercises/ex07_a_title.py",
        "line_no": 3,
        "duration": 0,
    }
    assert github.classroom(verdicts[1:], Path())["status"] == "pass"


def graded(verdicts: list[ExerciseVerdict]) -> gradesheet.Sheet:
    return gradesheet.sheet(verdicts, "v", "2.13.0", {})


def test_publish_replaces_what_a_learner_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_ENV", "GITHUB_PATH", "GITHUB_STATE")
    for name in names:
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name).write_text("of a learner")
    verdicts = [verdict(exercise(7), failed("7.1", "it is \ud800"))]
    github.publish(verdicts, graded(verdicts), tmp_path, "token")

    key, _, encoded = (tmp_path / "GITHUB_OUTPUT").read_text().partition("=")
    assert key == "result" and json.loads(base64.b64decode(encoded)) == github.classroom(verdicts, tmp_path)
    assert (tmp_path / "GITHUB_STEP_SUMMARY").read_text() == gradesheet.markdown(
        graded(verdicts), gradesheet.places(verdicts, tmp_path)
    )
    assert [(tmp_path / name).read_text() for name in names[2:]] == ["", "", ""]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "::token::" and said[1].startswith("::error ")
    assert said[2:] == [
        "::notice title=Autograding complete::Points 10/15",
        '::notice title=Autograding report::{"totalPoints":10,"maxPoints":15}',
    ]


def test_commands_are_off_until_the_token_comes(capsys: pytest.CaptureFixture[str]) -> None:
    token = github.mute()

    assert len(token) == 32 and capsys.readouterr().out == f"::stop-commands::{token}\n"


def test_outside_of_github_it_prints_what_it_can_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("GITHUB_")]:
        monkeypatch.delenv(name)
    github.publish([verdict(exercise(7))], graded([verdict(exercise(7))]), Path(), "token")

    _, *notices, last = capsys.readouterr().out.splitlines()
    assert len(notices) == 2
    assert last == (
        "github: GITHUB_OUTPUT and GITHUB_STEP_SUMMARY not set, so the lines above are all; GitHub Actions sets both"
    )


def test_a_summary_that_github_would_refuse_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(github, "SUMMARY_BYTES", 400)
    text = github.summary(graded([verdict(exercise(7, 40))]), {})

    assert len(text.encode()) <= 400 and text.endswith(
        "\n\nCut here: GitHub takes 1 MiB; the gradesheet has the rest.\n"
    )


@pytest.mark.parametrize(("score", "code", "says"), [(90, 0, ""), (85, 1, "5 of 90 points are missing")])
def test_missing_points_fail_where_the_teacher_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], score: int, code: int, says: str
) -> None:
    path = tmp_path / "gradesheet.json"
    path.write_text(json.dumps({"score": score, "max_score": 90}))

    assert github.main([str(path)]) == code
    assert capsys.readouterr().out.startswith(says)


def test_the_sheet_shows_a_learners_text_as_it_is(tmp_path: Path) -> None:
    broken = [Result(f"7.{i}", "test", "error", "*a* | `b` <c>\nd \ud800", 1, "load") for i in (1, 2, 3)]
    sheet = graded([verdict(exercise(7), *broken)])
    beside = gradesheet.write(sheet, tmp_path / "gradesheet.json", {})

    assert json.loads((tmp_path / "gradesheet.json").read_text()) == sheet
    text = beside.read_text()
    assert "| ex07 A title | does not import: `*a* \\| 'b' <c>; d ?` | 0/15 |" in text
    assert "  - `*a* | 'b' <c>; d ?` (`test`, error)\n" in text


def test_the_sheet_folds_what_was_begun_and_counts_checks(tmp_path: Path) -> None:
    todo = [failed(f"9.{i}", "TODO", 0, "no file") for i in (1, 2, 3)]
    verdicts = [verdict(exercise(7), failed("7.2", "two: 1 came", 5)), verdict_of(exercise(9), todo, untouched=True)]

    text = gradesheet.markdown(graded(verdicts), gradesheet.places(verdicts, tmp_path))

    begun = text.index("<details>\n<summary>ex07 A title: 10 of 15 points, 2 of 3 checks</summary>\n\n")
    assert "\n- ✓ 7.1 Title 1: a, b\n- ✗ 7.2 Title 2: a, b: 0 of 1 checks\n" in text[begun:], text
    assert "\n  - `exercises/ex07_a_title.py:5`: `two: 1 came` (`test_7.2`, failed)\n" in text, text
    assert text.count("<details>") == 1 and text.count("ex09") == 1, text


def test_the_sheet_says_where_the_work_comes_from() -> None:
    now = datetime(2026, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=1)))
    origin = github.origin({"GITHUB_REPOSITORY": "a/b", "GITHUB_SHA": "c0ffee"}, now)

    sheet = gradesheet.sheet([verdict(exercise(7))], "v", "2.13.0", origin)

    assert list(sheet)[:6] == ["schema", "checks_version", "torch", "repository", "commit", "date"]
    assert origin == {"repository": "a/b", "commit": "c0ffee", "date": "2026-02-03T03:05:00Z"}
    assert "\n`a/b` at `c0ffee`, 2026-02-03T03:05:00Z\n" in gradesheet.markdown(sheet, {})


def test_what_is_not_written_yet_is_a_notice(tmp_path: Path) -> None:
    todo = failed("7.1", "TODO", kind="not implemented")

    lines = github.annotations([verdict(exercise(7), todo, failed("7.2"))], tmp_path)

    assert [line.split()[0] for line in lines] == ["::error", "::notice"], lines
