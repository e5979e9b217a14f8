"""make's commands, run for real in a copy of the workspace."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from devtools.workspace import Workspace
from harness.commands.answer import difference
from harness.model.exercise import exercises
from selftest.written import node_id

EX01 = exercises()["ex01"]
FILE = EX01.file_name


def test_check_of_the_answers_is_done(workspace: Workspace) -> None:
    done = workspace.make("check", "EX=1", "SUBMISSION=answers")

    assert done.returncode == 0, done.stdout
    assert re.search(r"ex01\s+Multi-head attention\s+done\s+50/50", done.stdout), done.stdout
    assert (
        "✓ 1.10 Reads well" in done.stdout
        and "minutes to go" not in done.stdout
        and "next: make answer EX=1 compares" in done.stdout
    )


def test_check_names_file_line_and_slip_and_what_is_not_started(workspace: Workspace) -> None:
    workspace.keep("ex01", "ex05")
    path = workspace.top / "exercises" / FILE
    path.write_text(workspace.answer(FILE).replace("q.size(-1) ** -0.25", "q.size(-1) ** -0.5"))

    done = workspace.make("check")

    assert done.returncode == 2
    assert re.search(r"ex01\s+Multi-head attention\s+in progress", done.stdout), done.stdout
    assert re.search(r"ex05\s+LoRA.*\s+not started\s+0/50", done.stdout), done.stdout
    assert re.search(rf"^exercises/{FILE}:\d+:\d+: error: 1\.1 forward: weights: ", done.stdout, re.MULTILINE), (
        done.stdout
    )
    step = EX01.step_of("1.1")
    ahead = f"next: step {step.number} of {len(EX01.steps)}, {step.name} (about {step.minutes} minutes): "
    assert f"{ahead}edit exercises/{FILE} and save; make reset EX=1 starts it over" in done.stdout
    assert f"\n {step.number}. {step.name} ({step.minutes} min)\n" in done.stdout and " minutes to go\n" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("check", "EX=99"), "EX=99: no such exercise; there are ex01"),
        (("watch", "EX=99"), "EX=99: no such exercise; there are ex01"),
        (("check", "SUBMISSION=nowhere"), "SUBMISSION=nowhere: no such folder"),
        (
            ("check", "SUBMISSION=checks/template"),
            "SUBMISSION=checks/template: holds no exercise; files are named like",
        ),
        (("reset",), "make reset wants one exercise, as in: make reset EX=1"),
        (("reset", "EX=77"), "EX=77: no such exercise"),
        (("answer",), "make answer wants one exercise, as in: make answer EX=1"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(workspace: Workspace, arguments: tuple[str, ...], says: str) -> None:
    done = workspace.make(*arguments)

    assert done.returncode == 2
    lines = [line for line in done.stdout.splitlines() if not line.startswith("make: ***")]
    assert len(lines) == 1 and says in lines[0], done.stdout


@pytest.mark.parametrize("option", ["ex=1", "BUG=2", "EXERCISE=1"])
def test_a_mistyped_option_is_said(workspace: Workspace, option: str) -> None:
    done = workspace.make("check", option, "PROMPT=Once x=y upon = a")

    assert done.returncode == 2
    said = f"{option.partition('=')[0]}: no such option; make help shows them, in capitals as in EX=1.  Stop.\n"
    assert done.stdout.endswith(said) and done.stdout.count("\n") == 1, done.stdout


def test_reset_keeps_every_attempt(workspace: Workspace) -> None:
    path = workspace.top / "exercises" / FILE
    starter = path.read_text()

    assert "is the starter already" in workspace.make("reset", "EX=1").stdout
    for work in ("first", "second", "third"):
        path.write_text(work)
        said = workspace.make("reset", "EX=1").stdout
        kept = workspace.top / said.strip().rpartition("the old file is ")[2]
        assert kept.read_text() == work and path.read_text() == starter, said
    assert len(list((workspace.top / "attempts").iterdir())) == 3
    path.unlink()
    assert "is the starter again" in workspace.make("reset", "EX=1").stdout
    assert path.read_text() == starter


def test_without_answers_and_banks_own_tests_are_judged_later(workspace: Workspace) -> None:
    (workspace.top / "exercises" / FILE).write_text(workspace.answer(FILE))
    shutil.rmtree(workspace.top / "answers")
    for folder in (workspace.top / "checks").glob("ex*/*"):
        if folder.name in ("mistakes", "variants"):
            shutil.rmtree(folder)

    done = workspace.make("check", "EX=1")

    assert done.returncode == 0, done.stdout
    assert re.search(r"ex01\s+Multi-head attention\s+done\s+45/50", done.stdout)
    assert re.search(r"\? 1\.9  Write your own test +judged when you push", done.stdout), done.stdout


def test_cold_gives_the_same_verdict(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where forking is not safe: one worker for the code, interpreters that run own tests one after the other."""
    text = workspace.answer(FILE).replace("masked_fill(mask == 0", "masked_fill(mask != 0", 1)
    at = text.index("    torch.manual_seed", text.index("def test_"))
    (workspace.top / "exercises" / FILE).write_text(f"import os\n{text[:at]}    print('mine')\n    return\n{text[at:]}")

    warm, again = (workspace.make("check", "EX=1").stdout for _ in range(2))  # The second knows the own test.
    monkeypatch.setenv("EXERCISES_COLD", "1")
    (workspace.top / "build" / "verdicts.json").unlink()
    cold = workspace.make("check", "EX=1").stdout

    assert cold == warm == again and "1.9 test_" in cold, f"{cold}\n{warm}\n{again}"
    # Through a link to the environment: torch's files have another name then than the one that they lie under.
    linked = workspace.top.parent / "linked"
    linked.symlink_to(sys.prefix)
    monkeypatch.setattr(sys, "executable", str(linked / "bin" / "python"))
    through = workspace.make("check", "EX=1", "SUBMISSION=answers").stdout
    assert "50/50" in through, through


