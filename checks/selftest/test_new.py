"""`make new` begins an exercise, and `make check-exercise` says what it lacks until it holds."""

import re
import shutil

import pytest

from devtools.workspace import Workspace
from selftest import toys as toy


@pytest.fixture
def small(workspace: Workspace) -> Workspace:
    """A copy of the workspace without exercises, for the sake of time."""
    workspace.keep()
    readme = workspace.top / "README.md"
    readme.write_text(re.sub(r"^\| \d+ \|.*\n", "", readme.read_text(), flags=re.MULTILINE))
    return workspace


def fill(workspace: Workspace) -> None:
    """Fills the files that `make new EX=42 NAME=Doubling` writes with the toy exercise."""
    for name, text in toy.files().items():
        assert (workspace.top / name).exists() or name.endswith("bench.py"), f"make new writes no {name}"
        (workspace.top / name).write_text(text)
    readme = workspace.top / "README.md"
    rule = "|---|---|---|---|\n"
    readme.write_text(readme.read_text().replace(rule, rule + toy.ROW))


def test_a_new_exercise_says_what_to_fill(workspace: Workspace) -> None:
    done = workspace.make("new", "EX=12", "NAME=Grouped query attention")
    said = workspace.make("check-exercise", "EX=12")
    again = workspace.make("new", "EX=12", "NAME=Grouped query attention")

    name = "ex12_grouped_query_attention"
    assert done.returncode == 0 and f"new: checks/{name}/starter.py\nnew: exercises/{name}.py\n" in done.stdout, (
        done.stdout
    )
    assert "next: make check-exercise EX=12 says what to fill" in done.stdout
    text = (workspace.top / "exercises" / f"{name}.py").read_text()
    assert (
        text.startswith('"""ex12: Grouped query attention\n') and "\n12.1 (correctness) " in text and "99" not in text
    )
    assert said.returncode == 2, said.stdout
    for line in (
        rf"checks/{name}/starter\.py:\d+: to fill: FILL: the problem, in two or three sentences, .*",
        rf"checks/{name}/starter\.py:\d+: to fill: # TODO\(12\.1, 12\.3\): FILL what to do, in the imperative\.",
        rf"answers/{name}\.py:\d+: to fill: return x  # FILL: the answer; everything outside bodies .*",
        rf"checks/{name}/test_solve\.py:\d+: to fill: .*FILL: computed by hand",
        rf"checks/{name}/mistakes/values\.py:\d+: to fill: \"FILL: what the first message names\",",
        rf"checks/{name}/variants/written_differently\.py:\d+: to fill: return x  # FILL: the answer, written .*",
        r"answers/ex12\.md:\d+: to fill: 1\. FILL: the reply to the first question of the docstring",
        r"ex12: the form and the bank are judged once this is done",
    ):
        assert re.search(rf"^{line}$", said.stdout, re.MULTILINE), f"{line}\n{said.stdout}"
    assert len(set(said.stdout.splitlines())) == len(said.stdout.splitlines()), said.stdout
    assert again.returncode == 2 and f"EX=12: {name}.py is there; the next free number is 13" in again.stdout, (
        again.stdout
    )