def test_the_board_needs_no_file_and_its_reader_may_leave_early(workspace: Workspace) -> None:
    for path in (workspace.top / "exercises").iterdir():
        path.unlink()
    command = " ".join(f"'{word}'" for word in workspace.make_command("-s", "board", "EX=1"))

    done = workspace.make("board", "EX=1")
    cut = subprocess.run(f"{command} | head -1", shell=True, cwd=workspace.top, capture_output=True, text=True)

    assert done.returncode == 0 and re.search(r"ex01\s+Multi-head attention\s+not started", done.stdout), done.stdout
    assert cut.stdout.startswith("ex01") and "Traceback" not in cut.stderr and "INTERNAL" not in cut.stderr, cut


def test_help_names_every_target(workspace: Workspace) -> None:
    said = workspace.make().stdout
    targets = re.findall(r"^\.PHONY: (\S+)$", Path(workspace.top, "Makefile").read_text(), re.MULTILINE)

    assert targets and all(f"make {target} " in said for target in targets), said


def test_plain_pytest_judges_another_submission(workspace: Workspace) -> None:
    check = f"checks/{node_id(EX01, 'test_scores_by_hand')}"
    command = [sys.executable, "-W", "ignore", "-m", "pytest", check, "--submission=answers"]

    done = subprocess.run(command, cwd=workspace.top, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


def test_a_starter_with_other_line_ends_is_no_attempt(workspace: Workspace) -> None:
    path = workspace.top / "exercises" / FILE
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))

    assert "is the starter already" in workspace.make("reset", f"EX=exercises/{FILE}").stdout
    assert not (workspace.top / "attempts").exists()


def test_the_difference_names_lines_and_functions() -> None:
    answer = (
        "import os\n\n\nclass A:\n    def f(self) -> int:\n        one = 1\n        two = 2\n        return one + two\n"
    )
    theirs = '"""Text.\n"""\n' + answer.replace("two = 2", "two = 3")

    lines = difference(theirs, answer, FILE)

    assert lines[2] == "@@ -6,5 +4,5 @@ def f(self) -> int", lines
    assert theirs.splitlines()[6 - 1] == answer.splitlines()[4 - 1] == lines[3].strip()


def test_the_answer_waits_until_the_exercise_is_done(workspace: Workspace) -> None:
    refused = workspace.make("answer", "EX=1")
    forced = workspace.make("answer", "EX=1", "FORCE=1")
    (workspace.top / "exercises" / FILE).write_text(workspace.answer(FILE) + "# done\n")
    workspace.make("check", "EX=1")
    shown = workspace.make("answer", "EX=1")

    assert refused.returncode == 2 and "make answer EX=1 FORCE=1" in refused.stdout and "---" not in refused.stdout
    assert f"--- exercises/{FILE}" in forced.stdout and "+        self.num_heads = num_heads" in forced.stdout
    assert "# ex01 Multi-head attention" in forced.stdout
    assert shown.returncode == 0 and "-# done" in shown.stdout, shown.stdout