def test_nothing_is_overwritten(workspace: Workspace) -> None:
    kept = workspace.top / "answers" / "ex12.md"
    kept.write_text("mine")

    done = workspace.make("new", "EX=12", "NAME=sliding_window")

    assert done.returncode == 2
    assert "answers/ex12.md: there already; make new overwrites nothing" in done.stdout, done.stdout
    assert kept.read_text() == "mine" and not list(workspace.top.rglob("ex12_*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("new",), 'EX=: make new wants a number from 1 to 99, as in: make new EX=12 NAME="Grouped query attention"'),
        (("new", "EX=100", "NAME=x"), "EX=100: make new wants a number from 1 to 99"),
        (("new", "EX=12"), "NAME=: make new wants a title of letters and digits"),
        (("new", "EX=12", "NAME=../x"), "NAME=../x: make new wants a title of letters and digits"),
        (("check-exercise",), "make check-exercise wants one exercise, as in: make check-exercise EX=1"),
        (("check-exercise", "EX=77"), "EX=77: no such exercise; there are ex01"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(workspace: Workspace, arguments: tuple[str, ...], says: str) -> None:
    done = workspace.make(*arguments)

    lines = [line for line in done.stdout.splitlines() if not line.startswith("make: ***")]
    assert done.returncode == 2 and len(lines) == 1 and says in lines[0], done.stdout


def test_a_filled_exercise_holds(small: Workspace) -> None:
    small.make("new", "EX=42", "NAME=doubling")
    fill(small)

    done = small.make("check-exercise", "EX=42")

    assert done.returncode == 0 and done.stdout.endswith("ex42: holds; make lint judges its style\n"), done.stdout


def test_each_gap_is_named(small: Workspace) -> None:
    small.make("new", "EX=42", "NAME=doubling")
    fill(small)
    top = small.top
    for name in (f"{toy.FOLDER}/starter.py", f"exercises/{toy.FILE}"):
        (top / name).write_text(toy.STARTER.replace("TODO(42.2)", "Then"))
    checks = top / toy.FOLDER / "test_solve.py"
    text = re.sub(r"\n.*= style_checks.*", "", toy.CHECKS).replace(
        "own_test_checks, requirement, style_checks", "own_test_checks, requirement"
    )
    checks.write_text(text.replace("close(subj", "(subj"))
    mistakes = top / toy.FOLDER / "mistakes" / "values.py"
    mistakes.write_text(re.sub(r'    Mistake\(\n +"tests_nothing"(.*\n)+?    \),\n', "", toy.MISTAKES))
    readme = top / "README.md"
    readme.write_text(readme.read_text().replace("| 42 |", "| 41 |"))

    done = small.make("check-exercise", "EX=42")

    assert done.returncode == 2
    for line in (
        "requirement 42.2 has no `# TODO(42.2)` in the starter",
        "requirement 42.3 has no check",
        "README.md: the table has no row `| 42 | Doubling | …`",
        "problem: requirement 42.2 has no mistake with only=True, which it alone catches",
        "problem: mistake adds_two passes 42.1",
        "problem: mistake squares passes 42.1",
    ):
        assert f"{line}\n" in done.stdout, f"{line}\n{done.stdout}"


def test_what_is_not_there_is_named_first(small: Workspace) -> None:
    small.make("new", "EX=42", "NAME=doubling")
    fill(small)
    for name in ("mistakes", "variants"):
        shutil.rmtree(small.top / toy.FOLDER / name)

    said = small.make("check-exercise", "EX=42").stdout

    assert f"{toy.FOLDER}/mistakes/: holds no mistakes, the wrong answers\n" in said, said
    assert f"{toy.FOLDER}/variants/: holds no variant, a right answer written differently\n" in said, said


def test_what_would_bury_the_cause_waits(small: Workspace) -> None:
    small.make("new", "EX=42", "NAME=doubling")
    fill(small)
    answer, mistakes = small.top / "answers" / toy.FILE, small.top / toy.FOLDER / "mistakes" / "values.py"
    right, listed = answer.read_text(), mistakes.read_text()

    answer.write_text(right.replace("2 * x", "3 * x"))
    wrong = small.make("check-exercise", "EX=42").stdout
    answer.write_text(right)
    mistakes.write_text(listed.replace("MISTAKES = [", "MISTAKES = [Mistake(),", 1))
    malformed = small.make("check-exercise", "EX=42").stdout
    mistakes.write_text(listed)
    (small.top / "exercises" / toy.FILE).write_text(toy.STARTER + "# mine\n")
    begun = small.make("check-exercise", "EX=42").stdout

    assert "problem: the rest of the bank is judged once this is done\n" in wrong and "problem: mistake" not in wrong, (
        wrong
    )
    assert malformed.startswith(f"{toy.FOLDER}/mistakes/values.py:") and "Traceback" not in malformed, malformed
    assert "TypeError" in malformed and len(malformed.splitlines()) == 2, malformed
    assert f"exercises/{toy.FILE}: not the starter as it is now; make reset EX=42 brings that\n" in begun, begun
